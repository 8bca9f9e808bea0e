"""Triton kernels for evaluation on channels-last frames: neurons fused with the shortcut, the pooling or the mask.

Traffic in bytes per element and step, for inputs of b bytes and spikes of s bytes: `fire` b + s, with a shortcut 8 more
(read and written in float32); `fire_and_pool` b + s / 4, with the spikes in between as bits in registers; `attend` 3 b
+ s. Nothing is kept for a gradient, no division takes 64 bits, and kernels read the time constants from device memory:
no launch waits for the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

from ..spec import RESETS, NeuronSpec, arrange, state_dtype
from .arguments import STATES, as_number
from .lif import MOST_STEPS, charge, fires
from .tiles import (
    LINE,
    ROUNDED,
    SIZES,
    THREADS,
    WIDEST,
    cdiv,
    elements,
    grid_of,
    in_x,
    index,
    number,
    of_channel,
    place,
    second_axis,
    tile,
)

STRIP = 4
"""Rows of windows that a pooling program goes through."""
BITS = 64
"""Spikes are held in a word of this many bits, one for each step, or for each step and chunk of tokens."""
POOL_SIZES = ("strips", "per_plane", "height", "width", "rows", "columns", "channels", "x_step", "size")
TOKEN_SIZES = ("size", "tokens", "channels", "rounds", "x_step")


def fire(
    x: Tensor, neuron: NeuronSpec, inv_tau: Tensor, dtype: torch.dtype, shortcut: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`(u, spikes of u)` with `u = shortcut + x`, or x itself without a shortcut; x is `[T, ..., C]`.

    x has T frames, or one that is expanded. `inv_tau`, 0-d or `[C]`, replaces the neuron's own.
    """
    steps, channels = len(x), x.shape[-1]
    flat = x.reshape(steps, 1, -1, channels).movedim(-1, 2) if inv_tau.ndim else x.reshape(steps, 1, -1)
    frames, layout = arrange(flat[:1] if steps > 1 and not x.stride(0) else flat, steps, per_channel=inv_tau.ndim > 0)
    spikes = torch.empty(x.shape, dtype=dtype, device=x.device)
    before = None if shortcut is None else shortcut.contiguous()
    total = frames
    if before is not None:
        total = torch.empty(x.shape, dtype=torch.promote_types(before.dtype, x.dtype), device=x.device)
    # Groups fit the wider dtype of the two: otherwise elements would have to move between threads.
    cut = tile(total, layout)
    with device_of(x):
        fire_kernel[cut.grid](
            frames,
            frames if before is None else before,
            inv_tau,
            total,
            spikes,
            **cut.arguments,
            **_neuron(x, steps, neuron, inv_tau),
            SHORTCUT=before is not None,
        )
    return x if before is None else total, spikes


def fire_and_pool(x: Tensor, neuron: NeuronSpec, inv_tau: Tensor, dtype: torch.dtype) -> Tensor:
    """Spikes of x after a 3x3 maximum of stride 2, `[T, B, H, W, C] -> [T, B, ceil(H / 2), ceil(W / 2), C]`.

    Each frame of x is contiguous, and there are at most `BITS` steps.
    """
    steps, images, height, width, channels = x.shape
    rows, columns = (height + 1) // 2, (width + 1) // 2
    out = torch.empty(steps, images, rows, columns, channels, dtype=dtype, device=x.device)
    group = _group(x, channels)
    groups = channels // group
    strip = min(STRIP, triton.next_power_of_2(rows))
    per_plane = cdiv(rows, strip)
    strips = images * per_plane
    b = min(LINE // (group * x.element_size()), max(groups & -groups, min(4, triton.next_power_of_2(groups))))
    a = max(1, THREADS // b)
    with device_of(x):
        fire_and_pool_kernel[grid_of(cdiv(groups, b), cdiv(strips * columns, a))](
            x,
            inv_tau,
            out,
            strips=strips,
            per_plane=per_plane,
            height=height,
            width=width,
            rows=rows,
            columns=columns,
            channels=groups,
            x_step=x.stride(0) // group,
            size=out[0].numel() // group,
            **_neuron(x, steps, neuron, inv_tau, most=MOST_STEPS // 2),
            STRIP=strip,
            A=a,
            B=b,
            V=group,
            INDEX=index(x[0].numel() + 4 * (a + strip) * width * channels),
            WORD=_word(steps),
        )
    return out


def attend(qkv: Tensor, neurons: Sequence[NeuronSpec], inv_taus: Tensor, dtype: torch.dtype) -> Tensor | None:
    """`q * LIF(sum over tokens of k * v)` of `[T, B, H, W, 3 C]`; `None` if tokens and steps need over `BITS` bits.

    `neurons` are those of q, k and v, which are alike, and of the sum; inv_taus is `[4, C]`.
    """
    steps, images, height, width, channels = qkv.shape
    tokens, channels = height * width, channels // 3
    group = _group(qkv, channels)
    group = min(group, 4)  # with wider groups the membranes of three neurons would not fit the registers
    groups = channels // group
    b = min(8, triton.next_power_of_2(groups))
    a = max(1, 2 * THREADS // b)
    rounds = cdiv(tokens, a)
    while rounds * steps > BITS and rounds > 1:
        a, b = 2 * a, max(1, b // 2)
        rounds = cdiv(tokens, a)
    if rounds * steps > BITS:
        return None
    out = torch.empty(steps, images, height, width, channels, dtype=dtype, device=qkv.device)
    first, last = neurons[0], neurons[3]
    mask = {"mask_threshold_number": as_number(qkv, last.threshold), "MASK_RESET": RESETS.index(last.reset)}
    with device_of(qkv):
        attend_kernel[grid_of(images, cdiv(groups, b))](
            qkv,
            inv_taus,
            out,
            size=out[0].numel() // group,
            tokens=tokens,
            channels=groups,
            rounds=rounds,
            x_step=qkv.stride(0) // group,
            **_neuron(qkv, steps, first, None),
            **mask,
            MASK_STRICT=last.strict,
            A=a,
            B=b,
            V=group,
            INDEX=index(qkv[0].numel() + 6 * a * b * group * channels),
            WORD=_word(rounds * steps),
            num_warps=max(1, min(a * b, 2 * THREADS) // 32),
        )
    return out


def _group(x: Tensor, channels: int) -> int:
    """Channels read at once; only 8 for bytes, since each channel needs a neuron in registers."""
    return min(WIDEST // max(2, x.element_size()), channels & -channels)


def _word(bits: int) -> Any:
    return tl.int32 if bits <= BITS // 2 else tl.int64


def _neuron(
    x: Tensor, steps: int, neuron: NeuronSpec, inv_tau: Tensor | None, most: int = MOST_STEPS
) -> dict[str, Any]:
    """A kernel's arguments that describe its neurons; loops over steps are unrolled by `most` at most."""
    found = {
        "threshold_number": as_number(x, neuron.threshold),
        "STEPS": steps,
        "UNROLL": max(n for n in range(1, most + 1) if steps % n == 0),
        "RESET": RESETS.index(neuron.reset),
        "STRICT": neuron.strict,
        "STATE": STATES[state_dtype(x)],
        **ROUNDED,
    }
    return found if inv_tau is None else {**found, "OF_CHANNEL": inv_tau.ndim > 0}


@triton.jit(do_not_specialize=[*SIZES, "threshold_number"])
def fire_kernel(
    x,
    shortcut,
    inv_tau,
    total,
    spikes,
    size,
    chunk,
    chunk_stride,
    x_step,
    positions,
    channels,
    inner,
    tokens,
    threshold_number,
    STEPS: tl.constexpr,
    UNROLL: tl.constexpr,
    RESET: tl.constexpr,
    STRICT: tl.constexpr,
    OF_CHANNEL: tl.constexpr,
    SHORTCUT: tl.constexpr,
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
    i = elements(groups, V)
    threshold = number(threshold_number, STATE)
    k = of_channel(inv_tau, c if OF_CHANNEL else c * 0, there, STATE)
    h = tl.zeros([A, B, V], STATE)
    s = h > 1
    # Offsets into the whole sequence may exceed 32 bits.
    x += elements(in_x(groups, chunk, chunk_stride, DENSE), V)
    for t in tl.range(STEPS, loop_unroll_factor=UNROLL):
        frame = tl.cast(t, tl.int64)
        v = tl.load(x + frame * x_step * V, mask=mask, other=0.0).to(STATE)
        at = frame * size * V + i
        if SHORTCUT:
            v = tl.load(shortcut + at, mask=mask, other=0.0).to(STATE) + v
            tl.store(total + at, v.to(total.dtype.element_ty), mask=mask)
        h, _u = charge(h, s, v, k, threshold, RESET)
        s = fires(h, threshold, STRICT)
        tl.store(spikes + at, tl.where(s, 1.0, 0.0).to(spikes.dtype.element_ty), mask=mask)


@triton.jit
def _fired(x, at, step, mask, k, threshold, STEPS: tl.constexpr, UNROLL: tl.constexpr, RESET, STRICT, STATE, WORD):
    """The neurons' spikes, one bit per step; zero outside the mask."""
    h = tl.zeros(mask.shape, STATE)
    s = h > 1
    word = tl.zeros(mask.shape, WORD)
    one = tl.full([1, 1, 1], 1, WORD)
    for t in tl.range(STEPS, loop_unroll_factor=UNROLL):
        v = tl.load(x + at + tl.cast(t, tl.int64) * step, mask=mask, other=0.0).to(STATE)
        h, _u = charge(h, s, v, k, threshold, RESET)
        s = fires(h, threshold, STRICT)
        word |= tl.where(s & mask, one << tl.cast(t, WORD), 0)
    return word


@triton.jit
def _row(
    x,
    plane,
    y,
    column,
    lane,
    there,
    height,
    width,
    row,
    step,
    k,
    threshold,
    STEPS: tl.constexpr,
    UNROLL: tl.constexpr,
    RESET,
    STRICT,
    STATE,
    WORD,
):
    """The spikes in one row of windows: the maximum of zeros and ones is a bitwise OR."""
    inside = there & (y >= 0) & (y < height)
    at = ((plane * height + y) * width + 2 * column) * row + lane
    # Broadcast to all lanes, so that each element read has its own mask.
    inside = inside & (lane >= 0)
    left = _fired(x, at - row, step, inside & (column > 0), k, threshold, STEPS, UNROLL, RESET, STRICT, STATE, WORD)
    middle = _fired(x, at, step, inside, k, threshold, STEPS, UNROLL, RESET, STRICT, STATE, WORD)
    beside = inside & (2 * column + 1 < width)
    right = _fired(x, at + row, step, beside, k, threshold, STEPS, UNROLL, RESET, STRICT, STATE, WORD)
    return left | middle | right


@triton.jit(do_not_specialize=[*POOL_SIZES, "threshold_number"])
def fire_and_pool_kernel(
    x,
    inv_tau,
    out,
    strips,
    per_plane,
    height,
    width,
    rows,
    columns,
    channels,
    x_step,
    size,
    threshold_number,
    STEPS: tl.constexpr,
    UNROLL: tl.constexpr,
    RESET: tl.constexpr,
    STRICT: tl.constexpr,
    OF_CHANNEL: tl.constexpr,
    STATE: tl.constexpr,
    STRIP: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    V: tl.constexpr,
    INDEX: tl.constexpr,
    WORD: tl.constexpr,
):
    """A program goes down a strip of windows: each row of neurons fires once for the windows above and below it."""
    n = (second_axis().to(INDEX) * A + tl.arange(0, A))[:, None, None]
    g = (tl.program_id(0) * B + tl.arange(0, B))[None, :, None]
    lane = g * V + tl.arange(0, V)[None, None, :]
    column, strip = n % columns, n // columns
    plane, first = strip // per_plane, strip % per_plane * STRIP
    there = (strip < strips) & (g < channels)
    threshold = number(threshold_number, STATE)
    k = of_channel(inv_tau, lane if OF_CHANNEL else lane * 0, g < channels, STATE)
    row = channels * V
    step = x_step.to(tl.int64) * V
    above = _row(
        x,
        plane,
        2 * first - 1,
        column,
        lane,
        there,
        height,
        width,
        row,
        step,
        k,
        threshold,
        STEPS,
        UNROLL,
        RESET,
        STRICT,
        STATE,
        WORD,
    )
    for down in range(STRIP):
        y = 2 * (first + down)
        middle = _row(
            x,
            plane,
            y,
            column,
            lane,
            there,
            height,
            width,
            row,
            step,
            k,
            threshold,
            STEPS,
            UNROLL,
            RESET,
            STRICT,
            STATE,
            WORD,
        )
        below = _row(
            x,
            plane,
            y + 1,
            column,
            lane,
            there,
            height,
            width,
            row,
            step,
            k,
            threshold,
            STEPS,
            UNROLL,
            RESET,
            STRICT,
            STATE,
            WORD,
        )
        word = above | middle | below
        at = ((plane * rows + first + down) * columns + column) * row + lane
        inside = there & (first + down < rows)
        for t in tl.range(STEPS, loop_unroll_factor=UNROLL):
            spike = tl.where((word >> tl.cast(t, WORD)) & 1 != 0, 1.0, 0.0)
            tl.store(out + tl.cast(t, tl.int64) * size * V + at, spike.to(out.dtype.element_ty), mask=inside)
        above = below


@triton.jit
def _charged(x, mask, h, s, k, threshold, RESET: tl.constexpr, STRICT: tl.constexpr, STATE: tl.constexpr):
    h, _u = charge(h, s, tl.load(x, mask=mask, other=0.0).to(STATE), k, threshold, RESET)
    return h, fires(h, threshold, STRICT)


@triton.jit(do_not_specialize=[*TOKEN_SIZES, "threshold_number", "mask_threshold_number"])
def attend_kernel(
    qkv,
    inv_tau,
    out,
    size,
    tokens,
    channels,
    rounds,
    x_step,
    threshold_number,
    mask_threshold_number,
    STEPS: tl.constexpr,
    UNROLL: tl.constexpr,
    RESET: tl.constexpr,
    STRICT: tl.constexpr,
    MASK_RESET: tl.constexpr,
    MASK_STRICT: tl.constexpr,
    STATE: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    V: tl.constexpr,
    INDEX: tl.constexpr,
    WORD: tl.constexpr,
):
    """A program has a few channels of an image; their spikes wait in registers for the sums over all tokens."""
    image = tl.program_id(0).to(INDEX)
    g = (second_axis() * B + tl.arange(0, B))[None, :, None]
    c = g * V + tl.arange(0, V)[None, None, :]
    there = g < channels
    row = channels * V
    k_q = of_channel(inv_tau, c, there, STATE)
    k_k = of_channel(inv_tau + row, c, there, STATE)
    k_v = of_channel(inv_tau + 2 * row, c, there, STATE)
    k_mask = of_channel(inv_tau + 3 * row, c, there, STATE)
    threshold = number(threshold_number, STATE)
    mask_threshold = number(mask_threshold_number, STATE)
    step = x_step.to(tl.int64) * V
    one = tl.full([1, 1, 1], 1, WORD)
    fired = tl.zeros([A, B, V], WORD)
    both = tl.zeros([A, B, V], WORD)
    for chunk in range(rounds):
        n = (chunk * A + tl.arange(0, A))[:, None, None]
        mask = (n < tokens) & there
        q = qkv + (image * tokens + n) * (3 * row) + c
        h_q = tl.zeros([A, B, V], STATE)
        h_k = h_q
        h_v = h_q
        q_fires = h_q > 1
        k_fires = q_fires
        v_fires = q_fires
        for t in tl.range(STEPS, loop_unroll_factor=UNROLL):
            at = q + tl.cast(t, tl.int64) * step
            h_q, q_fires = _charged(at, mask, h_q, q_fires, k_q, threshold, RESET, STRICT, STATE)
            h_k, k_fires = _charged(at + row, mask, h_k, k_fires, k_k, threshold, RESET, STRICT, STATE)
            h_v, v_fires = _charged(at + 2 * row, mask, h_v, v_fires, k_v, threshold, RESET, STRICT, STATE)
            bit = one << tl.cast(chunk * STEPS + t, WORD)
            fired |= tl.where(q_fires, bit, 0)
            # Lanes beyond the last token may fire too.
            both |= tl.where(k_fires & v_fires & mask, bit, 0)
    allowed = tl.zeros(c.shape, WORD)
    h = tl.zeros(c.shape, STATE)
    s = h > 1
    for t in tl.range(STEPS, loop_unroll_factor=UNROLL):
        count = tl.zeros([A, B, V], WORD)
        for chunk in range(rounds):
            count += (both >> tl.cast(chunk * STEPS + t, WORD)) & 1
        total = tl.sum(count.to(tl.int32), axis=0)[None, :, :].to(STATE)
        h, _u = charge(h, s, total, k_mask, mask_threshold, MASK_RESET)
        s = fires(h, mask_threshold, MASK_STRICT)
        allowed |= tl.where(s, one << tl.cast(t, WORD), 0)
    for chunk in range(rounds):
        n = (chunk * A + tl.arange(0, A))[:, None, None]
        mask = (n < tokens) & there
        to = out + (image * tokens + n) * row + c
        left = (fired >> tl.cast(chunk * STEPS, WORD)) & allowed
        for t in tl.range(STEPS, loop_unroll_factor=UNROLL):
            masked = tl.where((left >> tl.cast(t, WORD)) & 1 != 0, 1.0, 0.0)
            tl.store(to + tl.cast(t, tl.int64) * size * V, masked.to(out.dtype.element_ty), mask=mask)
