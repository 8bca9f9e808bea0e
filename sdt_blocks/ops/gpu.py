"""Triton kernels: the functions of `cpu.py` for CUDA tensors, under `TRITON_INTERPRET=1` for CPU tensors.

Traffic in bytes per element and time step, for an element of b bytes: forward 2 b (input read, spikes written; the
state stays in registers), backward 4 b (input read twice, gradient read and written). The backward pass also writes the
membranes and reads them twice, in a scratch that a fixed number of programs use again and again, so that it stays in
the L2 cache. Sums over channels cost 4 bytes each per neuron, not per step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..surrogate import KINDS
from .spec import RESETS, Layout, NeuronSpec, state_dtype

BLOCK = 1024
HALF_PI = tl.constexpr(1.5707963267948966)
_STATE = {torch.float32: tl.float32, torch.float64: tl.float64}
# Programs of the backward pass for each multiprocessor: each owns a scratch of `steps * BLOCK` membranes.
_PROGRAMS = 8


@triton.jit
def _surrogate(shift, KIND: tl.constexpr, ALPHA: tl.constexpr):
    # A bare number would be rounded to float32 beside float64.
    a = tl.full(shift.shape, ALPHA, shift.dtype)
    if KIND == 0:
        p = 1 / (1 + tl.exp(-tl.abs(a * shift)))
        return a * p * (1 - p)
    elif KIND == 1:
        y = tl.full(shift.shape, HALF_PI, shift.dtype) * a * shift
        return (a / 2) / (1 + y * y)
    elif KIND == 2:
        y = a * tl.abs(shift) + 1
        return 1 / (y * y)
    elif KIND == 3:
        return a * tl.maximum(1 - a * tl.abs(shift), 0.0)
    else:
        return shift * 0 + 1


@triton.jit
def _fires(h, threshold, STRICT: tl.constexpr):
    if STRICT:
        return h > threshold
    else:
        return h >= threshold


@triton.jit
def _charge(h, s, v, k, threshold, RESET: tl.constexpr):
    """Membrane after input v, and what the reset left of the one before."""
    u = h * tl.where(s, 0.0, 1.0) if RESET == 0 else h
    h = u + (v - u) * k
    if RESET == 1:
        h = tl.where(s, h - threshold, h)
    return h, u


@triton.jit
def _channel_values(pointer, c, mask, DTYPE: tl.constexpr):
    return tl.load(pointer + c, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def _forward(
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
    a = _channel_values(scale, c, mask, STATE) if AFFINE else 1.0
    b = _channel_values(shift, c, mask, STATE) if AFFINE else 0.0
    k = tl.full([BLOCK], K, STATE) if TAU == 0 else _channel_values(inv_tau, c if TAU == 2 else c * 0, mask, STATE)
    if BEFORE:
        h = tl.load(before + i, mask=mask, other=0.0).to(STATE)
        s = _fires(h, threshold, STRICT)
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
        h, _u = _charge(h, s, v, k, threshold, RESET)
        s = _fires(h, threshold, STRICT)
        tl.store(to, tl.where(s, 1.0, 0.0).to(spikes.dtype.element_ty), mask=mask)
        x += x_step
        to += size
    if LAST:
        tl.store(last + i, h, mask=mask)


@triton.jit
def _backward(
    grad,
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
        offset = i if DENSE else i // chunk * chunk_stride + i % chunk
        c = i // inner % channels
        a = _channel_values(scale, c, mask, STATE) if AFFINE else 1.0
        b = _channel_values(shift, c, mask, STATE) if AFFINE else 0.0
        middle = _channel_values(center, c, mask, STATE) if AFFINE else 0.0
        k = tl.full([BLOCK], K, STATE) if TAU == 0 else _channel_values(inv_tau, c if TAU == 2 else c * 0, mask, STATE)
        first = tl.load(before + i, mask=mask, other=0.0).to(STATE) if BEFORE else tl.zeros([BLOCK], STATE)
        h = first
        s = _fires(h, threshold, STRICT) if BEFORE else h > 1
        of = x + offset
        for t in range(STEPS):
            v = tl.load(of, mask=mask, other=0.0).to(STATE)
            if AFFINE:
                v = v * a + b
            h, _u = _charge(h, s, v, k, threshold, RESET)
            s = _fires(h, threshold, STRICT)
            tl.store(own + t * BLOCK, h)
            of += x_step
        # Every thread reads what it wrote itself, unless the compiler lays loads and stores out differently.
        tl.debug_barrier()

        of_h = tl.load(grad_last + i, mask=mask, other=0.0).to(STATE) if LAST else tl.zeros([BLOCK], STATE)
        of_s = tl.zeros([BLOCK], STATE)
        of_tau = tl.zeros([BLOCK], STATE)
        of_shift = tl.zeros([BLOCK], STATE)
        of_scale = tl.zeros([BLOCK], STATE)
        last_step = (lane * 0 + STEPS - 1).to(tl.int64)
        given = grad + last_step * grad_step + i
        to = grad_x + last_step * size + i
        for back in range(STEPS):
            t = STEPS - 1 - back
            h = tl.load(own + t * BLOCK)
            if GRAD:
                of_s += tl.load(given, mask=mask, other=0.0).to(STATE)
            of_h += of_s * _surrogate(h - threshold, KIND, ALPHA)
            of -= x_step
            raw = tl.load(of, mask=mask, other=0.0).to(STATE)
            previous = tl.load(own + (t - 1) * BLOCK, mask=t > 0, other=0.0)
            previous = tl.where(t > 0, previous, first)
            fired = _fires(previous, threshold, STRICT)
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
            given -= grad_step
            to -= size
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
def _combine(
    grad, x, a, b, d, size, chunk, chunk_stride, x_step, channels, inner, STATE: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    t = tl.program_id(1).to(tl.int64)
    mask = i < size
    c = i // inner % channels
    grad += t * size + i
    value = tl.load(grad, mask=mask, other=0.0).to(STATE)
    raw = tl.load(x + t * x_step + i // chunk * chunk_stride + i % chunk, mask=mask, other=0.0).to(STATE)
    value = value * _channel_values(a, c, mask, STATE) + raw * _channel_values(b, c, mask, STATE)
    value += _channel_values(d, c, mask, STATE)
    tl.store(grad, value.to(grad.dtype.element_ty), mask=mask)


@triton.jit
def _pack(x, bits, size, BLOCK: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    packed = tl.zeros([BLOCK], tl.int32)
    for bit in range(8):
        i = byte * 8 + bit
        packed |= (tl.load(x + i, mask=i < size, other=0.0) != 0).to(tl.int32) << bit
    tl.store(bits + byte, packed.to(tl.uint8), mask=byte * 8 < size)


@triton.jit
def _unpack(bits, x, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    byte = tl.load(bits + i // 8, mask=i < size, other=0).to(tl.int32)
    # By way of float32: Triton's interpreter writes an integer into bfloat16 as its bits.
    spike = ((byte >> (i % 8).to(tl.int32)) & 1).to(tl.float32)
    tl.store(x + i, spike.to(x.dtype.element_ty), mask=i < size)


def lif_forward(
    x: Tensor,
    layout: Layout,
    neuron: NeuronSpec,
    *,
    scale: Tensor | None,
    shift: Tensor | None,
    inv_tau: Tensor | None,
    membrane: Tensor | None,
    keep_membrane: bool = False,
    as_bytes: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Spikes `[steps, ...]` for the input `x * scale + shift`, in x's dtype or as bytes, and the last membrane."""
    spikes = layout.empty(x, layout.steps, torch.uint8 if as_bytes else x.dtype)
    last = layout.empty_frame(x, state_dtype(x)) if keep_membrane else None
    before = None if membrane is None else layout.frame(membrane)
    with _device_of(x):
        _forward[(triton.cdiv(layout.size, BLOCK),)](
            x,
            _or(scale, x),
            _or(shift, x),
            _or(inv_tau, x),
            _or(before, x),
            spikes,
            _or(last, x),
            *_where(layout),
            layout.channels,
            layout.inner,
            layout.steps,
            **_constants(x, layout, neuron, scale, inv_tau, before),
            LAST=keep_membrane,
        )
    return spikes, last


def lif_backward(
    grad: Tensor | None,
    grad_last: Tensor | None,
    x: Tensor,
    layout: Layout,
    neuron: NeuronSpec,
    *,
    scale: Tensor | None,
    shift: Tensor | None,
    center: Tensor | None,
    inv_tau: Tensor | None,
    membrane: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of `x * scale + shift` (like x), of the first membrane, and sums `[3, channels]` in float64.

    The sums are over all neurons of a channel and all steps: of the gradient of `inv_tau`; of that of the input; and,
    where `center` is given, of that of the input times `x - center`.
    """
    dtype = state_dtype(x)
    grad_x = layout.empty(x, x.shape[0])
    before = None if membrane is None else layout.frame(membrane)
    grad_before = None if before is None else torch.empty_like(before)
    grad = None if grad is None else layout.frames(grad)
    grad_last = None if grad_last is None else layout.frame(grad_last)
    blocks = triton.cdiv(layout.size, BLOCK)
    programs = min(blocks, _programs(x.device))
    scratch = x.new_empty(programs * layout.steps * BLOCK, dtype=dtype)
    rows = 3 if scale is not None else 1 if inv_tau is not None else 0
    of_neurons = x.new_zeros(rows, layout.size, dtype=dtype)
    with _device_of(x):
        _backward[(programs,)](
            _or(grad, x),
            _or(grad_last, x),
            x,
            _or(scale, x),
            _or(shift, x),
            _or(center, x),
            _or(inv_tau, x),
            _or(before, x),
            grad_x,
            _or(grad_before, x),
            of_neurons,
            scratch,
            *_where(layout),
            0 if grad is None else grad.stride(0),
            layout.channels,
            layout.inner,
            blocks,
            layout.steps,
            **_constants(x, layout, neuron, scale, inv_tau, before),
            DETACH=neuron.detach_reset,
            KIND=KINDS.index(neuron.surrogate.kind),
            ALPHA=neuron.surrogate.alpha,
            GRAD=grad is not None,
            LAST=grad_last is not None,
            REPEAT=layout.repeat,
        )
    sums = x.new_zeros(3, layout.channels, dtype=torch.float64)
    if rows:
        by_channel = of_neurons.view(rows, -1, layout.channels, layout.inner)
        sums[:rows] = by_channel.sum((1, 3), dtype=torch.float64)
    return grad_x, grad_before, sums


def channel_statistics(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel `[channels]`, in float64."""
    axes = [axis for axis in range(x.ndim) if axis != 2]
    variance, mean = torch.var_mean(x.to(state_dtype(x)), axes, correction=0)
    return mean.double(), variance.double()


def channel_combine(grad: Tensor, x: Tensor, layout: Layout, a: Tensor, b: Tensor, d: Tensor) -> None:
    """`grad = a * grad + b * x + d` in place, with a, b and d `[channels]`."""
    with _device_of(x):
        _combine[(triton.cdiv(layout.size, BLOCK), layout.steps)](
            grad,
            x,
            a,
            b,
            d,
            *_where(layout),
            layout.channels,
            layout.inner,
            STATE=_STATE[state_dtype(x)],
            BLOCK=BLOCK,
        )


def pack_bits(x: Tensor) -> Tensor | None:
    """One bit for each spike of x in the order of memory, `[ceil(n / 8)]`; x must be 0 and 1, which is not checked."""
    bits = x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)
    with _device_of(x):
        _pack[(triton.cdiv(bits.numel(), BLOCK),)](x, bits, x.numel(), BLOCK=BLOCK)
    return bits


def unpack_bits(bits: Tensor, x: Tensor) -> None:
    """Fills x with the elements that `pack_bits` packed."""
    with _device_of(x):
        _unpack[(triton.cdiv(x.numel(), BLOCK),)](bits, x, x.numel(), BLOCK=BLOCK)


def _where(layout: Layout) -> tuple[int, int, int, int]:
    return layout.size, layout.chunk, layout.chunk_stride, layout.x_step


def _constants(
    x: Tensor, layout: Layout, neuron: NeuronSpec, scale: Tensor | None, inv_tau: Tensor | None, before: Tensor | None
) -> dict[str, object]:
    return {
        "K": neuron.inv_tau,
        "THRESHOLD": neuron.threshold,
        "RESET": RESETS.index(neuron.reset),
        "STRICT": neuron.strict,
        "AFFINE": scale is not None,
        "TAU": 0 if inv_tau is None else 2 if inv_tau.ndim else 1,
        "BEFORE": before is not None,
        "DENSE": layout.chunk == layout.size or layout.chunk_stride == layout.chunk,
        "STATE": _STATE[state_dtype(x)],
        "BLOCK": BLOCK,
    }


def _or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A kernel takes a pointer for what it is told not to read."""
    return stand_in if tensor is None else tensor


def _device_of(x: Tensor) -> torch.cuda.device_of:
    return torch.cuda.device_of(x)


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _PROGRAMS
    return _PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count
