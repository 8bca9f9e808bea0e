"""Golden vectors, kernels held to their own memory and to write all of it, and a worker's share of the cores."""

from __future__ import annotations

import os

# Read when Triton is imported, and torch may import it: without a GPU its kernels run in its interpreter.
os.environ.setdefault("TRITON_INTERPRET", "0" if os.path.exists("/dev/nvidiactl") else "1")
# Read when torch is imported, also by the processes that tests start: more threads than cores wait for each other.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import copy
import functools
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import sdt_blocks
import sdt_blocks.analysis
from sdt_blocks.ops.dispatch import forced

INTERPRETED = os.environ["TRITON_INTERPRET"] == "1" and importlib.util.find_spec("triton") is not None
"""Whether Triton's kernels run on CPU tensors, and on no others."""
# Where there is a GPU, convolutions are held to the same bounds as on a CPU.
torch.backends.cudnn.allow_tf32 = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A GPU's Triton has no interpreter for the CPU tensors of tests that are not marked for it."""
    for item in items:
        paths = getattr(item, "callspec", None)
        if not INTERPRETED and paths and "triton" in paths.params.values() and "cuda" not in item.keywords:
            item.add_marker(pytest.mark.skip(reason="CPU tensors, and Triton is not interpreted here"))


@pytest.fixture(autouse=True, scope="session")
def _a_launch_is_prepared_once():
    """Triton's interpreter prepares a module for each call of a function in it, a third of its time; once will do."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    prepared: set[int] = set()

    def launch(executor, *args, original=interpreter.GridExecutor.__call__, **kwargs):
        prepared.clear()
        return original(executor, *args, **kwargs)

    def prepare(function, original=interpreter._patch_lang):
        module = id(function.__globals__)
        if module not in prepared:
            prepared.add(module)
            return original(function)
        return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", launch)
        patch.setattr(interpreter, "_patch_lang", prepare)
        yield


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """The same random numbers for a test and its fixtures, whatever ran before it in the same process."""
    torch.manual_seed(0)


GOLDEN = Path(__file__).with_name("golden")
GOLDEN_NAMES = ("sdt_lif_static_64", "sdt_plif_static_32", "sdt_lif_dvs_64", "sdt_lif_dvsmode_tet_32")


@dataclass
class Golden:
    """One golden file: tensors by group, and a fresh model with its weights."""

    name: str
    config: dict
    firing_rates: dict[str, list[float]]
    tensors: dict[str, Tensor]

    def group(self, prefix: str) -> dict[str, Tensor]:
        return {key.split(".", 1)[1]: value for key, value in self.tensors.items() if key.startswith(f"{prefix}.")}

    def model(self, **overrides):
        c = self.config
        if c.get("family") in ("base", "large"):
            return self._of_levels(overrides)
        if "embed_dims" in c:
            options = {
                "dims": c["embed_dims"],
                "depths": c["depths"],
                "num_heads": c["num_heads"],
                "in_channels": c["in_channels"],
                "num_classes": c["num_classes"],
                "time_steps": c["T"],
                "distillation": c["kd"],
            }
            return self._filled(sdt_blocks.MetaSpikeFormer(**{**options, **overrides}))
        if "family" in c:
            return self._of_spike_level(overrides)
        options = {
            "depth": c["depth"],
            "dim": c["dim"],
            "num_heads": c["num_heads"],
            "mlp_ratio": c["mlp_ratio"],
            "in_channels": c["in_channels"],
            "num_classes": c["num_classes"],
            "time_steps": c["T"],
            "pooling": c["pooling_stat"],
            "neuron": c["spike_mode"],
            "event_pooling": c["dvs_mode"],
            "per_step": c["TET"],
        }
        return self._filled(sdt_blocks.SpikeDrivenTransformer(**{**options, **overrides}))

    def check_step(self, model: nn.Module, without_effect: re.Pattern[str]) -> None:
        """Gradients and running statistics after a training step are those of the released code."""
        expected = sdt_blocks.convert_released_state_dict({**self.group("state"), **self.group("grad")})
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            if without_effect.search(name):
                # Zero in theory, noise in fact.
                assert parameter.grad.abs().max() < 1e-5 and expected[name].abs().max() < 1e-5, name
            else:
                assert (parameter.grad - expected[name]).norm() < 1e-4 * expected[name].norm(), name
        after, state = {**self.group("state"), **self.group("after_step")}, model.state_dict()
        for name, value in sdt_blocks.convert_released_state_dict(after).items():
            if "running" in name:
                torch.testing.assert_close(state[name], value, atol=1e-6, rtol=1e-5, msg=name)

    def _of_levels(self, overrides):
        c = self.config
        names = {"dims": "embed_dims", "levels": "D", "time_steps": "T"}
        names |= {name: name for name in ("depths", "num_heads", "in_channels", "num_classes")}
        options = {ours: c[theirs] for ours, theirs in names.items()}
        if c["family"] == "base":
            return self._filled(sdt_blocks.ESpikeFormer(**{**options, **overrides}))
        large = {"rep_conv": c["rep_conv"], "distillation": c["kd"]}
        return self._filled(sdt_blocks.ESpikeFormerLarge(**{**options, **large, **overrides}))

    def _of_spike_level(self, overrides):
        c = self.config
        options = {"dim": c["dim"], "num_heads": c["num_heads"], "mlp_ratio": c["mlp_ratio"], "time_steps": c["T"]}
        options |= {"in_channels": c["in_channels"], "num_classes": c["num_classes"]}
        cifar = c["variant"] == "cifar"
        if c["family"] == "spikformer":
            options |= {"depth": c["depth"], "pooling": "0011" if cifar else "1111"}
            return self._filled(sdt_blocks.Spikformer(**{**options, "qkv_bias": cifar, **overrides}))
        options |= {"depths": (1, 1 if cifar else 2, 2), "form": c["variant"]}
        return self._filled(sdt_blocks.QKFormer(**{**options, **overrides}))

    def _filled(self, model: nn.Module) -> nn.Module:
        model.load_state_dict(sdt_blocks.convert_released_state_dict(self.group("state")))
        return model.eval()


def load_golden(name: str) -> Golden:
    path = GOLDEN / f"{name}.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for layer, shape in json.loads(metadata["hook_shapes"]).items():
        bits = np.unpackbits(tensors[f"hook.{layer}"].numpy(), count=int(np.prod(shape)))
        tensors[f"hook.{layer}"] = torch.from_numpy(bits).view(shape)
    for layer, shape in json.loads(metadata.get("level_shapes", "{}")).items():
        pairs = tensors[f"hook.{layer}"]
        levels = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten()
        tensors[f"hook.{layer}"] = levels[: int(np.prod(shape))].view(shape)
    return Golden(name, json.loads(metadata["config"]), json.loads(metadata["firing_rates"]), tensors)


@pytest.fixture(params=GOLDEN_NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    """Each of the four golden files in turn."""
    return load_golden(request.param)


@pytest.fixture
def named_golden() -> Callable[[str], Golden]:
    """Gives the golden file of a name."""
    return load_golden


@pytest.fixture
def static_golden() -> Golden:
    """The golden file with images, pooling 1111 and LIF."""
    return load_golden("sdt_lif_static_64")


@pytest.fixture
def v2_golden() -> Golden:
    """The golden file of Meta-SpikeFormer: images, T = 2, every neuron alive."""
    return load_golden("sdtv2_grads_T2_64")


@pytest.fixture
def as_printed() -> Callable[[str, str], None]:
    """Holds what a page shows to what was printed: line by line the same words, whatever numbers stand there.

    A line `...` stands for any lines.
    """

    def masked(text: str) -> list[str]:
        numbers = re.sub(r"(?<![\w.])[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?", "#", text.strip())
        return [" ".join(line.split()) for line in numbers.splitlines()]

    def check(shown: str, printed: str) -> None:
        lines = [r"(.*\n)*?" if line == "..." else re.escape(line) + "\n" for line in masked(shown)]
        assert re.fullmatch("".join(lines), "\n".join([*masked(printed), ""])), f"shown:\n{shown}\nprinted:\n{printed}"

    return check


@pytest.fixture
def released_file() -> Path:
    """A checkpoint in the released pickle format, with the weights of `static_golden`."""
    return GOLDEN / "released_format.pth.tar"


@pytest.fixture
def firing_model() -> Callable[..., sdt_blocks.SpikeDrivenTransformer]:
    """Makes a small model with random weights in eval mode, its norms fitted to images, so that every layer fires."""

    @torch.no_grad()
    def make(images: Tensor | None = None, **options) -> sdt_blocks.SpikeDrivenTransformer:
        torch.manual_seed(0)
        options = {"depth": 2, "dim": 32, "num_classes": 5, "pooling": "0011", **options}
        model = sdt_blocks.SpikeDrivenTransformer(**options)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
                nn.init.uniform_(module.weight, 0.6, 1.4)
                nn.init.normal_(module.bias, 0.0, 0.2)
            elif isinstance(module, sdt_blocks.ParametricLIF):
                nn.init.uniform_(module.w, -0.5, 0.5)
        model.train()(torch.rand(4, model.in_channels, 16, 16) if images is None else images)
        # Means over many tokens would leave the head silent.
        model.patch.position.norm.bias += 1
        return model.eval()

    return make


SMALL = {
    "sdt_2_256": {"dim": 32},
    "sdt_v2_15m": {"dims": (8, 16, 32, 32), "depths": (1, 1, 1, 1, 1)},
    "sdt_v3_5m": {"dims": (8, 16, 32, 32), "depths": (1, 1, 1, 1, 1)},
    "sdt_v3_83m": {"dims": (8, 16, 32), "depths": (1, 1, 1, 2)},
    "spikformer_4_384": {"dim": 32, "depth": 2, "num_heads": 4},
    "qkformer_4_384": {"dim": 32, "depths": (1, 1, 1), "num_heads": 4},
}
"""A variant of every family, and what makes it small."""


@dataclass
class Small:
    """A small model of one family, in eval mode, whose neurons fire at the images."""

    name: str
    options: dict
    model: nn.Module
    images: Tensor


@pytest.fixture
def small_names() -> list[str]:
    """A variant of every family."""
    return list(SMALL)


@functools.cache
def _small(name: str) -> Small:
    torch.manual_seed(0)
    options, images = {**SMALL[name], "num_classes": 5, "time_steps": 2}, torch.rand(4, 3, 32, 32)
    model = sdt_blocks.create_model(name, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, 0.5, 0.5)
    model.eval()
    with forced("reference"), torch.no_grad():  # whichever backend the first test of it asks for
        sdt_blocks.calibrate_norms(model, images)
        assert sdt_blocks.analysis.firing_rates(model, images).mean > 0.01 and model(images).std(0).min() > 1e-4
    return Small(name, options, model, images)


@pytest.fixture
def make_small() -> Callable[[str], Small]:
    """Gives the small model of a variant."""
    return lambda name: copy.deepcopy(_small(name))


@pytest.fixture(params=SMALL)
def small(request: pytest.FixtureRequest) -> Small:
    """Each family in turn."""
    return copy.deepcopy(_small(request.param))


@pytest.fixture
def large_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's programs do the work of 64, so that a whole network takes its interpreter seconds, not minutes."""
    if not INTERPRETED:
        yield
        return
    names = ("tiles", "attention", "dense", "levels", "pool", "training")
    modules = [importlib.import_module(f"sdt_blocks.ops.triton.{name}") for name in names]
    caches = [cached for module in modules for cached in vars(module).values() if hasattr(cached, "cache_clear")]
    for module in modules:
        monkeypatch.setattr(module, "THREADS", 64 * module.THREADS)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.fixture
def same_on_every_path(
    monkeypatch: pytest.MonkeyPatch, large_programs: None
) -> Callable[[nn.Module, Tensor, Tensor], None]:
    """Takes a training step of a model by each backend, and holds it to the reference: logits, gradients, statistics.

    Models show Triton's kernels in its interpreter too.
    """

    def check(model: nn.Module, x: Tensor, target: Tensor) -> None:
        results = []
        for path in ("reference", "compiled", *(["triton"] if INTERPRETED else [])):
            monkeypatch.setenv("SDT_BLOCKS_BACKEND", path)
            trained = copy.deepcopy(model).train()
            logits = trained(x)
            nn.functional.cross_entropy(logits, target).backward()
            gradients = {name: parameter.grad for name, parameter in trained.named_parameters()}
            results.append((logits, gradients, trained.state_dict()))
            expected_logits, expected_gradients, expected_state = results[0]
            least = 1e-3 * max(gradient.norm() for gradient in expected_gradients.values())
            assert next(iter(gradients.values())).any(), "the gradient reaches the first layer"
            for name, gradient in gradients.items():
                expected = expected_gradients[name]
                assert (gradient - expected).norm() <= 1e-3 * max(expected.norm(), least), (path, name)
            torch.testing.assert_close(logits, expected_logits, atol=1e-5, rtol=1e-5)
            for name, value in trained.state_dict().items():
                torch.testing.assert_close(value, expected_state[name], atol=1e-5, rtol=1e-5, msg=f"{path}: {name}")

    return check


@pytest.fixture
def on_a_grid() -> Callable[[nn.Module], nn.Module]:
    """Rounds weights so that sums are exact: a library may add in another order for other numbers of rows."""

    @torch.no_grad()
    def rounded(model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.mul_(1024).round_().div_(1024)
        return model

    return rounded


@pytest.fixture(autouse=True)
def _uninitialized_memory_is_nan():
    """`torch.empty` gives NaN, so that a result nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(autouse=True, scope="session")
def _kernels_keep_to_their_memory() -> Iterator[None]:
    """Triton's interpreter refuses what a GPU may not survive, or not twice alike.

    That is to read or write outside the tensors that a kernel is given, and to read or write, in one program of a
    launch, what another one writes: on a GPU these run in any order.
    """
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    memory = interpreter._interpreter
    spans: list[tuple[int, int]] = []
    touched: list[tuple[tuple[int, ...], bool, np.ndarray]] = []

    def span(x: Tensor) -> tuple[int, int]:
        """The addresses of the first element and behind the last."""
        last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()

    def arguments(executor, *given, original=interpreter.GridExecutor._init_args_hst):
        args, kwargs = original(executor, *given)
        spans[:] = [span(x) for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.numel()]
        touched.clear()
        return args, kwargs

    def finish(executor, *given, original=interpreter.GridExecutor._restore_args_dev):
        programs = {program: number for number, program in enumerate(dict.fromkeys(program for program, *_ in touched))}
        written = [at for _, writes, at in touched if writes]
        if len(programs) > 1 and written:
            at = np.concatenate([at for *_, at in touched])
            of = np.concatenate([np.full(at.size, programs[program]) for program, _, at in touched])
            shared = np.isin(at, np.concatenate(written))
            at, of = at[shared], of[shared]
            order = np.lexsort((of, at))
            at, of = at[order], of[order]
            assert not ((at[1:] == at[:-1]) & (of[1:] != of[:-1])).any(), "two programs share what one of them writes"
        return original(executor, *given)

    def check(pointers: np.ndarray, mask: np.ndarray, size: int, writes: bool) -> None:
        at = pointers[np.broadcast_to(mask, pointers.shape).astype(bool)]
        if at.size:
            first, last = int(at.min()), int(at.max()) + size
            assert any(begin <= first and last <= end for begin, end in spans), (
                f"{first} to {last} is outside of every tensor of the kernel: {spans}"
            )
            touched.append((interpreter.interpreter_builder.grid_idx, writes, at))

    def load(pointers, mask, other, dtype, original=memory.load):
        check(pointers, mask, dtype.itemsize, writes=False)
        return original(pointers, mask, other, dtype)

    def store(pointers, value, mask, original=memory.store):
        check(pointers, mask, value.itemsize, writes=True)
        return original(pointers, value, mask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "_init_args_hst", arguments)
        patch.setattr(interpreter.GridExecutor, "_restore_args_dev", finish)
        patch.setattr(memory, "load", load)
        patch.setattr(memory, "store", store)
        yield
