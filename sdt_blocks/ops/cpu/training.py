"""The training ops' kernels for CPU tensors, in C++ (`training.cpp`)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_int, c_int64
from typing import Any

import torch
from torch import Tensor

from ..spec import Layout, Mask, NeuronSpec, state_dtype
from .bindings import call, threads
from .bindings import neurons as neuron_array

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# Elements from which a second thread pays.
_WORTH_SHARING = 1 << 15


def lif_forward(
    x: Tensor,
    layout: Layout,
    neuron: NeuronSpec,
    *,
    scale: Tensor | None,
    shift: Tensor | None,
    inv_tau: Tensor | None,
    membrane: Tensor | None,
    keep_membrane: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Spikes `[steps, ...]` for the input `x * scale + shift`, and the last membrane."""
    spikes = layout.empty(x, layout.steps)
    last = layout.empty_frame(x, state_dtype(x)) if keep_membrane else None
    constants = 0 if inv_tau is None else inv_tau.numel()
    before = None if membrane is None else layout.frame(membrane)
    inputs = (x, scale, shift, inv_tau, constants, before)
    _call("lif_forward", x, layout, neuron_array(neuron), *inputs, spikes, last)
    return spikes, last


def lif_backward(
    grad: Tensor | None,
    grad_last: Tensor | None,
    x: Tensor,
    layout: Layout,
    neuron: NeuronSpec,
    *,
    scale: Tensor | None,
    shift: Tensor | None,
    center: Tensor | None,
    inv_tau: Tensor | None,
    membrane: Tensor | None,
    mask: Mask | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of `x * scale + shift` (like x), of the first membrane, and sums `[3, channels]` in float64.

    `mask` comes between `grad` and the neurons' spikes. The sums are over all neurons of a channel and all steps, of
    the gradient of the input times: what multiplies it in the gradient of `inv_tau`; 1; and, where `center` is given,
    `x - center`.
    """
    grad_x = layout.empty(x, x.shape[0])
    before = None if membrane is None else layout.frame(membrane)
    grad_before = None if before is None else torch.empty_like(before)
    sums = x.new_empty(3, layout.channels, dtype=torch.float64)
    constants = 0 if inv_tau is None else inv_tau.numel()
    grad = None if grad is None else layout.frames(grad)
    grad_step = 0 if grad is None else grad.stride(0)
    grad_last = None if grad_last is None else layout.frame(grad_last)
    masked = (None, None, 1, 0) if mask is None else (mask.values, mask.codes, mask.values.shape[1], mask.bit)
    inputs = (grad, grad_step, *masked, grad_last, x, scale, shift, center, inv_tau, constants, before)
    _call("lif_backward", x, layout, neuron_array(neuron), *inputs, grad_x, grad_before, sums)
    return grad_x, grad_before, sums


def attend(
    x: Sequence[Tensor],
    out: Tensor,
    codes: Tensor | None,
    sums: Tensor,
    layout: Layout,
    neurons: Sequence[NeuronSpec],
    *,
    scale: Tensor,
    shift: Tensor,
    inv_tau: Tensor | None,
) -> None:
    """Fills out with the masked spikes of q, for the inputs x of q, k and v; and sums, `[T, B, C]`.

    All but sums are dense `[T, B, C, ...]`, B outermost in a frame. `neurons` are those of q, k and v and of the
    sum; scale and shift `[3, C]`; inv_tau `[4, C]`. `codes`, if given, gets what fired: q, k and v as bits 0, 1 and 2.
    """
    q, k, v = x
    _call("attend", q, layout, q.shape[1], neuron_array(*neurons), q, k, v, scale, shift, inv_tau, out, codes, sums)


def mask_gradient(grad: Tensor, codes: Tensor, result: Tensor, layout: Layout) -> None:
    """Fills result `[T, B, C]` with `(grad * q).sum(tokens)`, for the codes of `attend` and grad in their order."""
    _call("mask_gradient", grad, layout, grad.shape[1], grad, grad.stride(0), codes, result)


def channel_statistics(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel `[channels]`, in float64."""
    mean, variance = (x.new_empty(layout.channels, dtype=torch.float64) for _ in range(2))
    _call("channel_statistics", x, layout, x, mean, variance)
    return mean, variance


def channel_combine(grad: Tensor, x: Tensor, layout: Layout, a: Tensor, b: Tensor, d: Tensor) -> None:
    """`grad = a * grad + b * x + d` in place, with a, b and d `[channels]`."""
    _call("channel_combine", x, layout, grad, x, a, b, d)


def max_pool(x: Tensor, out: Tensor, places: Tensor | None) -> None:
    """Fills out with the 3x3 maxima of stride 2 of x `[N, C, H, W]`, and places with where in its window each lies.

    All are contiguous, or all are channels-last.
    """
    _run("max_pool", x, _planes(x), x, out, places)


def max_pool_backward(grad: Tensor, places: Tensor, grad_x: Tensor) -> None:
    """Fills grad_x from the gradient of the maxima; all are contiguous, or all are channels-last."""
    _run("max_pool_backward", grad, _planes(grad_x), grad, places, grad_x)


def pack_bits(x: Tensor) -> Tensor | None:
    """One bit for each element of x in the order of memory, `[ceil(n / 8)]`; `None` where x is not all 0 and 1."""
    bits, binary = x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8), c_int()
    _run("pack_bits", x, x, x.numel(), _threads(x.numel()), bits, ctypes.byref(binary))
    return bits if binary.value else None


def unpack_bits(bits: Tensor, x: Tensor) -> None:
    """Fills x with the elements that `pack_bits` packed."""
    _run("unpack_bits", x, bits, x.numel(), _threads(x.numel()), x)


_FIELDS = ("steps", "size", "chunk", "chunk_stride", "x_step", "repeat", "channels", "inner")


class _Layout(ctypes.Structure):
    _fields_ = tuple((name, c_int64) for name in (*_FIELDS, "threads"))


def _run(name: str, x: Tensor, *arguments: Any) -> None:
    if call("training.cpp", name, _DTYPES[x.dtype], *arguments):
        raise TypeError(f"the compiler that built the CPU kernels has no type for {x.dtype}")


def _call(name: str, x: Tensor, layout: Layout, *arguments: Any) -> None:
    _run(name, x, _layout(layout, _threads(layout.size * layout.steps)), *arguments)


def _planes(x: Tensor) -> Any:
    return (c_int64 * 6)(*x.shape, not x.is_contiguous(), _threads(x.numel()))


def _threads(elements: int) -> int:
    return threads(elements, _WORTH_SHARING)


@functools.lru_cache(maxsize=1024)
def _layout(layout: Layout, team: int) -> Any:
    fields = [getattr(layout, name) for name in _FIELDS]
    return _Layout(*fields, team)
