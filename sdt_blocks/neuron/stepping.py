"""Neurons of other libraries, which take one time step a call and keep their state, as neurons for whole sequences."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import snntorch
import torch
from snntorch._neurons.neurons import SpikingNeuron
from torch import Tensor, nn

from .integer import IntegerNeuron
from .stream import Streamed, forget_of, other_shape


def over_time(neuron: nn.Module) -> nn.Module:
    """Wraps a neuron that takes single steps so that it takes a whole sequence, without memory between calls.

    It knows snnTorch's neurons (`Leaky`, `Synaptic`, `Alpha`, `Lapicque`, `RLeaky` and all others with `reset_mem`),
    SpikingJelly's (`step_mode` and `reset`, single-step or multi-step), and an `nn.Sequential` of such neurons. If a
    neuron returns a tuple, its first entry is the spikes. Blocks wrap what their neuron factory makes by themselves. A
    neuron that takes sequences and has no memory is returned unchanged.

    Shapes: `[T, ...] -> [T, ...]`.

    Raises `TypeError` if the argument is not a module, has a memory that cannot be cleared, or is a Sequential with a
    neuron that takes a whole sequence by itself.

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


_ONE_AT_A_TIME = threading.RLock()
"""A neuron keeps its state during a call, so threads that share a network take turns."""


class OverTime(nn.Module, Streamed):
    """The wrapper that `over_time` puts around `neuron`."""

    def __init__(self, neuron: nn.Module) -> None:
        super().__init__()
        whole = takes_sequence(neuron)
        for layer in _layers(neuron):
            if isinstance(layer, Streamed) or (getattr(layer, "step_mode", None) == "m" and not whole):
                raise TypeError(
                    f"over_time was given a Sequential in which {type(layer).__name__} takes a sequence, not single "
                    "steps: put over_time(...) around each of the other neurons instead"
                )
        self.neuron = neuron
        _clear(neuron)

    @property
    def states(self) -> int:
        """How many numbers a neuron keeps from one time step to the next."""
        return states_of(self.neuron)

    @property
    def emits(self) -> str:
        """ "spikes" if the neuron is known to return only zeros and ones, else "real"."""
        graded = torch.as_tensor(getattr(self.neuron, "graded_spikes_factor", 2.0))
        return "spikes" if _fires_as_snntorch(self.neuron) and bool((graded == 1).all()) else "real"

    @property
    def apart(self) -> bool:
        """Whether the samples of a batch are known not to influence each other."""
        return self.emits == "spikes"

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 0 or x.shape[0] == 0:
            raise ValueError(
                f"a sequence needs at least one time step on its first axis, got the shape {list(x.shape)}"
            )
        if self.carrier is None:
            if torch.compiler.is_compiling():
                return self._run_anew(x)
            with _ONE_AT_A_TIME:
                return self._run_anew(x)
        # The state of a stream is a neuron of its own, so that no other call can change it.
        before = self.carrier.state(self)
        with _ONE_AT_A_TIME:  # else it could start from what another thread's call has left in it so far
            neuron = copy.deepcopy(self.neuron if before is None else before)
        spikes = self._run(neuron, x)
        if before is not None:
            self._check_shapes(self.tensors_of(before), self.tensors_of(neuron), x)
        self.carrier.keep_state(self, neuron)
        return spikes

    @staticmethod
    def _check_shapes(before: Mapping[str, Tensor], after: Mapping[str, Tensor], x: Tensor) -> None:
        """Raises `ValueError` where the neuron has restarted by itself, or has continued with another batch."""
        for name, tensor in before.items():
            if tensor.shape[:1] != x.shape[1:2] or after.get(name, tensor).shape != tensor.shape:
                raise other_shape(tensor.shape, x.shape[1:])

    def _run_anew(self, x: Tensor) -> Tensor:
        try:
            return self._run(self.neuron, x)
        finally:
            _clear(self.neuron)

    def tensors_of(self, state: nn.Module) -> dict[str, Tensor]:
        """The tensors that the neuron and its parts keep but do not save: buffers, attributes, memories."""
        found: dict[str, Tensor] = {}
        for path, module in state.named_modules():
            passing = {key: module._buffers[key] for key in module._non_persistent_buffers_set}
            passing |= getattr(module, "_memories", {}) | vars(module)
            tensors = {key: value for key, value in passing.items() if isinstance(value, Tensor) and value.ndim}
            found |= {f"{path}.{key}".lstrip("."): value for key, value in tensors.items()}
        return found

    def state_of(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """A copy of the neuron with these tensors as its state."""
        neuron = copy.deepcopy(self.neuron)
        for name, value in tensors.items():
            path, _, key = name.rpartition(".")
            module = neuron.get_submodule(path)
            memories = getattr(module, "_memories", {})
            place = next((kept for kept in (module._buffers, memories) if key in kept), vars(module))
            place[key] = value
        return neuron

    def initial(self, name: str) -> float:
        """The value of a state's tensor at the start: SpikingJelly's neurons tell it, others start at zero."""
        path, _, key = name.rpartition(".")
        value = getattr(self.neuron.get_submodule(path), "_memories_rv", {}).get(key, 0.0)
        return float(value) if isinstance(value, int | float) else 0.0

    @torch.no_grad()
    def evaluate(self, x: Tensor) -> Tensor:
        """`forward(x)` without gradients: the same spikes, with fewer passes over memory for snnTorch's Leaky.

        U[t] = beta U[t-1] + x[t] - threshold S[t-1]     or, with reset "zero", beta (1 - S[t-1]) U[t-1] + x[t]
        S[t] = U[t] > threshold
        """
        if self.carrier is not None or x.dtype != torch.float32 or len(x) == 0 or not is_plain_leaky(self.neuron):
            spikes: Tensor = self(x)
            return spikes
        neuron: Any = self.neuron
        beta, threshold, reset = neuron.beta.clamp(0, 1), float(neuron.threshold), neuron.reset_mechanism
        fired, membrane = torch.empty_like(x), torch.zeros_like(x[0])
        before = torch.zeros_like(membrane)
        # In the order of snnTorch's own additions, so that the rounding is the same.
        for x_t, spikes_t in zip(x, fired, strict=True):
            if reset == "zero":
                membrane.masked_fill_(before != 0, 0.0)
            membrane.mul_(beta).add_(x_t)
            if reset == "subtract":
                membrane.sub_(before, alpha=threshold)
            before = torch.gt(membrane, threshold, out=spikes_t)
        return fired

    @staticmethod
    def _run(neuron: nn.Module, x: Tensor) -> Tensor:
        if takes_sequence(neuron):
            return spikes_of(neuron(x)).to(x.dtype)
        # snnTorch's spikes are float32 whatever the membrane is.
        return torch.stack([spikes_of(neuron(x_t)) for x_t in x.unbind(0)]).to(x.dtype)


def _fires_as_snntorch(neuron: Any) -> bool:
    """Whether a neuron fires by snnTorch's own step function: no other forward, no other surrogate.

    A user's own surrogate need not be a step in its forward, and may give other values than zeros and ones.
    """
    if not isinstance(neuron, SpikingNeuron) or {"forward", "fire", "fire_inhibition"} & vars(neuron).keys():
        return False
    of = [type(neuron).forward, type(neuron).fire, type(neuron).fire_inhibition, neuron.spike_grad]
    places = [str(getattr(function, "__module__", "")) for function in of]
    return all(place.startswith("snntorch._neurons.") or place == "snntorch.surrogate" for place in places)


def is_plain_leaky(neuron: Any) -> bool:
    """Whether `evaluate` computes what this neuron does: it is a `Leaky` without options that change its spikes."""
    if type(neuron) is not snntorch.Leaky or neuron.state_quant or neuron.inhibition or not neuron.reset_delay:
        return False
    if not _fires_as_snntorch(neuron):
        return False
    surrogate = getattr(neuron.spike_grad, "__qualname__", "").partition(".")[0]
    single = neuron.beta.numel() == neuron.threshold.numel() == 1 and neuron.beta.dtype == torch.float32
    plain = getattr(neuron.spike_grad, "__module__", "") == "snntorch.surrogate" and surrogate in _DETERMINISTIC
    return single and plain and bool((torch.as_tensor(neuron.graded_spikes_factor) == 1).all())


_DETERMINISTIC = ("atan", "fast_sigmoid", "sigmoid", "triangular")
"""snnTorch's surrogates whose forward is the Heaviside step; others draw spikes at random or are user-defined."""


def fires(module: nn.Module) -> bool:
    """Whether a module is a layer of neurons: one of the kit's, one wrapped by `over_time`, or any of snnTorch's."""
    snntorchs = any(cls.__module__.startswith("snntorch._neurons.") for cls in type(module).__mro__)
    return snntorchs or isinstance(module, Streamed | IntegerNeuron)


def clear_hidden(model: nn.Module) -> None:
    """Clears the state that neurons keep between calls of the model: snnTorch's with `init_hidden`, SpikingJelly's."""
    for module in model.modules():
        if getattr(module, "init_hidden", False) or hasattr(module, "step_mode"):
            _forget(module)


def takes_sequence(neuron: nn.Module) -> bool:
    """Whether the neuron takes `[T, B, ...]` in one call; other libraries' may say so by `step_mode`, "m" or "s"."""
    if isinstance(neuron, nn.Sequential):
        return all(takes_sequence(layer) for layer in neuron)
    mode = getattr(neuron, "step_mode", None)
    return mode != "s" if mode else not (isinstance(neuron, SpikingNeuron) and hasattr(neuron, "reset_mem"))


def remembers(neuron: nn.Module) -> bool:
    """Whether a neuron keeps a state from one call to the next."""
    if isinstance(neuron, nn.Sequential):
        return any(remembers(layer) for layer in neuron)
    return forget_of(neuron) is not None


def states_of(neuron: nn.Module) -> int:
    """How many numbers each neuron of a layer keeps from one time step to the next.

    A layer may say so itself, as `states`. SpikingJelly's neurons name their memories, snnTorch's take their states
    next to the input; any other is taken to have one, the membrane.

    >>> import snntorch
    >>> [states_of(neuron) for neuron in (LIF(), snntorch.Synaptic(alpha=0.9, beta=0.8), IntegerNeuron())]
    [1, 2, 0]
    """
    told = getattr(neuron, "states", None)
    if isinstance(told, int):
        return told
    if isinstance(neuron, nn.Sequential):
        return sum(states_of(layer) for layer in neuron if fires(layer) or remembers(layer))
    named = getattr(neuron, "named_memories", None)
    if callable(named):
        return len(list(named()))
    return len(inspect.signature(neuron.forward).parameters) - 1 if isinstance(neuron, SpikingNeuron) else 1


def spikes_of(output: Any, owner: str = "a neuron") -> Tensor:
    """The spikes in a neuron's output, which may be a tuple of the spikes and the state."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(f"a neuron must give a tensor of spikes, {owner} gave {type(output).__name__}")


def _clear(neuron: nn.Module) -> None:
    for module in neuron.modules():
        _forget(module)


def _forget(neuron: nn.Module) -> None:
    forget = forget_of(neuron)
    if forget is not None:
        forget()


def _layers(neuron: nn.Module) -> Iterator[nn.Module]:
    """The layers of a Sequential, and of those in it."""
    for layer in neuron if isinstance(neuron, nn.Sequential) else ():
        yield layer
        yield from _layers(layer)
