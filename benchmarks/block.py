"""Parts of the model, forward and backward: a conv-BN-LIF unit and what it keeps, attention, MLP, a whole block."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from harness import Bench, close, measure_memory, same_spikes
from torch import Tensor, nn

from sdt_blocks import LIF, SpikeDrivenBlock, SpikeDrivenSelfAttention, SpikingMLP
from sdt_blocks.ops import NeuronSpec, Norm, attend, attend_reference, batch_norm_lif, lif, lif_reference
from sdt_blocks.steps import normalize_and_fire, per_frame

ALLOCATORS = ["default", "reused"]
TIES = 1e-5
"""The share of an attention's spikes, and of its gradient, that may differ on a GPU, where a membrane is at its
threshold: its kernels and the equations add in other orders. On a CPU all are equal."""


def run(bench: Bench) -> None:
    unit(bench)
    dim, tokens, batch = bench.pick(cpu=(384, 14, 4), cuda=(512, 14, 32), trial=(16, 4, 2))
    x = torch.randn(4, batch, dim, tokens, tokens, device=bench.device)
    setting = f"T=4, batch {batch}, {dim} channels, {tokens} x {tokens} tokens"
    attention(bench, x, setting)
    parts = {"SDSA": SpikeDrivenSelfAttention(dim), "spiking MLP": SpikingMLP(dim), "block": SpikeDrivenBlock(dim)}
    for name, part in parts.items():
        whole(bench, name, part.to(bench.device), x, setting)


def unit(bench: Bench) -> None:
    """What training keeps of one conv-BN-LIF unit, in bytes per element of the convolution's output.

    A convolution to one channel stands for the next layer, which keeps the spikes for the gradient of its weights.
    """
    if bench.allocator != "default":
        return
    steps, batch, channels, size = bench.pick(cpu=(4, 8, 96, 112), cuda=(4, 32, 96, 112), trial=(2, 2, 16, 12))
    conv = nn.Conv2d(48, channels, 3, padding=1, bias=False).to(bench.device)
    norm, neuron = nn.BatchNorm2d(channels).to(bench.device), LIF()
    following = nn.Conv2d(channels, 1, 1).to(bench.device)
    units: dict[str, Callable[[Tensor], Tensor]] = {
        "sdt_blocks": lambda x: per_frame(following, normalize_and_fire(norm, neuron, x)),
        "sdt_blocks reference": lambda x: per_frame(following, lif_reference(per_frame(norm, x), NeuronSpec())[0]),
    }
    peer = spikingjelly_lif()
    if peer is not None:
        units["SpikingJelly eager"] = lambda x: per_frame(following, peer(per_frame(norm, x)))
    elements = steps * batch * channels * size * size
    for dtype in (torch.float32, torch.bfloat16):
        x = (torch.rand(steps, batch, 48, size, size, device=bench.device) < 0.2).to(dtype)
        setting = f"{'fp32' if dtype == torch.float32 else 'bf16 autocast'}, {elements / 1e6:.0f} M elements"
        for name, after in units.items():

            def function(x: Tensor = x, after: Callable[[Tensor], Tensor] = after) -> Tensor:
                with torch.autocast(bench.device.type, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
                    return after(per_frame(conv, x))

            kept = measure_memory(bench.device, function)[1]
            bench.record("conv-BN-LIF, kept for the backward", setting, name, kept / elements, unit="B/elem")


def attention(bench: Bench, x: Tensor, setting: str) -> None:
    """The part between the products of an attention: norms and neurons of q, k, v, token sum, neuron, mask."""
    channels = x.shape[2]
    inputs = [(x.roll(shift, 0) + 0.3).requires_grad_() for shift in range(3)]
    norms = [
        Norm(
            weight=torch.ones(channels, device=x.device, requires_grad=True),
            bias=torch.full((channels,), 0.5, device=x.device, requires_grad=True),
            training=True,
        )
        for _ in inputs
    ]
    contestants = attention_contestants(inputs, norms, [NeuronSpec(threshold) for threshold in (1.0, 1.0, 1.0, 0.5)])
    weights = torch.randn_like(x)

    def gradients(function: Callable[[], Tensor]) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(function(), inputs, weights)])

    expected, ties = contestants["sdt_blocks reference"], TIES if bench.device.type == "cuda" else 0.0
    ours = list(contestants)[:2]
    with torch.no_grad():
        bench.race(
            "attention between products, forward",
            setting,
            contestants,
            baseline="sdt_blocks, part by part",
            parity={name: lambda name=name: same_spikes(contestants[name](), expected(), ties) for name in ours},
        )
    bench.race(
        "attention between products, forward + backward",
        setting,
        {name: partial(gradients, function) for name, function in contestants.items()},
        baseline="sdt_blocks, part by part",
        parity={
            name: lambda name=name: close(gradients(contestants[name]), gradients(expected), 1e-3, ties)
            for name in ours
        },
    )
    if bench.allocator == "default":
        for name, function in contestants.items():
            kept = measure_memory(bench.device, function)[1]
            bench.record(
                "attention between products, kept for the backward", setting, name, kept / x.numel(), unit="B/elem"
            )


def attention_contestants(
    inputs: list[Tensor], norms: list[Norm], neurons: list[NeuronSpec]
) -> dict[str, Callable[[], Tensor]]:
    """The ways to compute it: our two first, then the equations, and SpikingJelly's if it is there."""

    def part_by_part() -> Tensor:
        parts = zip(inputs, norms, neurons, strict=False)
        q, k, v = (batch_norm_lif(part, norm, neuron) for part, norm, neuron in parts)
        mask = lif((k * v).sum((-2, -1), keepdim=True), neurons[3])
        assert isinstance(mask, Tensor)
        return q * mask

    contestants: dict[str, Callable[[], Tensor]] = {
        "sdt_blocks, one op": lambda: attend(inputs, norms, neurons),
        "sdt_blocks, part by part": part_by_part,
        "sdt_blocks reference": lambda: attend_reference(inputs, norms, neurons),
    }
    peer, gate = spikingjelly_lif(), spikingjelly_lif(0.5)
    if peer is not None and gate is not None:

        def eager() -> Tensor:
            q, k, v = (
                peer(F.batch_norm(part.flatten(0, 1), None, None, n.weight, n.bias, True).unflatten(0, part.shape[:2]))
                for part, n in zip(inputs, norms, strict=True)
            )
            return q * gate((k * v).sum((-2, -1), keepdim=True))

        contestants["SpikingJelly eager"] = eager
    return contestants


def whole(bench: Bench, name: str, part: nn.Module, x: Tensor, setting: str) -> None:
    """Forward and backward of one of our modules, and of its equations step by step.

    On a GPU parity is checked on one sample in float64: a membrane within rounding of its threshold otherwise changes
    all spikes that follow.
    """
    weights, checked, images, tolerance = torch.randn_like(x), part, None, 1e-3
    if bench.device.type == "cuda":
        checked, images, tolerance = copy.deepcopy(part).double(), 1, 1e-6

    def step(environment: Callable[[], None], part: nn.Module = part, images: int | None = None) -> Tensor:
        environment()
        part.zero_grad()
        dtype = next(part.parameters()).dtype
        leaf = x.detach()[:, :images].to(dtype).requires_grad_()
        part(leaf).backward(weights[:, :images].to(dtype))
        assert leaf.grad is not None
        return leaf.grad

    fused, reference = partial(backend, None), partial(backend, "reference")
    bench.race(
        f"{name}, forward + backward",
        setting,
        {"sdt_blocks": partial(step, fused), "sdt_blocks reference": partial(step, reference)},
        baseline="sdt_blocks reference",
        parity={"sdt_blocks": lambda: close(step(fused, checked, images), step(reference, checked, images), tolerance)},
    )
    backend(None)


def backend(name: str | None) -> None:
    """Force the path of the fused ops, or leave the choice to them."""
    if name is None:
        os.environ.pop("SDT_BLOCKS_BACKEND", None)
    else:
        os.environ["SDT_BLOCKS_BACKEND"] = name


def spikingjelly_lif(threshold: float = 1.0) -> Callable[[Tensor], Tensor] | None:
    try:
        from spikingjelly.activation_based import functional, surrogate
    except ImportError:
        print('  spikingjelly is not installed: pip install -e ".[bench]"')
        return None

    def neuron(x: Tensor) -> Tensor:
        v = torch.zeros_like(x[0])
        spikes: Tensor = functional.lif_multi_step(
            x, v, 2.0, True, threshold, 0.0, surrogate.Sigmoid(4.0), True, False
        )[0]
        return spikes

    return neuron
