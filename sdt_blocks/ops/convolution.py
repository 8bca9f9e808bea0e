"""A convolution of spikes as ops that torch.compile traces: for the gradient they keep one bit per spike.

In eager code `bits.SpikesAsBits` does the same for any layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import kernels
from .registered import registered


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
    channels_last = frames.is_contiguous(memory_format=torch.channels_last) and not frames.is_contiguous()
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
    geometry = (list(stride), list(padding), list(dilation), False, [0, 0], groups)
    found = torch.ops.aten.convolution_backward(grad, frames, weight, [biases], *geometry, list(wanted))
    of_frames, of_weight, of_bias = (grad.new_empty(0) if of is None else of for of in found)
    return of_frames, of_weight, of_bias


@convolve_backward_op.register_fake
def _(grad, bits, weight, shape, biases, stride, padding, dilation, groups, channels_last, wanted):
    frames = torch.empty(shape, dtype=weight.dtype, device=grad.device, memory_format=_order(channels_last))
    geometry = (list(stride), list(padding), list(dilation), False, [0, 0], groups)
    found = torch.ops.aten.convolution_backward(grad, frames, weight, [biases], *geometry, list(wanted))
    of_frames, of_weight, of_bias = (grad.new_empty(0) if of is None else of for of in found)
    return of_frames, of_weight, of_bias


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


def _order(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format
