"""The training ops' kernels for CUDA tensors, by Triton; see `Kernels`.

Under `TRITON_INTERPRET=1` they run on CPU tensors too.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..spec import RESETS, Affine, Arriving, Layout, NeuronSpec, arrange, state_dtype
from . import attention, lif, pool
from . import bits as bit_kernels
from . import norm as norms
from .tiles import tile

BLOCK = 1024
_STATE = {torch.float32: triton.language.float32, torch.float64: triton.language.float64}
# A program that adds up what others wrote for each channel has so many channels, and takes so many runs at once.
FEW = 32
# And so many runs in all; the more there are, the more such programs, whose sums are added up in their turn.
RUNS = 128


def lif_forward(
    x: Tensor,
    layout: Layout,
    neuron: NeuronSpec,
    norm: Affine | None,
    inv_tau: Tensor | None,
    membrane: Tensor | None,
    *,
    keep_membrane: bool,
) -> tuple[Tensor, Tensor | None]:
    spikes = layout.empty(x, layout.steps)
    last = layout.empty_frame(x, state_dtype(x)) if keep_membrane else None
    before = None if membrane is None else layout.frame(membrane)
    cut = tile(x, layout)
    with _device_of(x):
        lif.forward[cut.grid](
            x,
            *_affine(norm, x)[:2],
            _or(inv_tau, x),
            _or(before, x),
            spikes,
            _or(last, x),
            **cut.where(layout),
            **cut.arguments,
            **_numbers(x, neuron),
            **_constants(x, layout, neuron, norm, inv_tau, before),
            UNROLL=min(layout.steps, lif.MOST_STEPS),
            LAST=keep_membrane,
        )
    return spikes, last


def lif_backward(
    arriving: Arriving,
    x: Tensor,
    layout: Layout,
    neuron: NeuronSpec,
    norm: Affine | None,
    inv_tau: Tensor | None,
    membrane: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    dtype = state_dtype(x)
    grad_x = layout.empty(x, x.shape[0])
    before = None if membrane is None else layout.frame(membrane)
    grad_before = None if before is None else torch.empty_like(before)
    grad, mask, grad_last = arriving
    grad = None if grad is None else layout.frames(grad)
    grad_last = None if grad_last is None else layout.frame(grad_last)
    grad_step = 0 if grad is None else grad.stride(0)
    cut = tile(x, layout, grad_step, images=1 if mask is None else mask.values.shape[1])
    segment = _segment(layout.steps)
    kept = x.new_empty(triton.cdiv(layout.steps, segment) - 1, layout.size, dtype=dtype)
    rows = (1 if inv_tau is not None else 0) | (6 if norm is not None else 0)
    sums = x.new_empty((3, cut.runs, layout.channels) if rows else 0, dtype=dtype)
    kind, alpha = neuron.gradient()
    with _device_of(x):
        lif.backward[cut.grid](
            _or(grad, x),
            x if mask is None else mask.values,
            x if mask is None else _or(mask.codes, x),
            _or(grad_last, x),
            x,
            *_affine(norm, x),
            _or(inv_tau, x),
            _or(before, x),
            grad_x,
            _or(grad_before, x),
            sums,
            kept,
            **cut.where(layout),
            grad_step=grad_step // cut.group,
            mask_step=0 if mask is None else mask.values.stride(0),
            **cut.arguments,
            **_numbers(x, neuron),
            alpha_number=_number(x, alpha),
            **_constants(x, layout, neuron, norm, inv_tau, before),
            SEGMENT=segment,
            DETACH=neuron.detach_reset,
            KIND=kind,
            GRAD=grad is not None,
            MASK=mask is not None,
            BIT=0 if mask is None else mask.bit,
            LAST=grad_last is not None,
            REPEAT=layout.repeat,
        )
    return grad_x, grad_before, _total(sums, rows, cut.runs, layout.channels)


def _total(sums: Tensor, rows: int, runs: int, channels: int) -> Tensor:
    """`sums.sum(1)` of `[3, runs, channels]` in float64; zeros for a row whose bit is not in `rows`."""
    while True:
        splits = triton.cdiv(max(runs, 1), RUNS)
        result = sums.new_empty(3, splits, channels, dtype=torch.float64)
        with _device_of(sums):
            lif.total[(triton.cdiv(channels, FEW), 3, splits)](
                sums, result, runs, channels, RUNS, ROWS=rows, RUNS=FEW, CHANNELS=FEW
            )
        if splits == 1:
            return result[:, 0]
        sums, runs = result, splits


def attend(
    x: Sequence[Tensor],
    out: Tensor,
    codes: Tensor | None,
    sums: Tensor,
    layout: Layout,
    neurons: Sequence[NeuronSpec],
    norm: Affine,
    inv_tau: Tensor | None,
) -> None:
    q, k, v = x
    of_q, of_mask = neurons[0], neurons[3]
    cut = attention.cut(q, layout)
    if not cut.fits:
        _attend_by_parts(x, out, codes, sums, layout, neurons, norm, inv_tau)
        return
    with _device_of(q):
        attention.attend[cut.grid](
            q,
            k,
            v,
            norm.scale,
            norm.shift,
            _or(inv_tau, q),
            out,
            _or(codes, q),
            sums,
            **cut.arguments,
            **_numbers(q, of_q),
            **{f"mask_{name}": value for name, value in _numbers(q, of_mask).items()},
            STEPS=layout.steps,
            UNROLL=attention.unrolled(layout.steps),
            RESET=RESETS.index(of_q.reset),
            STRICT=of_q.strict,
            MASK_RESET=RESETS.index(of_mask.reset),
            MASK_STRICT=of_mask.strict,
            TAU=inv_tau is not None,
            KEEP=codes is not None,
            STATE=_STATE[state_dtype(q)],
        )


def _attend_by_parts(
    x: Sequence[Tensor],
    out: Tensor,
    codes: Tensor | None,
    sums: Tensor,
    layout: Layout,
    neurons: Sequence[NeuronSpec],
    norm: Affine,
    inv_tau: Tensor | None,
) -> None:
    """For more steps than a program has bits for."""
    taus: Sequence[Tensor | None] = [None] * 4 if inv_tau is None else list(inv_tau.unbind())
    fired = [
        lif_forward(part, layout, neurons[i], norm.row(i), taus[i], None, keep_membrane=False)[0]
        for i, part in enumerate(x)
    ]
    q, k, v = fired
    torch.sum((k * v).flatten(3), 3, dtype=sums.dtype, out=sums)
    of_sums, channels = arrange(sums, layout.steps, per_channel=True)
    mask, _ = lif_forward(of_sums, channels, neurons[3], None, taus[3], None, keep_membrane=False)
    torch.mul(q, mask.view(*mask.shape, *[1] * (q.ndim - 3)).to(q.dtype), out=out)
    if codes is not None:
        codes.copy_(q + 2 * k + 4 * v)


def mask_gradient(grad: Tensor, codes: Tensor, result: Tensor, layout: Layout) -> None:
    cut = attention.cut(grad, layout, grad.stride(0))
    with _device_of(grad):
        attention.mask_gradient[cut.grid](
            grad,
            codes,
            result,
            **cut.arguments,
            grad_step=grad.stride(0) // cut.group,
            STEPS=layout.steps,
            UNROLL=attention.unrolled(layout.steps),
            STATE=_STATE[state_dtype(grad)],
        )


def channel_statistics(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    cut, channels = tile(x, layout), layout.channels
    runs, step, positions = cut.runs, cut.step, cut.arguments["positions"]
    weight = layout.steps * (1 if cut.arguments["INNERMOST"] else cut.group)
    partial = x.new_empty(3, runs, channels, dtype=state_dtype(x))
    with _device_of(x):
        norms.moments[cut.grid](x, partial, **cut.where(layout), **cut.arguments, **_unrolled(x, layout))
    while True:
        splits = triton.cdiv(runs, RUNS)
        merged = x.new_empty(3, splits, channels, dtype=torch.float64)
        with _device_of(x):
            norms.merge[(triton.cdiv(channels, FEW), splits)](
                partial, merged, runs, channels, step, positions, weight, RUNS, RUNS=FEW, CHANNELS=FEW
            )
        if splits == 1:
            return merged[0, 0].clone(), merged[2, 0] / (layout.size // channels * layout.steps)
        partial, runs, step = merged, splits, step * RUNS


def channel_combine(grad: Tensor, x: Tensor, layout: Layout, a: Tensor, b: Tensor, d: Tensor) -> None:
    cut = tile(x, layout)
    with _device_of(x):
        norms.combine[cut.grid](grad, x, a, b, d, **cut.where(layout), **cut.arguments, **_unrolled(x, layout))


def max_pool(x: Tensor, out: Tensor, places: Tensor | None) -> None:
    cut = pool.cut(x, out)
    with _device_of(x):
        pool.max_pool[cut.grid](
            x, out, _or(places, x), **cut.arguments, KEEP=places is not None, STATE=_STATE[state_dtype(x)]
        )


def max_pool_backward(grad: Tensor, places: Tensor, grad_x: Tensor) -> None:
    cut = pool.cut(grad_x, grad)
    with _device_of(grad):
        pool.max_pool_backward[cut.grid](grad, places, grad_x, **cut.arguments, STATE=_STATE[state_dtype(grad)])


def pack_bits(x: Tensor) -> Tensor | None:
    bits = x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)
    with _device_of(x):
        bit_kernels.pack[(triton.cdiv(bits.numel(), BLOCK),)](x, bits, x.numel(), BLOCK=BLOCK)
    return bits


def unpack_bits(bits: Tensor, x: Tensor) -> None:
    with _device_of(x):
        bit_kernels.unpack[(triton.cdiv(x.numel(), BLOCK),)](bits, x, x.numel(), BLOCK=BLOCK)


def _segment(steps: int) -> int:
    """Steps whose membranes are in registers at once: all, or the most that leave no rest, or the most."""
    if steps <= lif.MOST_STEPS:
        return steps
    even = [n for n in range(lif.MOST_STEPS, lif.MOST_STEPS // 2, -1) if steps % n == 0]
    return even[0] if even else lif.MOST_STEPS


def _unrolled(x: Tensor, layout: Layout) -> dict[str, Any]:
    return {"STEPS": layout.steps, "UNROLL": min(layout.steps, lif.MOST_STEPS), "STATE": _STATE[state_dtype(x)]}


def _number(x: Tensor, value: float) -> float | int:
    """A number that no build depends on; Triton would pass it as float32, so for float64 its bits go."""
    return struct.unpack("<q", struct.pack("<d", value))[0] if x.dtype == torch.float64 else float(value)


def _numbers(x: Tensor, neuron: NeuronSpec) -> dict[str, float | int]:
    assert not isinstance(neuron.inv_tau, Tensor)
    return {"inv_tau_number": _number(x, neuron.inv_tau), "threshold_number": _number(x, neuron.threshold)}


def _constants(
    x: Tensor, layout: Layout, neuron: NeuronSpec, norm: Affine | None, inv_tau: Tensor | None, before: Tensor | None
) -> dict[str, Any]:
    return {
        "STEPS": layout.steps,
        "RESET": RESETS.index(neuron.reset),
        "STRICT": neuron.strict,
        "AFFINE": norm is not None,
        "TAU": 0 if inv_tau is None else 2 if inv_tau.ndim else 1,
        "BEFORE": before is not None,
        "STATE": _STATE[state_dtype(x)],
    }


def _affine(norm: Affine | None, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (x, x, x) if norm is None else (norm.scale, norm.shift, norm.mean)


def _or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A kernel takes a pointer for what it is told not to read."""
    return stand_in if tensor is None else tensor


def _device_of(x: Tensor) -> torch.cuda.device_of:
    return torch.cuda.device_of(x)
