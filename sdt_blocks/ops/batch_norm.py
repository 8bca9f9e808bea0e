"""Batch normalization alone, with a batch shared by several processes: for a single one PyTorch has fast kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .lif import gradients_of_equations, gradients_of_norm, normalized
from .norm_lif import statistics
from .registered import registered
from .spec import Affine, Norm, arrange, state_dtype


def batch_norm(x: Tensor, norm: Norm, *, time_steps: int | None = None) -> Tensor:
    """`nn.SyncBatchNorm` of the frames x `[T, B, C, ...]`, or of x `[1, B, C, ...]` shown `time_steps` times.

    `norm` has to be in training mode. Only x is kept for the backward pass.
    """
    steps, dtype = time_steps or x.shape[0], state_dtype(x)
    mean, inv_std = statistics(x, norm, steps // x.shape[0])
    parameters = [None if value is None else value.to(dtype) for value in (norm.weight, norm.bias)]
    y: Tensor = batch_norm_op(x, mean.to(dtype), inv_std.to(dtype), *parameters, norm.group)
    return y.expand(steps, *y.shape[1:])


@registered("sdt_blocks::batch_norm")
def batch_norm_op(
    x: Tensor, mean: Tensor, inv_std: Tensor, weight: Tensor | None, bias: Tensor | None, group: str
) -> Tensor:
    """The normalized x, shaped like x; mean and inv_std are those of the x of all processes."""
    x, layout = arrange(x, x.shape[0], per_channel=True)
    norm = Affine.of_one(mean, inv_std, weight, bias, True, group)
    scale, shift = (value.view(-1, *[1] * (x.ndim - 3)) for value in (norm.scale, norm.shift))
    return torch.addcmul(shift, x, scale, out=layout.empty(x, layout.steps))


@batch_norm_op.register_fake
def _(x, *_):
    x, layout = arrange(x, x.shape[0], per_channel=True)
    return layout.empty(x, layout.steps)


@registered("sdt_blocks::batch_norm_backward")
def batch_norm_backward_op(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    x, layout = arrange(x, x.shape[0], per_channel=True)
    norm = Affine.of_one(mean, inv_std, weight, bias, True, group)
    # As if mean and deviation did not depend on x: the sums over channels are then the gradients of weight and bias.
    frames = grad.flatten(0, 1), x.flatten(0, 1)
    settings = (None, mean, inv_std**-2, None, None, False, 0.0, [False, True, True])
    _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(*frames, *settings)
    sums = torch.stack([torch.zeros_like(mean), of_bias.to(mean), of_weight.to(mean) / inv_std])[None, :, None]
    of_x = layout.empty(x, layout.steps).copy_(grad)
    return of_x, *gradients_of_norm([of_x], [x], layout, norm, sums)


@batch_norm_backward_op.register_fake
def _(grad, x, mean, *_):
    x, layout = arrange(x, x.shape[0], per_channel=True)
    return layout.empty(x, layout.steps), torch.empty_like(mean), torch.empty_like(mean)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.group = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, mean, inv_std, weight, bias = ctx.saved_tensors
    of: Any
    if torch.is_grad_enabled():
        with torch.enable_grad():
            y = normalized(x, mean, inv_std, weight, bias, True, ctx.group)
        of = gradients_of_equations((y,), (x, weight, bias), (grad,))
    else:
        of = batch_norm_backward_op(grad, x, mean, inv_std, weight, bias, ctx.group)
    of_weight, of_bias = (
        None if value is None else gradient for value, gradient in zip((weight, bias), of[1:], strict=True)
    )
    return of[0], None, None, of_weight, of_bias, None


batch_norm_op.register_autograd(_gradients, keep=_keep)
