"""Triton kernel of a spiking layer in evaluation: int8 products on the tensor cores, followed by the neurons.

A program computes a tile of positions and output channels. It sums up to `AT_ONCE` time steps side by side, which share
the weights that are read; then the neurons go through these steps with their membranes in registers. Traffic: 1 byte
per input and 1 per output; a float32 shortcut that is read and written takes 8 more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

from ..spec import RESETS, ByteLayer, LevelSpec, NeuronSpec
from .levels import divided, level, numbers_of
from .lif import charge, fires
from .tiles import ROUNDED, cdiv, grid_of, index, second_axis

AT_ONCE = 4
"""Time steps whose sums are held in registers at once; the number used must divide the steps."""
ROWS, COLUMNS, DEPTH = 64, 128, 64
"""A tile of sums: positions (twice as many for a single step), output channels, and inputs multiplied at once."""
WARPS, STAGES = 8, 2 if torch.version.hip else 4
"""Warps of a program; pipeline stages of its loads, whose buffers share 64 KiB on AMD GPUs."""
FEW_PROGRAMS = 128
"""About the number of a GPU's multiprocessors: for fewer programs than this, tiles are made smaller."""
SIZES = ("positions", "places", "height", "width", "rows", "columns", "rounds")


def spike_layer(
    x: Tensor,
    layer: ByteLayer,
    size: tuple[int, int],
    residual: Tensor | None,
    membrane: torch.dtype | None,
    neuron: NeuronSpec | LevelSpec | None,
) -> tuple[Tensor | None, Tensor | None]:
    """As in `ops.bytes`, for contiguous tensors; `size` is the height and width of the result."""
    steps, images, height, width, channels = x.shape
    out, *kernel, _ = layer.weight.shape
    positions = images * size[0] * size[1]
    shape = (steps, images, *size, out)
    kept = None if membrane is None else torch.empty(shape, dtype=membrane, device=x.device)
    spikes = None if neuron is None else torch.empty(shape, dtype=torch.int8, device=x.device)
    at_once = max(n for n in (1, 2, AT_ONCE) if steps % n == 0)
    at_once = min(2, at_once) if steps > 4 else at_once
    a = ROWS if steps > 1 else 2 * ROWS
    # Each takes registers: a shortcut, membranes stored beside spikes, and membranes carried on to further steps.
    more = residual is not None or (kept is not None and spikes is not None) or steps > at_once
    b = max(16, min(COLUMNS // 2 if more else COLUMNS, triton.next_power_of_2(out)))
    while b > 32 and cdiv(out, b) * cdiv(positions, a) < FEW_PROGRAMS:
        b //= 2
    stand_in, of_levels = layer.scale, isinstance(neuron, LevelSpec)
    told = neuron if isinstance(neuron, NeuronSpec) else NeuronSpec(inv_tau=stand_in)
    assert isinstance(told.inv_tau, Tensor)
    numbers = numbers_of(stand_in, neuron if isinstance(neuron, LevelSpec) else LevelSpec())
    stride, padding, dilation = layer.windows
    with device_of(x):
        spike_layer_kernel[grid_of(cdiv(out, b), cdiv(positions, a))](
            x,
            layer.weight,
            layer.scale,
            layer.shift,
            stand_in if residual is None else residual,
            told.inv_tau,
            stand_in if kept is None else kept,
            stand_in if spikes is None else spikes,
            positions=positions,
            places=images * height * width,
            height=height,
            width=width,
            rows=size[0],
            columns=size[1],
            rounds=steps // at_once,
            channels=channels,
            out=out,
            limit_number=numbers["limit_number"],
            threshold_number=numbers["threshold_number"] if of_levels else float(told.threshold),
            KERNEL_Y=kernel[0],
            KERNEL_X=kernel[1],
            STRIDE_Y=stride[0],
            STRIDE_X=stride[1],
            PADDING_Y=padding[0],
            PADDING_X=padding[1],
            DILATION_Y=dilation[0],
            DILATION_X=dilation[1],
            STEPS=steps,
            AT_ONCE=at_once,
            AFTER=(residual is not None) + 2 * (kept is not None) + 4 * (spikes is not None) + 8 * of_levels,
            UP=numbers["UP"],
            EXACT=numbers["EXACT"],
            RESET=RESETS.index(told.reset),
            STRICT=told.strict,
            OF_CHANNEL=told.inv_tau.ndim > 0,
            A=a,
            B=b,
            DEPTH=_depth(channels),
            EVEN=out % b == 0,
            INDEX=index(max(images * (height + 2 * padding[0] + a) * width * channels, (positions + a) * out)),
            num_warps=WARPS,
            num_stages=STAGES,
            **ROUNDED,
        )
    return kept, spikes


def _depth(channels: int) -> int:
    """Inputs multiplied at once: 64, or 32 if that leaves fewer unused."""
    return min(DEPTH, 32, key=lambda depth: (cdiv(channels, depth) * depth, -depth))


@triton.jit
def _finished(
    sums,
    h,
    s,
    t,
    a,
    b,
    residual,
    membrane,
    spikes,
    at,
    frame,
    mask,
    k,
    threshold,
    limit,
    AFTER: tl.constexpr,
    UP: tl.constexpr,
    EXACT: tl.constexpr,
    RESET: tl.constexpr,
    STRICT: tl.constexpr,
):
    """Finishes the sums of one step: normalization, shortcut, neuron; returns the neurons' membranes and spikes."""
    first = tl.cast(t, tl.int64) * frame
    v = tl.fma(sums.to(tl.float32), a, b)
    if AFTER & 1:
        v = tl.load(residual + first + at, mask=mask, other=0.0).to(tl.float32) + v
    if AFTER & 2:
        tl.store(membrane + first + at, v.to(membrane.dtype.element_ty), mask=mask)
    if AFTER & 8:
        whole = level(divided(v, threshold, EXACT), limit, UP, tl.float32, tl.float32)
        # NaN has no level: silent, as on a CPU.
        tl.store(spikes + first + at, tl.where(whole > 0, whole, 0.0).to(tl.int8), mask=mask)
    elif AFTER & 4:
        h, _u = charge(h, s, v, k, threshold, RESET)
        s = fires(h, threshold, STRICT)
        tl.store(spikes + first + at, tl.where(s, 1, 0).to(tl.int8), mask=mask)
    return h, s


@triton.jit(do_not_specialize=[*SIZES, "limit_number", "threshold_number"])
def spike_layer_kernel(
    x,
    weight,
    scale,
    shift,
    residual,
    inv_tau,
    membrane,
    spikes,
    positions,
    places,
    height,
    width,
    rows,
    columns,
    rounds,
    channels,
    out,
    limit_number,
    threshold_number,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    STRIDE_Y: tl.constexpr,
    STRIDE_X: tl.constexpr,
    PADDING_Y: tl.constexpr,
    PADDING_X: tl.constexpr,
    DILATION_Y: tl.constexpr,
    DILATION_X: tl.constexpr,
    STEPS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    AFTER: tl.constexpr,
    UP: tl.constexpr,
    EXACT: tl.constexpr,
    RESET: tl.constexpr,
    STRICT: tl.constexpr,
    OF_CHANNEL: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    INDEX: tl.constexpr,
):
    m = second_axis().to(INDEX) * A + tl.arange(0, A)
    n = tl.program_id(0) * B + tl.arange(0, B)
    depth = tl.arange(0, DEPTH)
    there = m < positions
    within = n < out
    if EVEN:
        within = n >= 0
    mask = there[:, None] & within[None, :]
    y = m // columns % rows * STRIDE_Y - PADDING_Y
    column = m % columns * STRIDE_X - PADDING_X
    place = (m // (columns * rows) * height + y) * width + column
    blocks = tl.cdiv(channels, DEPTH)
    taken = KERNEL_Y * KERNEL_X * channels
    step = places.to(tl.int64) * channels
    frame = positions.to(tl.int64) * out
    at = m[:, None] * out + n[None, :]
    h = tl.zeros([A, B], tl.float32)
    for turn in range(1 if STEPS == AT_ONCE else rounds):
        first = turn * AT_ONCE
        frames = x + tl.cast(first, tl.int64) * step
        s0 = tl.zeros([A, B], tl.int32)
        s1 = s0
        s2 = s0
        s3 = s0
        for i in range(KERNEL_Y * KERNEL_X * blocks):
            if KERNEL_Y * KERNEL_X == 1:
                tap = 0
                c = i * DEPTH
            else:
                tap = i // blocks
                c = (i - tap * blocks) * DEPTH
            down = tap // KERNEL_X * DILATION_Y
            right = tap % KERNEL_X * DILATION_X
            inside = there & (y + down >= 0) & (y + down < height)
            inside = inside & (column + right >= 0) & (column + right < width)
            lanes = c + depth < channels
            some = inside[:, None] & lanes[None, :]
            of_x = frames + ((place + down * width + right) * channels + c)[:, None] + depth[None, :]
            of_weight = weight + (n * taken + tap * channels + c)[None, :] + depth[:, None]
            w = tl.load(of_weight, mask=within[None, :] & lanes[:, None], other=0)
            s0 = tl.dot(tl.load(of_x, mask=some, other=0), w, s0, out_dtype=tl.int32)
            if AT_ONCE > 1:
                s1 = tl.dot(tl.load(of_x + step, mask=some, other=0), w, s1, out_dtype=tl.int32)
            if AT_ONCE > 2:
                s2 = tl.dot(tl.load(of_x + 2 * step, mask=some, other=0), w, s2, out_dtype=tl.int32)
                s3 = tl.dot(tl.load(of_x + 3 * step, mask=some, other=0), w, s3, out_dtype=tl.int32)
        # Loaded only here, so that they take no registers in the loop above.
        k = tl.load(inv_tau + n, mask=within, other=0.0)[None, :] if OF_CHANNEL else tl.load(inv_tau)
        threshold = tl.full([1, 1], threshold_number, tl.float32)
        limit = tl.full([1, 1], limit_number, tl.float32)
        a = tl.load(scale + n, mask=within, other=0.0)[None, :]
        b = tl.load(shift + n, mask=within, other=0.0)[None, :]
        s = fires(h, threshold, STRICT) & (first > 0)
        for i in tl.static_range(AT_ONCE):
            sums = s0 if i == 0 else s1 if i == 1 else s2 if i == 2 else s3
            h, s = _finished(
                sums,
                h,
                s,
                first + i,
                a,
                b,
                residual,
                membrane,
                spikes,
                at,
                frame,
                mask,
                k,
                threshold,
                limit,
                AFTER,
                UP,
                EXACT,
                RESET,
                STRICT,
            )
