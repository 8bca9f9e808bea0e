"""Evaluation of sdt_v2_15m (Meta-SpikeFormer) at 224 x 224, T = 4, densely and by events, and layers without events.

For comparison: the same network with SpikingJelly's neurons and the V1 network of about its size. Rates are set by
shifting norms, as in `sparse`; the neurons behind the attention's sums and the head's fire as they then do.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness import Bench
from inference import agreement, spikingjelly_installed
from peers import MetaArrangement, firing_model
from rates import seats, set_rates
from torch import Tensor, nn
from training import last

from sdt_blocks import MetaSpikeFormer, calibrate_norms, create_model, optimize_for_inference
from sdt_blocks.blocks import LinearSpikeAttention
from sdt_blocks.inference import Events
from sdt_blocks.inference.forms import DenseSums
from sdt_blocks.ops.packed import PackedSpikes

ALLOCATORS = ["default", "reused"]
RATES = (0.1,)
SMALL = {"dims": (16, 32, 32, 48), "depths": (1, 1, 1, 1, 1)}
PLAIN = "sdt_blocks, the model as trained"
PEER, PEER_LAST = "SpikingJelly's neurons, eager", "SpikingJelly's neurons, eager, channels-last"


@torch.no_grad()
def run(bench: Bench) -> None:
    large = (8, 224, {}, "sdt_8_384")
    batch, side, options, name = bench.pick(cpu=large, cuda=(32, *large[1:]), trial=(2, 64, SMALL, "sdt_2_256"))
    images = torch.rand(batch, 3, side, side, device=bench.device)
    v1 = firing_model(name, images[:1])
    for rate in RATES:
        model = at_rate("sdt_v2_15m", images[:1], rate, **options)
        setting = f"sdt_v2_15m, {side} x {side}, T=4, layers at {rate:.0%}"
        timed: dict[str, Callable[[], object]] = {PLAIN: partial(model, images)}
        parity: dict[str, Callable[[], str]] = {}
        for title, build in builds(bench).items():
            timed[title] = partial(build(model), images)
            parity[title] = partial(agreement, build, bench.device, small=small_model)
        timed[f"V1: {name}, the model as trained"] = partial(v1, images)
        timed[f"V1: {name}, optimized"] = partial(optimize_for_inference(v1), images)
        bench.race(f"evaluation, batch {batch}", setting, timed, baseline=PLAIN, parity=parity, rounds=3, warmup=1)
        if bench.device.type == "cpu":
            by_layer(bench, optimize_for_inference(model, sparse=True), images, setting)


def builds(bench: Bench) -> dict[str, Callable[[Any], Callable[[Tensor], Tensor]]]:
    """Ways to evaluate one of our models."""
    found: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
        "sdt_blocks, optimized": optimize_for_inference,
        "sdt_blocks, optimized, bf16": lambda model: optimize_for_inference(model, torch.bfloat16),
    }
    if bench.device.type == "cpu":
        found["sdt_blocks, event-driven"] = lambda model: optimize_for_inference(model, sparse=True)
    if spikingjelly_installed():
        found[PEER] = lambda model: MetaArrangement(model).eval()
        found[PEER_LAST] = lambda model: in_channels_last(MetaArrangement(model).eval())
    return found


def in_channels_last(net: nn.Module) -> Callable[[Tensor], Tensor]:
    net.to(memory_format=torch.channels_last)
    return lambda images: net(last(images))


def at_rate(name: str, images: Tensor, rate: float, **options: Any) -> MetaSpikeFormer:
    """A model whose layers fire at this rate, and whose head fires at twice the rate."""
    model: MetaSpikeFormer = firing_model(name, images, **options)
    rates = {seat.name: rate for seat in seats(model)}
    # There is no norm to be shifted behind an attention's sums and the tokens' mean: a threshold is set instead.
    behind = {module.mixer_neuron: rate for module in model.modules() if isinstance(module, LinearSpikeAttention)}
    behind[model.head_neuron] = 2 * rate
    hooks = [neuron.register_forward_pre_hook(partial(_set_threshold, wanted)) for neuron, wanted in behind.items()]
    # Norms behind neurons that were silent have seen no variance, and would amplify rounding: they take the statistics
    # of this pass, in which every layer before them fires.
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = 1.0
    set_rates(model, images, rates)
    for norm in norms:
        norm.eval()
    # A still image's first membrane, one frame for all steps, is shifted in the second pass.
    for _ in range(2):
        set_rates(model, images, rates)
    for hook in hooks:
        hook.remove()
    return model


def _set_threshold(rate: float, neuron: Any, inputs: tuple[Tensor]) -> None:
    """Bisect the threshold, not below what a single spike among the sums needs, until neurons fire at this rate."""
    low, high = 1e-3, max(4 * inputs[0].max().item(), 2e-3)
    for _ in range(18):
        neuron.threshold = (low + high) / 2
        fired = type(neuron).forward(neuron, inputs[0]).mean().item()
        low, high = (neuron.threshold, high) if fired > rate else (low, neuron.threshold)


def small_model(images: Tensor) -> MetaSpikeFormer:
    """A small network in eval mode in which all layers fire, the head's neuron too."""
    model: MetaSpikeFormer = create_model("sdt_v2_15m", num_classes=10, **SMALL).to(images.device)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.8, 1.2)
            nn.init.normal_(norm.bias, 1.0, 0.5)
    calibrate_norms(model, images)
    return model.eval()


def by_layer(bench: Bench, fast: Any, images: Tensor, setting: str) -> None:
    """Seconds of an event-driven evaluation in layers that are computed densely, and the mean input rate.

    They are an upper bound of what a kernel for such layers could gain.
    """
    assert isinstance(fast, Events)
    spent, spikes, inputs, begun = Counter[str](), 0, 0, 0.0

    def count(product: Any, given: tuple[PackedSpikes, ...]) -> None:
        nonlocal spikes, inputs
        spikes, inputs = spikes + given[0].count(), inputs + given[0].words[..., 0].numel() * given[0].channels

    def begin(*_: Any) -> None:
        nonlocal begun
        begun = time.perf_counter()

    def end(layer: Any, *_: Any) -> None:
        spent[kind(layer)] += time.perf_counter() - begun

    layers = [form for form in fast.forms.values() if isinstance(form, DenseSums)]
    hooks = [product.register_forward_pre_hook(count) for _, product in fast.products()]
    fast(images)
    for layer in layers:
        hooks += [layer.register_forward_pre_hook(begin), layer.register_forward_hook(end)]
    start = time.perf_counter()
    fast(images)
    whole = time.perf_counter() - start
    for hook in hooks:
        hook.remove()
    figure = f"event-driven, batch {len(images)}, share of the time"
    bench.record(figure, setting, "mean input rate", spikes / inputs, unit="rate")
    for name, seconds in spent.items():
        bench.record(figure, setting, f"dense: {name}", seconds / whole, unit="share")


def kind(layer: DenseSums) -> str:
    convolutions = [module for module in layer.modules() if isinstance(module, nn.Conv2d)]
    first = convolutions[0]
    size, stride = first.kernel_size[0], first.stride[0]
    behind = ", then 1x1" if len(convolutions) > 1 else ""
    return (
        f"{size}x{size}{' depthwise' if first.groups > 1 else ''}{f', stride {stride}' if stride > 1 else ''}{behind}"
    )
