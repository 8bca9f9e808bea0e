"""The piece of a frame that one program computes: a few channels at a run of positions, and where it lies in memory.

All index arithmetic is in groups of V consecutive elements, which are read at once: so the kernels divide once a group,
in 32 bits unless a tensor needs more, and one build serves all sizes that a group divides.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..spec import Layout

THREADS = 128
# What one thread reads at once, in bytes.
WIDEST = 16
# Channels-last, one program's share of a position in bytes: a line of the caches.
LINE = 128
# Values of 4 bytes that a thread has at once of one kind, as membranes: with what it needs besides, registers are full.
MOST_HELD = 32
# The second and third axis of a grid.
MOST_PROGRAMS = 65535
PACKED_STEPS = 4
"""Steps whose bits have room in the 32 of a register, a byte each."""
ROUNDED = {"enable_fp_fusion": False}
"""Launches of neurons: products are rounded before they are added to, as in the equations.

Otherwise membranes would differ from theirs in the last bit, spikes with them where one is at its threshold.
"""

SIZES = (
    "positions",
    "channels",
    "inner",
    "tokens",
    "size",
    "chunk",
    "chunk_stride",
    "x_step",
    "grad_step",
    "mask_step",
)
"""Integers that a kernel is not built for, see `do_not_specialize`; what they divide by is in V."""


class Tile(NamedTuple):
    """How a frame is cut into programs, as a kernel's arguments."""

    grid: tuple[int, int, int]
    runs: int
    """Programs of each channel, those beyond the last position counted in."""
    step: int
    """Positions of one of them, in groups where the channels are not innermost."""
    group: int
    arguments: dict[str, Any]

    def where(self, layout: Layout) -> dict[str, int]:
        """The sizes of a frame and its distance from the next, in groups."""
        found = (layout.size, layout.chunk, layout.chunk_stride, layout.x_step)
        return dict(zip(("size", "chunk", "chunk_stride", "x_step"), (n // self.group for n in found), strict=True))


def tile(
    x: Tensor,
    layout: Layout,
    *strides: int,
    images: int = 1,
    times: int = 1,
    least: int = 1,
    inputs: int = 1,
    held: int = 1,
) -> Tile:
    """The tiles of a frame of x; `strides` are other distances between frames, which a group must divide as well.

    It has `least` elements or more, which the caller knows the layout to allow; what is wider than a thread's share is
    then read by several. A thread's share is what it reads at once, or less where it has `held` values of each element.

    They are `times` as large as usual, a power of two: where little is done with an element, what a program does
    besides counts. Of several `inputs` that lie alike each has its own programs, see `which`.
    """
    innermost = layout.inner == 1 and layout.channels > 1
    single = layout.channels == 1
    share = WIDEST // x.element_size()
    while share > 1 and share * held > MOST_HELD:
        share //= 2
    group = max(share, least)
    while not layout.has_groups(group, images) or any(stride % group for stride in strides):
        group //= 2
    elements = THREADS * share * times
    positions = layout.size // layout.channels
    channels, inner = layout.channels, layout.inner // group
    if innermost:
        channels, inner = layout.channels // group, 1
        # No lane is idle where a power of two divides the channels.
        even = max(channels & -channels, min(2, triton.next_power_of_2(channels)))
        columns = min(LINE // (group * x.element_size()), even)
        rows = elements // group // columns
        grid = grid_of(inputs * triton.cdiv(channels, columns), triton.cdiv(positions, rows))
        runs = grid[1] * grid[2]
    else:
        positions //= group
        inner = positions // images if single else inner
        # One channel, or as many as have room beside each other.
        columns = min(elements // group, triton.next_power_of_2(positions))
        rows = min(elements // group // columns, triton.next_power_of_2(channels))
        runs = triton.cdiv(positions, columns)
        grid = grid_of(inputs * runs, triton.cdiv(channels, rows))
    span = layout.size if layout.dense else max(layout.size, layout.size // layout.chunk * layout.chunk_stride)
    arguments = {
        "positions": positions,
        "channels": channels,
        "inner": inner,
        "tokens": positions // images,
        "INNERMOST": innermost,
        "SINGLE": single,
        "DENSE": layout.dense,
        "A": rows,
        "B": columns,
        "V": group,
        # What lies beyond the end is masked, but has an index.
        "INDEX": index(span + 2 * elements * layout.channels + layout.channels * layout.inner),
        "N": inputs,
    }
    return Tile(grid, runs, rows if innermost else columns, group, arguments)


def times_for(layout: Layout, many: int) -> int:
    """How many times larger a program's share of fewer steps is, of which `many` give it something to do."""
    return max(1, many // triton.next_power_of_2(layout.steps))


def index(size: int) -> Any:
    """The integers that count to `size`."""
    return tl.int64 if size >= 1 << 31 else tl.int32


def grid_of(first: int, second: int) -> tuple[int, int, int]:
    """A grid whose second axis is longer than may be: its number is `second_axis()`, or beyond the last `second`."""
    third = triton.cdiv(second, MOST_PROGRAMS)
    return first, triton.cdiv(second, third), third


@triton.jit
def second_axis():
    return tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)


@triton.jit
def which(N: tl.constexpr):
    """The one of N inputs that this program is for: they take turns along the first axis."""
    return tl.program_id(0) % N


@triton.jit
def first_axis(N: tl.constexpr):
    """This program's number on the first axis among those of its input."""
    return tl.program_id(0) // N


@triton.jit
def one_of(n, first, second, third, N: tl.constexpr):
    """The pointer for input n of three, or of one."""
    if N == 1:
        return first
    else:
        return tl.where(n == 0, first, tl.where(n == 1, second, third))


@triton.jit
def place(
    positions,
    channels,
    inner,
    tokens,
    INNERMOST: tl.constexpr,
    SINGLE: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    V: tl.constexpr,
    INDEX: tl.constexpr,
    N: tl.constexpr,
):
    """This program's channels, which of them exist, its groups `[A, B, 1]`, which of them exist, and their images."""
    lane = tl.arange(0, V)[None, None, :]
    if INNERMOST:
        n = second_axis().to(INDEX) * A + tl.arange(0, A)
        g = first_axis(N) * B + tl.arange(0, B)
        c = g[None, :, None] * V + lane
        there = (g < channels)[None, :, None]
        groups = n[:, None, None] * channels + g[None, :, None]
        mask = (n < positions)[:, None, None] & there
        image = (n // tokens)[:, None, None]
    else:
        n = (first_axis(N).to(INDEX) * B + tl.arange(0, B))[None, :, None]
        c = (second_axis() * A + tl.arange(0, A))[:, None, None]
        there = c < channels
        image = n // inner
        groups = n if SINGLE else (image * channels + c) * inner + n % inner
        mask = (n < positions) & there
    return c, there, groups, mask, image


@triton.jit
def elements(groups, V: tl.constexpr):
    """The elements `[A, B, V]` of groups."""
    return groups * V + tl.arange(0, V)[None, None, :]


@triton.jit
def store_bits(bits, fired, groups, mask, first, size, COUNT: tl.constexpr, STEPS: tl.constexpr):
    """Stores `fired` `[A, B, 8]`, whose bit 8 t says what fired at step `first + t`, a byte for a group and step.

    All of up to four steps at once: where several threads read a group, they wait for each other.
    """
    byte = tl.sum(fired << tl.arange(0, 8)[None, None, :], axis=2)[:, :, None]
    for t in tl.static_range(COUNT):
        there_is = mask & (first + t < STEPS) if STEPS % COUNT != 0 else mask
        tl.store(bits + (first + t) * size + groups, (byte >> (8 * t)).to(tl.uint8), mask=there_is)


@triton.jit
def in_x(groups, chunk, chunk_stride, DENSE: tl.constexpr):
    """Where groups lie in x."""
    return groups if DENSE else groups // chunk * chunk_stride + groups % chunk


@triton.jit
def of_channel(pointer, c, there, DTYPE: tl.constexpr):
    return tl.load(pointer + c, mask=there, other=0.0).to(DTYPE)


@triton.jit
def normalization(mean, inv_std, weight, bias, c, there, AFFINE: tl.constexpr, STATE: tl.constexpr):
    """Of channels the mean, and what makes the normalized x: a factor and what is added to the product.

    AFFINE has the bit 2 where there is a weight, and 4 where there is a bias.
    """
    middle = of_channel(mean, c, there, STATE)
    a = of_channel(inv_std, c, there, STATE)
    if AFFINE & 2:
        a *= of_channel(weight, c, there, STATE)
    b = of_channel(bias, c, there, STATE) - middle * a if AFFINE & 4 else -middle * a
    return middle, a, b


@triton.jit
def number(value, DTYPE: tl.constexpr):
    """A number that a kernel is not built for: a float, or an integer with the bits of a float64."""
    if DTYPE == tl.float64:  # noqa: SIM300
        return tl.full([1, 1, 1], value.to(tl.int64), tl.int64).to(tl.float64, bitcast=True)
    else:
        return tl.full([1, 1, 1], value, DTYPE)


@triton.jit
def store_by_channel(to, rows, c, there, x, y, mask, INNERMOST: tl.constexpr):
    """Stores the sums of x and y `[A, B, V]` over each channel's positions, `rows` apart; added up side by side."""
    x = tl.where(mask, x, 0.0)
    y = tl.where(mask, y, 0.0)
    if INNERMOST:
        both = tl.sum(tl.join(x, y), axis=0)[None, :, :, :]
    else:
        both = tl.sum(tl.join(tl.sum(x, axis=2), tl.sum(y, axis=2)), axis=1)[:, None, None, :]
    at = c[:, :, :, None] + rows * tl.arange(0, 2)[None, None, None, :]
    tl.store(to + at, both, mask=there[:, :, :, None])


@triton.jit
def by_channel(x, mask, INNERMOST: tl.constexpr):
    """The sum of x `[A, B, V]` over the positions of each channel."""
    x = tl.where(mask, x, 0.0)
    if INNERMOST:
        return tl.sum(x, axis=0)[None, :, :]
    else:
        return tl.sum(tl.sum(x, axis=2), axis=1)[:, None, None]
