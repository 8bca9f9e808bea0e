"""Triton kernels of spike-driven self-attention.

Traffic in bytes per element and time step, for an element of b bytes: forward 4 b (q, k and v read, masked spikes
written) and 1 where a gradient will be wanted; backward b + 1 for the mask's gradient, then for q what a neuron takes
and 1, for k and v 3 b + 1 each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .lif import channel_values, charge, fires


@triton.jit
def _advance(x, mask, h, s, a, b, k, threshold, RESET: tl.constexpr, STRICT: tl.constexpr, STATE: tl.constexpr):
    """Membrane and spikes of a normalized neuron after one step."""
    v = tl.load(x, mask=mask, other=0.0).to(STATE) * a + b
    h, _u = charge(h, s, v, k, threshold, RESET)
    return h, fires(h, threshold, STRICT)


@triton.jit
def attend(
    q,
    k,
    v,
    scale,
    shift,
    inv_tau,
    out,
    codes,
    sums,
    size,
    tokens,
    channels,
    token_stride,
    channel_stride,
    STEPS,
    K: tl.constexpr,
    THRESHOLD: tl.constexpr,
    RESET: tl.constexpr,
    STRICT: tl.constexpr,
    MASK_K: tl.constexpr,
    MASK_THRESHOLD: tl.constexpr,
    MASK_RESET: tl.constexpr,
    MASK_STRICT: tl.constexpr,
    TAU: tl.constexpr,
    KEEP: tl.constexpr,
    STATE: tl.constexpr,
    CHANNELS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """One image's tokens of a few channels, all of them at once, step after step."""
    image = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, TOKENS)
    of_channel = c < channels
    mask = of_channel[:, None] & (n < tokens)[None, :]
    i = image * tokens * channels + c.to(tl.int64)[:, None] * channel_stride + n[None, :] * token_stride
    a_q = channel_values(scale, c, of_channel, STATE)[:, None]
    a_k = channel_values(scale + channels, c, of_channel, STATE)[:, None]
    a_v = channel_values(scale + 2 * channels, c, of_channel, STATE)[:, None]
    b_q = channel_values(shift, c, of_channel, STATE)[:, None]
    b_k = channel_values(shift + channels, c, of_channel, STATE)[:, None]
    b_v = channel_values(shift + 2 * channels, c, of_channel, STATE)[:, None]
    k_q = tl.full([CHANNELS, 1], K, STATE)
    k_k = k_q
    k_v = k_q
    k_mask = tl.full([CHANNELS], MASK_K, STATE)
    if TAU:
        k_q = channel_values(inv_tau, c, of_channel, STATE)[:, None]
        k_k = channel_values(inv_tau + channels, c, of_channel, STATE)[:, None]
        k_v = channel_values(inv_tau + 2 * channels, c, of_channel, STATE)[:, None]
        k_mask = channel_values(inv_tau + 3 * channels, c, of_channel, STATE)
    threshold = tl.full([CHANNELS, TOKENS], THRESHOLD, STATE)
    mask_threshold = tl.full([CHANNELS], MASK_THRESHOLD, STATE)
    h_q = tl.zeros([CHANNELS, TOKENS], STATE)
    h_k = h_q
    h_v = h_q
    q_fires = h_q > 1
    k_fires = q_fires
    v_fires = q_fires
    h_mask = tl.zeros([CHANNELS], STATE)
    mask_fires = h_mask > 1
    q += i
    k += i
    v += i
    out += i
    codes += i
    sums += image * channels + c
    for _ in range(STEPS):
        h_q, q_fires = _advance(q, mask, h_q, q_fires, a_q, b_q, k_q, threshold, RESET, STRICT, STATE)
        h_k, k_fires = _advance(k, mask, h_k, k_fires, a_k, b_k, k_k, threshold, RESET, STRICT, STATE)
        h_v, v_fires = _advance(v, mask, h_v, v_fires, a_v, b_v, k_v, threshold, RESET, STRICT, STATE)
        # The padding beyond the tokens may fire too.
        total = tl.sum(tl.where(k_fires & v_fires & mask, 1.0, 0.0), axis=1).to(STATE)
        h_mask, _m = charge(h_mask, mask_fires, total, k_mask, mask_threshold, MASK_RESET)
        mask_fires = fires(h_mask, mask_threshold, MASK_STRICT)
        masked = tl.where(q_fires & mask_fires[:, None], 1.0, 0.0)
        tl.store(out, masked.to(out.dtype.element_ty), mask=mask)
        if KEEP:
            code = tl.where(q_fires, 1, 0) | tl.where(k_fires, 2, 0) | tl.where(v_fires, 4, 0)
            tl.store(codes, code.to(tl.uint8), mask=mask)
        tl.store(sums, total, mask=of_channel)
        q += size
        k += size
        v += size
        out += size
        codes += size
        sums += size // tokens


@triton.jit
def mask_gradient(
    grad,
    codes,
    result,
    size,
    tokens,
    channels,
    token_stride,
    channel_stride,
    grad_step,
    images,
    STATE: tl.constexpr,
    CHANNELS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) // images
    image = tl.program_id(0).to(tl.int64) % images
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, TOKENS)
    mask = (c < channels)[:, None] & (n < tokens)[None, :]
    i = image * tokens * channels + c.to(tl.int64)[:, None] * channel_stride + n[None, :] * token_stride
    code = tl.load(codes + t * size + i, mask=mask, other=0)
    given = tl.load(grad + t * grad_step + i, mask=mask, other=0.0).to(STATE)
    total = tl.sum(tl.where(code & 1 != 0, given, 0.0), axis=1)
    tl.store(result + (t * images + image) * channels + c, total, mask=c < channels)
