"""Triton kernels of max pooling: for each input of b bytes they move 1.25 b and 0.25 bytes more, forth and back."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def max_pool(
    x,
    out,
    places,
    size,
    height,
    width,
    rows,
    columns,
    inner,
    KEEP: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Results in the order (plane, row, column, inner): inner is the channels where these are innermost, else 1."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k = i % inner
    column = i // inner % columns
    row = i // inner // columns % rows
    plane = i // inner // columns // rows
    best = tl.full([BLOCK], float("-inf"), STATE)
    place = tl.where(row > 0, 0, 3) + tl.where(column > 0, 0, 1)
    for tap in tl.static_range(9):
        y = 2 * row + (tap // 3 - 1)
        z = 2 * column + (tap % 3 - 1)
        mask = (i < size) & (y >= 0) & (y < height) & (z >= 0) & (z < width)
        v = tl.load(x + ((plane * height + y) * width + z) * inner + k, mask=mask, other=0.0).to(STATE)
        better = mask & ((v > best) | (v != v))
        best = tl.where(better, v, best)
        place = tl.where(better, tap, place)
    tl.store(out + i, best.to(out.dtype.element_ty), mask=i < size)
    if KEEP:
        tl.store(places + i, place.to(tl.uint8), mask=i < size)


@triton.jit
def max_pool_backward(
    grad, places, grad_x, size, height, width, rows, columns, inner, STATE: tl.constexpr, BLOCK: tl.constexpr
):
    """Every input gathers from the one, two or four windows that it lies in."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k = i % inner
    z = i // inner % width
    y = i // inner // width % height
    plane = i // inner // width // height
    total = tl.zeros([BLOCK], STATE)
    for window in tl.static_range(4):
        row = y // 2 + window // 2
        column = z // 2 + window % 2
        # The second row of windows holds odd rows only, as their first.
        mask = (i < size) & (row < rows) & (column < columns)
        mask = mask & ((window // 2 == 0) | (y % 2 == 1)) & ((window % 2 == 0) | (z % 2 == 1))
        at = ((plane * rows + row) * columns + column) * inner + k
        place = (y - 2 * row + 1) * 3 + (z - 2 * column + 1)
        here = tl.load(places + at, mask=mask, other=0).to(tl.int64) == place
        total += tl.where(mask & here, tl.load(grad + at, mask=mask, other=0.0).to(STATE), 0.0)
    tl.store(grad_x + i, total.to(grad_x.dtype.element_ty), mask=i < size)
