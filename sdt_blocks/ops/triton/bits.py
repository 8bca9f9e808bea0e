"""Triton kernels that pack and unpack spikes as bits: b + 1 / 8 bytes of traffic per spike of b bytes, either way."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pack(x, bits, size, LANES: tl.constexpr, BLOCK: tl.constexpr):
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # One thread reads the spikes of a byte, as many at once as possible.
    lane = tl.arange(0, LANES)[None, :]
    packed = tl.zeros([BLOCK], tl.int32)
    for part in tl.static_range(8 // LANES):
        i = byte[:, None] * 8 + part * LANES + lane
        spikes = (tl.load(x + i, mask=i < size, other=0.0) != 0).to(tl.int32)
        packed |= tl.sum(spikes << (lane + part * LANES), axis=1)
    tl.store(bits + byte, packed.to(tl.uint8), mask=byte * 8 < size)


@triton.jit
def unpack(bits, x, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    byte = tl.load(bits + i // 8, mask=i < size, other=0).to(tl.int32)
    # Through float32: Triton's interpreter would store an integer's bits in a bfloat16.
    spike = ((byte >> (i % 8).to(tl.int32)) & 1).to(tl.float32)
    tl.store(x + i, spike.to(x.dtype.element_ty), mask=i < size)
