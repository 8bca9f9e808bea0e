"""Units: weights with the batch normalization behind them."""

from __future__ import annotations

from torch import nn

from ..steps import Unit


class ConvNorm(Unit):
    """A convolution that keeps the frame's size (or divides it by the stride, rounded up), and a batch normalization.

    Shapes: frames `[N, in_channels, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)]`.

    >>> ConvNorm(3, 8, 3, stride=2)(torch.rand(4, 3, 9, 9)).shape
    torch.Size([4, 8, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=bias
        )
        self.norm = nn.BatchNorm2d(out_channels)
