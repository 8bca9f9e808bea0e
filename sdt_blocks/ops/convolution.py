"""Convolutions as ops, where PyTorch's own keep too much for the gradient or take too long for it.

A convolution of spikes keeps one bit per spike under `torch.compile`, as `bits.SpikesAsBits` does in eager code for any
layer. A depthwise one has the kit's kernel for the gradient of its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import fused, kernels
from .registered import registered
from .spec import state_dtype

DEPTHWISE = (5, 7)
"""The sizes of depthwise convolutions whose weights have a gradient of the kit's; for 3 x 3 PyTorch's is as fast."""


def convolve_spikes(
    frames: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """`F.conv2d` of frames `[N, C, H, W]` that are known to hold only zeros and ones (see `bits.as_spikes`).

    Layers that take the same frames share their bits.
    """
    channels_last = _is_channels_last(frames)
    bits = pack_op(frames.detach(), channels_last)
    result: Tensor = convolve_op(
        frames, bits, weight, bias, list(stride), list(padding), list(dilation), groups, channels_last
    )
    return result


@registered("sdt_blocks::pack")
def pack_op(frames: Tensor, channels_last: bool) -> Tensor:
    """One bit for each of the frames' spikes, in the given memory order."""
    frames = frames.contiguous(memory_format=_order(channels_last))
    bits = kernels(frames).pack_bits(frames)
    if bits is None:
        raise RuntimeError("frames that were noted as spikes hold values other than 0 and 1")
    return bits


@pack_op.register_fake
def _(frames, channels_last):
    return frames.new_empty((frames.numel() + 7) // 8, dtype=torch.uint8)


@registered("sdt_blocks::convolve_spikes")
def convolve_op(
    frames: Tensor,
    bits: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
) -> Tensor:
    """The convolution of frames; for the gradient only `bits` are kept, not the frames."""
    return torch.conv2d(frames, weight, bias, stride, padding, dilation, groups)


@convolve_op.register_fake
def _(frames, bits, weight, bias, stride, padding, dilation, groups, channels_last):
    return torch.conv2d(frames, weight, bias, stride, padding, dilation, groups)


@registered("sdt_blocks::convolve_spikes_backward")
def convolve_backward_op(
    grad: Tensor,
    bits: Tensor,
    weight: Tensor,
    shape: Sequence[int],
    biases: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    channels_last: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of frames `[N, C, H, W]` of this shape, of the weight and of the bias; empty if not wanted."""
    frames = torch.empty(shape, dtype=weight.dtype, device=grad.device, memory_format=_order(channels_last))
    kernels(frames).unpack_bits(bits, frames)
    return _backward(grad, frames, weight, biases, (stride, padding, dilation, groups), wanted)


@convolve_backward_op.register_fake
def _(grad, bits, weight, shape, biases, stride, padding, dilation, groups, channels_last, wanted):
    frames = torch.empty(shape, dtype=weight.dtype, device=grad.device, memory_format=_order(channels_last))
    return _library_backward(grad, frames, weight, biases, (stride, padding, dilation, groups), wanted)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    frames, bits, weight, bias, *ctx.geometry = inputs
    ctx.shape, ctx.biases = list(frames.shape), 0 if bias is None else bias.shape[0]
    ctx.save_for_backward(bits, weight)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    bits, weight = ctx.saved_tensors
    needed = ctx.needs_input_grad
    wanted = [needed[0], needed[2], needed[3]]
    found = convolve_backward_op(grad, bits, weight, ctx.shape, ctx.biases, *ctx.geometry, wanted)
    of_frames, of_weight, of_bias = (of if want else None for of, want in zip(found, wanted, strict=True))
    return of_frames, None, of_weight, of_bias, *[None] * 5


convolve_op.register_autograd(_gradients, keep=_keep)


# ---- depthwise convolutions


def has_own_gradient(x: Tensor, weight: Tensor, *geometry: Any) -> bool:
    """Whether the weight of a convolution of x `[N, C, H, W]` gets its gradient from a kernel of the kit's.

    The geometry is stride, padding, dilation and groups.
    """
    if not torch.is_grad_enabled() or x.device.type != "cpu":
        return False
    return _is_depthwise(weight, *geometry) and fused(x, even_traced=True)


def _is_depthwise(
    weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> bool:
    """Whether a convolution is depthwise, of one of the sizes `DEPTHWISE`, and keeps the size of its frames."""
    channels, per_group, height, width = weight.shape
    sized = height == width and height in DEPTHWISE and tuple(padding) == (height // 2, height // 2)
    return sized and channels == groups and per_group == 1 and tuple(stride) == tuple(dilation) == (1, 1)


@registered("sdt_blocks::depthwise")
def depthwise_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.conv2d` of x `[N, C, H, W]` with a weight `[C, 1, K, K]` and padding K / 2, for the K in `DEPTHWISE`."""
    return torch.conv2d(x, weight, bias, 1, weight.shape[-1] // 2, 1, weight.shape[0])


@depthwise_convolution.register_fake
def _(x, weight, bias):
    return torch.conv2d(x, weight, bias, 1, weight.shape[-1] // 2, 1, weight.shape[0])


@registered("sdt_blocks::depthwise_backward")
def depthwise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, biases: int, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, of the weight and of the bias; empty if not wanted."""
    return _backward(grad, x, weight, biases, _geometry_of(weight), wanted)


@depthwise_backward.register_fake
def _(grad, x, weight, biases, wanted):
    return _library_backward(grad, x, weight, biases, _geometry_of(weight), wanted)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias = inputs
    ctx.biases = 0 if bias is None else bias.shape[0]
    ctx.save_for_backward(x, weight)


def _depthwise_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    arguments, wanted = (grad, x, weight, ctx.biases), list(ctx.needs_input_grad)
    if torch.is_grad_enabled():  # PyTorch's has a gradient of its own
        found = _library_backward(*arguments, _geometry_of(weight), wanted)
    else:
        found = depthwise_backward(*arguments, wanted)
    return tuple(of if want else None for of, want in zip(found, wanted, strict=True))


depthwise_convolution.register_autograd(_depthwise_gradients, keep=_keep_inputs)


def _geometry_of(weight: Tensor) -> tuple[Any, ...]:
    return (1, 1), (weight.shape[-1] // 2,) * 2, (1, 1), weight.shape[0]


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, biases: int, geometry: tuple[Any, ...], wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of a convolution's input, weight and bias, empty if not wanted, by the fastest kernels."""
    fill = kernels(x).depthwise_weights if wanted[1] and _is_depthwise(weight, *geometry) else None
    if fill is None:
        return _library_backward(grad, x, weight, biases, geometry, wanted)
    *_, of_bias = _library_backward(grad, x, weight, biases, geometry, (False, False, wanted[2]))
    # Once more a convolution, by the turned weight: the library's own gradient takes up to twice as long.
    turned = depthwise_convolution.compute(grad, weight.flip(2, 3), None) if wanted[0] else grad.new_empty(0)
    of_x = _in_order_of(x, turned)
    of_weight = torch.empty(weight.shape, dtype=state_dtype(x), device=x.device)
    x, grad = (frames.contiguous(memory_format=torch.channels_last) for frames in (x, grad))
    fill(x, grad, of_weight)
    return of_x, of_weight.to(weight.dtype), of_bias


def _library_backward(
    grad: Tensor, x: Tensor, weight: Tensor, biases: int, geometry: tuple[Any, ...], wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    stride, padding, dilation, groups = geometry
    settings = (list(stride), list(padding), list(dilation), False, [0, 0], groups)
    found = torch.ops.aten.convolution_backward(grad, x, weight, [biases], *settings, list(wanted))
    of_x, of_weight, of_bias = (grad.new_empty(0) if of is None else of for of in found)
    return _in_order_of(x, of_x), of_weight, of_bias


def _in_order_of(x: Tensor, of_x: Tensor) -> Tensor:
    """The gradient of x, empty or not, in the memory order of x."""
    return of_x.contiguous(memory_format=_order(_is_channels_last(x))) if of_x.ndim == x.ndim else of_x


def _is_channels_last(frames: Tensor) -> bool:
    return frames.is_contiguous(memory_format=torch.channels_last) and not frames.is_contiguous()


def _order(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format
