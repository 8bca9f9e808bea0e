"""Triton kernels of neurons behind a normalization.

Traffic in bytes per element and step, for an element of b bytes: forward 2 b (input read, spikes written), backward 3 b
(input and gradient read, gradient written). Membranes stay in registers. With more than eight steps the backward pass
works in segments of at most eight: it reads the input twice, and stores the membrane before each segment, 4 bytes per
neuron. Each program writes its own sum for each channel, so that results are reproducible.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    SIZES,
    by_channel,
    elements,
    first_axis,
    in_x,
    normalization,
    number,
    of_channel,
    one_of,
    place,
    second_axis,
    store_bits,
    store_by_channel,
    which,
)

HALF_PI = tl.constexpr(1.5707963267948966)
LOG2_E = tl.constexpr(1.4426950408889634)
MOST_STEPS = 8
"""The most steps whose inputs and membranes are held in registers at once."""


@triton.jit
def _surrogate(shift, a, KIND: tl.constexpr):
    if KIND == 0:
        e = tl.exp2(-tl.abs(a * LOG2_E * shift))
        # The square of rsqrt is 1 / (1 + e): a division takes seven instructions, needless for numbers between 1 and 2.
        root = tl.rsqrt(1 + e)
        inverse = root * root
        return a * e * (inverse * inverse)
    elif KIND == 1:
        y = tl.full([1, 1, 1], HALF_PI, shift.dtype) * a * shift
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
    """The membrane after input v, and what the reset left of the one before."""
    u = h * tl.where(s, 0.0, 1.0) if RESET == 0 else h
    h = u + (v - u) * k
    if RESET == 1:
        h = tl.where(s, h - threshold, h)
    return h, u


@triton.jit(do_not_specialize=[*SIZES, "inv_tau_number", "threshold_number"])
def forward(
    x,
    mean,
    inv_std,
    weight,
    bias,
    inv_tau,
    before,
    spikes,
    bits,
    last,
    size,
    chunk,
    chunk_stride,
    x_step,
    positions,
    channels,
    inner,
    tokens,
    inv_tau_number,
    threshold_number,
    STEPS: tl.constexpr,
    UNROLL: tl.constexpr,
    RESET: tl.constexpr,
    STRICT: tl.constexpr,
    AFFINE: tl.constexpr,
    TAU: tl.constexpr,
    BEFORE: tl.constexpr,
    LAST: tl.constexpr,
    PACK: tl.constexpr,
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
    offset = elements(in_x(groups, chunk, chunk_stride, DENSE), V)
    threshold = number(threshold_number, STATE)
    _middle, a, b = 0.0, 1.0, 0.0
    if AFFINE:
        _middle, a, b = normalization(mean, inv_std, weight, bias, c, there, AFFINE, STATE)
    k = number(inv_tau_number, STATE) if TAU == 0 else of_channel(inv_tau, c if TAU == 2 else c * 0, there, STATE)
    if BEFORE:
        h = tl.load(before + i, mask=mask, other=0.0).to(STATE)
        s = fires(h, threshold, STRICT)
    else:
        h = tl.zeros([A, B, V], STATE)
        s = h > 1
    # Offsets into the whole sequence may exceed 32 bits.
    x += offset
    coming = tl.load(x, mask=mask, other=0.0)
    for part in range((STEPS + UNROLL - 1) // UNROLL):
        first = tl.cast(part * UNROLL, tl.int64)
        fired = tl.zeros([A, B, V], tl.int32)
        for t in tl.static_range(UNROLL):
            frame = first + t
            there_is = mask & (frame < STEPS) if STEPS % UNROLL != 0 else mask
            v = coming.to(STATE)
            # Loaded before the store below; after it, the load would wait for the store.
            coming = tl.load(x + (frame + 1) * x_step * V, mask=mask & (frame + 1 < STEPS), other=0.0)
            if AFFINE:
                v = v * a + b
            charged, _u = charge(h, s, v, k, threshold, RESET)
            h = tl.where(frame < STEPS, charged, h) if STEPS % UNROLL != 0 else charged
            s = fires(h, threshold, STRICT)
            tl.store(spikes + frame * size * V + i, tl.where(s, 1.0, 0.0).to(spikes.dtype.element_ty), mask=there_is)
            if PACK:
                fired |= tl.where(s, 1 << (8 * t), 0)
        if PACK:
            store_bits(bits, fired, groups, mask, first, size, UNROLL, STEPS)
    if LAST:
        tl.store(last + i, h, mask=mask)


@triton.jit
def _input(x, of, t, step, mask, T: tl.constexpr, STEPS: tl.constexpr, SEGMENT: tl.constexpr, REPEAT: tl.constexpr):
    """Step T of the segment of x that begins at step t, in x's dtype; or `x`, the step before, if none is read."""
    if T >= SEGMENT or (REPEAT and T > 0):
        return x
    else:
        if STEPS % SEGMENT != 0:
            mask = mask & (t + T < STEPS)
        return tl.load(of + (t + T).to(tl.int64) * step, mask=mask, other=0.0)


@triton.jit
def _membrane(
    h,
    s,
    x,
    a,
    b,
    k,
    threshold,
    T: tl.constexpr,
    SEGMENT: tl.constexpr,
    AFFINE: tl.constexpr,
    RESET: tl.constexpr,
    STRICT: tl.constexpr,
    STATE: tl.constexpr,
):
    """Membrane and spikes after step T of a segment."""
    if T >= SEGMENT:
        return h, s
    else:
        v = x.to(STATE)
        if AFFINE:
            v = v * a + b
        h, _u = charge(h, s, v, k, threshold, RESET)
        return h, fires(h, threshold, STRICT)


@triton.jit
def _pick(T: tl.constexpr, v0, v1, v2, v3, v4, v5, v6, v7, v8):
    """One of nine values by a compile-time index; a tuple would do, but Triton has tuples only since 3.3."""
    if T == 0:  # noqa: SIM116
        return v0
    elif T == 1:
        return v1
    elif T == 2:
        return v2
    elif T == 3:
        return v3
    elif T == 4:
        return v4
    elif T == 5:
        return v5
    elif T == 6:
        return v6
    elif T == 7:
        return v7
    else:
        return v8


@triton.jit
def _keep_membranes(
    x,
    step,
    mask,
    h,
    s,
    a,
    b,
    k,
    threshold,
    to,
    frame,
    SEGMENTS: tl.constexpr,
    SEGMENT: tl.constexpr,
    AFFINE: tl.constexpr,
    RESET: tl.constexpr,
    STRICT: tl.constexpr,
    STATE: tl.constexpr,
):
    """Stores the membrane before each segment except the first."""
    for segment in range(SEGMENTS - 1):
        for t in tl.range(SEGMENT, loop_unroll_factor=SEGMENT):
            at = tl.cast(segment * SEGMENT + t, tl.int64)
            v = tl.load(x + at * step, mask=mask, other=0.0)
            h, s = _membrane(h, s, v, a, b, k, threshold, 0, SEGMENT, AFFINE, RESET, STRICT, STATE)
        tl.store(to + tl.cast(segment, tl.int64) * frame, h, mask=mask)


@triton.jit
def _before(kept, segment, frame, mask, first, threshold, STRICT: tl.constexpr, BEFORE: tl.constexpr):
    """Membrane and spikes before a segment."""
    later = segment > 0
    h = tl.load(kept + tl.cast(segment - 1, tl.int64) * frame, mask=mask & later, other=0.0)
    h = tl.where(later, h, first)
    fired = fires(h, threshold, STRICT)
    return h, fired if BEFORE else fired & later


@triton.jit
def _arriving(grad, masks, codes, n, t, grad_step, mask_step, frame, mask, MASK: tl.constexpr):
    """What `_of_spikes` computes the gradient of step t's spikes from, in the dtypes of memory."""
    if not MASK:
        given = tl.load(grad + t * grad_step, mask=mask, other=0.0)
        return given, given, given
    else:
        given = tl.load(grad + t * grad_step, mask=mask & (n == 0), other=0.0)
        code = tl.load(codes + t * frame, mask=mask & (n != 0), other=0)
        return given, code, tl.load(masks + t * mask_step, mask=mask, other=0.0)


@triton.jit
def _of_spikes(given, code, values, n, MASK: tl.constexpr, STATE: tl.constexpr):
    """The gradient of the spikes: as given; for q times the mask; for k (v) the mask's gradient where v (k) fired."""
    if not MASK:
        return given.to(STATE)
    else:
        # A branch: a program serves only one of q, k and v, and computing both to choose takes a tenth longer.
        return values * given.to(STATE) if n == 0 else tl.where((code >> (3 - n)) & 1 != 0, values, 0.0)


@triton.jit
def _constants(
    first,
    mean,
    inv_std,
    weight,
    bias,
    inv_tau,
    inv_tau_number,
    c,
    there,
    AFFINE: tl.constexpr,
    TAU: tl.constexpr,
    STATE: tl.constexpr,
):
    """Per channel: mean, factor and constant of the normalization, and 1 / tau; the input's rows begin at `first`."""
    middle, a, b = 0.0, 1.0, 0.0
    if AFFINE:
        middle, a, b = normalization(mean + first, inv_std + first, weight, bias, c, there, AFFINE, STATE)
    c = first + (c if TAU == 2 else c * 0)
    return middle, a, b, number(inv_tau_number, STATE) if TAU == 0 else of_channel(inv_tau, c, there, STATE)


@triton.jit
def _through_reset(of_h, previous, fired, k, threshold, RESET: tl.constexpr, DETACH: tl.constexpr):
    """From the gradient of a membrane to those of the membrane and the spikes one step before."""
    of_u = of_h * (1 - k)
    of_s = tl.zeros(of_h.shape, of_h.dtype)
    if not DETACH:
        if RESET == 0:
            of_s = -of_u * previous
        if RESET == 1:
            of_s = -of_h * threshold
    return (of_u * tl.where(fired, 0.0, 1.0) if RESET == 0 else of_u), of_s


@triton.jit(do_not_specialize=[*SIZES, "inv_tau_number", "threshold_number", "alpha_number"])
def backward(
    grad,
    mask_of_q,
    mask_of_others,
    codes,
    grad_last,
    x,
    x_1,
    x_2,
    mean,
    inv_std,
    weight,
    weight_1,
    weight_2,
    bias,
    bias_1,
    bias_2,
    inv_tau,
    before,
    grad_x,
    grad_x_1,
    grad_x_2,
    grad_before,
    sums,
    kept,
    size,
    chunk,
    chunk_stride,
    x_step,
    grad_step,
    mask_step,
    positions,
    channels,
    inner,
    tokens,
    inv_tau_number,
    threshold_number,
    alpha_number,
    STEPS: tl.constexpr,
    SEGMENT: tl.constexpr,
    RESET: tl.constexpr,
    STRICT: tl.constexpr,
    DETACH: tl.constexpr,
    KIND: tl.constexpr,
    AFFINE: tl.constexpr,
    TAU: tl.constexpr,
    BEFORE: tl.constexpr,
    GRAD: tl.constexpr,
    MASK: tl.constexpr,
    LAST: tl.constexpr,
    REPEAT: tl.constexpr,
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
    SEGMENTS: tl.constexpr = (STEPS + SEGMENT - 1) // SEGMENT
    c, there, groups, mask, image = place(positions, channels, inner, tokens, INNERMOST, SINGLE, A, B, V, INDEX, N)
    i = elements(groups, V)
    n = which(N)
    x = one_of(n, x, x_1, x_2, N)
    grad_x = one_of(n, grad_x, grad_x_1, grad_x_2, N)
    of = x + elements(in_x(groups, chunk, chunk_stride, DENSE), V)
    threshold, alpha = number(threshold_number, STATE), number(alpha_number, STATE)
    weight, bias = one_of(n, weight, weight_1, weight_2, N), one_of(n, bias, bias_1, bias_2, N)
    row = channels * V if INNERMOST else channels
    middle, a, b, k = _constants(
        n * row, mean, inv_std, weight, bias, inv_tau, inv_tau_number, c, there, AFFINE, TAU, STATE
    )
    zeros = tl.zeros([A, B, V], STATE)
    first = tl.load(before + i, mask=mask, other=0.0).to(STATE) if BEFORE else zeros
    s0 = fires(first, threshold, STRICT) if BEFORE else first > 1
    frame, step, step_of = size.to(tl.int64) * V, x_step.to(tl.int64) * V, grad_step.to(tl.int64) * V
    kept += n * (SEGMENTS - 1) * frame + i
    if SEGMENTS > 1:
        _keep_membranes(
            of, step, mask, first, s0, a, b, k, threshold, kept, frame, SEGMENTS, SEGMENT, AFFINE, RESET, STRICT, STATE
        )
        # Needed if the compiler lays out loads and stores differently: otherwise threads read their own writes.
        tl.debug_barrier()
    given, coded = grad + i, codes + i
    masked = one_of(n, mask_of_q, mask_of_others, mask_of_others, N) + image * row + c
    of_h = tl.load(grad_last + i, mask=mask, other=0.0).to(STATE) if LAST else zeros
    of_s, of_tau, of_shift, of_scale = zeros, zeros, zeros, zeros
    for back in range(SEGMENTS):
        segment = SEGMENTS - 1 - back
        t0 = tl.cast(segment * SEGMENT, tl.int32)
        h0 = first
        if SEGMENTS > 1:
            h0, s0 = _before(kept, segment, frame, mask, first, threshold, STRICT, BEFORE)
        x0 = _input(first, of, t0, step, mask, 0, STEPS, SEGMENT, REPEAT)
        x1 = _input(x0, of, t0, step, mask, 1, STEPS, SEGMENT, REPEAT)
        x2 = _input(x1, of, t0, step, mask, 2, STEPS, SEGMENT, REPEAT)
        x3 = _input(x2, of, t0, step, mask, 3, STEPS, SEGMENT, REPEAT)
        x4 = _input(x3, of, t0, step, mask, 4, STEPS, SEGMENT, REPEAT)
        x5 = _input(x4, of, t0, step, mask, 5, STEPS, SEGMENT, REPEAT)
        x6 = _input(x5, of, t0, step, mask, 6, STEPS, SEGMENT, REPEAT)
        x7 = _input(x6, of, t0, step, mask, 7, STEPS, SEGMENT, REPEAT)
        h1, s1 = _membrane(h0, s0, x0, a, b, k, threshold, 0, SEGMENT, AFFINE, RESET, STRICT, STATE)
        h2, s2 = _membrane(h1, s1, x1, a, b, k, threshold, 1, SEGMENT, AFFINE, RESET, STRICT, STATE)
        h3, s3 = _membrane(h2, s2, x2, a, b, k, threshold, 2, SEGMENT, AFFINE, RESET, STRICT, STATE)
        h4, s4 = _membrane(h3, s3, x3, a, b, k, threshold, 3, SEGMENT, AFFINE, RESET, STRICT, STATE)
        h5, s5 = _membrane(h4, s4, x4, a, b, k, threshold, 4, SEGMENT, AFFINE, RESET, STRICT, STATE)
        h6, s6 = _membrane(h5, s5, x5, a, b, k, threshold, 5, SEGMENT, AFFINE, RESET, STRICT, STATE)
        h7, s7 = _membrane(h6, s6, x6, a, b, k, threshold, 6, SEGMENT, AFFINE, RESET, STRICT, STATE)
        h8, _s = _membrane(h7, s7, x7, a, b, k, threshold, 7, SEGMENT, AFFINE, RESET, STRICT, STATE)
        if GRAD:
            t = (t0 + SEGMENT - 1).to(tl.int64)
            there_is = mask & (t < STEPS)
            got, code, values = _arriving(given, masked, coded, n, t, step_of, mask_step, frame, there_is, MASK)
        for T in tl.static_range(SEGMENT - 1, -1, -1):
            t = (t0 + T).to(tl.int64)
            there_is = mask & (t < STEPS) if STEPS % SEGMENT != 0 else mask
            if GRAD:
                of_s += _of_spikes(got, code, values, n, MASK, STATE)
                if T > 0:
                    # Loaded before the store below; after it, the load would wait for the store.
                    real = mask & (t <= STEPS) if STEPS % SEGMENT != 0 else mask
                    got, code, values = _arriving(given, masked, coded, n, t - 1, step_of, mask_step, frame, real, MASK)
            h = _pick(T + 1, h0, h1, h2, h3, h4, h5, h6, h7, h8)
            previous = _pick(T, h0, h1, h2, h3, h4, h5, h6, h7, h8)
            fired = s0 if T == 0 else fires(previous, threshold, STRICT)
            raw = _pick(T, x0, x1, x2, x3, x4, x5, x6, x7, x7).to(STATE)
            now = of_h + of_s * _surrogate(h - threshold, alpha, KIND)
            of_v = now * k
            if TAU != 0:
                u = previous * tl.where(fired, 0.0, 1.0) if RESET == 0 else previous
                of_tau += tl.where(there_is, now * ((raw * a + b if AFFINE else raw) - u), 0.0)
            if AFFINE or REPEAT:
                of_shift += tl.where(there_is, of_v, 0.0)
            if AFFINE and not REPEAT:
                of_scale += tl.where(there_is, of_v * (raw - middle), 0.0)
            if not REPEAT:
                tl.store(grad_x + t * frame + i, of_v.to(grad_x.dtype.element_ty), mask=there_is)
            earlier, of_spikes = _through_reset(now, previous, fired, k, threshold, RESET, DETACH)
            # Padding behind the last step leaves the gradient as it is.
            of_h = tl.where(t < STEPS, earlier, of_h) if STEPS % SEGMENT != 0 else earlier
            of_s = tl.where(t < STEPS, of_spikes, of_s) if STEPS % SEGMENT != 0 else of_spikes
    if REPEAT:
        if AFFINE:
            of_scale = of_shift * (tl.load(of, mask=mask, other=0.0).to(STATE) - middle)
        tl.store(grad_x + i, of_shift.to(grad_x.dtype.element_ty), mask=mask)
    if BEFORE:
        of_h += of_s * _surrogate(first - threshold, alpha, KIND)
        tl.store(grad_before + i, of_h, mask=mask)
    store_sums(sums, of_tau, of_shift, of_scale, c, there, mask, channels, AFFINE, TAU, INNERMOST, V, N)


@triton.jit
def store_sums(
    sums,
    of_tau,
    of_shift,
    of_scale,
    c,
    there,
    mask,
    channels,
    AFFINE: tl.constexpr,
    TAU: tl.constexpr,
    INNERMOST: tl.constexpr,
    V: tl.constexpr,
    N: tl.constexpr,
):
    """Each program stores its row of the sums `[N, 3, runs, channels]`."""
    row = channels * V if INNERMOST else channels
    run = second_axis() if INNERMOST else first_axis(N)
    runs = tl.num_programs(1) * tl.num_programs(2) if INNERMOST else tl.num_programs(0) // N
    rows = runs.to(tl.int64) * row
    sums += 3 * which(N) * rows + run.to(tl.int64) * row
    if TAU != 0:
        tl.store(sums + c, by_channel(of_tau, mask, INNERMOST), mask=there)
    if AFFINE:
        store_by_channel(sums + rows, rows, c, there, of_shift, of_scale, mask, INNERMOST)


@triton.jit(do_not_specialize=["runs", "channels", "per"])
def total(sums, result, runs, channels, per, RUNS: tl.constexpr, CHANNELS: tl.constexpr):
    """Adds up sums `[rows, runs, channels]`, each `per` runs into one, in float64."""
    row = tl.program_id(1)
    split = tl.program_id(2)
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    added = tl.zeros([RUNS, CHANNELS], tl.float64)
    for begin in range(0, per, RUNS):
        run = split * per + begin + tl.arange(0, RUNS)
        mask = (run < runs)[:, None] & (c < channels)[None, :]
        at = (row.to(tl.int64) * runs + run[:, None]) * channels + c[None, :]
        added += tl.load(sums + at, mask=mask, other=0.0).to(tl.float64)
    to = result + (row * tl.num_programs(2) + split).to(tl.int64) * channels + c
    tl.store(to, tl.sum(added, axis=0), mask=c < channels)
