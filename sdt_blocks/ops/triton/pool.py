"""Triton kernels of max pooling: for each input of b bytes they move 1.25 b and 0.25 bytes more, forth and back.

For the bits of pooled spikes it is 1/32 byte more.

A program walks down a strip of windows, so that each row of the input is read, and reduced to its columns' maxima, once
for the windows above and below it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .tiles import LINE, THREADS, WIDEST, grid_of, index, second_axis

SIZES = ("strips", "per_plane", "height", "width", "rows", "columns", "channels")
ORDER = tl.constexpr(0x7FFFE000)
"""The bits of a float32, but its sign, that a half-precision value has."""
KEPT = tl.constexpr(ORDER.value - 0x80000000)
"""And with its sign, as an integer with one."""
STRIPS = (8, 7, 4)
"""Rows of windows of a strip: the first that leaves no rest, or the last."""


class Cut(NamedTuple):
    """How frames are cut into programs, as a kernel's arguments."""

    grid: tuple[int, int, int]
    arguments: dict[str, Any]


def cut(x: Tensor, out: Tensor, pack: bool = False) -> Cut:
    """The strips of windows of the frames x, contiguous or channels-last, whose maxima are `out`.

    To `pack` bytes of which a thread has a part, threads wait for each other once for four rows: so strips have four.
    """
    images, channels, height, width = x.shape
    rows, columns = out.shape[2:]
    innermost = not x.is_contiguous()
    widest = WIDEST // x.element_size()
    if innermost:
        group = min(widest, channels & -channels)
    else:
        # As many windows at once as have two inputs each within what a thread reads.
        group = min(max(widest // 2, 1), (width & -width) // 2) if width % 2 == 0 else 1
    fitting = (n for n in (STRIPS[-1:] if pack and group < 8 else STRIPS) if rows % n == 0)
    strip = next(fitting, min(STRIPS[-1], triton.next_power_of_2(rows)))
    per_plane = triton.cdiv(rows, strip)
    strips = (images if innermost else images * channels) * per_plane
    if innermost:
        unit = group
        channels //= group
        even = max(channels & -channels, min(2, triton.next_power_of_2(channels)))
        b = min(LINE // (group * x.element_size()), even)
        a = THREADS * widest // group // b
        grid = grid_of(triton.cdiv(channels, b), triton.cdiv(strips * columns, a))
    else:
        unit = 2 * group if width % 2 == 0 else 1
        a, b = max(THREADS * widest // 2, 1) // group, 1
        channels, width, columns = 1, width // unit, columns // group
        grid = (triton.cdiv(strips * columns, a), 1, 1)
    arguments = {
        "strips": strips,
        "per_plane": per_plane,
        "height": height,
        "width": width,
        "rows": rows,
        "columns": columns,
        "channels": channels,
        "INNERMOST": innermost,
        "STRIP": strip,
        "A": a,
        "B": b,
        "V": group,
        "U": unit,
        # What lies beyond the end is masked, but has an index.
        "INDEX": index(x.numel() + 4 * (a + strip) * x[0].numel()),
    }
    return Cut(grid, arguments)


@triton.jit
def _place(strips, per_plane, columns, channels, INNERMOST: tl.constexpr, STRIP, A, B, V, INDEX):
    """Plane, first row and group of columns of a program's windows; their columns and channels; which exist.

    Channels-last a group is one column, of V channels: `[A, B, V]`; else it has V columns: `[A, V]`.
    """
    if INNERMOST:
        n = (second_axis().to(INDEX) * A + tl.arange(0, A))[:, None, None]
        g = (tl.program_id(0) * B + tl.arange(0, B))[None, :, None]
        group = n % columns
        column = group
        k = g * V + tl.arange(0, V)[None, None, :]
        there = (n // columns < strips) & (g < channels)
    else:
        n = (tl.program_id(0).to(INDEX) * A + tl.arange(0, A))[:, None]
        group = n % columns
        column = group * V + tl.arange(0, V)[None, :]
        k = column * 0
        there = n // columns < strips
    strip = n // columns
    return strip // per_plane, strip % per_plane * STRIP, group, column, k, there


@triton.jit
def _three(x, plane, y, group, column, k, there, height, width, channels, INNERMOST: tl.constexpr, A, V, U, STATE):
    """The columns of one row of windows, -inf beyond the edges; the left ones may be the first alone."""
    low = float("-inf")
    inside = there & (y >= 0) & (y < height)
    if INNERMOST:
        middle = x + ((plane * height + y) * width + 2 * column) * (channels * V) + k
        left = tl.load(middle - channels * V, mask=inside & (column > 0), other=low)
        right = tl.load(middle + channels * V, mask=inside & (2 * column + 1 < width), other=low)
        return left.to(STATE), tl.load(middle, mask=inside, other=low).to(STATE), right.to(STATE)
    else:
        row = x + (plane * height + y) * width * U + group * (2 * V)
        lane = tl.arange(0, 2 * V)[None, :]
        # Only an odd width, of groups of one, ends within a pair.
        pairs = tl.load(row + lane, mask=inside & (group * (2 * V) + lane < width * U), other=low)
        middle, right = tl.split(tl.reshape(pairs, [A, V, 2]))
        first = tl.load(row - 1, mask=inside & (group > 0), other=low)
        return first.to(STATE), middle.to(STATE), right.to(STATE)


@triton.jit
def _to_the_right(first, x, A: tl.constexpr, V: tl.constexpr):
    """x `[A, V]` moved by one column, behind `first` `[A, 1]`; within a thread that is no instruction."""
    if V == 1:
        return first
    else:
        even, odd = tl.split(tl.reshape(x, [A, V // 2, 2]))
        return tl.reshape(tl.join(_to_the_right(first, odd, A, V // 2), even), [A, V])


@triton.jit
def _better(v, best):
    """Of equal ones the first stays; NaN takes all, as in PyTorch."""
    return (v > best) | (v != v)


@triton.jit
def _key(v, code, SIGNED_NAN: tl.constexpr):
    """A half-precision value, by way of float32, as an integer of the same order, with a code in its idle bits."""
    # -0 counts for 0, and NaN takes all; NVIDIA's sums make every NaN positive.
    bits = (v + 0.0).to(tl.int32, bitcast=True)
    if SIGNED_NAN:
        bits = tl.where(v != v, 0x7FC00000, bits)
    return ((bits ^ ((bits >> 31) & ORDER)) & KEPT) | code


@triton.jit
def _of_key(key):
    """The value of a key, and the place in its window."""
    bits = key & KEPT
    return (bits ^ ((bits >> 31) & ORDER)).to(tl.float32, bitcast=True), 8 - (key & 15)


@triton.jit
def _of_row(
    x,
    plane,
    y,
    group,
    column,
    k,
    there,
    height,
    width,
    channels,
    INNERMOST: tl.constexpr,
    A,
    V,
    U,
    STATE,
    KEYED,
    SIGNED_NAN,
):
    """Maximum and its column of one row of windows, or both as one key."""
    left, middle, right = _three(
        x, plane, y, group, column, k, there, height, width, channels, INNERMOST, A, V, U, STATE
    )
    if KEYED:
        # Beyond the edge is -inf, which the middle comes before.
        left = _key(left, tl.where((column if INNERMOST else group) > 0, 2, 0), SIGNED_NAN)
        right = _key(right, 0, SIGNED_NAN)
        left = left if INNERMOST else _to_the_right(left, right + 2, A, V)
        best = tl.maximum(tl.maximum(left, _key(middle, 1, SIGNED_NAN)), right)
        return best, best
    else:
        best = left if INNERMOST else _to_the_right(left, right, A, V)
        place = tl.where(column > 0, 0, 1) + tl.zeros(best.shape, tl.int32)
        better = _better(middle, best)
        best = tl.where(better, middle, best)
        place = tl.where(better, 1, place)
        better = _better(right, best)
        return tl.where(better, right, best), tl.where(better, 2, place)


@triton.jit
def _of_window(above, of_above, middle, of_middle, below, of_below, row, KEYED: tl.constexpr):
    """Maximum and its place of windows, from those of their rows."""
    if KEYED:
        best = tl.maximum(above + tl.where(row > 0, 6, 0), middle + 3)
        return _of_key(tl.maximum(best, below))
    else:
        better = _better(middle, above)
        best = tl.where(better, middle, above)
        place = tl.where(better, of_middle + 3, of_above + tl.where(row > 0, 0, 3))
        better = _better(below, best)
        return tl.where(better, below, best), tl.where(better, of_below + 6, place)


@triton.jit
def _store_bits(
    bits,
    fired,
    step: tl.constexpr,
    strips,
    per_plane,
    rows,
    columns,
    channels,
    INNERMOST: tl.constexpr,
    STRIP: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    V: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Stores up to four rows of `fired`, the last of them row `step` of the strip, a byte for neighbouring groups.

    Bit 8 i is for the i-th of the rows.
    """
    BEGIN: tl.constexpr = step // 4 * 4
    JOINED: tl.constexpr = 8 // V
    if INNERMOST:
        channels //= JOINED
        plane, first, _group, column, g, there = _place(
            strips, per_plane, columns, channels, INNERMOST, STRIP, A, B // JOINED, 1, INDEX
        )
        down = columns * channels
        byte = (plane * rows + first + BEGIN) * down + column * channels + g
        fired = tl.reshape(fired, [A, B // JOINED, 8]) << tl.arange(0, 8)[None, None, :]
        fired = tl.sum(fired, axis=2)[:, :, None]
    else:
        down = columns // JOINED
        plane, first, group, _column, _k, there = _place(
            strips, per_plane, down, channels, INNERMOST, STRIP, A // JOINED, B, 1, INDEX
        )
        byte = (plane * rows + first + BEGIN) * down + group
        fired = tl.sum(tl.reshape(fired, [A // JOINED, 8]) << tl.arange(0, 8)[None, :], axis=1)[:, None]
    for row in tl.static_range(step % 4 + 1):
        there_is = there & (first + BEGIN + row < rows)
        tl.store(bits + byte + row * down, (fired >> (8 * row)).to(tl.uint8), mask=there_is)


@triton.jit(do_not_specialize=SIZES)
def max_pool(
    x,
    out,
    bits,
    places,
    strips,
    per_plane,
    height,
    width,
    rows,
    columns,
    channels,
    KEEP: tl.constexpr,
    PACK: tl.constexpr,
    SIGNED_NAN: tl.constexpr,
    STATE: tl.constexpr,
    INNERMOST: tl.constexpr,
    STRIP: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    V: tl.constexpr,
    U: tl.constexpr,
    INDEX: tl.constexpr,
):
    plane, first, group, column, k, there = _place(
        strips, per_plane, columns, channels, INNERMOST, STRIP, A, B, V, INDEX
    )
    KEYED: tl.constexpr = x.dtype.element_ty.primitive_bitwidth == 16
    above, of_above = _of_row(
        x,
        plane,
        2 * first - 1,
        group,
        column,
        k,
        there,
        height,
        width,
        channels,
        INNERMOST,
        A,
        V,
        U,
        STATE,
        KEYED,
        SIGNED_NAN,
    )
    fired = tl.zeros(above.shape, tl.int32)
    for step in tl.static_range(STRIP):
        row = first + step
        middle, of_middle = _of_row(
            x,
            plane,
            2 * row,
            group,
            column,
            k,
            there,
            height,
            width,
            channels,
            INNERMOST,
            A,
            V,
            U,
            STATE,
            KEYED,
            SIGNED_NAN,
        )
        below, of_below = _of_row(
            x,
            plane,
            2 * row + 1,
            group,
            column,
            k,
            there,
            height,
            width,
            channels,
            INNERMOST,
            A,
            V,
            U,
            STATE,
            KEYED,
            SIGNED_NAN,
        )
        best, place = _of_window(above, of_above, middle, of_middle, below, of_below, row, KEYED)
        if INNERMOST:
            at = ((plane * rows + row) * columns + column) * (channels * V) + k
        else:
            at = ((plane * rows + row) * columns + group) * V + tl.arange(0, V)[None, :]
        tl.store(out + at, best.to(out.dtype.element_ty), mask=there & (row < rows))
        if KEEP:
            tl.store(places + at, place.to(tl.uint8), mask=there & (row < rows))
        if PACK:
            fired |= tl.where(best != 0, 1 << (8 * (step % 4)), 0)
            if step % 4 == 3 or step == STRIP - 1:
                _store_bits(
                    bits, fired, step, strips, per_plane, rows, columns, channels, INNERMOST, STRIP, A, B, V, INDEX
                )
                fired = tl.zeros(above.shape, tl.int32)
        above, of_above = below, of_below


@triton.jit
def _windows(grad, places, at, mask, STATE: tl.constexpr):
    """Gradient and place of the maxima of windows; no place where there is none."""
    of = tl.load(grad + at, mask=mask, other=0.0).to(STATE)
    return of, tl.load(places + at, mask=mask, other=255)


@triton.jit(do_not_specialize=SIZES)
def max_pool_backward(
    grad,
    places,
    grad_x,
    strips,
    per_plane,
    height,
    width,
    rows,
    columns,
    channels,
    STATE: tl.constexpr,
    INNERMOST: tl.constexpr,
    STRIP: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    V: tl.constexpr,
    U: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Two by two inputs gather from the four windows that hold one of them."""
    plane, first, group, column, k, there = _place(
        strips, per_plane, columns, channels, INNERMOST, STRIP, A, B, V, INDEX
    )
    across = channels * V if INNERMOST else 1
    down = columns * (channels * V) if INNERMOST else columns * V
    if INNERMOST:
        at = ((plane * rows + first) * columns + column) * (channels * V) + k
        right = there & (column + 1 < columns)
    else:
        at = ((plane * rows + first) * columns + group) * V + tl.arange(0, V)[None, :]
        right = there & (column + 1 < columns * V)
    here, of_here = _windows(grad, places, at, there & (first < rows), STATE)
    beside, of_beside = _windows(grad, places, at + across, right & (first < rows), STATE)
    for step in tl.static_range(STRIP):
        row = first + step
        at += down
        below, of_below = _windows(grad, places, at, there & (row + 1 < rows), STATE)
        diagonal, of_diagonal = _windows(grad, places, at + across, right & (row + 1 < rows), STATE)
        even = tl.where(of_here == 4, here, 0.0)
        odd = tl.where(of_here == 5, here, 0.0) + tl.where(of_beside == 3, beside, 0.0)
        _store_pair(
            grad_x, even, odd, plane, 2 * row, group, column, k, there, height, width, channels, INNERMOST, A, V, U
        )
        even = tl.where(of_here == 7, here, 0.0) + tl.where(of_below == 1, below, 0.0)
        odd = tl.where(of_here == 8, here, 0.0) + tl.where(of_beside == 6, beside, 0.0)
        odd = odd + tl.where(of_below == 2, below, 0.0) + tl.where(of_diagonal == 0, diagonal, 0.0)
        _store_pair(
            grad_x, even, odd, plane, 2 * row + 1, group, column, k, there, height, width, channels, INNERMOST, A, V, U
        )
        here, of_here = below, of_below
        beside, of_beside = diagonal, of_diagonal


@triton.jit
def _store_pair(
    grad_x, even, odd, plane, y, group, column, k, there, height, width, channels, INNERMOST: tl.constexpr, A, V, U
):
    """The gradient of the columns 2 c and 2 c + 1 of a row."""
    inside = there & (y < height)
    if INNERMOST:
        to = grad_x + ((plane * height + y) * width + 2 * column) * (channels * V) + k
        tl.store(to, even.to(grad_x.dtype.element_ty), mask=inside)
        tl.store(to + channels * V, odd.to(grad_x.dtype.element_ty), mask=inside & (2 * column + 1 < width))
    else:
        lane = tl.arange(0, 2 * V)[None, :]
        to = grad_x + (plane * height + y) * width * U + group * (2 * V) + lane
        pairs = tl.reshape(tl.join(even, odd), [A, 2 * V])
        inside = inside & (group * (2 * V) + lane < width * U)
        tl.store(to, pairs.to(grad_x.dtype.element_ty), mask=inside)
