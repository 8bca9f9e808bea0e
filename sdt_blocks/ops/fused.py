"""The fused neuron as a registered op: a whole sequence, with or without a batch normalization in front of it.

Nothing but the inputs is kept for the backward pass, which computes the membranes anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import kernels
from .spec import Layout, Mask, NeuronSpec, arrange, state_dtype


@torch.library.custom_op("sdt_blocks::lif", mutates_args=())
def lif_op(
    x: Tensor,
    steps: int,
    neuron: Sequence[float],
    inv_tau: Tensor | None = None,
    membrane: Tensor | None = None,
    keep_membrane: bool = False,
    mean: Tensor | None = None,
    inv_std: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    of_batch: bool = False,
) -> tuple[Tensor, Tensor]:
    """Spikes `[steps, ...]` and the last membrane (empty unless `keep_membrane`) of x `[steps or 1, ...]`.

    `neuron` is an encoded `NeuronSpec`; `inv_tau`, `membrane` and the normalization's values are of the state's dtype.
    With `mean` the input of the neurons is `(x - mean) * inv_std * weight + bias`, per channel; `of_batch` says that
    mean and inv_std are those of x, through which the gradient flows too.
    """
    x, layout = _arranged(x, steps, inv_tau, mean)
    scale, shift = affine(mean, inv_std, weight, bias)
    spikes, last = kernels(x).lif_forward(
        x,
        layout,
        NeuronSpec.decode(neuron),
        scale=scale,
        shift=shift,
        inv_tau=inv_tau,
        membrane=membrane,
        keep_membrane=keep_membrane,
    )
    return spikes, x.new_empty(0, dtype=state_dtype(x)) if last is None else last


@lif_op.register_fake
def _(x, steps, neuron, inv_tau=None, membrane=None, keep_membrane=False, mean=None, *_normalization):
    x, layout = _arranged(x, steps, inv_tau, mean)
    dtype = state_dtype(x)
    return layout.empty(x, steps), layout.empty_frame(x, dtype) if keep_membrane else x.new_empty(0, dtype=dtype)


@torch.library.custom_op("sdt_blocks::lif_backward", mutates_args=())
def lif_backward_op(
    grad: Tensor | None,
    grad_last: Tensor | None,
    x: Tensor,
    steps: int,
    neuron: Sequence[float],
    inv_tau: Tensor | None,
    membrane: Tensor | None,
    mean: Tensor | None,
    inv_std: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    of_batch: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, inv_tau, membrane, weight and bias; those of what was not given are empty."""
    x, layout = _arranged(x, steps, inv_tau, mean)
    gradients = lif_gradients(
        x,
        layout,
        NeuronSpec.decode(neuron),
        grad,
        grad_last=grad_last,
        inv_tau=inv_tau,
        membrane=membrane,
        mean=mean,
        inv_std=inv_std,
        weight=weight,
        bias=bias,
        of_batch=of_batch,
    )
    # A registered op returns tensors only, none of them twice.
    of_x, of_inv_tau, of_membrane, of_weight, of_bias = (
        x.new_empty(0, dtype=state_dtype(x)) if gradient is None else gradient for gradient in gradients
    )
    return of_x, of_inv_tau, of_membrane, of_weight, of_bias


def lif_gradients(
    x: Tensor,
    layout: Layout,
    neuron: NeuronSpec,
    grad: Tensor | None,
    *,
    mask: Mask | None = None,
    grad_last: Tensor | None = None,
    inv_tau: Tensor | None = None,
    membrane: Tensor | None = None,
    mean: Tensor | None = None,
    inv_std: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    of_batch: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, inv_tau, membrane, weight and bias, for those of the spikes (through the mask) and membrane."""
    scale, shift = affine(mean, inv_std, weight, bias)
    module = kernels(x)
    grad_x, grad_membrane, sums = module.lif_backward(
        grad,
        grad_last,
        x,
        layout,
        neuron,
        scale=scale,
        shift=shift,
        center=mean,
        inv_tau=inv_tau,
        membrane=membrane,
        mask=mask,
    )
    dtype = state_dtype(x)
    grad_inv_tau = grad_weight = grad_bias = None
    if mean is not None:
        of_shift, of_scale = sums[1:].to(dtype).unbind()
        grad_weight = of_scale * inv_std
        count = layout.size // layout.channels * x.shape[0] if of_batch else torch.inf
        b = grad_weight * scale * inv_std / -count
        frames = dataclasses.replace(layout, steps=x.shape[0])
        module.channel_combine(grad_x, x, frames, scale, b, of_shift * scale / -count - b * mean)
        grad_bias = of_shift.clone()
    if inv_tau is not None:
        grad_inv_tau = (sums[0] if inv_tau.ndim else sums[0].sum()).to(dtype, copy=True)
    return grad_x, grad_inv_tau, grad_membrane, grad_weight, grad_bias


@lif_backward_op.register_fake
def _(grad, grad_last, x, steps, neuron, inv_tau, membrane, mean, inv_std, weight, bias, of_batch):
    x, layout = _arranged(x, steps, inv_tau, mean)
    empty = [x.new_empty(0, dtype=state_dtype(x)) for _ in range(4)]
    return (
        layout.empty(x, x.shape[0]),
        empty[0] if inv_tau is None else torch.empty_like(inv_tau),
        empty[1] if membrane is None else layout.empty_frame(x, membrane.dtype),
        empty[2] if mean is None else torch.empty_like(mean),
        empty[3] if mean is None else torch.empty_like(mean),
    )


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, steps, neuron, inv_tau, membrane, keep_membrane, mean, inv_std, weight, bias, of_batch = inputs
    ctx.save_for_backward(x, inv_tau, membrane, mean, inv_std, weight, bias)
    ctx.steps, ctx.neuron, ctx.keep_membrane, ctx.of_batch = steps, neuron, keep_membrane, of_batch
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, grad_last: Tensor | None) -> tuple[Tensor | None, ...]:
    x, inv_tau, membrane, mean, inv_std, weight, bias = ctx.saved_tensors
    if not ctx.keep_membrane:
        grad_last = None
    of_x, of_inv_tau, of_membrane, of_weight, of_bias = torch.ops.sdt_blocks.lif_backward(
        grad, grad_last, x, ctx.steps, ctx.neuron, inv_tau, membrane, mean, inv_std, weight, bias, ctx.of_batch
    )
    given = (
        None if of is None else gradient
        for of, gradient in ((inv_tau, of_inv_tau), (membrane, of_membrane), (weight, of_weight), (bias, of_bias))
    )
    of_inv_tau, of_membrane, of_weight, of_bias = given
    return of_x, None, None, of_inv_tau, of_membrane, None, None, None, of_weight, of_bias, None


lif_op.register_autograd(_gradients, setup_context=_keep_inputs)


@torch.library.custom_op("sdt_blocks::channel_statistics", mutates_args=())
def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance `[C]` of every channel of x `[T, B, C, ...]`, in float32 or better."""
    x, layout = arrange(x, x.shape[0], per_channel=True)
    mean, variance = kernels(x).channel_statistics(x, layout)
    return mean, variance


@channel_statistics.register_fake
def _(x):
    return x.new_empty(x.shape[2], dtype=torch.float64), x.new_empty(x.shape[2], dtype=torch.float64)


def _arranged(x: Tensor, steps: int, inv_tau: Tensor | None, mean: Tensor | None) -> tuple[Tensor, Layout]:
    return arrange(x, steps, per_channel=mean is not None or (inv_tau is not None and inv_tau.ndim == 1))


def affine(
    mean: Tensor | None, inv_std: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """A normalization as `x * scale + shift`."""
    if mean is None or inv_std is None:
        return None, None
    scale = inv_std if weight is None else inv_std * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    return scale, shift
