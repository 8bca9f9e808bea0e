"""The membrane and the spikes of one neuron layer over time, for plots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from snntorch._neurons.neurons import SpikingNeuron
from torch import Tensor, nn

from ..neuron import LIF, OverTime, spikes_of
from .probe import Forward, Probe


@dataclass
class Recording:
    """`membrane` (before its reset, as in snnTorch) and `spikes` of one neuron layer, `[T, B, ...]`."""

    name: str
    membrane: Tensor
    spikes: Tensor
    threshold: float


def record(model: nn.Module, batch: Any, layer: str, *, forward: Forward | None = None) -> Recording:
    """Runs one batch and keeps membrane and spikes of the neuron layer with that name, one of the kit's or snnTorch's.

    If the layer is called several times, the steps of each call follow those of the one before.

    Raises `ValueError` if there is no such neuron layer, if its membrane is not visible, or if its channels have
    thresholds of their own.

    >>> recording = record(example_model(), example_images()[0], "head_neuron")
    >>> recording.membrane.shape, bool((recording.membrane >= 1).eq(recording.spikes).all()), recording.spikes.any()
    (torch.Size([4, 20, 32]), True, tensor(True))
    """
    with Probe(model, forward=forward) as probe:
        if layer not in probe.neurons:
            raise ValueError(f"no neuron layer is called {layer!r}; there are {', '.join(probe.neurons) or 'none'}")
        neuron: Any = probe.neurons[layer]
        neuron = neuron.neuron if isinstance(neuron, OverTime) else neuron
        steps: list[tuple[Tensor, Tensor]] = []
        inputs: list[Tensor] = []

        def note(module: Any, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(neuron, LIF) and neuron.carrier is not None and inputs:
                inputs[-1] = torch.cat([inputs[-1], args[0]])  # a stream goes on from the call before
            elif isinstance(neuron, LIF):
                inputs.append(args[0])
            elif isinstance(output, tuple | list) and len(output) > 1:
                steps.append((output[-1], output[0]))  # between them a neuron's currents, if it has any
            elif isinstance(neuron, SpikingNeuron) and neuron.init_hidden:
                steps.append((neuron.mem.clone(), spikes_of(output)))
            else:
                raise ValueError(f"{layer}: a {type(neuron).__name__} does not show its membrane")

        probe.watch(neuron, note)
        for _ in probe.run([batch]):
            pass
    if not (inputs or steps):
        raise ValueError(f"{layer} took no part in the forward pass")
    threshold = torch.as_tensor(neuron.threshold).detach()
    if threshold.numel() > 1:
        raise ValueError(f"{layer} has {threshold.numel()} thresholds, one for each channel; a recording takes one")
    if isinstance(neuron, LIF):
        membrane, spikes = (torch.cat(parts) for parts in zip(*(trajectory(neuron, x) for x in inputs), strict=True))
    else:
        membrane, spikes = (torch.stack(parts) for parts in zip(*steps, strict=True))
    return Recording(layer, membrane.detach(), spikes.detach(), float(threshold))


@torch.no_grad()
def trajectory(neuron: LIF, x: Tensor) -> tuple[Tensor, Tensor]:
    """Runs the layer over its input again, step by step: membranes and spikes `[T, B, ...]`."""
    membrane: Tensor | None = None
    membranes, spikes = [], []
    for x_t in x.split(1):
        # `forward` itself, since hooks have seen this input already.
        fired, membrane = neuron.forward(x_t, membrane, return_membrane=True)  # type: ignore[misc]
        membranes.append(membrane)
        spikes.append(fired[0])
    return torch.stack(membranes), torch.stack(spikes)
