"""The training ops' kernels for CPU tensors, in C++ (`training.cpp`); see `Kernels`."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_int, c_int64
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..spec import Affine, Arriving, Layout, Masks, NeuronSpec, Spikes, state_dtype
from .bindings import call, threads
from .bindings import neurons as neuron_array

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# Number of elements from which a second thread pays.
_WORTH_SHARING = 1 << 15
# Writing the bits made the neurons alone 10 to 25 % slower, and a training step no faster.
writes_bits = False


def lif_forward(
    x: Tensor,
    layout: Layout,
    neuron: NeuronSpec,
    norm: Affine | None,
    inv_tau: Tensor | None,
    membrane: Tensor | None,
    *,
    keep_membrane: bool = False,
    bits: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    spikes = layout.empty(x, layout.steps)
    last = layout.empty_frame(x, state_dtype(x)) if keep_membrane else None
    constants = 0 if inv_tau is None else inv_tau.numel()
    before = None if membrane is None else layout.frame(membrane)
    scale, shift = (None, None) if norm is None else (norm.scale, norm.shift)
    inputs = (x, scale, shift, inv_tau, constants, before)
    _call("lif_forward", x, layout, neuron_array(neuron), *inputs, spikes, last)
    if bits is not None:
        _pack(Spikes(spikes, bits))
    return spikes, last


class Mask(NamedTuple):
    """The factor of the gradient of spikes `[T, B, C, ...]` on its way to their neurons.

    With `codes` (one byte each, in the spikes' memory order) there is no other gradient: it is `values` wherever `bit`
    of the code is set. B is the outermost axis of a frame in memory.
    """

    values: Tensor
    """`[T, B, C]` in the state's dtype."""
    codes: Tensor | None = None
    bit: int = 0


def lif_backward(
    arriving: Arriving,
    x: Tensor,
    layout: Layout,
    neuron: NeuronSpec,
    norm: Affine | None,
    inv_tau: Tensor | None,
    membrane: Tensor | None,
    mask: Mask | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    grad_x = layout.empty(x, x.shape[0])
    before = None if membrane is None else layout.frame(membrane)
    grad_before = None if before is None else torch.empty_like(before)
    sums = x.new_empty(1, 3, 1, layout.channels, dtype=torch.float64)
    constants = 0 if inv_tau is None else inv_tau.numel()
    grad, grad_last = arriving
    grad = None if grad is None else layout.frames(grad)
    grad_step = 0 if grad is None else grad.stride(0)
    grad_last = None if grad_last is None else layout.frame(grad_last)
    masked = (None, None, 1, 0) if mask is None else (mask.values, mask.codes, mask.values.shape[1], mask.bit)
    affine = (None, None, None) if norm is None else (norm.scale, norm.shift, norm.mean)
    inputs = (grad, grad_step, *masked, grad_last, x, *affine, inv_tau, constants, before)
    _call("lif_backward", x, layout, neuron_array(neuron), *inputs, grad_x, grad_before, sums)
    return grad_x, grad_before, sums


def attend(
    x: Sequence[Tensor],
    out: Spikes,
    codes: Tensor | None,
    sums: Tensor,
    layout: Layout,
    neurons: Sequence[NeuronSpec],
    norm: Affine,
    inv_tau: Tensor | None,
) -> None:
    q, k, v = x
    inputs = (q, k, v, norm.scale, norm.shift, inv_tau)
    _call("attend", q, layout, q.shape[1], neuron_array(*neurons), *inputs, out.values, codes, sums)
    _pack(out)


def mask_gradient(grad: Tensor, codes: Tensor, result: Tensor, layout: Layout) -> None:
    _call("mask_gradient", grad, layout, grad.shape[1], grad, grad.stride(0), codes, result)


def attend_backward(
    grad: Tensor,
    masks: Masks,
    x: Sequence[Tensor],
    layout: Layout,
    neurons: Sequence[NeuronSpec],
    norm: Affine,
    inv_tau: Tensor | None,
) -> tuple[Sequence[Tensor], Tensor]:
    of_k, of_v = (Mask(masks.of_sums, masks.codes, bit) for bit in (2, 1))
    arriving = (grad, Mask(masks.of_q)), (None, of_k), (None, of_v)
    found = []
    for i, (given, masked) in enumerate(arriving):
        tau = None if inv_tau is None else inv_tau[i]
        found.append(lif_backward(Arriving(given), x[i], layout, neurons[i], norm.row(i), tau, None, masked))
    return [of_x for of_x, *_ in found], torch.cat([sums for *_, sums in found])


def channel_statistics(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    mean, variance = (x.new_empty(layout.channels, dtype=torch.float64) for _ in range(2))
    _call("channel_statistics", x, layout, x, mean, variance)
    return mean, variance


batch_statistics = None


def norm_gradients(
    grad: Sequence[Tensor],
    x: Sequence[Tensor],
    layout: Layout,
    norm: Affine,
    sums: Tensor,
    count: int | None,
    of_weight: Tensor,
    of_bias: Tensor,
) -> None:
    for i, (of_part, part) in enumerate(zip(grad, x, strict=True)):
        one, weight, bias = (norm, of_weight, of_bias) if len(x) == 1 else (norm.row(i), of_weight[i], of_bias[i])
        of_shift, of_scale = sums[i, 1:, 0].to(bias.dtype).unbind()
        torch.mul(of_scale, one.inv_std, out=weight)
        bias.copy_(of_shift)
        divisor = -torch.inf if count is None else -count
        b = weight * one.scale * one.inv_std / divisor
        d = of_shift * one.scale / divisor - b * one.mean
        _call("channel_combine", part, layout, of_part, part, one.scale, b, d)


def max_pool(x: Tensor, out: Tensor, places: Tensor | None, bits: Tensor | None = None) -> None:
    _run("max_pool", x, _planes(x), x, out, places)
    _pack(Spikes(out, bits))


def max_pool_backward(grad: Tensor, places: Tensor, grad_x: Tensor) -> None:
    _run("max_pool_backward", grad, _planes(grad_x), grad, places, grad_x)


def depthwise_weights(x: Tensor, grad: Tensor, weights: Tensor) -> None:
    _run("depthwise_weights", x, _planes(x), weights.shape[-1], x, grad, weights)


def pack_bits(x: Tensor) -> Tensor | None:
    bits = x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)
    return bits if _pack(Spikes(x, bits)) else None


def _pack(spikes: Spikes) -> bool:
    """Fill the bits, if there are any; returns whether all values are 0 or 1."""
    x, bits = spikes
    if bits is None:
        return True
    binary = c_int()
    _run("pack_bits", x, x, x.numel(), _threads(x.numel()), bits, ctypes.byref(binary))
    return bool(binary.value)


def unpack_bits(bits: Tensor, x: Tensor) -> None:
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
