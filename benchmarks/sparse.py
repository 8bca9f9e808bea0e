"""Event-driven inference on the CPU compared with dense products: single products, sdt_8_384, and the work counted.

Firing rates of the whole model are set by shifting the norms in front of its neurons: to one rate for all layers, to a
mixture, and layer by layer to those of a network of the same depth that is trained here on scikit-learn's digits.
"""

from __future__ import annotations

import copy
import itertools
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import Bench, ParityError
from peers import ConvolutionFloor, firing_model
from rates import digits, measured_rates, seats, set_rates, train_on_digits
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from sdt_blocks import SpikeDrivenTransformer, optimize_for_inference
from sdt_blocks.analysis import E_AC, E_MAC
from sdt_blocks.inference import Events, Product, plan
from sdt_blocks.inference.choice import Calibration
from sdt_blocks.ops import dense as firing
from sdt_blocks.ops.integers import IntegerWeight, quantize, spike_product_dense
from sdt_blocks.ops.packed import Epilogue, EventWeight, PackedSpikes, spike_product
from sdt_blocks.ops.spec import NeuronSpec

PRODUCTS = (
    # inputs, outputs, kernel, side; 32 frames (8 images of 4 steps)
    (384, 1536, 1, 14),
    (1536, 384, 1, 14),
    (192, 384, 3, 28),
    (48, 96, 3, 112),
)
PRODUCT_RATES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
MODEL_RATES = (0.02, 0.05, 0.1, 0.2, 0.4)
TRAINED, MIXED = "the rates of a trained network", "blocks in turn at 2% and 40%"
DENSE, DENSE_BF16 = "dense fp32, fastest library path", "dense bf16, fastest library path"
DENSE_OURS = "dense fp32, sdt_blocks"
DENSE_BF16_FIRED = "dense bf16 and the neuron, sdt_blocks"
SUMS, FIRED = "events to membrane", "events to spikes, neuron included"
FLOOR, FLOOR_BF16 = "floor: bare convolutions, fp32", "floor: bare convolutions, bf16"
OPTIMIZED, OPTIMIZED_BF16 = "optimized dense, fp32", "optimized dense, bf16"
EVENTS, AUTO = "event-driven, fp32", 'sparse="auto"'
OPTIMIZED_INT8, EVENTS_INT8, AUTO_INT8 = "optimized dense, int8", "event-driven, int8", 'sparse="auto", int8'
SUMS_INT8, FIRED_INT8, DENSE_INT8 = (
    "events to membrane, int8",
    "events to spikes, int8, neuron included",
    "dense to spikes, int8, neuron included",
)
FALLBACK = "event-driven, dense layers by call"
"""The path of sparse=\"auto\" if it was calibrated on quieter images than these."""
DEVICES = ["cpu"]


@torch.no_grad()
def run(bench: Bench) -> None:
    for inputs, outputs, kernel, side in PRODUCTS:
        race_product(bench, inputs, outputs, kernel, side)
    trained = answers_of_a_trained_network(bench)
    images = torch.rand(8, 3, 224, 224)
    model = firing_model("sdt_8_384", images[:1])
    names = [seat.name for seat in seats(model)]
    mixed = {name: 0.4 if name[0] in "1357" else 0.02 for name in names}
    settings = [(f"every layer at {rate:.0%}", dict.fromkeys(names, rate)) for rate in MODEL_RATES]
    for setting, rates in [*settings, (MIXED, mixed), (TRAINED, trained)]:
        set_rates(model, images[:1], rates)
        race_models(bench, model, images, f"sdt_8_384, 224 x 224, T=4, {setting}")
    answers_of_a_large_network(bench, model)


def race_product(bench: Bench, inputs: int, outputs: int, kernel: int, side: int) -> None:
    """Time one product at every rate, and find the rates up to which events are faster."""
    weight = torch.randn(outputs, inputs, kernel, kernel) / inputs**0.5
    tiles, plain, fires = EventWeight(weight), Epilogue(outputs), Epilogue(outputs, neuron=NeuronSpec())
    membrane = torch.empty(4, 8, side, side, outputs)
    ours, ours_bf16 = (Product(weight, torch.zeros(outputs), dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    neuron = firing.Neuron(torch.tensor(0.5), threshold=1.0, reset="zero", strict=False)
    shape = torch.Size((32, side, side, inputs))
    whole, scale = quantize(weight, pieces=1)
    integers, fires_int8 = IntegerWeight(whole), Epilogue(outputs, scale=scale, neuron=NeuronSpec())
    ratios: dict[tuple[str, str], list[float]] = {
        (SUMS, DENSE): [],
        (SUMS, DENSE_OURS): [],
        (SUMS, DENSE_BF16): [],
        (FIRED, DENSE_BF16_FIRED): [],
        (FIRED_INT8, DENSE_INT8): [],
        (FIRED_INT8, DENSE_BF16_FIRED): [],
    }
    for rate in PRODUCT_RATES:
        spikes = PackedSpikes.pack(torch.rand(4, 8, inputs, side, side) < rate)
        frames = spikes.unpack(ours.input_dtype(shape)).movedim(2, -1).flatten(0, 1)
        frames_bf16 = spikes.unpack().bfloat16().movedim(2, -1).flatten(0, 1)
        dense, dense_bf16 = (fastest_dense(spikes.unpack(), weight, dtype) for dtype in (torch.float32, torch.bfloat16))
        sums = partial(spike_product, spikes, tiles, plain, membrane=membrane)
        contestants: dict[str, Callable[[], Any]] = {
            DENSE: dense,
            DENSE_BF16: dense_bf16,
            DENSE_OURS: partial(ours, frames),
            DENSE_BF16_FIRED: lambda frames=frames_bf16: firing.fire(
                ours_bf16(frames).view(membrane.shape), neuron, torch.bfloat16, compiled=True
            ),
            SUMS: sums,
            FIRED: partial(spike_product, spikes, tiles, fires),
            SUMS_INT8: partial(spike_product, spikes, integers, plain, membrane=membrane),
            FIRED_INT8: partial(spike_product, spikes, integers, fires_int8),
            DENSE_INT8: partial(spike_product_dense, spikes, integers, fires_int8),
        }
        samples = bench.race(
            f"product {inputs} -> {outputs}, {kernel}x{kernel}",
            f"{32 * side**2} rows, {rate:.1%} active",
            contestants,
            baseline=DENSE,
            parity={
                SUMS: partial(same_sums, sums, dense),
                SUMS_INT8: partial(same_integers, spikes, integers),
            },
            rounds=7 if kernel > 1 else 15,
        )
        for (events, dense_way), found in ratios.items():
            found.append(samples[events].median / samples[dense_way].median)
    for (events, dense_way), found in ratios.items():
        figure = f"break-even {inputs} -> {outputs}, {kernel}x{kernel}"
        bench.record(figure, f"against {dense_way}", events, break_even(found), unit="rate")


def fastest_dense(frames: Tensor, weight: Tensor, dtype: torch.dtype) -> Callable[[], Tensor]:
    """The faster of a channels-last convolution and, for 1x1, a matrix product; the result is `[N, H, W, out]`."""
    images = frames.flatten(0, 1).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = weight.to(dtype).contiguous(memory_format=torch.channels_last)
    ways: list[Callable[[], Tensor]] = [
        lambda: F.conv2d(images, weight, padding=weight.shape[-1] // 2).permute(0, 2, 3, 1)
    ]
    if weight.shape[-1] == 1:
        ways.append(lambda: F.linear(images.permute(0, 2, 3, 1), weight.flatten(1)))
    return min(ways, key=lambda way: min(seconds(way) for _ in range(4)))


def seconds(compute: Callable[[], object]) -> float:
    timer = Timer("compute()", globals={"compute": compute}, num_threads=torch.get_num_threads())
    found: float = timer.timeit(1).mean
    return found


def same_sums(compute: Callable[[], Any], dense: Callable[[], Tensor]) -> str:
    found, _ = compute()
    expected = dense().view_as(found)
    error = (found - expected).abs().max().item()
    if not error <= 2e-5 * expected.abs().max().item():
        raise ParityError(f"sums differ by {error:.2e}")
    return "equal to the last bit" if error == 0 else f"absolute error {error:.1e}"


def same_integers(spikes: PackedSpikes, weight: IntegerWeight) -> str:
    """Both forms with whole numbers compared with float64, which represents such sums exactly."""
    frames = spikes.unpack().double().flatten(0, 1)
    expected = F.conv2d(frames, weight.weight.double(), padding=weight.radius).movedim(1, -1)
    for product in (spike_product, spike_product_dense):
        found, _ = product(spikes, weight, Epilogue(len(weight.weight)), membrane=True)
        if not torch.equal(found.flatten(0, 1).double(), expected):
            raise ParityError("sums of whole numbers differ")
    return "equal to the last bit, by events and densely"


def break_even(ratios: list[float]) -> float:
    """The rate at which event-driven / dense reaches 1, between the measured ones; the highest if it never does."""
    points = list(zip(PRODUCT_RATES, ratios, strict=True))
    for (low, before), (high, after) in itertools.pairwise(points):
        if before <= 1 < after:
            return low + (high - low) * (1 - before) / (after - before)
    return PRODUCT_RATES[-1] if ratios[-1] <= 1 else 0.0


def race_models(bench: Bench, model: SpikeDrivenTransformer, images: Tensor, setting: str) -> None:
    """Time the whole model for one image and for eight, and count the additions."""
    fast = optimize_for_inference(model, sparse=True)
    assert isinstance(fast, Events)
    expected = like_convolutions(model, images)
    dense, dense_bf16, dense_int8 = (
        optimize_for_inference(model, dtype) for dtype in (torch.float32, torch.bfloat16, torch.int8)
    )
    fast_int8 = optimize_for_inference(model, torch.int8, sparse=True)
    for batch in (1, len(images)):
        some = images[:batch]
        auto: Any = optimize_for_inference(model, sparse="auto", calibrate=[some])
        auto_int8 = optimize_for_inference(model, torch.int8, sparse="auto", calibrate=[some])
        choices: dict[str, nn.Module] = {AUTO: auto, AUTO_INT8: auto_int8}
        if not isinstance(auto, Events):
            choices[FALLBACK] = dense_by_call(model, auto.calibration)
        floor = ConvolutionFloor(model, some)
        samples = bench.race(
            f"evaluation, batch {batch}",
            setting,
            {
                FLOOR: floor,
                FLOOR_BF16: ConvolutionFloor(model, some, torch.bfloat16),
                OPTIMIZED: partial(dense, some),
                OPTIMIZED_BF16: partial(dense_bf16, some),
                OPTIMIZED_INT8: partial(dense_int8, some),
                EVENTS: partial(fast, some),
                EVENTS_INT8: partial(fast_int8, some),
                **{name: partial(chosen, some) for name, chosen in choices.items()},
            },
            baseline=FLOOR,
            parity={
                EVENTS: partial(same_answers, fast(images), expected),
                EVENTS_INT8: partial(same_bits, fast_int8(some), dense_int8(some)),
            },
            rounds=15 if batch == 1 else 9,
            warmup=1,
        )
        for name in choices:
            pairs = zip(samples[name].values, samples[OPTIMIZED].values, strict=True)
            against_dense = statistics.median(own / other for own, other in pairs)
            bench.record(f"against {OPTIMIZED}, batch {batch}", setting, name, against_dense, unit="x")
    count_work(bench, fast, floor, images, setting)


def dense_by_call(model: SpikeDrivenTransformer, calibration: Calibration) -> Events:
    """The event-driven model with the limits of a calibration that has chosen the dense one."""
    chosen = Events(plan(model))
    for (_, product), layer in zip(chosen.products(), calibration.layers, strict=True):
        product.break_even = layer.break_even
    return chosen


def like_convolutions(model: SpikeDrivenTransformer, images: Tensor) -> Tensor:
    """Logits of the plain model in channels-last layout, where the library adds terms one by one as events do."""
    plain = copy.deepcopy(model)
    images = images.contiguous(memory_format=torch.channels_last)
    logits: Tensor = plain.eval().to(memory_format=torch.channels_last)(images)
    return logits


def same_answers(found: Tensor, expected: Tensor, least: float = 0.5) -> str:
    """Random weights are chaotic: one spike at the threshold moves an image's logits, so images are counted."""
    same = ((found - expected).abs().amax(1) <= 1e-4).float().mean().item()
    if same < least:
        raise ParityError(f"the logits of {same:.0%} of the images are within 1e-4 of the plain model's")
    return f"{same:.1%} of the images within 1e-4"


def same_bits(found: Tensor, expected: Tensor) -> str:
    if not torch.equal(found, expected):
        raise ParityError("the event-driven int8 model differs from the dense one")
    return f"equal to {OPTIMIZED_INT8} to the last bit"


def answers_of_a_trained_network(bench: Bench, train: int = 1500) -> dict[str, float]:
    """Train a network, compare its answers on every digit, and return its firing rates on held-out ones."""
    model = train_on_digits(train, depth=8)
    images, labels = digits()
    expected = model(images)
    setting = f"scikit-learn's digits, 16 x 16, depth 8, dim {model.config['dim']}"
    accuracy = (expected.argmax(1) == labels)[train:].float().mean().item()
    bench.record("accuracy on held-out digits", setting, "the trained network", accuracy, unit="share")
    compare_answers(bench, setting, model, images, expected)
    rates = measured_rates(model, images[train:])
    for kind in ("membrane", "q", "k", "v", "mlp", "hidden"):
        found = [rate for name, rate in rates.items() if name.split(".")[1] == kind]
        bench.record("firing rate, mean over the blocks", setting, kind, statistics.mean(found), unit="share")
    return rates


def answers_of_a_large_network(bench: Bench, model: SpikeDrivenTransformer) -> None:
    images = torch.rand(1000, 3, 64, 64)
    setting = f"1000 random images, 64 x 64, sdt_8_384 with random weights at {TRAINED}"
    expected = torch.cat([like_convolutions(model, part) for part in images.split(100)])
    compare_answers(bench, setting, model, images, expected)


def compare_answers(
    bench: Bench, setting: str, model: SpikeDrivenTransformer, images: Tensor, expected: Tensor
) -> None:
    fast = Events(plan(model))
    found = torch.cat([fast(part) for part in images.split(100)])
    same = (found.argmax(1) == expected.argmax(1)).float().mean().item()
    bench.record("same class", setting, EVENTS, same, unit="share", parity=same_answers(found, expected))


def count_work(bench: Bench, fast: Events, floor: ConvolutionFloor, images: Tensor, setting: str) -> None:
    """Additions and multiply-adds per image, as energy at the prices of a spiking network, and by the meter."""
    spikes, neurons, additions = 0, 0, 0

    def note(product: Any, given: tuple[PackedSpikes, ...]) -> None:
        nonlocal spikes, neurons, additions
        out, _, kernel, _ = product.weight.weight.shape
        count = given[0].count()
        spikes, neurons = spikes + count, neurons + given[0].words[..., 0].numel() * given[0].channels
        additions += count * out * kernel**2

    hooks = [product.register_forward_pre_hook(note) for _, product in fast.products()]
    fast(images)
    for hook in hooks:
        hook.remove()
    first = floor.calls[0]
    batch = len(images)
    first_layer = first[0].shape[2:].numel() * first[1].numel()
    dense = floor.multiply_adds / batch
    record = partial(bench.record, "work an image", setting)
    record("mean input rate", spikes / neurons, unit="share")
    record("dense: multiply-adds", dense / 1e9, unit="G")
    record("event-driven: additions", additions / batch / 1e9, unit="G")
    record("event-driven: multiply-adds (first layer)", first_layer / 1e9, unit="G")
    record(f"dense: energy at {E_MAC} pJ", dense * E_MAC * 1e-9, unit="mJ")
    energy = (additions / batch * E_AC + first_layer * E_MAC) * 1e-9
    record(f"event-driven: energy at {E_AC} and {E_MAC} pJ", energy, unit="mJ")
    for name, compute in (("dense, metered", floor), ("event-driven, metered", partial(fast, images))):
        joules = metered_joules(compute)
        if joules is None:
            bench.absent("work an image", setting, name, "this machine has no energy counters")
        else:
            record(f"{name}, whole processor", joules / batch * 1e3, unit="mJ")


def metered_joules(compute: Callable[[], object], runs: int = 5) -> float | None:
    """Energy for one run by the counters that `perf stat` shows as energy-pkg, or None if there are none to read."""
    counters = sorted(Path("/sys/class/powercap").glob("intel-rapl:[0-9]*/energy_uj"))
    counters = [counter for counter in counters if counter.parent.name.count(":") == 1]
    try:
        before = [int(counter.read_text()) for counter in counters]
        for _ in range(runs):
            compute()
        spent = [int(counter.read_text()) - start for counter, start in zip(counters, before, strict=True)]
    except OSError:
        return None
    # A counter that has wrapped around in the meantime says nothing.
    return sum(spent) / runs * 1e-6 if spent and min(spent) > 0 else None
