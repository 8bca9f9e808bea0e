"""Spiking MLP."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ..neuron import LIF, NeuronLike, make_neuron
from ..steps import check_sequence, fire, project, project_and_fire
from .names import Named
from .sizes import check_widths
from .units import ConvNorm


class SpikingMLP(Named):
    """Two 1x1 convolutions, each fed by spikes: `BN(W2 LIF(m))` with `m = BN(W1 LIF(u))`.

    Between them there are `hidden` channels, four times dim by default. If `hidden` equals `dim`, the first half has a
    membrane shortcut of its own, as in the released models: with `m = u + BN(W1 LIF(u))` the result is
    `m - u + BN(W2 LIF(m))`, which a `MembraneShortcut` adds to `u`.

    Shapes: membrane `[T, B, dim, H, W] -> [T, B, dim, H, W]`.

    >>> SpikingMLP(64, hidden=256)(torch.randn(4, 2, 64, 8, 8)).shape
    torch.Size([4, 2, 64, 8, 8])
    """

    names: ClassVar[dict[str, str]] = {f"{part}{i}": f"fc{i}.{part}" for i in (1, 2) for part in ("conv", "norm")}

    def __init__(self, dim: int, *, hidden: int | None = None, neuron: NeuronLike = LIF) -> None:
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        check_widths(dim=dim, hidden=hidden)
        self.dim, self.hidden = dim, hidden
        self.neuron1 = make_neuron(neuron, channels=dim)
        self.fc1 = ConvNorm(dim, hidden, bias=True)
        self.neuron2 = make_neuron(neuron, channels=hidden)
        self.fc2 = ConvNorm(hidden, dim, bias=True)

    def forward(self, membrane: Tensor) -> Tensor:
        check_sequence(membrane, self.dim, "SpikingMLP")
        spikes = fire(self.neuron1, membrane)
        if self.hidden != self.dim:
            return project(self.fc2, project_and_fire(self.fc1, self.neuron2, spikes))
        change = project(self.fc1, spikes)
        return change + project(self.fc2, fire(self.neuron2, membrane + change))
