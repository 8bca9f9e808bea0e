"""Leaky integrate-and-fire over a whole sequence."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..surrogate import KINDS, Surrogate, fire
from .bits import as_spikes
from .dispatch import fall_back, fused
from .fused import lif_op
from .spec import RESETS, SIGMOID, NeuronSpec, state_dtype


def lif_reference(
    x: Tensor,
    inv_tau: float | Tensor,
    membrane: Tensor | None = None,
    *,
    threshold: float = 1.0,
    reset: str = "zero",
    surrogate: Surrogate | Callable[[Tensor], Tensor] = SIGMOID,
    detach_reset: bool = True,
    strict: bool = False,
) -> tuple[Tensor, Tensor]:
    """The equations, one time step after the other; the definition of truth for every fused version.

        r[t] = s[t-1]                                      what fired, resets
        u[t] = h[t-1] * (1 - r[t])        (reset "zero"),  else h[t-1]
        h[t] = u[t] + (x[t] - u[t]) / tau - r[t] * threshold (reset "subtract" only)
        s[t] = 1 if h[t] >= threshold else 0               (`>` if strict)

    As in snnTorch, the membrane that is handed in and out is `h`, before its reset, and `r` is recomputed from it: so
    two halves of a sequence give what the whole gives, and snnTorch's own step can go on from it. The state is
    float32 for half-precision input, else of the input's dtype.

    Shapes: x `[T, ...]`; inv_tau a number, a 0-d tensor, or `[C]` for x `[T, B, C, ...]`; membrane `x.shape[1:]`.
    Returns spikes like x, and the last membrane `x.shape[1:]` in the state's dtype.
    """
    state_dtype = torch.promote_types(x.dtype, torch.float32)
    if isinstance(inv_tau, Tensor):
        inv_tau = inv_tau.to(state_dtype)
        if inv_tau.ndim == 1:
            inv_tau = inv_tau.view(-1, *[1] * (x.ndim - 3))
    h = x.new_zeros(x.shape[1:], dtype=state_dtype) if membrane is None else membrane.to(state_dtype)

    s = torch.zeros_like(h) if membrane is None else fire(h - threshold, surrogate, strict)
    spikes = []
    for x_t in x.unbind(0):
        r = s.detach() if detach_reset else s
        u = h * (1 - r) if reset == "zero" else h
        h = u + (x_t.to(state_dtype) - u) * inv_tau
        if reset == "subtract":
            h = h - r * threshold
        s = fire(h - threshold, surrogate, strict)
        spikes.append(s.to(x.dtype))
    return torch.stack(spikes), h


def lif(
    x: Tensor,
    inv_tau: float | Tensor,
    membrane: Tensor | None = None,
    *,
    threshold: float = 1.0,
    reset: str = "zero",
    surrogate: Surrogate | Callable[[Tensor], Tensor] = SIGMOID,
    detach_reset: bool = True,
    strict: bool = False,
    return_membrane: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Spikes of leaky integrate-and-fire neurons for a whole sequence; see `lif_reference` for the equations.

    Returns spikes `[T, ...]`, and with `return_membrane` the last membrane too.

    Raises `ValueError` for an empty sequence, a wrong `membrane` shape, a wrong `inv_tau` shape or an unknown `reset`;
    `TypeError` for input that is not floating point.

    >>> lif(torch.ones(4, 2), inv_tau=0.5, threshold=0.8).sum(0)
    tensor([1., 1.])
    """
    if not x.is_floating_point():
        raise TypeError(f"a neuron's input must be a floating-point tensor, got {x.dtype}")
    if x.ndim == 0 or x.shape[0] == 0:
        raise ValueError(f"a sequence needs at least one time step on its first axis, got the shape {list(x.shape)}")
    if membrane is not None and membrane.shape != x.shape[1:]:
        raise ValueError(f"the initial membrane must have the shape {list(x.shape[1:])}, got {list(membrane.shape)}")
    if isinstance(inv_tau, Tensor) and inv_tau.ndim and (x.ndim < 3 or inv_tau.shape != x.shape[2:3]):
        raise ValueError(
            f"a time constant per channel must have one value for each channel of [T, B, C, ...]; got "
            f"{list(inv_tau.shape)} for the input {list(x.shape)}"
        )
    if reset not in RESETS:
        raise ValueError(f"reset {reset!r} is unknown; choose one of {', '.join(RESETS)}")
    spec = constants(inv_tau, threshold, reset, surrogate, detach_reset, strict)
    if spec is not None and x.numel() and fused(x):
        dtype = state_dtype(x)
        spikes, last = lif_op(
            x,
            x.shape[0],
            spec.encode(),
            inv_tau.to(dtype) if isinstance(inv_tau, Tensor) else None,
            None if membrane is None else membrane.to(dtype),
            return_membrane,
        )
        as_spikes(spikes)
    else:
        spikes, last = lif_reference(
            x,
            inv_tau,
            membrane,
            threshold=threshold,
            reset=reset,
            surrogate=surrogate,
            detach_reset=detach_reset,
            strict=strict,
        )
    return (spikes, last) if return_membrane else spikes


def constants(
    inv_tau: float | Tensor,
    threshold: float = 1.0,
    reset: str = "zero",
    surrogate: Surrogate | Callable[[Tensor], Tensor] = SIGMOID,
    detach_reset: bool = True,
    strict: bool = False,
) -> NeuronSpec | None:
    """What a fused kernel is told of the neurons; `None`, with a warning, for a surrogate that no kernel knows."""
    if not isinstance(surrogate, Surrogate):
        name = getattr(surrogate, "__qualname__", type(surrogate).__qualname__)
        fall_back(
            f"the surrogate gradient {name} is not one of sdt_blocks.surrogate, of which {', '.join(KINDS)} are fused"
        )
        return None
    return NeuronSpec(
        threshold, reset, surrogate, detach_reset, strict, 0.0 if isinstance(inv_tau, Tensor) else float(inv_tau)
    )
