"""A sequence cut into chunks: every neuron goes on where the chunk before left it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Streamed:
    """A neuron whose state a `Stream` hands over from chunk to chunk."""

    carrier: Stream | None = None


class Stream:
    """Runs a model on one chunk of frames after the other, as if they came in one piece.

    Called like the model in eval mode, or used as a context within which the model (and what it is made of) may be
    called in any way; either way membranes go on from the call before, and spikes and membranes are those of the uncut
    sequence. What the model averages over time it averages over the chunk. There are no gradients. `reset`
    starts a new sequence; outside the stream the model has no memory, as ever.

    An error leaves the states as they were before the call, or the context.

    Shapes: those of the model; the batch must be the same for all chunks.

    Raises `TypeError` for a model whose memory cannot be handed over: one that is compiled, was rebuilt for
    inference, has one neuron in two places or layers with a state of their own, such as `nn.LSTM`. Raises
    `RuntimeError` in training mode, where a chunk's norms would differ from the sequence's.

    >>> block = SpikingMLP(8).eval()
    >>> stream, x = Stream(block), torch.randn(4, 2, 8, 3, 3)
    >>> parts = torch.cat([stream(x[:1]), stream(x[1:])])
    >>> torch.equal(parts, block(x))
    True
    """

    def __init__(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            reason = _obstacle(module)
            if reason:
                what = f"{type(module).__name__} {name}".rstrip()
                raise TypeError(f"{what} cannot be streamed: {reason}")
        self.model = model
        everywhere = [module for _, module in model.named_modules(remove_duplicate=False)]
        self.neurons = [module for module in everywhere if isinstance(module, Streamed)]
        if not self.neurons or len(set(self.neurons)) < len(self.neurons):
            what = "one neuron in several places" if self.neurons else "no neuron whose state could be handed over"
            raise TypeError(f"{type(model).__name__} cannot be streamed: it has {what}")
        self._states: dict[Streamed, Any] = {}
        self._before = self._states

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        with self:
            return self.model(*inputs, **options)

    def __enter__(self) -> Stream:
        if any(module.training for module in self.model.modules()):
            raise RuntimeError("streaming needs eval mode: in training a chunk's norms differ from the sequence's")
        if any(neuron.carrier is not None for neuron in self.neurons):
            raise RuntimeError("the model is within a stream already; leave that one first")
        for neuron in self.neurons:
            neuron.carrier = self
        self._before = dict(self._states)
        self._no_grad = torch.no_grad()
        self._no_grad.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: Any) -> None:
        self._no_grad.__exit__(kind, *exception)
        if kind is not None:
            self._states = self._before
        for neuron in self.neurons:
            neuron.carrier = None

    def reset(self) -> None:
        """Forgets all states: the next chunk begins a sequence."""
        self._states.clear()

    def membrane(self, neuron: Streamed, x: Tensor) -> Tensor | None:
        """Where the neuron stood after the chunk before x `[T, ...]`; `None` at the start."""
        membrane: Tensor | None = self._states.get(neuron)
        if membrane is not None and membrane.shape != x.shape[1:]:
            raise ValueError(
                f"a stream's chunks must have one shape but for their length: a neuron had {list(membrane.shape)} and "
                f"now gets {list(x.shape[1:])} a step; call reset() before another sequence"
            )
        return membrane

    def state(self, neuron: Streamed) -> Any:
        """What was kept for the neuron last; `None` at the start."""
        return self._states.get(neuron)

    def keep(self, neuron: Streamed, state: Any) -> None:
        """Keeps a neuron's state for the next chunk."""
        self._states[neuron] = state


def _obstacle(module: nn.Module) -> str | None:
    if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
        return "it is compiled; stream the model that was compiled"
    if not getattr(module, "streams", True):
        return "it was rebuilt for inference and keeps no membranes; stream the model that it was made from"
    if isinstance(module, nn.RNNBase):
        return "its state would start anew with every chunk"
    return None
