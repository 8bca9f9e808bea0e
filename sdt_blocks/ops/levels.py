"""Integer neurons, with or without a batch normalization in front of them.

For the backward pass, neurons alone keep one bit per element: whether the gradient passes. Behind a norm, only x is
kept.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_known
from ..surrogate import transformed
from .bits import gapless
from .dispatch import fused, kernels, level_kernels
from .lif import gradients_of_equations, gradients_of_norm, normalized
from .norm_lif import batch_norm_reference, fused_behind, statistics
from .registered import registered
from .spec import ROUNDINGS, Affine, Layout, LevelSpec, Norm, arrange, state_dtype


class _Levels(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, levels: int, rounding: str) -> Tensor:  # type: ignore[override]
        clamped = x.clamp(0, levels)
        return clamped.round() if rounding == "even" else (clamped + 0.5).floor()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(_inside(*inputs))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None


class _ForwardLevels(_Levels):
    """With a rule for forward-mode gradients, which torch.compile does not accept in a function."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        inside = _inside(*inputs)
        ctx.save_for_backward(inside)
        ctx.save_for_forward(inside)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:  # type: ignore[override]
        (inside,) = ctx.saved_tensors
        result: Tensor = tangent * inside
        return result


def _inside(x: Tensor, levels: int, rounding: str) -> Tensor:
    """Where the gradient passes: the ends of an open window, where silent neurons are, are left out."""
    return (x >= 0) & (x <= levels) if rounding == "even" else (x > 0) & (x < levels)


def levels_reference(x: Tensor, neuron: LevelSpec) -> Tensor:
    """The equations, each in the dtype of x; the reference for every fused version.

        l = round(clamp(x / threshold, 0, levels));   y = l / norm

    The gradient is passed straight through where `x / threshold` is within `[0, levels]`, excluding the ends if halves
    are rounded up. The result has the shape of x, which may be any.
    """
    x = x if neuron.threshold == 1 else x / neuron.threshold
    function = _ForwardLevels if transformed() else _Levels
    found: Tensor = function.apply(x, neuron.levels, neuron.rounding)
    return found if neuron.norm == 1 else found / neuron.norm


def levels(x: Tensor, neuron: LevelSpec) -> Tensor:
    """Compute `levels_reference`, equal to the bit, and keep one bit per element for the backward pass.

    Raises `ValueError` for an unknown rounding.

    >>> levels(torch.tensor([-1.0, 0.6, 2.5, 9.0]), LevelSpec(levels=4, norm=4.0))
    tensor([0.0000, 0.2500, 0.5000, 1.0000])
    """
    check_known("rounding", neuron.rounding, ROUNDINGS)
    if not x.is_floating_point() or x.numel() == 0 or not fused(x):
        return levels_reference(x, neuron)
    result: Tensor = levels_op(x, neuron.encode(), torch.is_grad_enabled() and x.requires_grad)[0]
    return result


@functools.lru_cache(maxsize=256)
@torch.no_grad()
def level_limits(neuron: LevelSpec) -> Tensor:
    """The smallest float32 of each level, `[levels]`: the level of a number is how many of these it reaches.

    Found by bisection of the equations, so that they decide about every number.

    >>> level_limits(LevelSpec(levels=4))
    tensor([0.5000, 1.5000, 2.5000, 3.5000])
    """
    level, found = torch.arange(1, neuron.levels + 1, device="cpu"), neuron._replace(norm=1.0)
    # Floats from zero on are in the order of their bits.
    below, reached = (torch.full((neuron.levels,), end).view(torch.int32) for end in (0.0, torch.inf))
    while (reached - below).max() > 1:
        middle = below + (reached - below) // 2
        reaches = levels_reference(middle.view(torch.float32), found) >= level
        below, reached = torch.where(reaches, below, middle), torch.where(reaches, middle, reached)
    return reached.view(torch.float32)


@registered("sdt_blocks::levels")
def levels_op(x: Tensor, neuron: Sequence[float], keep: bool = False) -> tuple[Tensor, Tensor]:
    """Values in the order of x; with `keep` also where the gradient passes, one bit per element, else empty."""
    x = _without_gaps(x)
    values, inside = _results(x, keep)
    level_kernels(x).levels(x, LevelSpec.decode(neuron), values, inside if keep else None)
    return values, inside


@levels_op.register_fake
def _(x, neuron, keep=False):
    return _results(x, keep)


@registered("sdt_blocks::levels_backward")
def levels_backward_op(grad: Tensor, inside: Tensor, strides: Sequence[int], neuron: Sequence[float]) -> Tensor:
    """The gradient of x from that of the values, whose memory layout is `strides`."""
    grad = _laid_out(grad, strides)
    grad_x = torch.empty_like(grad)
    level_kernels(grad).levels_backward(grad, inside, LevelSpec.decode(neuron), grad_x)
    return grad_x


@levels_backward_op.register_fake
def _(grad, inside, strides, neuron):
    return grad.new_empty_strided(grad.shape, strides)


def _keep_inside(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    values, inside = output
    ctx.neuron, ctx.strides = inputs[1], list(values.stride())
    ctx.save_for_backward(inside)
    ctx.mark_non_differentiable(inside)


def _gradient(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, None]:
    (inside,) = ctx.saved_tensors
    if torch.is_grad_enabled():
        # By operations that have a gradient themselves.
        neuron, passes = LevelSpec.decode(ctx.neuron), grad.new_empty_strided(grad.shape, ctx.strides)
        kernels(passes).unpack_bits(inside, passes)
        return grad / neuron.norm * passes / neuron.threshold, None, None
    return levels_backward_op(grad, inside, ctx.strides, ctx.neuron), None, None


levels_op.register_autograd(_gradient, keep=_keep_inside)


def _without_gaps(x: Tensor) -> Tensor:
    return x if gapless(x) else x.clone(memory_format=torch.preserve_format)


def _results(x: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((x.numel() + 7) // 8 if keep else 0, dtype=torch.uint8)


def _laid_out(grad: Tensor, strides: Sequence[int]) -> Tensor:
    """grad with these strides, copied only if an axis of more than one element has another stride."""
    if all(a == b or size == 1 for a, b, size in zip(grad.stride(), strides, grad.shape, strict=True)):
        return grad
    return grad.new_empty_strided(grad.shape, strides).copy_(grad)


# ---- behind a batch normalization


def batch_norm_levels_reference(x: Tensor, norm: Norm, neuron: LevelSpec, *, time_steps: int | None = None) -> Tensor:
    """`levels` of the normalized frames of x `[T, B, C, ...]`; arguments as in `batch_norm_lif_reference`."""
    return levels_reference(batch_norm_reference(x, norm, time_steps), neuron)


def batch_norm_levels(x: Tensor, norm: Norm, neuron: LevelSpec, *, time_steps: int | None = None) -> Tensor:
    """Compute `batch_norm_levels_reference`, keeping only x for the backward pass.

    In half precision the values are rounded once, at the end. As with `batch_norm_lif`, with the statistics of the
    batch it stays one op under `torch.compile`. A frame shown `time_steps` times is computed once.

    Raises `ValueError` for an unknown rounding, and for what `fused_behind` refuses.

    >>> batch_norm_levels(torch.randn(1, 2, 8, 5, 5), Norm(training=True), LevelSpec()).shape
    torch.Size([1, 2, 8, 5, 5])
    """
    check_known("rounding", neuron.rounding, ROUNDINGS)
    if not fused_behind(x, norm, time_steps):
        return batch_norm_levels_reference(x, norm, neuron, time_steps=time_steps)
    steps, dtype = time_steps or x.shape[0], state_dtype(x)
    mean, inv_std = statistics(x, norm, steps // x.shape[0])
    values = norm_levels_op(
        x,
        neuron.encode(),
        mean.to(dtype),
        inv_std.to(dtype),
        None if norm.weight is None else norm.weight.to(dtype),
        None if norm.bias is None else norm.bias.to(dtype),
        norm.training,
        norm.group,
    )
    return values.expand(steps, *x.shape[1:])


@registered("sdt_blocks::norm_levels")
def norm_levels_op(
    x: Tensor,
    neuron: Sequence[float],
    mean: Tensor,
    inv_std: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    of_batch: bool,
    group: str = "",
) -> Tensor:
    """Values `[T, B, C, ...]` of the normalized x; the normalization is given as in `lif_op`."""
    x, layout = _frames(x)
    values = layout.empty(x, layout.steps)
    norm = Affine.of_one(mean, inv_std, weight, bias, of_batch, group)
    level_kernels(x).norm_levels(x, layout, LevelSpec.decode(neuron), norm, values)
    return values


@norm_levels_op.register_fake
def _(x, *_):
    x, layout = _frames(x)
    return layout.empty(x, layout.steps)


@registered("sdt_blocks::norm_levels_backward")
def norm_levels_backward_op(
    grad: Tensor,
    x: Tensor,
    neuron: Sequence[float],
    mean: Tensor,
    inv_std: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    of_batch: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    x, layout = _frames(x)
    norm = Affine.of_one(mean, inv_std, weight, bias, of_batch, group)
    grad_x = layout.empty(x, layout.steps)
    sums = level_kernels(x).norm_levels_backward(layout.frames(grad), x, layout, LevelSpec.decode(neuron), norm, grad_x)
    return grad_x, *gradients_of_norm([grad_x], [x], layout, norm, sums)


@norm_levels_backward_op.register_fake
def _(grad, x, neuron, mean, *_):
    x, layout = _frames(x)
    return layout.empty(x, layout.steps), torch.empty_like(mean), torch.empty_like(mean)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, ctx.neuron, mean, inv_std, weight, bias, ctx.of_batch, ctx.group = inputs
    ctx.save_for_backward(x, mean, inv_std, weight, bias)


def _norm_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, mean, inv_std, weight, bias = ctx.saved_tensors
    of_x: Tensor | None
    of_weight: Tensor | None
    of_bias: Tensor | None
    if torch.is_grad_enabled():
        with torch.enable_grad():
            frames = normalized(x, mean, inv_std, weight, bias, ctx.of_batch, ctx.group)
            values = levels_reference(frames, LevelSpec.decode(ctx.neuron)).to(x.dtype)
        of_x, of_weight, of_bias = gradients_of_equations((values,), (x, weight, bias), (grad,))
    else:
        of_x, of_weight, of_bias = norm_levels_backward_op(
            grad, x, ctx.neuron, mean, inv_std, weight, bias, ctx.of_batch, ctx.group
        )
    of_weight = None if weight is None else of_weight
    return of_x, None, None, None, of_weight, None if bias is None else of_bias, None, None


norm_levels_op.register_autograd(_norm_gradients, keep=_keep_inputs)


def _frames(x: Tensor) -> tuple[Tensor, Layout]:
    return arrange(x, x.shape[0], per_channel=True)
