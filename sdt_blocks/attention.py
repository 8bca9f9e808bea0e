"""Spike-driven self-attention (SDSA)."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .functional import (
    check_multiple,
    check_sequence,
    fused_attention,
    normalize_and_fire,
    per_frame,
)
from .neuron import LIF, NeuronFactory, make_neuron
from .ops.bits import as_spikes
from .ops.spec import state_dtype

ATTENTION_THRESHOLD = 0.5
"""Threshold of the neuron on the summed k * v: with tau = 2 one coincidence makes h = 0.5, which fires."""


class SpikeDrivenSelfAttention(nn.Module):
    """Self-attention by mask and addition alone (Yao et al., 2023, https://arxiv.org/abs/2307.01694).

        s = LIF(u);   q, k, v = LIF(BN(W s))
        a = LIF_0.5(sum over tokens of k * v)        one spike a channel
        result = BN(W' (q * a))

    What is called (k, v, q) here, as in the released weights, is (Q, K, V) in the paper's text. Without `event_pooling`
    `num_heads` changes nothing: channel c belongs to head c // (dim / num_heads). With it (the released CIFAR10-DVS
    setting) a 3x3 maximum is taken of k and v over (H, W), and of k * v and q * a over (tokens, channels of a head).

    Hooks see everything: k and v as they are used pass through `k_pool` and `v_pool`, k * v through `coincidences`
    and q * a through `masked`, submodules that do nothing where there is no pooling.

    Shapes: membrane `[T, B, dim, H, W] -> [T, B, dim, H, W]`.

    Raises `ValueError` where num_heads does not divide dim.

    >>> SpikeDrivenSelfAttention(64)(torch.randn(4, 2, 64, 8, 8)).shape
    torch.Size([4, 2, 64, 8, 8])
    """

    def __init__(
        self, dim: int, *, num_heads: int = 8, neuron: str | NeuronFactory = LIF, event_pooling: bool = False
    ) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads must be positive, got {num_heads}")
        check_multiple(dim, num_heads, "dim (for this number of heads)")
        self.dim, self.num_heads, self.event_pooling = dim, num_heads, event_pooling
        self.neuron = make_neuron(neuron, channels=dim)
        self.q_conv = nn.Conv2d(dim, dim, 1, bias=False)
        self.q_norm = nn.BatchNorm2d(dim)
        self.q_neuron = make_neuron(neuron, channels=dim)
        self.k_conv = nn.Conv2d(dim, dim, 1, bias=False)
        self.k_norm = nn.BatchNorm2d(dim)
        self.k_neuron = make_neuron(neuron, channels=dim)
        self.v_conv = nn.Conv2d(dim, dim, 1, bias=False)
        self.v_norm = nn.BatchNorm2d(dim)
        self.v_neuron = make_neuron(neuron, channels=dim)
        self.k_pool = PlanePool() if event_pooling else nn.Identity()
        self.v_pool = PlanePool() if event_pooling else nn.Identity()
        self.coincidences = nn.Identity()
        self.attention_neuron = make_neuron(neuron, channels=dim, threshold=ATTENTION_THRESHOLD)
        self.masked = nn.Identity()
        self.proj_conv = nn.Conv2d(dim, dim, 1)
        self.proj_norm = nn.BatchNorm2d(dim)

    def forward(self, membrane: Tensor) -> Tensor:
        check_sequence(membrane, self.dim, "SpikeDrivenSelfAttention")
        s = self.neuron(membrane)
        q, k, v = per_frame(self.q_conv, s), per_frame(self.k_conv, s), per_frame(self.v_conv, s)
        masked = self._fused(q, k, v)
        if masked is None:
            masked = self.attend(
                normalize_and_fire(self.q_norm, self.q_neuron, q),
                normalize_and_fire(self.k_norm, self.k_neuron, k),
                normalize_and_fire(self.v_norm, self.v_neuron, v),
            )
        return per_frame(self.proj_norm, per_frame(self.proj_conv, masked))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`q * LIF_0.5(sum over tokens of k * v)` for spikes `[T, B, dim, H, W]`, same shape."""
        kv = self.coincidences(self.k_pool(k) * self.v_pool(v))
        # Half precision could not hold the sum of many tokens.
        a = self.attention_neuron(self._pool_tokens(kv).sum((-2, -1), keepdim=True, dtype=state_dtype(kv)))
        masked: Tensor = self.masked(as_spikes(self._pool_tokens(q * a.to(q.dtype)), q, a))
        return masked

    def _fused(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
        if self.event_pooling or not self._attends_plainly():
            return None
        return fused_attention(
            (self.q_norm, self.k_norm, self.v_norm),
            (self.q_neuron, self.k_neuron, self.v_neuron, self.attention_neuron),
            (q, k, v),
            between=(self.k_pool, self.v_pool, self.coincidences, self.masked),
        )

    def _attends_plainly(self) -> bool:
        # The class is asked: torch.compile sees another function in the bound method.
        return type(self).attend is SpikeDrivenSelfAttention.attend and "attend" not in self.__dict__

    def _pool_tokens(self, spikes: Tensor) -> Tensor:
        if not self.event_pooling:
            return spikes
        height, width = spikes.shape[-2:]
        heads = rearrange(spikes, "t b (heads d) h w -> t b heads (h w) d", heads=self.num_heads)
        return rearrange(max_pool_plane(heads), "t b heads (h w) d -> t b (heads d) h w", h=height, w=width)


class PlanePool(nn.Module):
    """3x3 maximum, stride 1, over the last two axes of `[T, B, C, H, W]`."""

    def forward(self, x: Tensor) -> Tensor:
        return max_pool_plane(x)


def max_pool_plane(x: Tensor) -> Tensor:
    """3x3 maximum, stride 1, over the last two axes of x `[T, B, ...]`."""
    return F.max_pool2d(x.flatten(0, 1), 3, stride=1, padding=1).unflatten(0, x.shape[:2])
