"""Spiking patch splitting (SPS)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import ClassVar

from torch import Tensor, nn

from ..neuron import LIF, NeuronLike, make_neuron
from ..steps import check_sequence, fire, pool, project, project_and_fire, shortcut
from .names import Named
from .sizes import check_multiple
from .units import ConvNorm

WIDTHS = (8, 4, 2, 1)
"""The four stages have dim / 8, dim / 4, dim / 2 and dim channels."""


class SpikingPatchSplitting(Named):
    """Four 3x3 convolution stages from frames to membranes of tokens, and a convolutional relative position embedding.

        stages 0-2: conv -> BN -> LIF -> max pool where pooling[i] is "1"
        stage 3:    conv -> BN -> max pool where pooling[3] is "1" = f;   result = f + BN(conv(LIF(f)))

    Each pooling halves height and width (rounded up). For a still image, which `steps.present` shows at every step
    without copying it, the first convolution and BN are computed only once.

    Shapes: x `[T, B, in_channels, H, W] -> [T, B, dim, H', W']`.

    Raises `ValueError` if dim is not a multiple of 8, pooling is not four flags, or x does not fit.

    >>> SpikingPatchSplitting(64, pooling="0011")(torch.rand(4, 2, 3, 32, 32)).shape
    torch.Size([4, 2, 64, 8, 8])
    """

    names: ClassVar[dict[str, str]] = {
        "convs": "stages.*.conv",
        "norms": "stages.*.norm",
        "position_conv": "position.conv",
        "position_norm": "position.norm",
    }

    def __init__(self, dim: int, *, in_channels: int = 3, pooling: str = "1111", neuron: NeuronLike = LIF) -> None:
        super().__init__()
        check_multiple(dim, WIDTHS[0], "dim")
        self.dim, self.in_channels, self.pooling = dim, in_channels, pooling
        channels = [in_channels, *(dim // width for width in WIDTHS)]
        self.stages = nn.ModuleList(ConvNorm(before, after, 3) for before, after in pairwise(channels))
        self.neurons = nn.ModuleList(make_neuron(neuron, channels=after) for after in channels[1:])
        self.pools = pools_of(pooling)
        self.position = ConvNorm(dim, dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        for result in self.forward_stages(x):  # noqa: B007
            pass
        return result

    def forward_stages(self, x: Tensor) -> Iterator[Tensor]:
        """The pooled spikes of stages 0-2 one after another, then the result."""
        check_sequence(x, self.in_channels, "SpikingPatchSplitting")
        for stage in range(3):
            x = pool(self.pools[stage], project_and_fire(self.stages[stage], self.neurons[stage], x))
            yield x
        membrane = pool(self.pools[3], project(self.stages[3], x))
        yield shortcut(membrane, project(self.position, fire(self.neurons[3], membrane)))


def pools_of(flags: str) -> nn.ModuleList:
    """A 3x3 maximum of stride 2 for each flag "1", nothing for a "0". Raises `ValueError` unless there are four."""
    if not isinstance(flags, str) or len(flags) != len(WIDTHS) or set(flags) - set("01"):
        raise ValueError(f'pooling must be four flags of 0 and 1 such as "1111" or "0011", got {flags!r}')
    return nn.ModuleList(nn.MaxPool2d(3, 2, 1) if flag == "1" else nn.Identity() for flag in flags)
