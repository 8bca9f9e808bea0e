"""Mixers: how an attention combines the spikes of q, k and v.

A mixer is any module that takes these spikes and says what it `emits`: "spikes" (zeros and ones), "counts" or "real".
If it has `additions`, it gets a row and a map of its own in the analysis: `additions(q, k, v)` returns how many
additions its products of spikes need, in any shape `[T, B, ...]`. Optional are `bound`, an estimate of them from the
firing rates in the same form, and `seen`, the names of submodules that its products of spikes pass through.
`exact = True` says that its sums are whole numbers below 2^24, so that their order does not matter, and `apart = True`
that the samples of a batch do not influence each other, so that a large batch may be split.

Optional forms of the forward are `fused` (training), `dense` and `packed` (evaluation). `packed` takes q, k and v as
`PackedSpikes`, also of integer neurons if `packs_levels = True`, and returns such spikes, or real values
`[T, B, H, W, C]`.

All of this describes the forward of the class that states it: a subclass with its own forward must state it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..checks import check_flag, check_positive
from ..neuron import LIF, NeuronLike, make_neuron
from ..ops import dense
from ..ops.bits import SpikesAsBits, are_spikes, as_spikes, bits_of
from ..ops.packed import WORD, PackedSpikes
from ..ops.packed_attention import spike_attention, spike_linear_attention, spike_token_attention
from ..ops.spec import channels_last, in_evaluation, state_dtype
from ..steps import fire, fires_spikes, fused_attention, is_plain
from .sizes import check_heads

ATTENTION_THRESHOLD = 0.5
"""Threshold of the neuron on a mixer's sum: with tau = 2 one coincidence of k and v makes h = 0.5, which fires."""


def of_neuron(module: Any) -> str:
    """What a module `emits` that ends in its `neuron`: "spikes" if that is known to return only these, else "real"."""
    return "spikes" if fires_spikes(module.neuron) else "real"


class MaskMixer(nn.Module):
    """`q * a` with `a = LIF_0.5(sum over tokens of k * v)`, one spike per channel: only masks and additions.

    With `event_pooling` (the released CIFAR10-DVS setting) a 3x3 maximum is taken of k and v over (H, W), and of k * v
    and q * a over (tokens, channels of a head); channel c belongs to head c // (dim / num_heads). Without it
    `num_heads` has no effect.

    Hooks can see every intermediate value: k and v pass through `k_pool` and `v_pool`, k * v through `coincidences` and
    q * a through `masked`. Without pooling these submodules do nothing.

    Shapes: spikes q, k, v `[T, B, dim, H, W]` each `-> [T, B, dim, H, W]`.
    """

    exact = apart = True
    emits = property(of_neuron)

    @property
    def seen(self) -> tuple[str, ...]:
        """The submodules through which the mixer's own products of spikes pass."""
        return ("coincidences", "masked") + ("k_pool", "v_pool") * self.event_pooling

    def __init__(self, dim: int, *, num_heads: int = 8, neuron: NeuronLike = LIF, event_pooling: bool = False) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        check_flag("event_pooling", event_pooling)
        self.num_heads, self.event_pooling = num_heads, event_pooling
        self.k_pool = PlanePool() if event_pooling else nn.Identity()
        self.v_pool = PlanePool() if event_pooling else nn.Identity()
        self.coincidences = nn.Identity()
        self.neuron: Any = make_neuron(neuron, channels=dim, threshold=ATTENTION_THRESHOLD)
        self.masked = nn.Identity()

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kv = self.coincidences(self.k_pool(k) * self.v_pool(v))
        # Half precision cannot hold the sum of many tokens.
        a = fire(self.neuron, self._pool_tokens(kv).sum((-2, -1), keepdim=True, dtype=state_dtype(kv)))
        masked: Tensor = self.masked(as_spikes(self._pool_tokens(q * a.to(q.dtype)), q, a))
        return masked

    def additions(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What the sum over tokens adds: k * v, one addition for each coincidence. The mask q * a adds nothing."""
        return self._pool_tokens(self._pooled(k) * self._pooled(v))

    def bound(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The paper's estimate of the additions: one for every spike of k and of v."""
        return self._pooled(k) + self._pooled(v)

    def fused(self, norms: Sequence[nn.Module], neurons: Sequence[nn.Module], x: Sequence[Tensor]) -> Tensor | None:
        """The norms, the neurons and the mixing, from the outputs x of the convolutions, as one op; `None` if unfit."""
        if self.event_pooling or not is_plain(self, MaskMixer):
            return None
        between = (self.k_pool, self.v_pool, self.coincidences, self.masked)
        return fused_attention(norms, (*neurons, self.neuron), x, between)

    def dense(
        self, qkv: Tensor, neurons: Sequence[dense.Neuron], dtype: torch.dtype, *, compiled: bool = False
    ) -> Tensor:
        """The evaluation form: masked spikes in `dtype` from q, k and v before they fire, `[T, B, H, W, 3 dim]`.

        `neurons` are those of q, k and v, and this mixer's.
        """
        heads = self.num_heads if self.event_pooling else None
        return dense.attend(qkv, neurons, dtype, heads=heads, compiled=compiled)

    def packed(self, q: PackedSpikes, k: PackedSpikes, v: PackedSpikes) -> PackedSpikes:
        """The event-driven form."""
        if self.event_pooling:
            # The pooling mixes channels, which have to be unpacked for it.
            return PackedSpikes.pack(self(*(part.unpack() for part in (q, k, v))))
        return spike_attention(q, k, v, *in_evaluation(self.neuron.spec, q.channels), _of_tokens(self.neuron, q))

    def _pooled(self, spikes: Tensor) -> Tensor:
        return max_pool_plane(spikes) if self.event_pooling else spikes

    def _pool_tokens(self, spikes: Tensor) -> Tensor:
        if not self.event_pooling:
            return spikes
        height, width = spikes.shape[-2:]
        heads = rearrange(spikes, "t b (heads d) h w -> t b heads (h w) d", heads=self.num_heads)
        pooled = max_pool_plane(heads)
        if channels_last(spikes):
            return rearrange(pooled, "t b heads (h w) d -> t b h w (heads d)", h=height, w=width).movedim(-1, 2)
        return rearrange(pooled, "t b heads (h w) d -> t b (heads d) h w", h=height, w=width)


class LinearSpikeMixer(nn.Module):
    """`scale * q (k^T v)` per step and head (SDSA-3; Yao et al., 2024, https://arxiv.org/abs/2404.03663).

    Channel c belongs to head c // (dim / num_heads); q, k and v of a head are `[tokens, dim / num_heads]`. For spikes
    the result is counts times `scale`, the input of a neuron. The product of k and v is computed first, so that the
    cost grows linearly with the number of tokens.

    Shapes: spikes q, k, v `[T, B, dim, H, W]` each `-> [T, B, dim, H, W]`; v, and with it the result, may have a
    multiple of dim channels.

    Raises `ValueError` if num_heads does not divide dim, or scale is not positive and finite.

    >>> q, k, v = torch.ones(3, 4, 2, 16, 5, 5)
    >>> LinearSpikeMixer(16, num_heads=8)(q, k, v).unique()
    tensor([6.2500])
    """

    emits = "counts"
    exact = apart = packs_levels = True

    def __init__(self, dim: int, *, num_heads: int = 8, scale: float = 0.125) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        check_positive("scale", scale)
        self.num_heads, self.scale = num_heads, scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Matrices of tokens and channels, the way round that q has in memory.
        tokens_first = channels_last(q)
        of_q, of_k, of_v = (self._heads(x, tokens_first) for x in (q, k, v))
        # torch.compile stops at hooks; meta tensors have no autocast.
        kept = [] if torch.compiler.is_compiling() else [x for x in (of_q, of_k, of_v) if are_spikes(x)]
        exact = nullcontext() if q.is_meta else torch.autocast(q.device.type, enabled=False)
        with exact, SpikesAsBits(*kept) if kept else nullcontext():
            counts = of_q @ (of_k.mT @ of_v) if tokens_first else (of_v @ of_k.mT) @ of_q
        if tokens_first:
            counts = counts.transpose(2, 3).flatten(3).mT
        return (counts * self.scale).to(q.dtype).reshape(v.shape)

    def _heads(self, x: Tensor, tokens_first: bool) -> Tensor:
        """The matrices `[T, B, heads, dim / heads, tokens]` of x, or with `tokens_first` transposed, without gaps."""
        # Half precision cannot hold the counts of many tokens.
        channels = x.to(state_dtype(x)).flatten(3)
        if tokens_first:
            heads = channels.mT.unflatten(3, (self.num_heads, -1)).transpose(2, 3)
            return as_spikes(heads.contiguous(), x)
        heads = channels.unflatten(2, (self.num_heads, -1))
        return as_spikes(heads.contiguous(), x, bits=bits_of(x) if x.is_contiguous() else None)

    def packed(self, q: PackedSpikes, k: PackedSpikes, v: PackedSpikes) -> Tensor:
        """The event-driven form, `[T, B, H, W, C]`."""
        return spike_linear_attention(q, k, v, self.num_heads, self.scale)

    def additions(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Those of k^T v, one for each pair of a spike of k and one of v in a token and head, and those of q (k^T v).

        In the latter a spike of q adds a row of counts, one per channel of v's head. The next neuron's threshold
        absorbs the scale.
        """
        of_q, of_k, of_v = (x.unflatten(2, (self.num_heads, -1)) for x in (q, k, v))
        return of_k * of_v.sum(3, keepdim=True) + of_q * of_v.shape[3]

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, scale={self.scale:g}"


class QKMixer(nn.Module):
    """`k * a` with `a = LIF_0.5(sum of q)`: only a mask (Zhou et al., 2024, https://arxiv.org/abs/2403.16552).

    The sum is over the channels of a head (`over="channels"`: token attention, where one spike per head and token
    decides which tokens pass) or over the tokens (`over="tokens"`: channel attention, one spike per channel). Channel c
    belongs to head c // (dim / num_heads). With tau = 2, a fires whenever any q in the sum does, and so keeps no state.

    Shapes: spikes q, k `[T, B, dim, H, W]` each `-> [T, B, dim, H, W]`.

    Raises `ValueError` if num_heads does not divide dim, or for another `over`.

    >>> q, k = torch.zeros(4, 1, 16, 3, 3), torch.ones(4, 1, 16, 3, 3)
    >>> q[:, :, 0, 0, 0] = 1
    >>> QKMixer(16, num_heads=8)(q, k).sum((0, 1, 2))[0]  # two channels a head, four steps
    tensor([8., 0., 0.])
    """

    exact = apart = True
    emits = property(of_neuron)

    def __init__(self, dim: int, *, num_heads: int = 8, over: str = "channels", neuron: NeuronLike = LIF) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        if over not in ("channels", "tokens"):
            raise ValueError(f'over must be "channels" (token attention) or "tokens" (channel attention), got {over!r}')
        self.num_heads, self.over = num_heads, over
        masks = num_heads if over == "channels" else dim
        self.neuron: Any = make_neuron(neuron, channels=masks, threshold=ATTENTION_THRESHOLD)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        dtype = state_dtype(q)  # half precision cannot hold the sum of many spikes
        if self.over == "tokens":
            a = fire(self.neuron, q.sum((-2, -1), keepdim=True, dtype=dtype))
        else:
            a = fire(self.neuron, q.unflatten(2, (self.num_heads, -1)).sum(3, dtype=dtype))
            a = as_spikes(a.repeat_interleave(k.shape[2] // self.num_heads, dim=2), a)
        return as_spikes(k * a.to(k.dtype), k, a)

    def packed(self, q: PackedSpikes, k: PackedSpikes) -> PackedSpikes:
        """The event-driven form."""
        if self.over == "tokens":
            return spike_attention(k, q, q, *in_evaluation(self.neuron.spec, q.channels), _of_tokens(self.neuron, q))
        standing = _standing(self.neuron, (*q.words.shape[1:4], self.num_heads))
        return spike_token_attention(q, k, self.num_heads, *in_evaluation(self.neuron.spec, self.num_heads), standing)

    def additions(self, q: Tensor, k: Tensor) -> Tensor:
        """One for every spike of q. The mask adds nothing."""
        return q

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, over={self.over!r}"


def _standing(neuron: Any, shape: Sequence[int]) -> Tensor | None:
    """In a stream, the neuron's membrane of this shape, for a kernel that overwrites it."""
    found: Tensor | None = None if neuron.carrier is None else neuron.carrier.membrane_in_place(neuron, shape)
    return found


def _of_tokens(neuron: Any, spikes: PackedSpikes) -> Tensor | None:
    """`_standing` of a neuron with a membrane for each image and channel, these filled up to whole words."""
    return _standing(neuron, (spikes.words.shape[1], spikes.words.shape[-1] * WORD))


class PlanePool(nn.Module):
    """3x3 maximum, stride 1, over the last two axes of `[T, B, C, H, W]`."""

    def forward(self, x: Tensor) -> Tensor:
        return max_pool_plane(x)


def max_pool_plane(x: Tensor) -> Tensor:
    """3x3 maximum, stride 1, over the last two axes of x `[T, B, ...]`."""
    return F.max_pool2d(x.flatten(0, 1), 3, stride=1, padding=1).unflatten(0, x.shape[:2])
