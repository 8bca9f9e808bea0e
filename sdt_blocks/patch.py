"""Spiking patch splitting (SPS)."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from .functional import check_multiple, normalize_and_fire, per_frame, pool_frames
from .neuron import LIF, NeuronFactory, make_neuron

WIDTHS = (8, 4, 2, 1)
"""The four stages have dim / 8, dim / 4, dim / 2 and dim channels."""


class SpikingPatchSplitting(nn.Module):
    """Four 3x3 convolution stages from frames to membranes of tokens, and a convolutional relative position embedding.

        stages 0-2: conv -> BN -> LIF -> max pool where pooling[i] is "1"
        stage 3:    conv -> BN -> max pool where pooling[3] is "1" = f;   result = f + BN(conv(LIF(f)))

    Each pooling halves height and width (rounded up). For a still image give `time_steps`: x `[1, B, C, H, W]` is
    shown at every step, and the first convolution and BN, which see the same frame each time, are computed once.

    Shapes: x `[T, B, in_channels, H, W] -> [T, B, dim, H', W']`.

    Raises `ValueError` where dim is no multiple of 8, pooling is not four flags, or x does not fit.

    >>> SpikingPatchSplitting(64, pooling="0011")(torch.rand(4, 2, 3, 32, 32)).shape
    torch.Size([4, 2, 64, 8, 8])
    """

    def __init__(
        self, dim: int, *, in_channels: int = 3, pooling: str = "1111", neuron: str | NeuronFactory = LIF
    ) -> None:
        super().__init__()
        check_multiple(dim, WIDTHS[0], "dim")
        if in_channels < 1:
            raise ValueError(f"in_channels must be positive, got {in_channels}")
        if len(str(pooling)) != len(WIDTHS) or set(str(pooling)) - set("01"):
            raise ValueError(f'pooling must be four flags of 0 and 1 such as "1111" or "0011", got {pooling!r}')
        self.dim, self.in_channels, self.pooling = dim, in_channels, str(pooling)
        channels = [in_channels, *(dim // width for width in WIDTHS)]
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1, bias=False) for before, after in pairwise(channels)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(after) for after in channels[1:])
        self.neurons = nn.ModuleList(make_neuron(neuron, channels=after) for after in channels[1:])
        self.pools = nn.ModuleList(nn.MaxPool2d(3, 2, 1) if flag == "1" else nn.Identity() for flag in self.pooling)
        self.position_conv = nn.Conv2d(dim, dim, 3, padding=1, bias=False)
        self.position_norm = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor, time_steps: int | None = None) -> Tensor:
        if x.ndim != 5 or x.shape[2] != self.in_channels or 0 in x.shape:
            raise ValueError(f"SpikingPatchSplitting expects [T, B, {self.in_channels}, H, W], got {list(x.shape)}")
        if time_steps is not None and (x.shape[0] != 1 or time_steps < 1):
            raise ValueError(
                f"time_steps repeats a single frame: x must be [1, B, C, H, W] and time_steps >= 1, got "
                f"{list(x.shape)} and {time_steps}"
            )
        x = per_frame(self.convs[0], x)
        for stage in range(3):
            steps = time_steps if stage == 0 else None
            spikes = normalize_and_fire(self.norms[stage], self.neurons[stage], x, steps)
            x = per_frame(self.convs[stage + 1], pool_frames(self.pools[stage], spikes))
        x = pool_frames(self.pools[3], per_frame(self.norms[3], x))
        change = per_frame(self.position_conv, self.neurons[3](x))
        return x + per_frame(self.position_norm, change)
