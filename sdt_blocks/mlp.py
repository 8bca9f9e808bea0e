"""Spiking MLP."""

from __future__ import annotations

from torch import Tensor, nn

from .functional import check_sequence, normalize_and_fire, per_frame
from .neuron import LIF, NeuronFactory, make_neuron


class SpikingMLP(nn.Module):
    """Two 1x1 convolutions, each fed by spikes: `BN(W2 LIF(m))` with `m = BN(W1 LIF(u))`.

    Where the hidden width equals `dim`, the first half has a membrane shortcut of its own, as in the released models:
    with `m = u + BN(W1 LIF(u))` the result is `m - u + BN(W2 LIF(m))`, which a `MembraneShortcut` adds to `u`.

    Shapes: membrane `[T, B, dim, H, W] -> [T, B, dim, H, W]`.

    >>> SpikingMLP(64, hidden=256)(torch.randn(4, 2, 64, 8, 8)).shape
    torch.Size([4, 2, 64, 8, 8])
    """

    def __init__(self, dim: int, *, hidden: int | None = None, neuron: str | NeuronFactory = LIF) -> None:
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        if dim < 1 or hidden < 1:
            raise ValueError(f"dim and hidden must be positive, got {dim} and {hidden}")
        self.dim, self.hidden = dim, hidden
        self.neuron1 = make_neuron(neuron, channels=dim)
        self.conv1 = nn.Conv2d(dim, hidden, 1)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.neuron2 = make_neuron(neuron, channels=hidden)
        self.conv2 = nn.Conv2d(hidden, dim, 1)
        self.norm2 = nn.BatchNorm2d(dim)

    def forward(self, membrane: Tensor) -> Tensor:
        check_sequence(membrane, self.dim, "SpikingMLP")
        x = per_frame(self.conv1, self.neuron1(membrane))
        if self.hidden != self.dim:
            spikes = normalize_and_fire(self.norm1, self.neuron2, x)
            return per_frame(self.norm2, per_frame(self.conv2, spikes))
        change = per_frame(self.norm1, x)
        spikes = self.neuron2(membrane + change)
        return change + per_frame(self.norm2, per_frame(self.conv2, spikes))
