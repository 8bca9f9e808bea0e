"""The max pooling between spiking layers, which keeps one byte per result for its gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .bits import as_spikes, wants_bits
from .dispatch import fused, kernels
from .registered import registered


def max_pool_reference(x: Tensor) -> Tensor:
    """3x3 max pooling, stride 2, padding 1: `[N, C, H, W] -> [N, C, ceil(H / 2), ceil(W / 2)]`."""
    return F.max_pool2d(x, 3, stride=2, padding=1)


def max_pool(x: Tensor, *, spikes: bool = False) -> Tensor:
    """Compute `max_pool_reference`, keeping the place of each maximum in its window for the gradient.

    Of equal values the first takes the whole gradient, as in PyTorch, which keeps x and an 8-byte index per result. If
    a gradient will be needed, it stays one op under `torch.compile` too. With `spikes`, x holds only zeros and ones;
    then so do the maxima, and are known to (see `bits.as_spikes`).

    >>> max_pool(torch.rand(2, 8, 7, 7)).shape
    torch.Size([2, 8, 4, 4])
    """
    differentiable = torch.is_grad_enabled() and x.requires_grad
    if x.ndim != 4 or x.numel() == 0 or not fused(x, even_traced=differentiable):
        return max_pool_reference(x)
    result, _, bits = max_pool_op(x, differentiable, spikes and wants_bits(x))
    return as_spikes(result, bits=bits) if spikes else result


@registered("sdt_blocks::max_pool")
def max_pool_op(x: Tensor, keep: bool, keep_bits: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The maxima, and with `keep` their places in the windows, 0 to 8 row by row, else empty.

    With `keep_bits`, if x is spikes and no byte crosses a position or row, their bits too, else empty.
    """
    x = _dense(x)
    out, places, bits = _results(x, keep, keep_bits)
    kernels(x).max_pool(x, out, places if keep else None, bits if bits.numel() else None)
    return out, places, bits


@max_pool_op.register_fake
def _(x, keep, keep_bits=False):
    return _results(_dense(x), keep, keep_bits)


@registered("sdt_blocks::max_pool_backward")
def max_pool_backward_op(grad: Tensor, places: Tensor, height: int, width: int) -> Tensor:
    """The gradient of the pooled frames `[N, C, height, width]`."""
    grad_x = _like_places(places, height, width, grad.dtype)
    grad = grad.contiguous(memory_format=_order(places))
    kernels(grad).max_pool_backward(grad, places, grad_x)
    return grad_x


@max_pool_backward_op.register_fake
def _(grad, places, height, width):
    return _like_places(places, height, width, grad.dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.size = inputs[0].shape[2:]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(*output[1:])


def _gradient(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None, None]:
    (places,) = ctx.saved_tensors
    if torch.is_grad_enabled():
        return _scattered(grad, places, *ctx.size), None, None
    return max_pool_backward_op(grad, places, *ctx.size), None, None


max_pool_op.register_autograd(_gradient, keep=_keep)


def _scattered(grad: Tensor, places: Tensor, height: int, width: int) -> Tensor:
    """`max_pool_backward_op` by operations that have a gradient themselves."""
    down, right = (torch.arange(size, device=grad.device) * 2 - 1 for size in grad.shape[2:])
    rows, columns = down[:, None] + places // 3, right + places % 3
    index = (rows * width + columns).flatten(2)
    frames = grad.new_zeros(*grad.shape[:2], height * width)
    return frames.scatter_add(2, index, grad.flatten(2)).unflatten(2, (height, width))


def _order(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def _dense(x: Tensor) -> Tensor:
    return x if x.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def _results(x: Tensor, keep: bool, keep_bits: bool) -> tuple[Tensor, Tensor, Tensor]:
    size = (*x.shape[:2], (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2)
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=_order(x))
    whole_bytes = (size[3] if x.is_contiguous() else size[1]) % 8 == 0
    bits = torch.empty(out.numel() // 8 if keep_bits and whole_bytes else 0, dtype=torch.uint8, device=x.device)
    if not keep:
        return out, torch.empty(0, dtype=torch.uint8, device=x.device), bits
    return out, torch.empty(size, dtype=torch.uint8, device=x.device, memory_format=_order(x)), bits


def _like_places(places: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    shape = (*places.shape[:2], height, width)
    return torch.empty(shape, dtype=dtype, device=places.device, memory_format=_order(places))
