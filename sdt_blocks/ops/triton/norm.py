"""Triton kernels of batch normalization: statistics of an input that is read once, in its own dtype, and its gradient.

A tile's sums are of the distance from its first value, so that a large mean costs no precision.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import SIZES, elements, in_x, of_channel, place, second_axis, store_by_channel


@triton.jit(do_not_specialize=SIZES)
def moments(
    x,
    partial,
    size,
    chunk,
    chunk_stride,
    x_step,
    positions,
    channels,
    inner,
    tokens,
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
):
    """First value, sum and sum of squares of the distances from it `[3, runs, channels]`, for each program."""
    c, there, groups, mask, _image = place(positions, channels, inner, tokens, INNERMOST, SINGLE, A, B, V, INDEX)
    at = elements(in_x(groups, chunk, chunk_stride, DENSE), V)
    if INNERMOST:
        run = second_axis()
        runs = tl.num_programs(1) * tl.num_programs(2)
        row = channels * V
        first = (run.to(INDEX) * A) * channels + c // V
        exists = there & (run * A < positions)
        start = tl.load(x + in_x(first, chunk, chunk_stride, DENSE) * V + c % V, mask=exists, other=0.0).to(STATE)
    else:
        run = tl.program_id(0)
        runs = tl.num_programs(0)
        row = channels
        n = run.to(INDEX) * B
        first = n + c * 0 if SINGLE else (n // inner * channels + c) * inner + n % inner
        start = tl.load(x + in_x(first, chunk, chunk_stride, DENSE) * V, mask=there, other=0.0).to(STATE)
    of_x = tl.zeros([A, B, V], STATE)
    of_squares = tl.zeros([A, B, V], STATE)
    for t in tl.range(STEPS, loop_unroll_factor=UNROLL):
        value = tl.load(x + tl.cast(t, tl.int64) * x_step * V + at, mask=mask, other=0.0).to(STATE)
        distance = value - start
        of_x += distance
        of_squares += distance * distance
    partial += run.to(tl.int64) * row
    rows = runs.to(tl.int64) * row
    tl.store(partial + c, start, mask=there)
    store_by_channel(partial + rows, rows, c, there, of_x, of_squares, mask, INNERMOST)


@triton.jit
def _of_runs(partial, run, runs, last, channels, c, step, positions, weight):
    """How many values some runs have, their first value, sum and sum of squares of distances from it."""
    mask = (run < last)[:, None] & (c < channels)[None, :]
    left = positions - run.to(tl.int64) * step
    count = tl.where(run < last, tl.maximum(tl.minimum(left, step), 0), 0).to(tl.float64)[:, None] * weight
    at = partial + run.to(tl.int64)[:, None] * channels + c[None, :]
    rows = runs.to(tl.int64) * channels
    start = tl.load(at, mask=mask, other=0.0).to(tl.float64)
    of_x = tl.load(at + rows, mask=mask, other=0.0).to(tl.float64)
    of_squares = tl.load(at + 2 * rows, mask=mask, other=0.0).to(tl.float64)
    return count, start, of_x, of_squares


@triton.jit(do_not_specialize=["runs", "channels", "step", "positions", "weight", "per"])
def merge(partial, result, runs, channels, step, positions, weight, per, RUNS: tl.constexpr, CHANNELS: tl.constexpr):
    """The `moments` of each `per` runs together, about their mean, in float64.

    A run has `step` positions of `weight` values each, but for the last.
    """
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    split = tl.program_id(1)
    last = tl.minimum(runs, (split + 1) * per)
    summed = tl.zeros([RUNS, CHANNELS], tl.float64)
    number = tl.zeros([RUNS, 1], tl.float64)
    for begin in range(0, per, RUNS):
        run = split * per + begin + tl.arange(0, RUNS)
        count, start, of_x, _squares = _of_runs(partial, run, runs, last, channels, c, step, positions, weight)
        summed += tl.where(count > 0, count * start + of_x, 0.0)
        number += count
    middle = tl.sum(summed, axis=0) / tl.maximum(tl.sum(number, axis=0), 1)
    spread = tl.zeros([RUNS, CHANNELS], tl.float64)
    for begin in range(0, per, RUNS):
        run = split * per + begin + tl.arange(0, RUNS)
        count, start, of_x, of_squares = _of_runs(partial, run, runs, last, channels, c, step, positions, weight)
        # About the middle m: sum (d - m)^2 = sum d^2 - m (2 sum d - n m), for distances d from the first value.
        off = middle[None, :] - start
        spread += tl.where(count > 0, of_squares - off * (2 * of_x - count * off), 0.0)
    spread = tl.sum(spread, axis=0)
    to = result + split.to(tl.int64) * channels + c
    rows = tl.num_programs(1).to(tl.int64) * channels
    tl.store(to, middle, mask=c < channels)
    tl.store(to + rows, tl.zeros([CHANNELS], tl.float64), mask=c < channels)
    # A maximum would hide a NaN.
    tl.store(to + 2 * rows, tl.where(spread < 0, 0.0, spread), mask=c < channels)


@triton.jit(do_not_specialize=SIZES)
def combine(
    grad,
    x,
    a,
    b,
    d,
    size,
    chunk,
    chunk_stride,
    x_step,
    positions,
    channels,
    inner,
    tokens,
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
):
    """`grad = a * grad + b * x + d` in place."""
    c, there, groups, mask, _image = place(positions, channels, inner, tokens, INNERMOST, SINGLE, A, B, V, INDEX)
    grad += elements(groups, V)
    x += elements(in_x(groups, chunk, chunk_stride, DENSE), V)
    of_grad = of_channel(a, c, there, STATE)
    of_x = of_channel(b, c, there, STATE)
    constant = of_channel(d, c, there, STATE)
    for t in tl.range(STEPS, loop_unroll_factor=UNROLL):
        frame = tl.cast(t, tl.int64)
        to = grad + frame * size * V
        value = tl.load(to, mask=mask, other=0.0).to(STATE) * of_grad
        value += tl.load(x + frame * x_step * V, mask=mask, other=0.0).to(STATE) * of_x
        tl.store(to, (value + constant).to(grad.dtype.element_ty), mask=mask)
