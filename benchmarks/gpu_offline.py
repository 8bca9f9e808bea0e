"""The Triton kernels built for GPUs that need not be present, and a model's prediction: nothing is measured on a GPU.

`--with sm_80` and `--with sm_120` add targets to sm_90. The launches are those of a training step, of an evaluation and
of a folded one of sdt_8_384, sdt_8_512 and sdt_v3_19m, recorded on tensors without data. Rows go to
results/gpu_offline/TARGET.csv.
"""

from __future__ import annotations

import contextlib
import csv
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import offline
import torch
import torch.nn.functional as F
import triton
from harness import RESULTS, Bench
from offline import GPUS, Launch, Work
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sdt_blocks import create_model, optimize_for_inference
from sdt_blocks.inference import Bytes, plan
from sdt_blocks.ops import bits, dense, dispatch, norm_lif
from sdt_blocks.ops import bytes as ops_of_bytes
from sdt_blocks.ops.attention import attend_backward_op, attend_op
from sdt_blocks.ops.levels import levels_backward_op, levels_op, norm_levels_backward_op, norm_levels_op
from sdt_blocks.ops.lif import lif_backward_op, lif_op
from sdt_blocks.ops.norm_lif import channel_statistics
from sdt_blocks.ops.pool import max_pool_backward_op, max_pool_op
from sdt_blocks.ops.triton import training

ALLOCATORS = ["default"]
DEVICES = ["cpu"]
COLUMNS = [
    *("target", "gpu", "model", "batch", "run", "dtype", "order", "kernel", "shape", "launches", "registers"),
    *("spilled", "shared", "occupancy", "accesses", "instructions", "memory", "integer", "float", "special", "control"),
    *("divisions", "barriers", "bytes", "cached", "bound", "share", "microseconds"),
]
TARGETS = [f"sm_{capability}" for capability in GPUS]
MODELS = ("sdt_8_384", "sdt_8_512", "sdt_v3_19m")
BATCH = 32
OPS = {
    op.name: op
    for op in (
        *(lif_op, lif_backward_op, channel_statistics, max_pool_op, max_pool_backward_op),
        *(attend_op, attend_backward_op),
        *(levels_op, levels_backward_op, norm_levels_op, norm_levels_backward_op),
    )
}
LAUNCH_NOTHING = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "unbind", "split"),
    *("set_", "detach", "promote_types", "convolution", "convolution_backward"),
}
SEVERAL = {"aten::native_batch_norm": 3, "aten::native_batch_norm_backward": 2}
"""Kernels of one call on CUDA: statistics, their update and the normalization; sums and the gradient."""
Row = dict[str, Any]


def run(bench: Bench) -> None:
    """Build, predict and write; `bench` names the targets besides sm_90."""
    for target in ["sm_90", *(name for name in TARGETS if name in bench.options and name != "sm_90")]:
        capability = int(target.removeprefix("sm_"))
        rows = [row for name in MODELS for row in of_model(name, capability)]
        rows += of_spikingjelly(capability)
        path = RESULTS / "gpu_offline" / f"{target}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        for line in summary(rows):
            print(f"  {line}", flush=True)
    path = RESULTS / "gpu_offline/launches.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["dtype", "order", "direction", "kernel", "launches"])
        for dtype in (torch.float32, torch.bfloat16):
            for order in ("channels-first", "channels-last"):
                name = str(dtype).removeprefix("torch.")
                for direction, found in launches_of_block(dtype, order == "channels-last").items():
                    writer.writerows([name, order, direction, *item] for item in found.items())
                    print(f"  a training block, {name}, {order}, {direction}: {sum(found.values())} launches")


def of_model(name: str, capability: int) -> list[Row]:
    """A row for every distinct launch of the model's training step and evaluation."""
    rows = []
    for training_step in (True, False):
        for dtype in (torch.float32, torch.bfloat16):
            for channels_last in (False, True):
                launches = record(name, dtype, channels_last, training_step)
                settings = {
                    "model": name,
                    "batch": BATCH,
                    "run": "training step" if training_step else "evaluation",
                    "dtype": str(dtype).removeprefix("torch."),
                    "order": "channels-last" if channels_last else "channels-first",
                }
                rows += distinct(launches, capability, settings)
    for dtype in (torch.float32, torch.bfloat16):
        settings = {"model": name, "batch": BATCH, "run": "folded evaluation", "order": "channels-last"}
        settings["dtype"] = str(dtype).removeprefix("torch.")
        launches, products = record_folded(name, dtype)
        rows += distinct(launches, capability, settings)
        rows += of_library(products, capability, settings)
    launches, products = record_bytes(name)
    settings["dtype"] = "int8"
    rows += distinct(launches, capability, settings)
    # The layers with real inputs.
    rows += of_library(products, capability, settings)
    return rows


def record_folded(name: str, dtype: torch.dtype) -> tuple[list[Launch], list[Convolution]]:
    """The launches of one evaluation of a model after `optimize_for_inference`, and the library's products."""
    of_triton = mock.patch.object(dense, "by_triton", lambda x: True)
    with ours_run() as (launches, bodies), of_triton, torch.device("meta"):
        model = create_model(name).eval()
        optimize_for_inference(model, dtype, paths="convolution")(torch.empty(BATCH, 3, 224, 224))
    return launches, bodies.convolutions


def record_bytes(name: str) -> tuple[list[Launch], list[Convolution]]:
    """The same in 8 bits."""
    fast = Bytes(plan(create_model(name).eval()))
    # Weights are rounded where they are, and then only their shapes are needed; a form does not let itself be moved.
    nn.Module._apply(fast, lambda tensor: tensor.to("meta"))
    fast.made_on = torch.device("meta")
    of_triton = mock.patch.object(dense, "by_triton", lambda x: True)
    with ours_run() as (launches, bodies), of_triton, mock.patch.object(ops_of_bytes, "by_triton", lambda x: True):
        fast(torch.empty(BATCH, 3, 224, 224, device="meta"))
    return launches, bodies.convolutions


class Convolution(NamedTuple):
    """A product of the library: the shape of its result, its multiplications, its bytes read and written once."""

    shape: tuple[int, ...]
    products: int
    moved: int
    dtype: str


def of_library(products: list[Convolution], capability: int, settings: Row) -> list[Row]:
    """One row for equal products, under a run of their own: their shortest time by memory and tensor cores."""
    gpu, rows = GPUS[capability], []
    for one, number in Counter(products).items():
        times = {"memory": one.moved / gpu.copy}
        times["tensor cores"] = 2 * one.products / (gpu.tensor[one.dtype] * offline.REACHED)
        bound = max(times, key=lambda name: times[name])
        rows.append(
            {
                "target": f"sm_{capability}",
                "gpu": gpu.name,
                **settings,
                "run": f"{settings['run']}, the library's products",
                "kernel": "convolution",
                "shape": "x".join(map(str, one.shape)),
                "launches": number,
                "bytes": f"{one.moved / math.prod(one.shape):.2f}",
                "bound": bound,
                "share": f"{times['memory'] / times[bound]:.3f}",
                "microseconds": f"{times[bound] * 1e6:.1f}",
            }
        )
    return rows


def record(name: str, dtype: torch.dtype, channels_last: bool, training_step: bool) -> list[Launch]:
    """The launches of one step of a model, in their order."""
    with FakeTensorMode(allow_non_fake_inputs=True), ours_run() as (launches, _):
        # Drawing weights depends on values, which do not exist here.
        with mock.patch.object(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor):
            model = create_model(name).train(training_step)
        # All tensors made of the images have the images' memory order.
        order = torch.channels_last if channels_last else torch.contiguous_format
        images = torch.empty(BATCH, 3, 224, 224).contiguous(memory_format=order)
        with torch.set_grad_enabled(training_step), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(images)
        if training_step:
            F.cross_entropy(logits.float(), torch.zeros(BATCH, dtype=torch.long)).backward()
    return launches


@contextlib.contextmanager
def ours_run() -> Iterator[tuple[list[Launch], _Bodies]]:
    """Within it, the kernels' launchers are called for tensors without data, as if these were on an H100.

    Yields their launches, and the operations of PyTorch's own ops.
    """
    of_h100 = mock.patch.object(training, "_programs", lambda device: training._PROGRAMS * GPUS[90].multiprocessors)
    with (
        mock.patch.object(dispatch, "_backend", lambda device, dtype: "triton"),
        mock.patch.object(bits, "_holds_all", _holds_all),
        mock.patch.object(norm_lif, "watched", lambda: False),
        of_h100 if hasattr(training, "_programs") else contextlib.nullcontext(),
        offline.recorded() as launches,
        _Bodies() as bodies,
    ):
        yield launches, bodies


class _Bodies(TorchDispatchMode):
    """Runs the bodies of our ops, of which tensors without data otherwise only see the shapes of the results.

    It also counts the launches of PyTorch's own ops, except convolutions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.convolutions: list[Convolution] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in OPS:
            with self:
                return OPS[name].compute(*args, **(kwargs or {}))
        if not name.startswith("prim::") and name.removeprefix("aten::") not in LAUNCH_NOTHING and not func.is_view:
            self.launches[name.removeprefix("aten::")] += SEVERAL.get(name, 1)
        result = func(*args, **(kwargs or {}))
        if name == "aten::convolution":
            x, weight = args[:2]
            moved = sum(tensor.numel() * tensor.element_size() for tensor in (x, weight, result))
            dtype = str(x.dtype).removeprefix("torch.")
            self.convolutions.append(Convolution(tuple(result.shape), result.numel() * weight[0].numel(), moved, dtype))
        return result


def launches_of_block(dtype: torch.dtype, channels_last: bool) -> dict[str, dict[str, int]]:
    """Number of kernels that a training block of sdt_8_384 launches forward and backward, by kernel or PyTorch op."""
    order = (0, 1, 3, 4, 2) if channels_last else (0, 1, 2, 3, 4)
    shape = [(4, BATCH, 384, 14, 14)[axis] for axis in order]
    with FakeTensorMode(allow_non_fake_inputs=True), ours_run() as (launches, bodies):
        with mock.patch.object(torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor):
            block = create_model("sdt_8_384").train().blocks[0]
        x = torch.empty(shape, dtype=dtype, requires_grad=True)
        found = []
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            launches.clear(), bodies.launches.clear()
            result = block(x.permute([order.index(axis) for axis in range(5)]))
            found.append(Counter(launch.name for launch in launches) + bodies.launches)
            grad = torch.empty_like(result)
            launches.clear(), bodies.launches.clear()
            # As in a backward pass without an existing gradient: autograd then keeps the new one without a copy,
            # except for tensors that a noted launch still holds.
            torch.autograd.grad(result, [x, *block.parameters()], grad)
            found.append(Counter(launch.name for launch in launches) + bodies.launches)
    return {"forward": dict(found[0]), "backward": dict(found[1])}


def _holds_all(tensor: Tensor, spikes: Tensor) -> bool:
    """`bits._holds_all` by the storage: tensors without data have no address."""
    same = tensor.untyped_storage()._cdata == spikes.untyped_storage()._cdata and tensor.dtype == spikes.dtype
    return same and tensor.numel() == spikes.numel() and bits.gapless(tensor)


def distinct(launches: list[Launch], capability: int, settings: Row) -> list[Row]:
    """A row for launches of equal build and size, with their number."""
    counts: Counter[tuple[Any, ...]] = Counter()
    first: dict[tuple[Any, ...], Launch] = {}
    for launch in launches:
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in launch.tensors().items())
        of = (*offline.key(launch, capability), launch.grid, shapes)
        counts[of] += 1
        first.setdefault(of, launch)
    return [row(launch, work(launch), capability, settings, counts[of]) for of, launch in first.items()]


def work(launch: Launch) -> Work:
    """Elements, bytes and rounds of a launch of ours, from its tensors."""
    tensors, arguments = launch.tensors(), launch.arguments
    scratch = tensors.pop("scratch", None)
    elements: int = max(tensor.numel() for tensor in tensors.values())
    # A frame that is shown at every step is one in memory.
    held = (math.prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride) for t in tensors.values())
    moved = sum(n * tensor.element_size() for n, tensor in zip(held, tensors.values(), strict=True))
    inputs = arguments.get("N", 1)
    elements *= inputs
    if launch.name == "combine":
        moved += inputs * arguments["grad"].numel() * arguments["grad"].element_size()
    if arguments.get("MASK"):
        # The spikes are read for k and for v.
        moved += arguments["codes"].numel()
    steps = arguments.get("STEPS", 1)
    if launch.name == "spike_layer_kernel":
        return of_spike_layer(launch, moved)
    if scratch is not None:
        # Membranes are written once and read twice; the input is read again, unless it is one frame.
        again = 0 if arguments["REPEAT"] else arguments["x"].element_size()
        elements = arguments["size"] * steps
        return Work(elements, moved, elements * (3 * scratch.element_size() + again), steps, training._PROGRAMS)
    if "per" in arguments:
        return Work(elements, moved, trips=arguments["per"] // arguments["RUNS"])
    return Work(elements, moved, trips=arguments.get("rounds", steps))


def of_spike_layer(launch: Launch, moved: int) -> Work:
    """Every program reads its inputs of all steps, and its weights once for the steps that are summed together."""
    arguments = launch.arguments
    out, *_ = arguments["weight"].shape
    inputs = arguments["weight"][0].numel()
    elements = arguments["STEPS"] * arguments["positions"] * out
    a, b = arguments["A"] * arguments["STEPS"], arguments["B"] * arguments["rounds"]
    return Work(elements, moved, launch.programs * (a + b) * inputs, products=elements * inputs)


def row(launch: Launch, of: Work, capability: int, settings: Row, number: int) -> Row:
    gpu, binary = GPUS[capability], offline.build(launch, capability)
    counts = offline.executed(launch, binary, of.trips, 1 if of.persistent else None)
    found = offline.predict(launch, of, binary, gpu, counts)
    offline.check(launch, of, binary, found)
    kinds = offline.kinds(found.counts)
    shape = max((tensor.shape for tensor in launch.tensors().values()), key=math.prod)
    return {
        "target": f"sm_{capability}",
        "gpu": gpu.name,
        **settings,
        "kernel": title(launch),
        "shape": "x".join(map(str, shape)),
        "launches": number,
        "registers": binary.registers,
        "spilled": binary.spilled,
        "shared": binary.shared,
        "occupancy": f"{offline.resident(binary, gpu) * binary.warps / gpu.warps:.2f}",
        "accesses": " ".join(f"{width}:{count}" for width, count in sorted(offline.accesses(found.counts).items())),
        "instructions": f"{sum(kinds.values()) * found.per_element:.1f}",
        **{name: f"{kinds[name] * found.per_element:.2f}" for name in (*offline.KINDS, "integer")},
        "divisions": found.divisions,
        "barriers": sum(count for op, count in found.counts.items() if op.startswith("BAR")),
        "bytes": f"{of.moved / of.elements:.2f}",
        "cached": f"{of.cached / of.elements:.2f}",
        "bound": found.bound,
        "share": f"{found.share:.3f}",
        "microseconds": f"{found.seconds * 1e6:.1f}",
    }


def title(launch: Launch) -> str:
    """A kernel's name, with its arguments that describe the neuron."""
    flags = {"AFFINE": "norm", "MASK": "mask", "REPEAT": "one frame", "KEEP": "kept"}
    told = [word for name, word in flags.items() if launch.arguments.get(name)]
    return launch.name + (f" ({', '.join(told)})" if told else "")


def of_spikingjelly(capability: int) -> list[Row]:
    """SpikingJelly's Triton neurons at the size of a block's, float32 and its opt-in bfloat16; none if absent."""
    try:
        from spikingjelly._ops.lif import triton as theirs
        from spikingjelly._ops.lif import triton_precision as reduced
    except ImportError:
        return []
    steps, neurons = 4, BATCH * 384 * 14 * 14
    rows: list[Row] = []
    with FakeTensorMode():
        x, v = torch.empty(steps, neurons), torch.empty(neurons)
        half = x.bfloat16()
        number = {"tau": 2.0, "threshold": 1.0, "reset": 0.0}
        flags = {"T": steps, "DECAY_INPUT": True, "SOFT_RESET": False, "STORE_V_SEQ": False, "BLOCK": 256}
        forward = {"x_ptr": x, "v_ptr": v, "spikes_ptr": x.clone(), "voltages_ptr": v.clone(), "charged_ptr": x.clone()}
        backward = {"gs_ptr": x, "gv_ptr": v, "h_ptr": x.clone(), "gx_ptr": x.clone(), "gv_init_ptr": v.clone()}
        backward |= {"alpha": 4.0, "DETACH_RESET": True, "SURROGATE": 0, "UNROLL": steps}
        grid, options = (triton.cdiv(neurons, 256),), {"enable_fp_fusion": False}
        plain = {"N": neurons, "LAYOUT": None, **number, **flags}
        launches = [
            Launch(theirs._forward_kernel, {**plain, **forward}, grid, options),
            Launch(theirs._backward_kernel, {**plain, **backward}, grid, options),
        ]
        number = {"tau": 2.0, "v_threshold": 1.0, "v_reset": 0.0, "decay_input": True, "soft_reset": False}
        number |= {"T": steps, "NCL": neurons, "BLOCK_NCL": 256, "compute_dtype": triton.language.bfloat16}
        number |= {"store_v_seq": False, "BLOCK_MINOR": 1, "SIZES": (), "STRIDES": ()}
        first = v.bfloat16()
        forward = {"x_seq_ptr": half, "v_init_ptr": first, "s_seq_ptr": half.clone(), "h_seq_ptr": half.clone()}
        forward |= {"v_seq_ptr": first.clone()}
        backward = {"grad_s_seq_ptr": half, "grad_v_seq_ptr": first, "h_seq_ptr": half.clone()}
        backward |= {"grad_x_seq_ptr": half.clone(), "grad_v_init_ptr": first.clone(), "sg_alpha": 4.0}
        backward |= {"sg_triton_id": 0, "detach_reset": True}
        half_forward = reduced._multistep_lif_forward_kernel_static.fn
        half_backward = reduced._multistep_lif_backward_kernel_static.fn
        launches += [
            Launch(half_forward, {**number, **forward, "save_intermediates": True}, grid),
            Launch(half_backward, {**number, **backward}, grid),
        ]
        for launch, dtype in zip(launches, ("float32", "float32", "bfloat16", "bfloat16"), strict=True):
            tensors = launch.tensors().values()
            moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            settings = {"model": "SpikingJelly's LIF", "batch": BATCH, "dtype": dtype, "order": "any"}
            settings["run"] = "training step"
            rows.append(row(launch, Work(steps * neurons, moved, trips=steps), capability, settings, 1))
    return rows


def summary(rows: list[Row]) -> list[str]:
    """Milliseconds of all launches of a step, and the ratio to the time of copying their bytes."""
    lines = []
    for name, which, dtype, order in dict.fromkeys((r["model"], r["run"], r["dtype"], r["order"]) for r in rows):
        found = [r for r in rows if (r["model"], r["run"], r["dtype"], r["order"]) == (name, which, dtype, order)]
        time = sum(float(r["microseconds"]) * r["launches"] for r in found)
        ideal = sum(float(r["microseconds"]) * float(r["share"]) * r["launches"] for r in found)
        launches = sum(r["launches"] for r in found)
        lines.append(
            f"{found[0]['target']} {name} {which} {dtype} {order}: {launches} launches, predicted {time / 1e3:.2f} ms, "
            f"{time / ideal:.2f} of their bytes; lowest share {min(float(r['share']) for r in found):.2f}"
        )
    return lines
