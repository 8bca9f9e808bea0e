"""The Triton kernels of the training ops, for CUDA tensors; see `Kernels`.

Under `TRITON_INTERPRET=1` they also run on CPU tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.cuda import device_of

from ..spec import RESETS, Affine, Arriving, Layout, Masks, NeuronSpec, Norm, Spikes, arrange, state_dtype
from . import attention, lif, pool
from . import bits as bit_kernels
from . import norm as norms
from .arguments import (
    STATES,
    affine,
    affines,
    as_bits,
    as_number,
    constants,
    given,
    norm_kind,
    numbers,
    three,
    unrolled,
)
from .tiles import PACKED_STEPS, ROUNDED, THREADS, WIDEST, cdiv, tile, times_for

logging.getLogger(__name__).info(
    "Triton builds each kernel when it is first called, and keeps it for the next time in TRITON_CACHE_DIR or ~/.triton"
)
BLOCK = 1024
writes_bits = True
depthwise_weights = None
# A program that adds up other programs' results per channel handles FEW channels and reads RUNS runs at once.
FEW = 8
RUNS = 128
# The most runs for such a program: more are split among several programs, whose sums are then added up in turn.
MOST_RUNS = 512
# Steps that give a program enough to do.
MANY = 8


def lif_forward(
    x: Tensor,
    layout: Layout,
    neuron: NeuronSpec,
    norm: Affine | None,
    inv_tau: Tensor | None,
    membrane: Tensor | None,
    *,
    keep_membrane: bool = False,
    bits: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    spikes = layout.empty(x, layout.steps)
    last = layout.empty_frame(x, state_dtype(x)) if keep_membrane else None
    before = None if membrane is None else layout.frame(membrane)
    cut = tile(x, layout, least=1 if bits is None else 8)
    with device_of(x):
        lif.forward[cut.grid](
            x,
            *affine(norm, x),
            given(inv_tau, x),
            given(before, x),
            spikes,
            given(bits, x),
            given(last, x),
            **cut.arguments,
            **numbers(x, neuron),
            **constants(x, layout, neuron, norm, inv_tau, before),
            UNROLL=_segment(layout.steps, lif.MOST_STEPS if bits is None else PACKED_STEPS),
            LAST=keep_membrane,
            PACK=bits is not None,
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
    (grad_x,), grad_membrane, sums = _backward(arriving, None, [x], layout, neuron, norm, inv_tau, membrane)
    return grad_x, grad_membrane, sums


def attend_backward(
    grad: Tensor,
    masks: Masks,
    x: Sequence[Tensor],
    layout: Layout,
    neurons: Sequence[NeuronSpec],
    norm: Affine,
    inv_tau: Tensor | None,
) -> tuple[Sequence[Tensor], Tensor]:
    grad_x, _, sums = _backward(Arriving(grad), masks, x, layout, neurons[0], norm, inv_tau, None)
    return grad_x, sums


def _backward(
    arriving: Arriving,
    masks: Masks | None,
    x: Sequence[Tensor],
    layout: Layout,
    neuron: NeuronSpec,
    norm: Affine | None,
    inv_tau: Tensor | None,
    membrane: Tensor | None,
) -> tuple[list[Tensor], Tensor | None, Tensor]:
    """The results of `lif_backward`, for one input or, with masks, for q, k and v."""
    before = None if membrane is None else layout.frame(membrane)
    grad_before = None if before is None else torch.empty_like(before)
    q, dtype = x[0], state_dtype(x[0])
    grad, grad_last = arriving
    grad = None if grad is None else layout.frames(grad)
    grad_last = None if grad_last is None else layout.frame(grad_last)
    grad_x = [layout.empty(part, part.shape[0]) for part in x]
    grad_step = 0 if grad is None else grad.stride(0)
    images = 1 if masks is None else masks.of_q.shape[1]
    segment = _segment(layout.steps)
    times, held = 2 if layout.repeat else 1, segment * dtype.itemsize // 4
    cut = tile(q, layout, grad_step, images=images, times=times, inputs=len(x), held=held)
    kept = q.new_empty(len(x), cdiv(layout.steps, segment) - 1, layout.size, dtype=dtype)
    summed = inv_tau is not None or norm is not None
    sums = q.new_empty((len(x), 3, cut.runs, layout.channels) if summed else 0, dtype=dtype)
    kind, alpha = neuron.gradient()
    with device_of(q):
        lif.backward[cut.grid](
            given(grad, q),
            *(masks or [q] * 3),
            given(grad_last, q),
            *three(x),
            *affines(norm, q),
            given(inv_tau, q),
            given(before, q),
            *three(grad_x),
            given(grad_before, q),
            sums,
            kept,
            grad_step=grad_step // cut.group,
            mask_step=0 if masks is None else masks.of_q.stride(0),
            **cut.arguments,
            **numbers(q, neuron),
            alpha_number=as_number(q, alpha),
            **constants(q, layout, neuron, norm, inv_tau, before),
            SEGMENT=segment,
            DETACH=neuron.detach_reset,
            KIND=kind,
            GRAD=grad is not None,
            MASK=masks is not None,
            LAST=grad_last is not None,
            REPEAT=layout.repeat,
        )
    return grad_x, grad_before, sums


def norm_gradients(
    grad: Sequence[Tensor],
    x: Sequence[Tensor],
    layout: Layout,
    norm: Affine,
    sums: Tensor,
    count: int | None,
    of_weight: Tensor,
    of_bias: Tensor,
) -> None:
    channels, number, cut = layout.channels, len(x), tile(x[0], layout, inputs=len(x))
    factors = of_weight.new_empty(number, 3, channels)
    with device_of(sums):
        while sums.shape[2] > MOST_RUNS:
            parts = sums.new_empty(number, 3, cdiv(sums.shape[2], MOST_RUNS), channels, dtype=torch.float64)
            lif.total[(cdiv(channels, FEW), 3 * number, parts.shape[2])](
                sums, parts, sums.shape[2], channels, MOST_RUNS, RUNS=RUNS, CHANNELS=FEW
            )
            sums = parts
        norms.gradients[(cdiv(channels, FEW), number)](
            sums,
            norm.inv_std,
            norm.mean,
            *three(norm.weight or [norm.mean]),
            of_weight,
            of_bias,
            factors,
            sums.shape[2],
            channels,
            count or 0,
            WEIGHT=norm.weight is not None,
            STATE=STATES[of_weight.dtype],
            RUNS=RUNS,
            CHANNELS=FEW,
            N=number,
        )
        norms.combine[cut.grid](*three(grad), *three(x), factors, **cut.arguments, **unrolled(x[0], layout))


def attend(
    x: Sequence[Tensor],
    out: Spikes,
    codes: Tensor | None,
    sums: Tensor,
    layout: Layout,
    neurons: Sequence[NeuronSpec],
    norm: Affine,
    inv_tau: Tensor | None,
) -> None:
    (q, k, v), (values, bits) = x, out
    of_q, of_mask = neurons[0], neurons[3]
    cut = attention.cut(q, layout)
    if not cut.fits:
        _attend_by_parts(x, values, codes, sums, layout, neurons, norm, inv_tau)
        _pack(values, bits)
        return
    # A byte may cover more of a token than a program does, and of a single channel more than one image.
    whole = layout.has_groups(8, q.shape[1]) and cut.arguments["B"] * cut.group % 8 == 0
    pack = bits is not None and whole
    with device_of(q):
        attention.attend[cut.grid](
            q,
            k,
            v,
            *affines(norm, q),
            given(inv_tau, q),
            values,
            given(bits, q),
            given(codes, q),
            sums,
            **cut.arguments,
            **numbers(q, of_q),
            **{f"mask_{name}": value for name, value in numbers(q, of_mask).items()},
            STEPS=layout.steps,
            UNROLL=attention.unrolled(layout.steps),
            RESET=RESETS.index(of_q.reset),
            STRICT=of_q.strict,
            MASK_RESET=RESETS.index(of_mask.reset),
            MASK_STRICT=of_mask.strict,
            AFFINE=norm_kind(norm),
            TAU=inv_tau is not None,
            KEEP=codes is not None,
            PACK=min(layout.steps, PACKED_STEPS) if pack else 0,
            STATE=STATES[state_dtype(q)],
            **ROUNDED,
        )
    if not pack:
        _pack(values, bits)


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
    """Attention in several launches, for more chunks and steps than a program has bits for."""
    taus: Sequence[Tensor | None] = [None] * 4 if inv_tau is None else list(inv_tau.unbind())
    fired = [lif_forward(part, layout, neurons[i], norm.row(i), taus[i], None)[0] for i, part in enumerate(x)]
    q, k, v = fired
    torch.sum((k * v).flatten(3), 3, dtype=sums.dtype, out=sums[0])
    of_sums, channels = arrange(sums[0], layout.steps, per_channel=True)
    mask, _ = lif_forward(of_sums, channels, neurons[3], None, taus[3], None)
    sums[1].copy_(mask)
    torch.mul(q, mask.view(*mask.shape, *[1] * (q.ndim - 3)).to(q.dtype), out=out)
    if codes is not None:
        codes.copy_(q + 2 * k + 4 * v)


def mask_gradient(grad: Tensor, codes: Tensor, result: Tensor, layout: Layout) -> None:
    cut = attention.cut(grad, layout, grad.stride(0))
    with device_of(grad):
        attention.mask_gradient[cut.grid](
            grad,
            codes,
            result,
            **cut.arguments,
            grad_step=grad.stride(0) // cut.group,
            STEPS=layout.steps,
            UNROLL=attention.unrolled(layout.steps),
            STATE=STATES[state_dtype(grad)],
        )


def channel_statistics(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    mean, variance = (x.new_empty(layout.channels, dtype=torch.float64) for _ in range(2))
    _settle([x], layout, [Norm()], 1, mean, variance, invert=False)
    return mean, variance


def batch_statistics(
    x: Sequence[Tensor], layout: Layout, of: Sequence[Norm], repeats: int, mean: Tensor, inv_std: Tensor
) -> None:
    _settle(x, layout, of, repeats, mean, inv_std, invert=True)


def _settle(
    x: Sequence[Tensor],
    layout: Layout,
    of: Sequence[Norm],
    repeats: int,
    mean: Tensor,
    of_deviation: Tensor,
    *,
    invert: bool,
) -> None:
    """Fills in the mean and the inverse deviation (the variance without `invert`), and updates running statistics."""
    cut, channels = tile(x[0], layout, times=times_for(layout, MANY), inputs=len(x)), layout.channels
    runs, step, positions = cut.runs, cut.step, cut.arguments["positions"]
    weight = layout.steps * (1 if cut.arguments["INNERMOST"] else cut.group)
    count = layout.size // channels * layout.steps
    first = of[0]
    assert not isinstance(first.momentum, Tensor)
    partial = x[0].new_empty(len(x), 3, runs, channels, dtype=state_dtype(x[0]))
    with device_of(partial):
        norms.moments[cut.grid](*three(x), partial, **cut.arguments, **unrolled(x[0], layout))
        while runs > MOST_RUNS:
            splits = cdiv(runs, MOST_RUNS)
            merged = partial.new_empty(len(x), 3, splits, channels, dtype=torch.float64)
            norms.merge[(cdiv(channels, FEW), splits, len(x))](
                partial, merged, runs, channels, step, positions, weight, MOST_RUNS, RUNS=RUNS, CHANNELS=FEW
            )
            partial, runs, step = merged, splits, step * MOST_RUNS
        norms.settle[(cdiv(channels, FEW), len(x))](
            partial,
            mean,
            of_deviation,
            *three([given(norm.running_mean, mean) for norm in of]),
            *three([given(norm.running_var, mean) for norm in of]),
            *three([given(norm.batches, mean) for norm in of]),
            runs,
            channels,
            step,
            positions,
            weight,
            count,
            count * repeats,
            as_bits(first.momentum),
            as_bits(first.eps),
            INVERT=invert,
            RUNNING=first.running_mean is not None,
            COUNT=first.batches is not None,
            RUNS=RUNS,
            CHANNELS=FEW,
            N=len(x),
        )


def max_pool(x: Tensor, out: Tensor, places: Tensor | None, bits: Tensor | None = None) -> None:
    cut = pool.cut(x, out, pack=bits is not None)
    with device_of(x):
        pool.max_pool[cut.grid](
            x,
            out,
            given(bits, x),
            given(places, x),
            **cut.arguments,
            KEEP=places is not None,
            PACK=bits is not None,
            STATE=STATES[state_dtype(x)],
            HALF=x.element_size() == 2,
        )


def max_pool_backward(grad: Tensor, places: Tensor, grad_x: Tensor) -> None:
    cut = pool.cut(grad_x, grad)
    with device_of(grad):
        pool.max_pool_backward[cut.grid](grad, places, grad_x, **cut.arguments, STATE=STATES[state_dtype(grad)])


def pack_bits(x: Tensor) -> Tensor | None:
    bits = x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)
    _pack(x, bits)
    return bits


def _pack(x: Tensor, bits: Tensor | None) -> None:
    if bits is not None:
        with device_of(x):
            lanes = WIDEST // x.element_size()
            bit_kernels.pack[(cdiv(bits.numel(), THREADS),)](x, bits, x.numel(), LANES=lanes, BLOCK=THREADS)


def unpack_bits(bits: Tensor, x: Tensor) -> None:
    with device_of(x):
        bit_kernels.unpack[(cdiv(x.numel(), BLOCK),)](bits, x, x.numel(), BLOCK=BLOCK)


def _segment(steps: int, most: int = lif.MOST_STEPS) -> int:
    """Steps to unroll: all, or their largest divisor in (most / 2, most], or `most` if there is none."""
    if steps <= most:
        return steps
    even = [n for n in range(most, most // 2, -1) if steps % n == 0]
    return even[0] if even else most
