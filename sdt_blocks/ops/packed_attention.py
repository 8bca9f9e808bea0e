"""Attention on packed spikes: what the mixers compute in the event-driven form, from q, k and v as rows of words.

q, k and v are of the same frames, each with channels of its own, and may be parts of one tensor of words.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from .cpu import bindings
from .lif import lif_reference
from .packed import WORD, PackedSpikes, call, check_real, pad_to_words
from .spec import NeuronSpec, constant


def spike_attention(
    q: PackedSpikes,
    k: PackedSpikes,
    v: PackedSpikes,
    neuron: NeuronSpec,
    inv_tau: Tensor | None = None,
    standing: Tensor | None = None,
) -> PackedSpikes:
    """Spike-driven self-attention: `q AND neuron(number of tokens with k AND v)`.

    q, k and v are spikes of the same channels; inv_tau is a number or `[channels]`; `standing`, float32
    `[B, channels filled up to whole words]`, is as in `spike_product`.

    Raises `ValueError` for spikes that do not fit each other, and for levels.

    >>> q, k = (PackedSpikes.pack(torch.ones(2, 1, 8, 3, 3)) for _ in range(2))
    >>> spike_attention(q, k, k, NeuronSpec(threshold=8.0)).rate()
    0.0
    """
    _check({"q": q, "k": k, "v": v})
    steps, images, height, width, words = q.words.shape
    if standing is not None:
        check_real("standing", standing, (images, words * WORD), standing)
    out = q.words.new_empty(steps, images, height, width, words)
    leak = pad_to_words(_leak(neuron, inv_tau, q.channels))
    sizes = (steps, images, height * width)
    call("spike_attention", *map(_rows, (q, k, v)), out, *sizes, leak, bindings.Neuron.of(neuron), standing)
    return PackedSpikes(out, q.channels)


def spike_attention_reference(
    q: PackedSpikes, k: PackedSpikes, v: PackedSpikes, neuron: NeuronSpec, inv_tau: Tensor | None = None
) -> PackedSpikes:
    """`spike_attention` on unpacked spikes."""
    _check({"q": q, "k": k, "v": v})
    counts = (k.unpack_reference() * v.unpack_reference()).sum((-2, -1), keepdim=True)
    a, _ = lif_reference(counts, neuron._replace(inv_tau=neuron.inv_tau if inv_tau is None else inv_tau))
    return PackedSpikes.pack(q.unpack_reference() * a)


def spike_token_attention(
    q: PackedSpikes,
    k: PackedSpikes,
    heads: int,
    neuron: NeuronSpec,
    inv_tau: Tensor | None = None,
    standing: Tensor | None = None,
) -> PackedSpikes:
    """Token attention: `k AND neuron(number of spikes of q in a token's head)`, one of the head's neurons per token.

    inv_tau is a number or `[heads]`; `standing` is `[B, H, W, heads]`; all else as in `spike_attention`.
    """
    _check({"q": q, "k": k}, heads)
    steps, *places, words = q.words.shape
    if standing is not None:
        check_real("standing", standing, (*places, heads), standing)
    out = q.words.new_empty(steps, *places, words)
    sizes = (steps, out[0, ..., 0].numel(), heads)
    told = (_leak(neuron, inv_tau, heads), bindings.Neuron.of(neuron), standing)
    call("spike_token_attention", _rows(q), _rows(k), out, *sizes, *told)
    return PackedSpikes(out, q.channels)


def spike_token_attention_reference(
    q: PackedSpikes, k: PackedSpikes, heads: int, neuron: NeuronSpec, inv_tau: Tensor | None = None
) -> PackedSpikes:
    """`spike_token_attention` on unpacked spikes."""
    _check({"q": q, "k": k}, heads)
    counts = q.unpack_reference().unflatten(2, (heads, -1)).sum(3)
    a, _ = lif_reference(counts, neuron._replace(inv_tau=neuron.inv_tau if inv_tau is None else inv_tau))
    return PackedSpikes.pack(k.unpack_reference() * a.repeat_interleave(k.channels // heads, dim=2))


def spike_linear_attention(q: PackedSpikes, k: PackedSpikes, v: PackedSpikes, heads: int, scale: float) -> Tensor:
    """`scale * q (k^T v)` of every step and head, `[T, B, H, W, channels of v]` in float32.

    Spikes, or levels divided by their norms; v may have other channels than q and k. The sums are whole numbers, exact
    up to 2^24, and only active channels of q and k add anything.
    """
    _check({"q": q, "k": k}, heads, levels=True)
    if v.words.shape[:4] != q.words.shape[:4] or v.channels % heads:
        raise ValueError(
            f"v must have frames {list(q.words.shape[:4])} and a multiple of {heads} channels, got "
            f"{list(v.words.shape[:4])} and {v.channels}"
        )
    steps, images, height, width, _ = q.words.shape
    out = torch.empty(steps, images, height, width, v.channels, dtype=torch.float32, device=q.words.device)
    factor = c_float(scale / (q.norm * k.norm * v.norm))
    call("spike_linear_attention", *map(_rows, (q, k, v)), out, steps * images, height * width, heads, factor)
    return out


def spike_linear_attention_reference(
    q: PackedSpikes, k: PackedSpikes, v: PackedSpikes, heads: int, scale: float
) -> Tensor:
    """`spike_linear_attention` in float64 on unpacked spikes."""
    of_q, of_k, of_v = (part.unpack_reference().double().flatten(3).unflatten(2, (heads, -1)) for part in (q, k, v))
    counts = (of_v @ of_k.mT) @ of_q
    return (counts * scale).float().flatten(2, 3).unflatten(-1, q.words.shape[2:4]).movedim(2, -1)


class _Rows(ctypes.Structure):
    """`Rows` of packed_attention.h."""

    _fields_ = (("words", c_void_p), *((name, c_int64) for name in ("step", "channels", "planes")))


def _rows(spikes: PackedSpikes) -> ctypes.Structure:
    words = spikes.words.flatten(0, 3)
    words = words if words.stride(1) == 1 else words.contiguous()
    rows = _Rows(bindings.address(words), words.stride(0), spikes.channels, spikes.planes)
    rows.kept = words  # the memory lives as long as its address
    return rows


def _check(parts: dict[str, PackedSpikes], heads: int = 1, *, levels: bool = False) -> None:
    """Raises `ValueError` unless all have the same frames and channels, these in whole heads, and none has levels."""
    (owner, first), *_ = parts.items()
    for name, part in parts.items():
        if part.words.shape[:4] != first.words.shape[:4] or part.channels != first.channels or part.channels % heads:
            raise ValueError(
                f"{', '.join(parts)} must have the same frames and the same channels, in {heads} equal heads; {owner} "
                f"has {list(first.words.shape[:4])} and {first.channels}, {name} {list(part.words.shape[:4])} and "
                f"{part.channels}"
            )
        if not levels and (part.planes, part.norm) != (1, 1.0):
            raise ValueError(f"{name} must be spikes, got {part.planes} planes with norm {part.norm:g}")


def _leak(neuron: NeuronSpec, inv_tau: Tensor | None, count: int) -> Tensor:
    return constant(neuron.inv_tau if inv_tau is None else inv_tau).expand(count).contiguous()
