"""Triton kernels of neurons with a normalization in front of them.

Traffic in bytes per element and time step, for an element of b bytes: forward 2 b (input read, spikes written; the
state stays in registers), backward 4 b (input read twice, gradient read and written). The backward pass also writes the
membranes and reads them twice, in a scratch that a fixed number of programs use again and again, so that it stays in
the L2 cache. Sums over channels cost 4 bytes each per neuron, not per step.
"""

from __future__ import annotations

import triton
import triton.language as tl

HALF_PI = tl.constexpr(1.5707963267948966)


@triton.jit
def _surrogate(shift, KIND: tl.constexpr, ALPHA: tl.constexpr):
    # A bare number would be rounded to float32 beside float64.
    a = tl.full(shift.shape, ALPHA, shift.dtype)
    if KIND == 0:
        e = tl.exp(-tl.abs(a * shift))
        return a * e / ((1 + e) * (1 + e))
    elif KIND == 1:
        y = tl.full(shift.shape, HALF_PI, shift.dtype) * a * shift
        return (a / 2) / (1 + y * y)
    elif KIND == 2:
        y = a * tl.abs(shift) + 1
        return 1 / (y * y)
    elif KIND == 3:
        height = 1 - a * tl.abs(shift)
        return a * tl.where(height < 0, 0.0, height)
    else:
        return tl.full(shift.shape, 1, shift.dtype)


@triton.jit
def fires(h, threshold, STRICT: tl.constexpr):
    if STRICT:
        return h > threshold
    else:
        return h >= threshold


@triton.jit
def charge(h, s, v, k, threshold, RESET: tl.constexpr):
    """Membrane after input v, and what the reset left of the one before."""
    u = h * tl.where(s, 0.0, 1.0) if RESET == 0 else h
    h = u + (v - u) * k
    if RESET == 1:
        h = tl.where(s, h - threshold, h)
    return h, u


@triton.jit
def channel_values(pointer, c, mask, DTYPE: tl.constexpr):
    return tl.load(pointer + c, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def forward(
    x,
    scale,
    shift,
    inv_tau,
    before,
    spikes,
    last,
    size,
    chunk,
    chunk_stride,
    x_step,
    channels,
    inner,
    STEPS,
    K: tl.constexpr,
    THRESHOLD: tl.constexpr,
    RESET: tl.constexpr,
    STRICT: tl.constexpr,
    AFFINE: tl.constexpr,
    TAU: tl.constexpr,
    BEFORE: tl.constexpr,
    LAST: tl.constexpr,
    DENSE: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    offset = i if DENSE else i // chunk * chunk_stride + i % chunk
    c = i // inner % channels
    threshold = tl.full([BLOCK], THRESHOLD, STATE)
    a = channel_values(scale, c, mask, STATE) if AFFINE else 1.0
    b = channel_values(shift, c, mask, STATE) if AFFINE else 0.0
    k = tl.full([BLOCK], K, STATE) if TAU == 0 else channel_values(inv_tau, c if TAU == 2 else c * 0, mask, STATE)
    if BEFORE:
        h = tl.load(before + i, mask=mask, other=0.0).to(STATE)
        s = fires(h, threshold, STRICT)
    else:
        h = tl.zeros([BLOCK], STATE)
        s = h > 1
    # Pointers step from frame to frame: an offset into the whole sequence may not fit 32 bits.
    x += offset
    to = spikes + i
    for _ in range(STEPS):
        v = tl.load(x, mask=mask, other=0.0).to(STATE)
        if AFFINE:
            v = v * a + b
        h, _u = charge(h, s, v, k, threshold, RESET)
        s = fires(h, threshold, STRICT)
        tl.store(to, tl.where(s, 1.0, 0.0).to(spikes.dtype.element_ty), mask=mask)
        x += x_step
        to += size
    if LAST:
        tl.store(last + i, h, mask=mask)


@triton.jit
def _membranes(
    x,
    x_step,
    mask,
    h,
    s,
    a,
    b,
    k,
    threshold,
    to,
    STEPS,
    RESET: tl.constexpr,
    STRICT: tl.constexpr,
    AFFINE: tl.constexpr,
    BLOCK: tl.constexpr,
    STATE: tl.constexpr,
):
    """Writes the membranes of all steps."""
    for t in range(STEPS):
        v = tl.load(x, mask=mask, other=0.0).to(STATE)
        if AFFINE:
            v = v * a + b
        h, _u = charge(h, s, v, k, threshold, RESET)
        s = fires(h, threshold, STRICT)
        tl.store(to + t * BLOCK, h)
        x += x_step


@triton.jit
def _arriving(grad, masks, codes, mask, GRAD: tl.constexpr, MASK: tl.constexpr, BIT: tl.constexpr, STATE: tl.constexpr):
    """The gradient of one step's spikes: given, given and masked, or the mask's values wherever a bit is set."""
    if not MASK:
        return tl.load(grad, mask=mask, other=0.0).to(STATE)
    else:
        values = tl.load(masks, mask=mask, other=0.0)
        if GRAD:
            return values * tl.load(grad, mask=mask, other=0.0).to(STATE)
        else:
            code = tl.load(codes, mask=mask, other=0)
            return tl.where((code >> BIT) & 1 != 0, values, 0.0)


@triton.jit
def backward(
    grad,
    masks,
    codes,
    grad_last,
    x,
    scale,
    shift,
    center,
    inv_tau,
    before,
    grad_x,
    grad_before,
    sums,
    scratch,
    size,
    chunk,
    chunk_stride,
    x_step,
    grad_step,
    image,
    channels,
    inner,
    blocks,
    STEPS,
    K: tl.constexpr,
    THRESHOLD: tl.constexpr,
    RESET: tl.constexpr,
    STRICT: tl.constexpr,
    DETACH: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    AFFINE: tl.constexpr,
    TAU: tl.constexpr,
    BEFORE: tl.constexpr,
    GRAD: tl.constexpr,
    MASK: tl.constexpr,
    BIT: tl.constexpr,
    LAST: tl.constexpr,
    REPEAT: tl.constexpr,
    DENSE: tl.constexpr,
    STATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.arange(0, BLOCK).to(tl.int64)
    threshold = tl.full([BLOCK], THRESHOLD, STATE)
    own = scratch + tl.program_id(0).to(tl.int64) * STEPS * BLOCK + lane
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        i = (lane * 0 + block) * BLOCK + lane
        mask = i < size
        last_step = (lane * 0 + STEPS - 1).to(tl.int64)
        offset = i if DENSE else i // chunk * chunk_stride + i % chunk
        c = i // inner % channels
        a = channel_values(scale, c, mask, STATE) if AFFINE else 1.0
        b = channel_values(shift, c, mask, STATE) if AFFINE else 0.0
        middle = channel_values(center, c, mask, STATE) if AFFINE else 0.0
        k = tl.full([BLOCK], K, STATE) if TAU == 0 else channel_values(inv_tau, c if TAU == 2 else c * 0, mask, STATE)
        first = tl.load(before + i, mask=mask, other=0.0).to(STATE) if BEFORE else tl.zeros([BLOCK], STATE)
        s = fires(first, threshold, STRICT) if BEFORE else first > 1
        of = x + offset
        _membranes(of, x_step, mask, first, s, a, b, k, threshold, own, STEPS, RESET, STRICT, AFFINE, BLOCK, STATE)
        of += x_step * last_step
        # Every thread reads what it wrote itself, unless the compiler lays loads and stores out differently.
        tl.debug_barrier()

        of_h = tl.load(grad_last + i, mask=mask, other=0.0).to(STATE) if LAST else tl.zeros([BLOCK], STATE)
        of_s = tl.zeros([BLOCK], STATE)
        of_tau = tl.zeros([BLOCK], STATE)
        of_shift = tl.zeros([BLOCK], STATE)
        of_scale = tl.zeros([BLOCK], STATE)
        given = grad + last_step * grad_step + i
        fires_at = codes + last_step * size + i
        masked = masks + last_step * (size // image * channels) + i // image * channels + c
        to = grad_x + last_step * size + i
        for back in range(STEPS):
            t = STEPS - 1 - back
            h = tl.load(own + t * BLOCK)
            if GRAD or MASK:
                of_s += _arriving(given, masked, fires_at, mask, GRAD, MASK, BIT, STATE)
            of_h += of_s * _surrogate(h - threshold, KIND, ALPHA)
            raw = tl.load(of, mask=mask, other=0.0).to(STATE)
            previous = tl.load(own + (t - 1) * BLOCK, mask=t > 0, other=0.0)
            previous = tl.where(t > 0, previous, first)
            fired = fires(previous, threshold, STRICT)
            if not BEFORE:
                fired = fired & (t > 0)
            of_v = of_h * k
            if TAU != 0:
                u = previous * tl.where(fired, 0.0, 1.0) if RESET == 0 else previous
                of_tau += of_h * ((raw * a + b if AFFINE else raw) - u)
            if AFFINE:
                of_shift += of_v
                of_scale += of_v * (raw - middle)
            if REPEAT:
                if not AFFINE:
                    of_shift += of_v
            else:
                tl.store(to, of_v.to(grad_x.dtype.element_ty), mask=mask)
            of_u = of_h * (1 - k)
            of_s = tl.zeros([BLOCK], STATE)
            if not DETACH:
                if RESET == 0:
                    of_s = -of_u * previous
                if RESET == 1:
                    of_s = -of_h * threshold
            of_h = of_u * tl.where(fired, 0.0, 1.0) if RESET == 0 else of_u
            of -= x_step
            given -= grad_step
            to -= size
            fires_at -= size
            masked -= size // image * channels
        if REPEAT:
            tl.store(grad_x + i, of_shift.to(grad_x.dtype.element_ty), mask=mask)
        if BEFORE:
            of_h += of_s * _surrogate(first - threshold, KIND, ALPHA)
            tl.store(grad_before + i, of_h, mask=mask)
        if TAU != 0:
            tl.store(sums + i, of_tau, mask=mask)
        if AFFINE:
            tl.store(sums + size + i, of_shift, mask=mask)
            tl.store(sums + 2 * size + i, of_scale, mask=mask)
        tl.debug_barrier()


@triton.jit
def combine(
    grad, x, a, b, d, size, chunk, chunk_stride, x_step, channels, inner, STATE: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    t = tl.program_id(1).to(tl.int64)
    mask = i < size
    c = i // inner % channels
    grad += t * size + i
    value = tl.load(grad, mask=mask, other=0.0).to(STATE)
    raw = tl.load(x + t * x_step + i // chunk * chunk_stride + i % chunk, mask=mask, other=0.0).to(STATE)
    value = value * channel_values(a, c, mask, STATE) + raw * channel_values(b, c, mask, STATE)
    value += channel_values(d, c, mask, STATE)
    tl.store(grad, value.to(grad.dtype.element_ty), mask=mask)
