"""Triton kernels of integer neurons, alone and behind a normalization.

Traffic in bytes per element of b bytes: alone 2 b + 1 / 8 forward (including the bits that say where the gradient
passes) and 2 b + 1 / 8 backward; behind a norm 2 b forward and 3 b backward, for which only x is kept. In evaluation a
shortcut that is added first takes 8 more, read and written in float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

from ..spec import Affine, Layout, LevelSpec, state_dtype
from .arguments import STATES, affine, as_number, given, norm_kind, unrolled
from .lif import store_sums
from .tiles import (
    ROUNDED,
    SIZES,
    THREADS,
    WIDEST,
    Tile,
    cdiv,
    elements,
    in_x,
    normalization,
    number,
    place,
    tile,
    times_for,
)

NUMBERS = ("limit_number", "norm_number", "threshold_number")
"""The neuron's numbers, in the state's dtype; kernels are not specialized on them."""
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
MANY = 4
"""Groups of elements, over steps or side by side, that give a thread enough to do."""


def levels(x: Tensor, neuron: LevelSpec, values: Tensor, inside: Tensor | None) -> None:
    _launch(x, neuron, values, inside=inside, dtype=_TYPES.get(x.dtype))


def fire_levels(x: Tensor, neuron: LevelSpec, dtype: torch.dtype, shortcut: Tensor | None) -> tuple[Tensor, Tensor]:
    """`(u, l / norm of u)` with `u = shortcut + x`, or x itself without one, in evaluation; x is contiguous.

    Computed in float32 or better.
    """
    values, total = torch.empty(x.shape, dtype=dtype, device=x.device), x
    if shortcut is not None:
        shortcut = shortcut.contiguous()
        total = torch.empty(x.shape, dtype=torch.promote_types(shortcut.dtype, x.dtype), device=x.device)
    _launch(x, neuron, values, shortcut=shortcut, total=total)
    return total, values


def _launch(
    x: Tensor,
    neuron: LevelSpec,
    values: Tensor,
    *,
    inside: Tensor | None = None,
    shortcut: Tensor | None = None,
    total: Tensor | None = None,
    dtype: Any = None,
) -> None:
    """Each equation's result is rounded to `dtype`, by default that of the state."""
    told = numbers_of(x, neuron)
    with device_of(x):
        levels_kernel[_programs(x)](
            x,
            given(shortcut, x),
            given(total, x),
            values,
            given(inside, x),
            x.numel(),
            **told,
            SHORTCUT=shortcut is not None,
            KEEP=inside is not None,
            DTYPE=dtype or told["STATE"],
            **_lanes(x if total is None else total),
        )


def levels_backward(grad: Tensor, inside: Tensor, neuron: LevelSpec, grad_x: Tensor) -> None:
    with device_of(grad):
        levels_gradient_kernel[_programs(grad)](
            grad, inside, grad_x, grad.numel(), **numbers_of(grad, neuron), **_lanes(grad)
        )


def norm_levels(x: Tensor, layout: Layout, neuron: LevelSpec, norm: Affine, values: Tensor) -> None:
    cut = tile(x, layout, times=times_for(layout, MANY))
    with device_of(x):
        norm_levels_kernel[cut.grid](x, *affine(norm, x), values, **_cut(x, cut, layout, neuron, norm))


def norm_levels_backward(
    grad: Tensor, x: Tensor, layout: Layout, neuron: LevelSpec, norm: Affine, grad_x: Tensor
) -> Tensor:
    cut = tile(x, layout, grad.stride(0), times=times_for(layout, MANY))
    sums = x.new_empty(1, 3, cut.runs, layout.channels, dtype=state_dtype(x))
    with device_of(x):
        norm_levels_gradient_kernel[cut.grid](
            grad,
            x,
            *affine(norm, x),
            grad_x,
            sums,
            grad_step=grad.stride(0) // cut.group,
            **_cut(x, cut, layout, neuron, norm),
        )
    return sums


def _programs(x: Tensor) -> tuple[int]:
    return (cdiv(x.numel(), 8 * THREADS),)


def _lanes(x: Tensor) -> dict[str, int]:
    return {"LANES": min(8, WIDEST // x.element_size()), "BLOCK": THREADS}


def _cut(x: Tensor, cut: Tile, layout: Layout, neuron: LevelSpec, norm: Affine) -> dict[str, Any]:
    told = {**cut.arguments, **numbers_of(x, neuron)}
    return {**told, **unrolled(x, layout), "AFFINE": norm_kind(norm)}


def numbers_of(x: Tensor, neuron: LevelSpec) -> dict[str, Any]:
    """A kernel's arguments that describe the neuron.

    If both divisors are powers of two, kernels multiply by their inverses: the same bits, at a tenth of the
    instructions.
    """
    divisors = (neuron.norm, neuron.threshold)
    exact = all(_has_inverse(number) for number in divisors)
    numbers = (neuron.levels, *(1 / number if exact else number for number in divisors))
    return {
        **{name: as_number(x, value) for name, value in zip(NUMBERS, numbers, strict=True)},
        "UP": neuron.rounding == "up",
        "EXACT": exact,
        "STATE": STATES[state_dtype(x)],
        **ROUNDED,
    }


def _has_inverse(number: float) -> bool:
    mantissa, exponent = math.frexp(number)
    return mantissa == 0.5 and abs(exponent) < 120


@triton.jit
def divided(v, by, EXACT: tl.constexpr):
    """A quotient, rounded as PyTorch rounds it on a CPU; if EXACT, `by` is the divisor's inverse."""
    if EXACT:
        return v * by
    elif v.dtype == tl.float64:
        return v / by
    else:
        return tl.div_rn(v, by)


@triton.jit
def _nearest(v, STATE: tl.constexpr):
    """v >= 0 rounded to the nearest whole number, halves to even. From `big` on every number is whole."""
    big: tl.constexpr = 8388608.0 if STATE == tl.float32 else 4503599627370496.0  # noqa: SIM300
    return tl.where(v < big, (v + big) - big, v)


@triton.jit
def _inside(v, limit, UP: tl.constexpr):
    if UP:
        return (v > 0) & (v < limit)
    else:
        return (v >= 0) & (v <= limit)


@triton.jit
def level(v, limit, UP: tl.constexpr, DTYPE: tl.constexpr, STATE: tl.constexpr):
    """The level of v = x / threshold; each equation's result is rounded to DTYPE. NaN stays NaN."""
    clamped = tl.where(v < 0, 0.0, tl.where(v > limit, limit, v))
    return tl.floor((clamped + 0.5).to(DTYPE).to(STATE)) if UP else _nearest(clamped, STATE)


@triton.jit
def _gradient(grad, passes, norm, threshold, EXACT: tl.constexpr, DTYPE: tl.constexpr, STATE: tl.constexpr):
    """Masked by a product, so that a gradient that is not finite still shows."""
    grad = divided(grad, norm, EXACT).to(DTYPE).to(STATE) * tl.where(passes, 1.0, 0.0)
    return divided(grad, threshold, EXACT)


@triton.jit(do_not_specialize=NUMBERS)
def levels_kernel(
    x,
    shortcut,
    total,
    values,
    inside,
    size,
    limit_number,
    norm_number,
    threshold_number,
    UP: tl.constexpr,
    EXACT: tl.constexpr,
    SHORTCUT: tl.constexpr,
    KEEP: tl.constexpr,
    DTYPE: tl.constexpr,
    STATE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    limit, norm, threshold = number(limit_number, STATE), number(norm_number, STATE), number(threshold_number, STATE)
    limit = limit.to(DTYPE).to(STATE)
    byte = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[:, None, None]
    # One thread reads the elements of a byte, as many at once as possible.
    lane = tl.arange(0, LANES)[None, None, :]
    packed = tl.zeros([BLOCK, 1], tl.int32)
    for part in tl.static_range(8 // LANES):
        i = byte * 8 + part * LANES + lane
        v = tl.load(x + i, mask=i < size, other=0.0).to(STATE)
        if SHORTCUT:
            v = tl.load(shortcut + i, mask=i < size, other=0.0).to(STATE) + v
            tl.store(total + i, v.to(total.dtype.element_ty), mask=i < size)
        v = divided(v, threshold, EXACT).to(DTYPE).to(STATE)
        value = divided(level(v, limit, UP, DTYPE, STATE), norm, EXACT)
        tl.store(values + i, value.to(values.dtype.element_ty), mask=i < size)
        if KEEP:
            packed |= tl.sum(_inside(v, limit, UP).to(tl.int32) << (lane + part * LANES), axis=2)
    if KEEP:
        to = inside + byte
        tl.store(to, packed.to(tl.uint8)[:, :, None], mask=byte * 8 < size)


@triton.jit(do_not_specialize=NUMBERS)
def levels_gradient_kernel(
    grad,
    inside,
    grad_x,
    size,
    limit_number,
    norm_number,
    threshold_number,
    UP: tl.constexpr,
    EXACT: tl.constexpr,
    STATE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    norm, threshold = number(norm_number, STATE), number(threshold_number, STATE)
    dtype: tl.constexpr = grad.dtype.element_ty
    byte = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[:, None, None]
    lane = tl.arange(0, LANES)[None, None, :]
    packed = tl.load(inside + byte, mask=byte * 8 < size, other=0).to(tl.int32)
    for part in tl.static_range(8 // LANES):
        i = byte * 8 + part * LANES + lane
        of = tl.load(grad + i, mask=i < size, other=0.0).to(STATE)
        passes = (packed >> (lane + part * LANES)) & 1 != 0
        tl.store(grad_x + i, _gradient(of, passes, norm, threshold, EXACT, dtype, STATE).to(dtype), mask=i < size)


@triton.jit(do_not_specialize=[*SIZES, *NUMBERS])
def norm_levels_kernel(
    x,
    mean,
    inv_std,
    weight,
    bias,
    values,
    size,
    chunk,
    chunk_stride,
    x_step,
    positions,
    channels,
    inner,
    tokens,
    limit_number,
    norm_number,
    threshold_number,
    UP: tl.constexpr,
    EXACT: tl.constexpr,
    AFFINE: tl.constexpr,
    STEPS: tl.constexpr,
    UNROLL: tl.constexpr,
    STATE: tl.constexpr,
    INNERMOST: tl.constexpr,
    SINGLE: tl.constexpr,
    DENSE: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    V: tl.constexpr,
    INDEX: tl.constexpr,
    N: tl.constexpr,
):
    c, there, groups, mask, _image = place(positions, channels, inner, tokens, INNERMOST, SINGLE, A, B, V, INDEX, N)
    limit, norm, threshold = number(limit_number, STATE), number(norm_number, STATE), number(threshold_number, STATE)
    _middle, a, b = normalization(mean, inv_std, weight, bias, c, there, AFFINE, STATE)
    x += elements(in_x(groups, chunk, chunk_stride, DENSE), V)
    values += elements(groups, V)
    for t in tl.range(STEPS, loop_unroll_factor=UNROLL):
        frame = tl.cast(t, tl.int64)
        v = tl.load(x + frame * x_step * V, mask=mask, other=0.0).to(STATE) * a + b
        value = divided(level(divided(v, threshold, EXACT), limit, UP, STATE, STATE), norm, EXACT)
        tl.store(values + frame * size * V, value.to(values.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=[*SIZES, *NUMBERS])
def norm_levels_gradient_kernel(
    grad,
    x,
    mean,
    inv_std,
    weight,
    bias,
    grad_x,
    sums,
    size,
    chunk,
    chunk_stride,
    x_step,
    grad_step,
    positions,
    channels,
    inner,
    tokens,
    limit_number,
    norm_number,
    threshold_number,
    UP: tl.constexpr,
    EXACT: tl.constexpr,
    AFFINE: tl.constexpr,
    STEPS: tl.constexpr,
    UNROLL: tl.constexpr,
    STATE: tl.constexpr,
    INNERMOST: tl.constexpr,
    SINGLE: tl.constexpr,
    DENSE: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    V: tl.constexpr,
    INDEX: tl.constexpr,
    N: tl.constexpr,
):
    """Also sums the gradient of the normalized x, and its product with `x - mean`: the last two rows of `sums`."""
    c, there, groups, mask, _image = place(positions, channels, inner, tokens, INNERMOST, SINGLE, A, B, V, INDEX, N)
    limit, norm, threshold = number(limit_number, STATE), number(norm_number, STATE), number(threshold_number, STATE)
    middle, a, b = normalization(mean, inv_std, weight, bias, c, there, AFFINE, STATE)
    x += elements(in_x(groups, chunk, chunk_stride, DENSE), V)
    i = elements(groups, V)
    of_shift = tl.zeros([A, B, V], STATE)
    of_scale = tl.zeros([A, B, V], STATE)
    for t in tl.range(STEPS, loop_unroll_factor=UNROLL):
        frame = tl.cast(t, tl.int64)
        raw = tl.load(x + frame * x_step * V, mask=mask, other=0.0).to(STATE)
        of = tl.load(grad + frame * grad_step * V + i, mask=mask, other=0.0).to(STATE)
        passes = _inside(divided(raw * a + b, threshold, EXACT), limit, UP)
        of = _gradient(of, passes, norm, threshold, EXACT, STATE, STATE)
        of_shift += of
        of_scale += of * (raw - middle)
        tl.store(grad_x + frame * size * V + i, of.to(grad_x.dtype.element_ty), mask=mask)
    store_sums(sums, of_shift, of_shift, of_scale, c, there, mask, channels, AFFINE, 0, INNERMOST, V, N)
