"""The training ops' kernels for CUDA tensors, by Triton; see `Kernels`.

Under `TRITON_INTERPRET=1` they run on CPU tensors too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ..spec import MOST_TOKENS, RESETS, Affine, Arriving, Layout, NeuronSpec, state_dtype
from . import attention, lif, pool
from . import bits as bit_kernels

BLOCK = 1024
_STATE = {torch.float32: triton.language.float32, torch.float64: triton.language.float64}
# Programs of the backward pass for each multiprocessor: each owns a scratch of `steps * BLOCK` membranes.
_PROGRAMS = 8


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
    with _device_of(x):
        lif.forward[(triton.cdiv(layout.size, BLOCK),)](
            x,
            *_affine(norm, x)[:2],
            _or(inv_tau, x),
            _or(before, x),
            spikes,
            _or(last, x),
            *_where(layout),
            layout.channels,
            layout.inner,
            layout.steps,
            **_constants(x, layout, neuron, norm, inv_tau, before),
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
    blocks = triton.cdiv(layout.size, BLOCK)
    programs = min(blocks, _programs(x.device))
    scratch = x.new_empty(programs * layout.steps * BLOCK, dtype=dtype)
    rows = 3 if norm is not None else 1 if inv_tau is not None else 0
    of_neurons = x.new_zeros(rows, layout.size, dtype=dtype)
    kind, alpha = neuron.gradient()
    with _device_of(x):
        lif.backward[(programs,)](
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
            of_neurons,
            scratch,
            *_where(layout),
            0 if grad is None else grad.stride(0),
            layout.size if mask is None else layout.size // mask.values.shape[1],
            layout.channels,
            layout.inner,
            blocks,
            layout.steps,
            **_constants(x, layout, neuron, norm, inv_tau, before),
            DETACH=neuron.detach_reset,
            KIND=kind,
            ALPHA=alpha,
            GRAD=grad is not None,
            MASK=mask is not None,
            BIT=0 if mask is None else mask.bit,
            LAST=grad_last is not None,
            REPEAT=layout.repeat,
        )
    sums = x.new_zeros(3, layout.channels, dtype=torch.float64)
    if rows:
        by_channel = of_neurons.view(rows, -1, layout.channels, layout.inner)
        sums[:rows] = by_channel.sum((1, 3), dtype=torch.float64)
    return grad_x, grad_before, sums


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
    tile, where = _tokens(layout, q.shape[1])
    with _device_of(q):
        attention.attend[(q.shape[1], triton.cdiv(layout.channels, tile["CHANNELS"]))](
            q,
            k,
            v,
            norm.scale,
            norm.shift,
            _or(inv_tau, q),
            out,
            _or(codes, q),
            sums,
            *where,
            layout.steps,
            K=of_q.inv_tau,
            THRESHOLD=of_q.threshold,
            RESET=RESETS.index(of_q.reset),
            STRICT=of_q.strict,
            MASK_K=of_mask.inv_tau,
            MASK_THRESHOLD=of_mask.threshold,
            MASK_RESET=RESETS.index(of_mask.reset),
            MASK_STRICT=of_mask.strict,
            TAU=inv_tau is not None,
            KEEP=codes is not None,
            STATE=_STATE[state_dtype(q)],
            **tile,
        )


def mask_gradient(grad: Tensor, codes: Tensor, result: Tensor, layout: Layout) -> None:
    images = grad.shape[1]
    tile, where = _tokens(layout, images)
    with _device_of(grad):
        attention.mask_gradient[(layout.steps * images, triton.cdiv(layout.channels, tile["CHANNELS"]))](
            grad, codes, result, *where, grad.stride(0), images, STATE=_STATE[state_dtype(grad)], **tile
        )


def channel_statistics(x: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    axes = [axis for axis in range(x.ndim) if axis != 2]
    variance, mean = torch.var_mean(x.to(state_dtype(x)), axes, correction=0)
    return mean.double(), variance.double()


def channel_combine(grad: Tensor, x: Tensor, layout: Layout, a: Tensor, b: Tensor, d: Tensor) -> None:
    with _device_of(x):
        lif.combine[(triton.cdiv(layout.size, BLOCK), layout.steps)](
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


def max_pool(x: Tensor, out: Tensor, places: Tensor | None) -> None:
    with _device_of(x):
        pool.max_pool[(triton.cdiv(out.numel(), BLOCK),)](
            x,
            out,
            _or(places, x),
            out.numel(),
            *_planes(x),
            KEEP=places is not None,
            STATE=_STATE[state_dtype(x)],
            BLOCK=BLOCK,
        )


def max_pool_backward(grad: Tensor, places: Tensor, grad_x: Tensor) -> None:
    with _device_of(grad):
        pool.max_pool_backward[(triton.cdiv(grad_x.numel(), BLOCK),)](
            grad, places, grad_x, grad_x.numel(), *_planes(grad_x), STATE=_STATE[state_dtype(grad)], BLOCK=BLOCK
        )


def pack_bits(x: Tensor) -> Tensor | None:
    bits = x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)
    with _device_of(x):
        bit_kernels.pack[(triton.cdiv(bits.numel(), BLOCK),)](x, bits, x.numel(), BLOCK=BLOCK)
    return bits


def unpack_bits(bits: Tensor, x: Tensor) -> None:
    with _device_of(x):
        bit_kernels.unpack[(triton.cdiv(x.numel(), BLOCK),)](bits, x, x.numel(), BLOCK=BLOCK)


def _where(layout: Layout) -> tuple[int, int, int, int]:
    return layout.size, layout.chunk, layout.chunk_stride, layout.x_step


def _constants(
    x: Tensor, layout: Layout, neuron: NeuronSpec, norm: Affine | None, inv_tau: Tensor | None, before: Tensor | None
) -> dict[str, object]:
    return {
        "K": neuron.inv_tau,
        "THRESHOLD": neuron.threshold,
        "RESET": RESETS.index(neuron.reset),
        "STRICT": neuron.strict,
        "AFFINE": norm is not None,
        "TAU": 0 if inv_tau is None else 2 if inv_tau.ndim else 1,
        "BEFORE": before is not None,
        "DENSE": layout.chunk == layout.size or layout.chunk_stride == layout.chunk,
        "STATE": _STATE[state_dtype(x)],
        "BLOCK": BLOCK,
    }


def _tokens(layout: Layout, images: int) -> tuple[dict[str, int], tuple[int, ...]]:
    """The tile of an attention program, with all tokens of an image, and how it lies in memory."""
    tokens = layout.size // (images * layout.channels)
    padded = triton.next_power_of_2(tokens)
    # Eight channels fill the smallest piece of memory that is fetched; more elements would not fit the registers.
    channels = max(1, min(8, triton.next_power_of_2(layout.channels), MOST_TOKENS // padded))
    tile = {"CHANNELS": channels, "TOKENS": padded, "num_warps": min(16, max(4, channels * padded // 512))}
    strides = (1, tokens) if layout.inner > 1 else (layout.channels, 1)
    return tile, (layout.size, tokens, layout.channels, *strides)


def _planes(x: Tensor) -> tuple[int, int, int, int, int]:
    channels, height, width = x.shape[1:]
    return height, width, (height + 1) // 2, (width + 1) // 2, 1 if x.is_contiguous() else channels


def _affine(norm: Affine | None, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (x, x, x) if norm is None else (norm.scale, norm.shift, norm.mean)


def _or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    """A kernel takes a pointer for what it is told not to read."""
    return stand_in if tensor is None else tensor


def _device_of(x: Tensor) -> torch.cuda.device_of:
    return torch.cuda.device_of(x)


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _PROGRAMS
    return _PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count
