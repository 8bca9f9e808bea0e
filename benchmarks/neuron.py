"""One multi-step LIF layer compared with the memory traffic that it cannot avoid, and with other libraries' neurons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import snntorch
import torch
from harness import Bench, close, measure_memory, same_spikes
from torch import Tensor

from sdt_blocks import LIF
from sdt_blocks.ops import NeuronSpec, Norm, batch_norm_lif, lif_reference
from sdt_blocks.ops.lif import lif_op

ALLOCATORS = ["default", "reused"]
TAU, ALPHA = 2.0, 4.0


def run(bench: Bench) -> None:
    small = [((2, 2, 8, 6, 6), dtype) for dtype in (torch.float32, torch.bfloat16)]
    for shape, dtype in bench.pick(cpu=[((4, 16, 96, 56, 56), torch.float32)], cuda=GPU_SETTINGS, trial=small):
        setting = (
            f"T={shape[0]}, {torch.Size(shape[1:]).numel() / 1e6:.1f} M neurons, {str(dtype).removeprefix('torch.')}"
        )
        x = torch.randn(shape, device=bench.device, dtype=dtype) * 0.8 + 0.4
        forward(bench, setting, x)
        forward_backward(bench, setting, x)
    one_call(bench)


GPU_SETTINGS = [((steps, 32, 96, 56, 56), dtype) for steps in (4, 16) for dtype in (torch.float32, torch.bfloat16)]


def forward(bench: Bench, setting: str, x: Tensor) -> None:
    out = torch.empty_like(x)
    expected = lif_reference(x, NeuronSpec(inv_tau=1 / TAU))[0]
    neurons = contestants(bench)

    def timed(neuron: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        @torch.no_grad()
        def call() -> object:
            return neuron(x)

        return call

    def checked(name: str, neuron: Callable[[Tensor], Tensor]) -> Callable[[], str]:
        return lambda: same_spikes(neuron(x), expected, others(name, x, 1e-6))

    bench.race(
        "LIF forward",
        setting,
        {"floor: one read, one write": lambda: out.copy_(x), **{name: timed(n) for name, n in neurons.items()}},
        baseline="floor: one read, one write",
        parity={name: checked(name, neuron) for name, neuron in neurons.items()},
    )


def forward_backward(bench: Bench, setting: str, x: Tensor) -> None:
    out, weights = torch.empty_like(x), torch.randn_like(x)
    neurons = contestants(bench)

    def gradient(neuron: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = x.detach().requires_grad_()
        neuron(leaf).backward(weights)
        assert leaf.grad is not None
        return leaf.grad

    expected = gradient(lambda leaf: lif_reference(leaf, NeuronSpec(inv_tau=1 / TAU))[0])
    tolerance = 1e-5 if x.dtype == torch.float32 else 2e-2
    bench.race(
        "LIF forward + backward",
        setting,
        {"floor: one read, one write": lambda: out.copy_(x)}
        | {name: lambda neuron=neuron: gradient(neuron) for name, neuron in neurons.items()},
        baseline="floor: one read, one write",
        parity={
            name: lambda name=name, n=neuron: close(gradient(n), expected, tolerance, others(name, x, 4e-6))
            for name, neuron in neurons.items()
        },
    )
    if bench.allocator == "default":
        for name, neuron in neurons.items():
            kept = measure_memory(bench.device, lambda neuron=neuron: neuron(x.detach().requires_grad_()))[1]
            bench.record("kept for the backward", setting, name, kept / x.numel(), unit="B/elem")


def others(name: str, x: Tensor, most: float) -> float:
    """The share of spikes that may differ: libraries with membranes in bfloat16 have many ties in its eight bits."""
    return most if x.dtype == torch.float32 or name.startswith("sdt_blocks") else 0.05


def one_call(bench: Bench) -> None:
    """The cost of a call when there is next to nothing to compute: one time step of few neurons."""
    x = torch.randn(1, 2, 8, 4, 4, device=bench.device, requires_grad=True)
    weights, rest = torch.ones_like(x), torch.zeros_like(x[0])
    lif, norm = LIF(tau=TAU), torch.nn.BatchNorm2d(8, device=bench.device)
    leaky = leaky_neuron()
    known = Norm(norm.running_mean, norm.running_var, norm.weight, norm.bias, training=True)
    code = lif.spec.encode()
    calls: dict[str, Callable[[], Tensor]] = {
        "snnTorch Leaky, a step": lambda: leaky(x[0] / TAU, rest)[0][None],
        "sdt_blocks LIF": lambda: lif(x),
        "sdt_blocks LIF, by PyTorch's registry": lambda: lif_op.overload(x, 1, code)[0],
        "sdt_blocks norm + LIF": lambda: batch_norm_lif(x, known, lif.spec),
        "sdt_blocks reference": lambda: lif_reference(x, lif.spec)[0],
    }
    expected = calls["sdt_blocks reference"]().detach()
    parity = {
        name: lambda call=call: same_spikes(call(), expected) for name, call in calls.items() if "norm" not in name
    }
    options: dict[str, Any] = {"baseline": "snnTorch Leaky, a step", "rounds": 1000, "warmup": 50}
    setting = f"T=1, {x[0].numel()} neurons"
    bench.race("one call, forward", setting, calls, parity=parity, **options)
    both = {
        name: lambda call=call: torch.autograd.grad(call(), x, weights, materialize_grads=True)
        for name, call in calls.items()
    }
    bench.race("one call, forward + backward", setting, both, **options)


def contestants(bench: Bench) -> dict[str, Callable[[Tensor], Tensor]]:
    """Neurons with the same equations: input scaled by 1 / tau, hard and detached reset, sigmoid surrogate, alpha 4."""
    found: dict[str, Callable[[Tensor], Tensor]] = {
        "sdt_blocks LIF": LIF(tau=TAU),
        "sdt_blocks reference": lambda x: lif_reference(x, NeuronSpec(inv_tau=1 / TAU))[0],
        "snnTorch Leaky in a loop": snntorch_loop(),
    }
    try:
        from spikingjelly.activation_based import functional, surrogate
    except ImportError:
        print('  spikingjelly is not installed: pip install -e ".[bench]"')
        return found

    def step(x: Tensor, v: Tensor) -> Tensor:
        spikes: Tensor = functional.lif_multi_step(x, v, TAU, True, 1.0, 0.0, surrogate.Sigmoid(ALPHA), True, False)[0]
        return spikes

    compiled = torch.compile(step, dynamic=False)
    found["SpikingJelly eager"] = lambda x: step(x, torch.zeros_like(x[0]))
    found["SpikingJelly compiled"] = lambda x: compiled(x, torch.zeros_like(x[0]))
    return found


def leaky_neuron() -> snntorch.Leaky:
    """snnTorch's Leaky, reset "zero"; its own surrogate fires above the threshold, not at it."""
    spike_grad = LIF(tau=TAU).spike_grad
    return snntorch.Leaky(beta=1 - 1 / TAU, spike_grad=spike_grad, reset_mechanism="zero", init_hidden=False)


def snntorch_loop() -> Callable[[Tensor], Tensor]:
    """snnTorch's Leaky stepped over time."""
    leaky = leaky_neuron()

    def loop(x: Tensor) -> Tensor:
        membrane = torch.zeros_like(x[0])
        spikes = []
        for frame in x:
            spike, membrane = leaky(frame / TAU, membrane)
            spikes.append(spike)
        return torch.stack(spikes)

    return loop
