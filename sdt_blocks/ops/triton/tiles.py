"""The part of a frame that one program computes: a few channels at a run of positions, and where it lies in memory.

All index arithmetic counts groups of V consecutive elements, which are read at once: kernels divide only once per
group, in 32 bits unless a tensor needs more, and one build serves all sizes that V divides.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..spec import Layout

THREADS = 128
# Bytes that one thread reads at once.
WIDEST = 16
# Channels-last, the bytes of one position that a program handles: a cache line.
LINE = 128
# The most 4-byte values of one kind, such as membranes, that a thread holds: with the rest, registers are then full.
MOST_HELD = 32
# The limit of a grid's second and third axis.
MOST_PROGRAMS = 65535
PACKED_STEPS = 4
"""Steps whose bits fit a 32-bit register, a byte each."""
ROUNDED = {"enable_fp_fusion": False}
"""For launches of neurons: products are rounded before anything is added, as in the reference equations.

Otherwise membranes would differ from these in the last bit, and so would spikes of membranes at the threshold.
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
"""Integers that kernels are not specialized on, see `do_not_specialize`; V stands for what they are divisible by."""


class Tile(NamedTuple):
    """How a frame is cut into programs, as kernel arguments."""

    grid: tuple[int, int, int]
    runs: int
    """Programs per channel, including any beyond the last position."""
    step: int
    """Positions per program, counted in groups unless the channels are innermost."""
    group: int
    arguments: dict[str, Any]


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
    """The tiles of a frame of x; a group must also divide `strides`, other distances between frames.

    A group has at least `least` elements, which the caller knows the layout to allow; one that is wider than a thread's
    share is read by several threads. That share is what a thread reads at once, or less if `held` values per element
    would overfill its registers.

    Tiles are `times` as large as usual, a power of two: where an element takes little work, a program's overhead
    counts. Each of several `inputs` of the same layout has its own programs, see `which`.
    """
    return _tile(x.element_size(), layout, strides, images, times, least, inputs, held)


@functools.lru_cache(maxsize=4096)
def _tile(
    element_size: int,
    layout: Layout,
    strides: Sequence[int],
    images: int,
    times: int,
    least: int,
    inputs: int,
    held: int,
) -> Tile:
    innermost = layout.inner == 1 and layout.channels > 1
    single = layout.channels == 1
    share = WIDEST // element_size
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
        # No lane is idle if the columns are a power of two that divides the channels.
        even = max(channels & -channels, min(2, triton.next_power_of_2(channels)))
        columns = min(LINE // (group * element_size), even)
        rows = elements // group // columns
        grid = grid_of(inputs * cdiv(channels, columns), cdiv(positions, rows))
        runs = grid[1] * grid[2]
    else:
        positions //= group
        inner = positions // images if single else inner
        # One channel, or as many side by side as have room.
        columns = min(elements // group, triton.next_power_of_2(positions))
        rows = min(elements // group // columns, triton.next_power_of_2(channels))
        runs = cdiv(positions, columns)
        grid = grid_of(inputs * runs, cdiv(channels, rows))
    span = layout.size if layout.dense else max(layout.size, layout.size // layout.chunk * layout.chunk_stride)
    arguments = {
        "size": layout.size // group,
        "chunk": layout.chunk // group,
        "chunk_stride": layout.chunk_stride // group,
        "x_step": layout.x_step // group,
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
        # Elements beyond the end are masked, but still have an index.
        "INDEX": index(span + 2 * elements * layout.channels + layout.channels * layout.inner),
        "N": inputs,
    }
    return Tile(grid, runs, rows if innermost else columns, group, arguments)


def times_for(layout: Layout, many: int) -> int:
    """How many times larger to make tiles for few steps, so that a program has about `many` to work on."""
    return max(1, many // triton.next_power_of_2(layout.steps))


def index(size: int) -> Any:
    """The integer type that can count to `size`."""
    return tl.int64 if size >= 1 << 31 else tl.int32


def cdiv(size: int, share: int) -> int:
    """How many shares cover `size`: on the host a twentieth of the time of `triton.cdiv`."""
    return -(-size // share)


def grid_of(first: int, second: int) -> tuple[int, int, int]:
    """A grid with a second axis of any length, folded into a third; `second_axis()` may then reach beyond `second`."""
    third = cdiv(second, MOST_PROGRAMS)
    return first, cdiv(second, third), third


@triton.jit
def second_axis():
    return tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)


@triton.jit
def which(N: tl.constexpr):
    """The one of N inputs that this program works on: they alternate along the first axis."""
    return tl.program_id(0) % N


@triton.jit
def first_axis(N: tl.constexpr):
    """This program's number on the first axis among the programs of its input."""
    return tl.program_id(0) // N


@triton.jit
def one_of(n, first, second, third, N: tl.constexpr):
    """The pointer for input n of three, or the only one."""
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
    """This program's channels and their mask, its groups `[A, B, 1]` and their mask, and the groups' images."""
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
    """The indices `[A, B, V]` of the groups' elements."""
    return groups * V + tl.arange(0, V)[None, None, :]


@triton.jit
def store_bits(bits, fired, groups, mask, first, size, COUNT: tl.constexpr, STEPS: tl.constexpr):
    """Stores `fired` `[A, B, 8]`, whose bit 8 t tells what fired at step `first + t`, as a byte per group and step.

    Up to four steps are stored at once, because threads that share a group wait for each other each time.
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
    """Per channel: the mean, and the factor and the constant that normalize x.

    AFFINE has bit 2 set if there is a weight, and bit 4 if there is a bias.
    """
    middle = of_channel(mean, c, there, STATE)
    a = of_channel(inv_std, c, there, STATE)
    if AFFINE & 2:
        a *= of_channel(weight, c, there, STATE)
    b = of_channel(bias, c, there, STATE) - middle * a if AFFINE & 4 else -middle * a
    return middle, a, b


@triton.jit
def number(value, DTYPE: tl.constexpr):
    """A number that kernels are not specialized on: a float, or an integer that holds the bits of a float64."""
    if DTYPE == tl.float64:  # noqa: SIM300
        return tl.full([1, 1, 1], value.to(tl.int64), tl.int64).to(tl.float64, bitcast=True)
    else:
        return tl.full([1, 1, 1], value, DTYPE)


@triton.jit
def store_by_channel(to, rows, c, there, x, y, mask, INNERMOST: tl.constexpr):
    """Stores the sums of x and y `[A, B, V]` over each channel's positions, `rows` apart, from one joint reduction."""
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
    """The sum of x `[A, B, V]` over each channel's positions."""
    x = tl.where(mask, x, 0.0)
    if INNERMOST:
        return tl.sum(x, axis=0)[None, :, :]
    else:
        return tl.sum(tl.sum(x, axis=2), axis=1)[:, None, None]
