"""Triton kernels of batch normalization: statistics of an input that is read once, in its own dtype, and its gradient.

A tile sums distances from its first value, so that a large mean costs no precision. N inputs of the same layout, one or
three, share a launch: where each has a tensor of its own, a kernel takes three pointers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import SIZES, elements, first_axis, in_x, of_channel, one_of, place, second_axis, store_by_channel, which


@triton.jit(do_not_specialize=SIZES)
def moments(
    x,
    x_1,
    x_2,
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
    N: tl.constexpr,
):
    """For each program: first value, and sum and sum of squares of distances from it, in `[N, 3, runs, channels]`."""
    n = which(N)
    x = one_of(n, x, x_1, x_2, N)
    c, there, groups, mask, _image = place(positions, channels, inner, tokens, INNERMOST, SINGLE, A, B, V, INDEX, N)
    at = elements(in_x(groups, chunk, chunk_stride, DENSE), V)
    if INNERMOST:
        run = second_axis().to(INDEX)
        runs = tl.num_programs(1) * tl.num_programs(2)
        row = channels * V
        first = run * A * channels + c // V
        exists = there & (run * A < positions)
        start = tl.load(x + in_x(first, chunk, chunk_stride, DENSE) * V + c % V, mask=exists, other=0.0).to(STATE)
    else:
        run = first_axis(N)
        runs = tl.num_programs(0) // N
        row = channels
        begin = run.to(INDEX) * B
        first = begin + c * 0 if SINGLE else (begin // inner * channels + c) * inner + begin % inner
        start = tl.load(x + in_x(first, chunk, chunk_stride, DENSE) * V, mask=there, other=0.0).to(STATE)
    of_x = tl.zeros([A, B, V], STATE)
    of_squares = tl.zeros([A, B, V], STATE)
    for t in tl.range(STEPS, loop_unroll_factor=UNROLL):
        value = tl.load(x + tl.cast(t, tl.int64) * x_step * V + at, mask=mask, other=0.0).to(STATE)
        distance = value - start
        of_x += distance
        of_squares += distance * distance
    rows = runs.to(tl.int64) * row
    partial += 3 * n * rows + run.to(tl.int64) * row
    tl.store(partial + c, start, mask=there)
    store_by_channel(partial + rows, rows, c, there, of_x, of_squares, mask, INNERMOST)


@triton.jit
def _of_runs(partial, run, runs, last, channels, c, step, positions, weight):
    """Of each given run: its number of values, first value, and sum and sum of squares of the distances from that."""
    mask = (run < last)[:, None] & (c < channels)[None, :]
    left = positions - run.to(tl.int64) * step
    count = tl.where(run < last, tl.maximum(tl.minimum(left, step), 0), 0).to(tl.float64)[:, None] * weight
    at = partial + run.to(tl.int64)[:, None] * channels + c[None, :]
    rows = runs.to(tl.int64) * channels
    start = tl.load(at, mask=mask, other=0.0).to(tl.float64)
    of_x = tl.load(at + rows, mask=mask, other=0.0).to(tl.float64)
    of_squares = tl.load(at + 2 * rows, mask=mask, other=0.0).to(tl.float64)
    return count, start, of_x, of_squares


@triton.jit
def _merged(partial, runs, first, last, channels, c, step, positions, weight, RUNS: tl.constexpr):
    """Mean, and sum of squared distances from it, merged from the `moments` of the runs from `first` up to `last`."""
    summed = tl.zeros([RUNS, c.shape[0]], tl.float64)
    number = tl.zeros([RUNS, 1], tl.float64)
    for begin in range(first, last, RUNS):
        run = begin + tl.arange(0, RUNS)
        count, start, of_x, _squares = _of_runs(partial, run, runs, last, channels, c, step, positions, weight)
        summed += tl.where(count > 0, count * start + of_x, 0.0)
        number += count
    middle = tl.sum(summed, axis=0) / tl.maximum(tl.sum(number, axis=0), 1)
    spread = tl.zeros([RUNS, c.shape[0]], tl.float64)
    for begin in range(first, last, RUNS):
        run = begin + tl.arange(0, RUNS)
        count, start, of_x, of_squares = _of_runs(partial, run, runs, last, channels, c, step, positions, weight)
        # Around the mean, `off` = m from the first value: sum (d - m)^2 = sum d^2 - m (2 sum d - n m).
        off = middle[None, :] - start
        spread += tl.where(count > 0, of_squares - off * (2 * of_x - count * off), 0.0)
    spread = tl.sum(spread, axis=0)
    # Not a maximum, which would hide a NaN.
    return middle, tl.where(spread < 0, 0.0, spread)


@triton.jit(do_not_specialize=["runs", "channels", "step", "positions", "weight", "per"])
def merge(partial, result, runs, channels, step, positions, weight, per, RUNS: tl.constexpr, CHANNELS: tl.constexpr):
    """Merges the `moments` of each `per` runs into one, around their common mean, in float64.

    A run has `step` positions of `weight` values each; the last run may have fewer.
    """
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    split = tl.program_id(1)
    n = tl.program_id(2).to(tl.int64)
    partial += 3 * n * runs * channels
    last = tl.minimum(runs, (split + 1) * per)
    middle, spread = _merged(partial, runs, split * per, last, channels, c, step, positions, weight, RUNS)
    rows = tl.num_programs(1).to(tl.int64) * channels
    to = result + 3 * n * rows + split.to(tl.int64) * channels + c
    tl.store(to, middle, mask=c < channels)
    tl.store(to + rows, tl.zeros([CHANNELS], tl.float64), mask=c < channels)
    tl.store(to + 2 * rows, spread, mask=c < channels)


@triton.jit
def _double(bits):
    """A float64 that kernels are not specialized on, from its bits as an integer."""
    return tl.full([1], bits.to(tl.int64), tl.int64).to(tl.float64, bitcast=True)


@triton.jit(
    do_not_specialize=["runs", "channels", "step", "positions", "weight", "count", "repeated", "momentum", "eps"]
)
def settle(
    partial,
    mean,
    inv_std,
    running_mean,
    running_mean_1,
    running_mean_2,
    running_var,
    running_var_1,
    running_var_2,
    batches,
    batches_1,
    batches_2,
    runs,
    channels,
    step,
    positions,
    weight,
    count,
    repeated,
    momentum,
    eps,
    INVERT: tl.constexpr,
    RUNNING: tl.constexpr,
    COUNT: tl.constexpr,
    RUNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    N: tl.constexpr,
):
    """Mean and inverse deviation (or variance) from the `moments` of all runs; also updates the running statistics.

    A channel has `count` values, or `repeated` with all repeats counted. `batches` is incremented.
    """
    n = tl.program_id(1)
    partial += 3 * n.to(tl.int64) * runs * channels
    mean += n * channels
    inv_std += n * channels
    if COUNT:
        batches = one_of(n, batches, batches_1, batches_2, N)
        # A branch: the interpreter of Triton 3.2 stores where a mask of one element says not to.
        if tl.program_id(0) == 0:
            tl.store(batches, tl.load(batches) + 1)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    there = c < channels
    middle, spread = _merged(partial, runs, 0, runs, channels, c, step, positions, weight, RUNS)
    variance = spread / count
    tl.store(mean + c, middle.to(mean.dtype.element_ty), mask=there)
    found = 1 / tl.sqrt(variance + _double(eps)) if INVERT else variance
    tl.store(inv_std + c, found.to(inv_std.dtype.element_ty), mask=there)
    if RUNNING:
        # A single value has no unbiased variance: the result is infinite or NaN.
        unbiased = variance * (repeated / (repeated - 1).to(tl.float64))
        share = _double(momentum)
        running_mean = one_of(n, running_mean, running_mean_1, running_mean_2, N)
        running_var = one_of(n, running_var, running_var_1, running_var_2, N)
        before = tl.load(running_mean + c, mask=there, other=0.0).to(tl.float64)
        tl.store(running_mean + c, (before + share * (middle - before)).to(running_mean.dtype.element_ty), mask=there)
        before = tl.load(running_var + c, mask=there, other=0.0).to(tl.float64)
        tl.store(running_var + c, (before + share * (unbiased - before)).to(running_var.dtype.element_ty), mask=there)


@triton.jit
def _all_runs(sums, runs, channels, c, RUNS: tl.constexpr):
    """The sum of `[runs, channels]` over the runs, in float64."""
    added = tl.zeros([RUNS, c.shape[0]], tl.float64)
    for begin in range(0, runs, RUNS):
        run = begin + tl.arange(0, RUNS)
        at = run.to(tl.int64)[:, None] * channels + c[None, :]
        added += tl.load(sums + at, mask=(run < runs)[:, None] & (c < channels)[None, :], other=0.0).to(tl.float64)
    return tl.sum(added, axis=0)


@triton.jit(do_not_specialize=["runs", "channels", "count"])
def gradients(
    sums,
    inv_std,
    mean,
    weight,
    weight_1,
    weight_2,
    of_weight,
    of_bias,
    factors,
    runs,
    channels,
    count,
    WEIGHT: tl.constexpr,
    STATE: tl.constexpr,
    RUNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    N: tl.constexpr,
):
    """The norm's gradients and the factors of `combine`, from a neuron's sums `[N, 3, runs, channels]`.

    `count` is the number of values of a channel, or 0 if mean and deviation were not computed from these.
    """
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    there = c < channels
    n = tl.program_id(1)
    weight = one_of(n, weight, weight_1, weight_2, N)
    inv_std += n * channels
    mean += n * channels
    of_weight += n * channels
    of_bias += n * channels
    factors += 3 * n * channels
    rows = runs.to(tl.int64) * channels
    sums += 3 * n * rows
    of_shift = _all_runs(sums + rows, runs, channels, c, RUNS).to(STATE)
    of_scale = _all_runs(sums + 2 * rows, runs, channels, c, RUNS).to(STATE)
    deviation = tl.load(inv_std + c, mask=there, other=0.0).to(STATE)
    scale = deviation * tl.load(weight + c, mask=there, other=0.0).to(STATE) if WEIGHT else deviation
    gain = of_scale * deviation
    share = tl.where(count > 0, -1.0, 0.0) / tl.maximum(count, 1).to(STATE)
    of_x = gain * scale * deviation * share
    constant = of_shift * scale * share - of_x * tl.load(mean + c, mask=there, other=0.0).to(STATE)
    tl.store(of_weight + c, gain, mask=there)
    tl.store(of_bias + c, of_shift, mask=there)
    tl.store(factors + c, scale, mask=there)
    tl.store(factors + channels + c, of_x, mask=there)
    tl.store(factors + 2 * channels + c, constant, mask=there)


@triton.jit(do_not_specialize=SIZES)
def combine(
    grad,
    grad_1,
    grad_2,
    x,
    x_1,
    x_2,
    factors,
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
    N: tl.constexpr,
):
    """`grad = a * grad + b * x + d` in place; a, b and d are the rows of `factors` `[N, 3, channels]`."""
    n = which(N)
    grad = one_of(n, grad, grad_1, grad_2, N)
    x = one_of(n, x, x_1, x_2, N)
    c, there, groups, mask, _image = place(positions, channels, inner, tokens, INNERMOST, SINGLE, A, B, V, INDEX, N)
    grad += elements(groups, V)
    x += elements(in_x(groups, chunk, chunk_stride, DENSE), V)
    row = channels * V if INNERMOST else channels
    factors += 3 * n * row
    of_grad = of_channel(factors, c, there, STATE)
    of_x = of_channel(factors + row, c, there, STATE)
    constant = of_channel(factors + 2 * row, c, there, STATE)
    for t in tl.range(STEPS, loop_unroll_factor=UNROLL):
        frame = tl.cast(t, tl.int64)
        to = grad + frame * size * V
        value = tl.load(to, mask=mask, other=0.0).to(STATE) * of_grad
        value += tl.load(x + frame * x_step * V, mask=mask, other=0.0).to(STATE) * of_x
        tl.store(to, (value + constant).to(grad.dtype.element_ty), mask=mask)
