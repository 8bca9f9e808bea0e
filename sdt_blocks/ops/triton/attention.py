"""Triton kernels of spike-driven self-attention.

Traffic in bytes per element and time step, for an element of b bytes: forward 4 b (q, k and v read, masked spikes
written), plus 1 if a gradient will be needed; backward b + 1 for the mask's gradient, then for q a neuron's backward
traffic plus 1, and 2 b + 1 each for k and v.

A program goes over an image's tokens chunk by chunk, and runs all steps of a chunk before the next. Spikes wait in
registers, one bit per chunk and step, until the sums over all tokens decide what is masked.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..spec import Layout
from .lif import MOST_STEPS, charge, fires
from .tiles import (
    THREADS,
    WIDEST,
    cdiv,
    elements,
    grid_of,
    index,
    normalization,
    number,
    of_channel,
    second_axis,
    store_bits,
)

SIZES = ("size", "tokens", "channels", "rounds", "grad_step")
NUMBERS = ("inv_tau_number", "threshold_number", "mask_inv_tau_number", "mask_threshold_number")
# Width of a chunk in groups, of tokens or of channels: a larger one leaves more lanes idle at an image's end.
FEWEST = 8
# The most chunks times steps: each element's spikes are held as one bit for each of these.
BITS = 64
# Bytes that one memory access fetches: a chunk's row shorter than this would be fetched twice.
SECTOR = 32


class Cut(NamedTuple):
    """How an image is cut into programs and chunks, as kernel arguments."""

    grid: tuple[int, int, int]
    group: int
    fits: bool
    """Whether the spikes of all chunks and steps fit the bits that a program holds."""
    arguments: dict[str, Any]


def cut(x: Tensor, layout: Layout, *strides: int) -> Cut:
    """The chunks of x `[T, B, C, ...]`; a group must also divide `strides`, other distances between frames."""
    return _cut(x.element_size(), x.shape[1], x.shape[2], layout, strides)


@functools.lru_cache(maxsize=4096)
def _cut(element_size: int, images: int, channels: int, layout: Layout, strides: Sequence[int]) -> Cut:
    tokens = layout.size // (images * channels)
    innermost = layout.inner == 1 and channels > 1
    # With wider groups the membranes of three neurons would not fit the registers.
    group = min(WIDEST // element_size, 4)
    while any(number % group for number in (channels if innermost else tokens, *strides)):
        group //= 2
    if innermost:
        channels //= group
        b = min(FEWEST, triton.next_power_of_2(channels))
        chunk = 2 * THREADS // b
    else:
        tokens //= group
        chunk = FEWEST
    rounds = cdiv(tokens, chunk)
    while rounds * layout.steps > BITS and rounds > 1:
        chunk *= 2
        rounds = cdiv(tokens, chunk)
    bits = BITS // 2 if rounds * layout.steps <= BITS // 2 else BITS
    if innermost:
        # With 64 bits (two registers) per element, the registers do not suffice for twice the threads.
        fewer = bits == BITS and THREADS // chunk * group * element_size >= SECTOR
        a, b = chunk, max(1, min(b, (1 if fewer else 2) * THREADS // chunk))
        blocks = cdiv(channels, b)
    else:
        a, b = min(triton.next_power_of_2(channels), max(1, THREADS // chunk)), chunk
        blocks = cdiv(channels, a)
    arguments = {
        "size": layout.size // group,
        "tokens": tokens,
        "channels": channels,
        "rounds": rounds,
        "INNERMOST": innermost,
        "A": a,
        "B": b,
        "V": group,
        "INDEX": index(layout.size + 2 * a * b * group * layout.channels),
        "num_warps": max(1, min(a * b, 2 * THREADS) // 32),
        "BITS": tl.int64 if bits == BITS else tl.int32,
    }
    return Cut(grid_of(images, blocks), group, rounds * layout.steps <= BITS, arguments)


def unrolled(steps: int) -> int:
    """How many steps of a loop are unrolled."""
    return max(n for n in range(1, MOST_STEPS + 1) if steps % n == 0)


@triton.jit
def _channels(channels, INNERMOST: tl.constexpr, A: tl.constexpr, B: tl.constexpr, V: tl.constexpr):
    """A program's channels, `[A, 1, 1]` or, if innermost, `[1, B, V]`, and a mask of those that exist."""
    if INNERMOST:
        g = (second_axis() * B + tl.arange(0, B))[None, :, None]
        return g * V + tl.arange(0, V)[None, None, :], g < channels
    else:
        c = (second_axis() * A + tl.arange(0, A))[:, None, None]
        return c, c < channels


@triton.jit
def _chunk(chunk, image, tokens, channels, INNERMOST: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """The groups `[A, B, 1]` of a chunk, and a mask of those that exist."""
    if INNERMOST:
        n = (chunk * A + tl.arange(0, A))[:, None, None]
        g = (second_axis() * B + tl.arange(0, B))[None, :, None]
        return (image * tokens + n) * channels + g, (n < tokens) & (g < channels)
    else:
        n = (chunk * B + tl.arange(0, B))[None, :, None]
        c = (second_axis() * A + tl.arange(0, A))[:, None, None]
        return (image * channels + c) * tokens + n, (n < tokens) & (c < channels)


@triton.jit
def _over_tokens(x, INNERMOST: tl.constexpr):
    """The sum of x `[A, B, V]` over its tokens, in the shape of the channels."""
    if INNERMOST:
        return tl.sum(x, axis=0)[None, :, :]
    else:
        return tl.sum(tl.sum(x, axis=2), axis=1)[:, None, None]


@triton.jit
def _advance(x, mask, h, s, a, b, k, threshold, RESET: tl.constexpr, STRICT: tl.constexpr, STATE: tl.constexpr):
    """Membrane and spikes after one step of a neuron behind its normalization."""
    v = tl.load(x, mask=mask, other=0.0).to(STATE) * a + b
    h, _u = charge(h, s, v, k, threshold, RESET)
    return h, fires(h, threshold, STRICT)


@triton.jit
def _pack(
    bits,
    left,
    chunk,
    image,
    size,
    tokens,
    channels,
    STEPS: tl.constexpr,
    COUNT: tl.constexpr,
    INNERMOST: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    V: tl.constexpr,
):
    """Stores a chunk's spikes `left`, a bit per step, as a byte per step and eight neighbors, COUNT steps at once."""
    JOINED: tl.constexpr = 8 // V
    tokens = tokens if INNERMOST else tokens // JOINED
    channels = channels // JOINED if INNERMOST else channels
    groups, mask = _chunk(chunk, image, tokens, channels, INNERMOST, A, B // JOINED)
    for first in tl.static_range(0, STEPS, COUNT):
        fired = tl.zeros([A, B, V], tl.int32)
        for t in tl.static_range(COUNT):
            fired |= ((left >> (first + t)) & 1).to(tl.int32) << (8 * t)
        fired = tl.reshape(fired, [A, B // JOINED, 8])
        at = tl.full([], first, tl.int64)
        store_bits(bits, fired, groups, mask, at, size // JOINED, COUNT, STEPS)


@triton.jit(do_not_specialize=[*SIZES, *NUMBERS])
def attend(
    q,
    k,
    v,
    mean,
    inv_std,
    weight,
    weight_1,
    weight_2,
    bias,
    bias_1,
    bias_2,
    inv_tau,
    out,
    bits,
    codes,
    sums,
    size,
    tokens,
    channels,
    rounds,
    inv_tau_number,
    threshold_number,
    mask_inv_tau_number,
    mask_threshold_number,
    STEPS: tl.constexpr,
    UNROLL: tl.constexpr,
    RESET: tl.constexpr,
    STRICT: tl.constexpr,
    MASK_RESET: tl.constexpr,
    MASK_STRICT: tl.constexpr,
    AFFINE: tl.constexpr,
    TAU: tl.constexpr,
    KEEP: tl.constexpr,
    PACK: tl.constexpr,
    STATE: tl.constexpr,
    INNERMOST: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    V: tl.constexpr,
    INDEX: tl.constexpr,
    BITS: tl.constexpr,
):
    image = tl.program_id(0).to(INDEX)
    c, there = _channels(channels, INNERMOST, A, B, V)
    row = channels * V if INNERMOST else channels
    _mean, a_q, b_q = normalization(mean, inv_std, weight, bias, c, there, AFFINE, STATE)
    _mean, a_k, b_k = normalization(mean + row, inv_std + row, weight_1, bias_1, c, there, AFFINE, STATE)
    mean += 2 * row
    inv_std += 2 * row
    _mean, a_v, b_v = normalization(mean, inv_std, weight_2, bias_2, c, there, AFFINE, STATE)
    k_q = of_channel(inv_tau, c, there, STATE) if TAU else number(inv_tau_number, STATE)
    k_k = of_channel(inv_tau + row, c, there, STATE) if TAU else k_q
    k_v = of_channel(inv_tau + 2 * row, c, there, STATE) if TAU else k_q
    threshold = number(threshold_number, STATE)
    one = tl.full([1, 1, 1], 1, BITS)
    fired = tl.zeros([A, B, V], BITS)
    both = tl.zeros([A, B, V], BITS)
    for chunk in range(rounds):
        groups, mask = _chunk(chunk, image, tokens, channels, INNERMOST, A, B)
        i = elements(groups, V)
        first = one << tl.cast(chunk * STEPS, BITS)
        h_q = tl.zeros([A, B, V], STATE)
        h_k = h_q
        h_v = h_q
        q_fires = h_q > 1
        k_fires = q_fires
        v_fires = q_fires
        for t in tl.range(STEPS, loop_unroll_factor=UNROLL):
            at = tl.cast(t, tl.int64) * size * V + i
            h_q, q_fires = _advance(q + at, mask, h_q, q_fires, a_q, b_q, k_q, threshold, RESET, STRICT, STATE)
            h_k, k_fires = _advance(k + at, mask, h_k, k_fires, a_k, b_k, k_k, threshold, RESET, STRICT, STATE)
            h_v, v_fires = _advance(v + at, mask, h_v, v_fires, a_v, b_v, k_v, threshold, RESET, STRICT, STATE)
            if KEEP:
                code = tl.where(q_fires, 1, 0) | tl.where(k_fires, 2, 0) | tl.where(v_fires, 4, 0)
                tl.store(codes + at, code.to(tl.uint8), mask=mask)
            bit = first << tl.cast(t, BITS)
            fired |= tl.where(q_fires, bit, 0)
            # Lanes beyond the last token may fire too.
            both |= tl.where(k_fires & v_fires & mask, bit, 0)
    k_mask = of_channel(inv_tau + 3 * row, c, there, STATE) if TAU else number(mask_inv_tau_number, STATE)
    mask_threshold = number(mask_threshold_number, STATE)
    allowed = tl.zeros(c.shape, BITS)
    h = tl.zeros(c.shape, STATE)
    s = h > 1
    sums += image.to(tl.int64) * row + c
    # Not unrolled: there are no loads to hide, and unrolling would take registers from the loops above.
    for t in range(STEPS):
        count = tl.zeros([A, B, V], tl.int32)
        left = both >> tl.cast(t, BITS)
        for _round in range(rounds):
            count += left.to(tl.int32) & 1
            left >>= STEPS
        total = _over_tokens(count, INNERMOST).to(STATE)
        h, _u = charge(h, s, total, k_mask, mask_threshold, MASK_RESET)
        s = fires(h, mask_threshold, MASK_STRICT)
        allowed |= tl.where(s, one << tl.cast(t, BITS), 0)
        to = sums + tl.cast(t, tl.int64) * tl.num_programs(0) * row
        tl.store(to, total, mask=there)
        tl.store(to + STEPS * tl.num_programs(0).to(tl.int64) * row, tl.where(s, 1.0, 0.0).to(STATE), mask=there)
    for chunk in range(rounds):
        groups, mask = _chunk(chunk, image, tokens, channels, INNERMOST, A, B)
        i = elements(groups, V)
        left = (fired >> tl.cast(chunk * STEPS, BITS)) & allowed
        for t in tl.range(STEPS, loop_unroll_factor=UNROLL):
            masked = tl.where((left >> tl.cast(t, BITS)) & 1 != 0, 1.0, 0.0)
            tl.store(out + tl.cast(t, tl.int64) * size * V + i, masked.to(out.dtype.element_ty), mask=mask)
        if PACK:
            _pack(bits, left, chunk, image, size, tokens, channels, STEPS, PACK, INNERMOST, A, B, V)


@triton.jit(do_not_specialize=SIZES)
def mask_gradient(
    grad,
    codes,
    result,
    size,
    tokens,
    channels,
    rounds,
    grad_step,
    STEPS: tl.constexpr,
    UNROLL: tl.constexpr,
    STATE: tl.constexpr,
    INNERMOST: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    V: tl.constexpr,
    INDEX: tl.constexpr,
    BITS: tl.constexpr,
):
    """Sums of the gradient over an image's tokens where q fired, for each step."""
    image = tl.program_id(0).to(INDEX)
    c, there = _channels(channels, INNERMOST, A, B, V)
    row = channels * V if INNERMOST else channels
    result += image.to(tl.int64) * row + c
    for t in tl.range(STEPS, loop_unroll_factor=UNROLL):
        frame = tl.cast(t, tl.int64)
        total = tl.zeros([A, B, V], STATE)
        for chunk in range(rounds):
            groups, mask = _chunk(chunk, image, tokens, channels, INNERMOST, A, B)
            i = elements(groups, V)
            code = tl.load(codes + frame * size * V + i, mask=mask, other=0)
            given = tl.load(grad + frame * grad_step * V + i, mask=mask, other=0.0).to(STATE)
            total += tl.where(code & 1 != 0, given, 0.0)
        tl.store(result + frame * tl.num_programs(0) * row, _over_tokens(total, INNERMOST), mask=there)
