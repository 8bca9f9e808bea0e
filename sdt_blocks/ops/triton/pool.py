"""Triton kernels of max pooling. Bytes of traffic per input of b bytes: 1.25 b + 0.25, forward and backward alike.

Bits of the pooled spikes add 1/32 byte.

A program goes down a strip of windows, so that each row of the input is read, and reduced to its column-wise maxima,
only once for the windows above and below it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .tiles import LINE, THREADS, WIDEST, cdiv, grid_of, index, second_axis

SIZES = ("strips", "per_plane", "height", "width", "rows", "columns", "channels")
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
"""All bits except the sign bit."""
STRIPS = (8, 7, 4)
"""Rows of windows of a strip: the first number that divides the rows, else the last."""


class Cut(NamedTuple):
    """How frames are cut into programs, as kernel arguments."""

    grid: tuple[int, int, int]
    arguments: dict[str, Any]


def cut(x: Tensor, out: Tensor, pack: bool = False) -> Cut:
    """The strips of windows of the frames x, contiguous or channels-last, whose maxima are `out`.

    If threads share the bytes to `pack`, they wait for each other once every four rows: strips then have four rows.
    """
    images, channels, height, width = x.shape
    rows, columns = out.shape[2:]
    innermost = not x.is_contiguous()
    widest = WIDEST // x.element_size()
    if innermost:
        group = min(widest, channels & -channels)
    else:
        # As many windows at once as a thread's read covers with two inputs each.
        group = min(max(widest // 2, 1), (width & -width) // 2) if width % 2 == 0 else 1
    fitting = (n for n in (STRIPS[-1:] if pack and group < 8 else STRIPS) if rows % n == 0)
    strip = next(fitting, min(STRIPS[-1], triton.next_power_of_2(rows)))
    per_plane = cdiv(rows, strip)
    strips = (images if innermost else images * channels) * per_plane
    if innermost:
        unit = group
        channels //= group
        even = max(channels & -channels, min(2, triton.next_power_of_2(channels)))
        b = min(LINE // (group * x.element_size()), even)
        a = THREADS * widest // group // b
        grid = grid_of(cdiv(channels, b), cdiv(strips * columns, a))
    else:
        unit = 2 * group if width % 2 == 0 else 1
        a, b = max(THREADS * widest // 2, 1) // group, 1
        channels, width, columns = 1, width // unit, columns // group
        grid = (cdiv(strips * columns, a), 1, 1)
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
        # Whether every strip has all its rows, and every window two by two inputs of its own.
        "WHOLE": rows % strip == 0 and height % 2 == 0 and width % 2 == 0,
        "A": a,
        "B": b,
        "V": group,
        "U": unit,
        # Elements beyond the end are masked, but still have an index.
        "INDEX": index(x.numel() + 4 * (a + strip) * x[0].numel()),
    }
    return Cut(grid, arguments)


@triton.jit
def _place(strips, per_plane, columns, channels, INNERMOST: tl.constexpr, STRIP, A, B, V, INDEX):
    """Of a program's windows: plane, first row, group of columns, columns, innermost offset, and which exist.

    Channels-last, a group is one column of V channels, `[A, B, V]`; otherwise it is V columns, `[A, V]`.
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
        k = tl.arange(0, V)[None, :]
        there = n // columns < strips
    strip = n // columns
    return strip // per_plane, strip % per_plane * STRIP, group, column, k, there


@triton.jit
def _three(x, at, inside, group, column, width, channels, INNERMOST: tl.constexpr, A, V, U, WHOLE: tl.constexpr):
    """The left, middle and right column of each window in one row, -inf beyond the edges.

    Channels-last, `at` is the middle column's place; else it is that of the first window, whose left column alone is
    read.
    """
    low = float("-inf")
    x += at
    if INNERMOST:
        across = channels * V
        left = tl.load(x - across, mask=inside & (column > 0), other=low)
        right = tl.load(x + across, mask=inside if WHOLE else inside & (2 * column + 1 < width), other=low)
        return left, tl.load(x, mask=inside, other=low), right
    else:
        lane = tl.arange(0, 2 * V)[None, :]
        # Only an odd width, where groups are single windows, can end within a pair.
        within = inside if U > 1 else inside & (group * (2 * V) + lane < width * U)
        middle, right = tl.split(tl.reshape(tl.load(x + lane, mask=within, other=low), [A, V, 2]))
        return tl.load(x - 1, mask=inside & (group > 0), other=low), middle, right


@triton.jit
def _to_the_right(first, x, A: tl.constexpr, V: tl.constexpr):
    """x `[A, V]` moved right by one column, with `first` `[A, 1]` in front; within a thread this costs nothing."""
    tl.static_assert(V <= 4)
    if V == 1:
        return first
    else:
        even, odd = tl.split(tl.reshape(x, [A, V // 2, 2]))
        if V == 4:
            second, _last = tl.split(tl.reshape(odd, [A, 1, 2]))
            first = tl.reshape(tl.join(first, second), [A, 2])
        return tl.reshape(tl.join(first, even), [A, V])


@triton.jit
def _better(v, best):
    """Of equal values the first stays; a NaN always wins, as in PyTorch."""
    return (v > best) | (v != v)


@triton.jit
def _least(DTYPE: tl.constexpr):
    """The bits of -inf in half precision, as a signed integer in the upper half, as in a key."""
    return (-128 if DTYPE == tl.bfloat16 else -1024) * 65536  # noqa: SIM300


@triton.jit
def _key(v, code):
    """A half-precision value as an integer of the same order, with a code of 15 bits in its lower half.

    Both zeros count as 0. -inf is the smallest key, so that a negative NaN, which would be below it, wraps to the top.
    """
    bits = v.to(tl.uint16, bitcast=True).to(tl.int32) << 16
    # The lower half of a negative value is now all ones, so that adding 1 carries.
    return (bits ^ ((bits >> 31) & MAGNITUDE)) + (2 * code + 1 + _least(v.dtype))


@triton.jit
def _of_key(key, DTYPE: tl.constexpr):
    """The value of a key, its code, and whether the value is nonzero."""
    bits = key - _least(DTYPE)
    sign = bits >> 31
    half = (bits + (sign << 16)) ^ (sign & MAGNITUDE)
    return (half >> 16).to(tl.int16).to(DTYPE, bitcast=True), (key & 65535) >> 1, bits >> 16 != 0


@triton.jit
def _last_code(UP: tl.constexpr, INNERMOST: tl.constexpr, V: tl.constexpr):
    """The code of the windows' right column in the row that is UP rows above the strip's last one.

    Codes grow by one per column to the left and by three per row upwards, opposite to the places in a window: so the
    largest key gives the maximum and its place to every window that contains it.
    """
    return 3 * UP + (0 if INNERMOST else 2 * (V - 1 - tl.arange(0, V))[None, :])


@triton.jit
def _of_row(
    x,
    at,
    inside,
    group,
    column,
    width,
    channels,
    UP: tl.constexpr,
    TOP: tl.constexpr,
    INNERMOST: tl.constexpr,
    A,
    V,
    U,
    STATE,
    HALF: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """The maximum and its column for one row of windows, or one key for both; the row is UP above the strip's last."""
    left, middle, right = _three(x, at, inside, group, column, width, channels, INNERMOST, A, V, U, WHOLE)
    begins = column if INNERMOST else group
    if HALF:
        # Outside the edges lies -inf with the smallest code, so that a value inside wins over it.
        last = _last_code(UP, INNERMOST, V)
        of_left = tl.where(begins > 0, last + 2 if INNERMOST else 3 * UP + 2 * V, 0)
        if TOP:
            last = tl.where(inside, last, 0)
            of_left = tl.where(inside, of_left, 0)
        right = _key(right, last)
        left = _key(left, of_left) if INNERMOST else _to_the_right(_key(left, of_left), right, A, V)
        best = tl.maximum(tl.maximum(left, _key(middle, last + 1)), right)
        return best, best
    else:
        left, middle, right = left.to(STATE), middle.to(STATE), right.to(STATE)
        best = left if INNERMOST else _to_the_right(left, right, A, V)
        place = tl.where(column > 0, 0, 1) + tl.zeros(best.shape, tl.int32)
        better = _better(middle, best)
        best = tl.where(better, middle, best)
        place = tl.where(better, 1, place)
        better = _better(right, best)
        return tl.where(better, right, best), tl.where(better, 2, place)


@triton.jit
def _of_window(
    above,
    of_above,
    middle,
    of_middle,
    below,
    of_below,
    row,
    UP: tl.constexpr,
    DTYPE: tl.constexpr,
    HALF: tl.constexpr,
    INNERMOST: tl.constexpr,
    V: tl.constexpr,
):
    """Maxima of windows, their places and which are nonzero, from three rows each; the first is UP above the last."""
    if HALF:
        best, code, fired = _of_key(tl.maximum(tl.maximum(above, middle), below), DTYPE)
        return best, _last_code(UP, INNERMOST, V) + 2 - code, fired
    else:
        better = _better(middle, above)
        best = tl.where(better, middle, above)
        place = tl.where(better, of_middle + 3, of_above + tl.where(row > 0, 0, 3))
        better = _better(below, best)
        best = tl.where(better, below, best)
        return best.to(DTYPE), tl.where(better, of_below + 6, place), best != 0


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
    """Stores up to four rows of `fired`, the last being row `step` of the strip, one byte for eight neighbors.

    Bit 8 i belongs to the i-th of these rows.
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
    STATE: tl.constexpr,
    HALF: tl.constexpr,
    INNERMOST: tl.constexpr,
    STRIP: tl.constexpr,
    WHOLE: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    V: tl.constexpr,
    U: tl.constexpr,
    INDEX: tl.constexpr,
):
    plane, first, group, column, k, there = _place(
        strips, per_plane, columns, channels, INNERMOST, STRIP, A, B, V, INDEX
    )
    across, down = channels * V, width * channels * U
    at = (plane * height + 2 * first) * down + group * (2 * across) + (k if INNERMOST else 0)
    to = ((plane * rows + first) * columns + group) * across + k
    above, of_above = _of_row(
        x,
        at - down,
        there & (first > 0),
        group,
        column,
        width,
        channels,
        2 * STRIP,
        True,
        INNERMOST,
        A,
        V,
        U,
        STATE,
        HALF,
        WHOLE,
    )
    fired = tl.zeros(above.shape, tl.int32)
    for step in tl.static_range(STRIP):
        row = first + step
        inside = there if WHOLE else there & (row < rows)
        middle, of_middle = _of_row(
            x,
            at,
            inside,
            group,
            column,
            width,
            channels,
            2 * (STRIP - step) - 1,
            False,
            INNERMOST,
            A,
            V,
            U,
            STATE,
            HALF,
            WHOLE,
        )
        below, of_below = _of_row(
            x,
            at + down,
            there if WHOLE else there & (2 * row + 1 < height),
            group,
            column,
            width,
            channels,
            2 * (STRIP - step) - 2,
            False,
            INNERMOST,
            A,
            V,
            U,
            STATE,
            HALF,
            WHOLE,
        )
        best, place, is_one = _of_window(
            above,
            of_above,
            middle,
            of_middle,
            below,
            of_below,
            row,
            2 * (STRIP - step),
            x.dtype.element_ty,
            HALF,
            INNERMOST,
            V,
        )
        tl.store(out + to, best, mask=inside)
        if KEEP:
            tl.store(places + to, place.to(tl.uint8), mask=inside)
        if PACK:
            fired |= tl.where(is_one, 1 << (8 * (step % 4)), 0)
            if step % 4 == 3 or step == STRIP - 1:
                _store_bits(
                    bits, fired, step, strips, per_plane, rows, columns, channels, INNERMOST, STRIP, A, B, V, INDEX
                )
                fired = tl.zeros(above.shape, tl.int32)
        above, of_above = below, of_below
        at, to = at + 2 * down, to + columns * across


@triton.jit
def _windows(grad, places, at, mask, STATE: tl.constexpr):
    """Gradients of windows and the places of their maxima; a place of 255, which matches none, outside the mask."""
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
    WHOLE: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    V: tl.constexpr,
    U: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Each two by two inputs gather their gradient from the four windows that contain any of them."""
    plane, first, group, column, k, there = _place(
        strips, per_plane, columns, channels, INNERMOST, STRIP, A, B, V, INDEX
    )
    across = channels * V if INNERMOST else 1
    down = columns * channels * V
    right = there & (column + 1 < (columns if INNERMOST else columns * V))
    at = ((plane * rows + first) * columns + group) * (channels * V) + k
    row_of_x = width * channels * U
    to = (plane * height + 2 * first) * row_of_x + group * (2 * channels * V)
    to += k if INNERMOST else 0
    here, of_here = _windows(grad, places, at, there if WHOLE else there & (first < rows), STATE)
    beside, of_beside = _windows(grad, places, at + across, right if WHOLE else right & (first < rows), STATE)
    for step in tl.static_range(STRIP):
        row = first + step
        at += down
        goes_on = WHOLE and step + 1 < STRIP
        below, of_below = _windows(grad, places, at, there if goes_on else there & (row + 1 < rows), STATE)
        diagonal, of_diagonal = _windows(
            grad, places, at + across, right if goes_on else right & (row + 1 < rows), STATE
        )
        even = tl.where(of_here == 4, here, 0.0)
        odd = tl.where(of_here == 5, here, 0.0) + tl.where(of_beside == 3, beside, 0.0)
        inside = there if WHOLE else there & (row < rows)
        _store_pair(grad_x + to, even, odd, inside, group, column, width, channels, INNERMOST, A, V, U, WHOLE)
        even = tl.where(of_here == 7, here, 0.0) + tl.where(of_below == 1, below, 0.0)
        odd = tl.where(of_here == 8, here, 0.0) + tl.where(of_beside == 6, beside, 0.0)
        odd = odd + tl.where(of_below == 2, below, 0.0) + tl.where(of_diagonal == 0, diagonal, 0.0)
        inside = there if WHOLE else there & (2 * row + 1 < height)
        below_to = grad_x + (to + row_of_x)
        _store_pair(below_to, even, odd, inside, group, column, width, channels, INNERMOST, A, V, U, WHOLE)
        here, of_here = below, of_below
        beside, of_beside = diagonal, of_diagonal
        to += 2 * row_of_x


@triton.jit
def _store_pair(
    to, even, odd, inside, group, column, width, channels, INNERMOST: tl.constexpr, A, V, U, WHOLE: tl.constexpr
):
    """Stores the gradient of the columns 2 c and 2 c + 1 of a row."""
    if INNERMOST:
        tl.store(to, even.to(to.dtype.element_ty), mask=inside)
        right = inside if WHOLE else inside & (2 * column + 1 < width)
        tl.store(to + channels * V, odd.to(to.dtype.element_ty), mask=right)
    else:
        lane = tl.arange(0, 2 * V)[None, :]
        pairs = tl.reshape(tl.join(even, odd), [A, 2 * V])
        within = inside if U > 1 else inside & (group * (2 * V) + lane < width * U)
        tl.store(to + lane, pairs.to(to.dtype.element_ty), mask=within)
