"""Spike-driven self-attention (SDSA): by mask, and linear."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from ..neuron import LIF, NeuronLike, make_neuron
from ..steps import check_sequence, fire, project, project_and_mix
from .mixers import ATTENTION_THRESHOLD, LinearSpikeMixer, MaskMixer
from .names import Named
from .sizes import check_heads
from .units import ConvNorm, RepConv


class SpikeDrivenSelfAttention(Named):
    """Self-attention that only masks and adds (Yao et al., 2023, https://arxiv.org/abs/2307.01694).

        s = LIF(u);   q, k, v = LIF(BN(W s))
        a = LIF_0.5(sum over tokens of k * v)        one spike per channel
        result = BN(W' (q * a))

    (k, v, q) here and in the released weights are (Q, K, V) in the paper's text. `num_heads` and `event_pooling` are
    those of `MaskMixer`, which computes the second line and the mask.

    A subclass may define its own `attend(q, k, v)`, which then replaces the mixer.

    Shapes: membrane `[T, B, dim, H, W] -> [T, B, dim, H, W]`.

    Raises `ValueError` if num_heads does not divide dim.

    >>> SpikeDrivenSelfAttention(64)(torch.randn(4, 2, 64, 8, 8)).shape
    torch.Size([4, 2, 64, 8, 8])
    """

    names: ClassVar[dict[str, str]] = {
        **{f"{unit}_{part}": f"{unit}.{part}" for unit in ("q", "k", "v", "proj") for part in ("conv", "norm")},
        **{part: f"mixer.{part}" for part in ("k_pool", "v_pool", "coincidences", "masked")},
        "attention_neuron": "mixer.neuron",
    }

    def __init__(self, dim: int, *, num_heads: int = 8, neuron: NeuronLike = LIF, event_pooling: bool = False) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.dim, self.num_heads, self.event_pooling = dim, num_heads, event_pooling
        self.neuron = make_neuron(neuron, channels=dim)
        self.q, self.k, self.v = (ConvNorm(dim, dim) for _ in range(3))
        self.q_neuron, self.k_neuron, self.v_neuron = (make_neuron(neuron, channels=dim) for _ in range(3))
        self.mixer = MaskMixer(dim, num_heads=num_heads, neuron=neuron, event_pooling=event_pooling)
        self.proj = ConvNorm(dim, dim, bias=True)

    def forward(self, membrane: Tensor) -> Tensor:
        check_sequence(membrane, self.dim, "SpikeDrivenSelfAttention")
        units, neurons = (self.q, self.k, self.v), (self.q_neuron, self.k_neuron, self.v_neuron)
        own = type(self).attend is not SpikeDrivenSelfAttention.attend or "attend" in self.__dict__
        mixer = self.attend if own else self.mixer
        return project(self.proj, project_and_mix(units, neurons, mixer, fire(self.neuron, membrane)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The mixer's result for the spikes q, k and v `[T, B, dim, H, W]`, of the same shape."""
        mixed: Tensor = self.mixer(q, k, v)
        return mixed


class LinearSpikeAttention(nn.Module):
    """Linear self-attention of spikes (SDSA-3; Yao et al., 2024, https://arxiv.org/abs/2404.03663).

        s = LIF(u);   q, k, v = LIF(BN(RepConv(s)))
        a = LIF_0.5(scale * q (k^T v))               per step and head
        result = BN(RepConv(a))

    `num_heads` and `scale` are those of `LinearSpikeMixer`; the published scale, 0.125, does not depend on the width of
    the heads.

    Shapes: membrane `[T, B, dim, H, W] -> [T, B, dim, H, W]`.

    Raises `ValueError` if num_heads does not divide dim.

    >>> LinearSpikeAttention(64)(torch.randn(4, 2, 64, 8, 8)).shape
    torch.Size([4, 2, 64, 8, 8])
    """

    def __init__(self, dim: int, *, num_heads: int = 8, scale: float = 0.125, neuron: NeuronLike = LIF) -> None:
        super().__init__()
        self.dim = dim
        self.mixer = LinearSpikeMixer(dim, num_heads=num_heads, scale=scale)
        self.neuron = make_neuron(neuron, channels=dim)
        self.q, self.k, self.v = (RepConv(dim, dim) for _ in range(3))
        self.q_neuron, self.k_neuron, self.v_neuron = (make_neuron(neuron, channels=dim) for _ in range(3))
        self.mixer_neuron = make_neuron(neuron, channels=dim, threshold=ATTENTION_THRESHOLD)
        self.proj = RepConv(dim, dim)

    def forward(self, membrane: Tensor) -> Tensor:
        check_sequence(membrane, self.dim, "LinearSpikeAttention")
        units, neurons = (self.q, self.k, self.v), (self.q_neuron, self.k_neuron, self.v_neuron)
        counts = project_and_mix(units, neurons, self.mixer, fire(self.neuron, membrane))
        return project(self.proj, fire(self.mixer_neuron, counts))
