"""Neurons of other libraries, which take one time step a call and remember it, where whole sequences are meant."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from snntorch._neurons.neurons import SpikingNeuron
from torch import Tensor, nn

from .stream import Streamed


def over_time(neuron: nn.Module) -> nn.Module:
    """A neuron that takes single steps as one that takes a whole sequence, without memory between calls.

    It knows snnTorch's neurons (`Leaky`, `Synaptic`, `Alpha`, `Lapicque`, `RLeaky` and all that have `reset_mem`),
    SpikingJelly's (`step_mode` and `reset`, single-step or multi-step), and an `nn.Sequential` with such. Of a tuple
    the first entry is the spikes. Blocks do this by themselves for what their neuron factory makes. A neuron that takes
    sequences and remembers nothing is given back as it is.

    Shapes: `[T, ...] -> [T, ...]`.

    Raises `TypeError` for what is no module, and for a module whose memory nobody knows how to clear.

    >>> import snntorch
    >>> over_time(snntorch.Leaky(beta=0.9))(torch.full((4, 2, 8), 0.5)).mean((1, 2))
    tensor([0., 0., 1., 0.])
    """
    if not isinstance(neuron, nn.Module):
        raise TypeError(f"over_time takes a neuron, not what makes one: got {neuron!r}; a factory needs no wrapping")
    if remembers(neuron):
        return OverTime(neuron)
    if isinstance(neuron, Streamed):
        return neuron
    raise TypeError(
        f"over_time does not know how to clear the memory of {type(neuron).__name__}: it has neither reset_mem "
        "(snnTorch) nor step_mode and reset (SpikingJelly)"
    )


class OverTime(nn.Module, Streamed):
    """What `over_time` makes of `neuron`."""

    def __init__(self, neuron: nn.Module) -> None:
        super().__init__()
        self.neuron = neuron
        _clear(neuron)

    @property
    def emits(self) -> str:
        """ "spikes" where the neuron is known to give zeros and ones alone."""
        graded = torch.as_tensor(getattr(self.neuron, "graded_spikes_factor", 2.0))
        return "spikes" if isinstance(self.neuron, SpikingNeuron) and bool((graded == 1).all()) else "real"

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 0 or x.shape[0] == 0:
            raise ValueError(
                f"a sequence needs at least one time step on its first axis, got the shape {list(x.shape)}"
            )
        if self.carrier is None:
            try:
                return self._run(self.neuron, x)
            finally:
                _clear(self.neuron)
        # A stream's state lies in a neuron of its own, which no other call can touch.
        neuron = copy.deepcopy(self.carrier.state(self) or self.neuron)
        spikes = self._run(neuron, x)
        self.carrier.keep(self, neuron)
        return spikes

    @staticmethod
    def _run(neuron: nn.Module, x: Tensor) -> Tensor:
        if takes_sequence(neuron):
            return spikes_of(neuron(x))
        return torch.stack([spikes_of(neuron(x_t)) for x_t in x.unbind(0)])


def takes_sequence(neuron: nn.Module) -> bool:
    """Whether the neuron takes `[T, B, ...]` in one call; a foreign one may say so by `step_mode`, "m" or "s"."""
    if isinstance(neuron, nn.Sequential):
        return all(takes_sequence(layer) for layer in neuron)
    mode = getattr(neuron, "step_mode", None)
    return mode != "s" if mode else not (isinstance(neuron, SpikingNeuron) and hasattr(neuron, "reset_mem"))


def remembers(neuron: nn.Module) -> bool:
    """Whether a neuron has a memory from one call to the next."""
    if isinstance(neuron, nn.Sequential):
        return any(remembers(layer) for layer in neuron)
    return _forget(neuron) is not None


def spikes_of(output: Any, owner: str = "a neuron") -> Tensor:
    """The spikes in a neuron's output, which may come with its state behind them."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(f"a neuron must give a tensor of spikes, {owner} gave {type(output).__name__}")


def _forget(neuron: nn.Module) -> Callable[[], Any] | None:
    """What clears the neuron's memory, if it has one."""
    name = "reset" if hasattr(neuron, "step_mode") else "reset_mem"
    clear: Callable[[], Any] | None = getattr(neuron, name, None)
    return clear if callable(clear) else None


def _clear(neuron: nn.Module) -> None:
    for module in neuron.modules():
        forget = _forget(module)
        if forget is not None:
            forget()
