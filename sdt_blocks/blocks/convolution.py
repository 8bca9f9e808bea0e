"""Convolution blocks of hierarchical spiking transformers."""

from __future__ import annotations

from torch import Tensor, nn

from ..neuron import LIF, NeuronLike, make_neuron
from ..steps import check_sequence, fire, project, project_and_fire, shortcut
from .shortcut import MembraneShortcut
from .sizes import check_widths
from .units import ConvNorm, SeparableConvNorm


class Downsampling(nn.Module):
    """`BN(conv(LIF(u)))`: changes the number of channels and divides height and width by the stride (rounded up).

    The first one of a network takes frames instead of membranes, and has no neuron: `neuron=None`.

    Shapes: `[T, B, in_channels, H, W] -> [T, B, out_channels, ceil(H / stride), ceil(W / stride)]`.

    >>> Downsampling(16, 32)(torch.randn(4, 2, 16, 9, 9)).shape
    torch.Size([4, 2, 32, 5, 5])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        stride: int = 2,
        neuron: NeuronLike | None = LIF,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.neuron = None if neuron is None else make_neuron(neuron, channels=in_channels)
        self.conv = ConvNorm(in_channels, out_channels, kernel_size, stride=stride, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        check_sequence(x, self.in_channels, "Downsampling")
        return project(self.conv, x if self.neuron is None else fire(self.neuron, x))


class SeparableConvolution(nn.Module):
    """Inverted separable convolution, fed by spikes: `BN(W2 depthwise(LIF(BN(W1 LIF(u)))))`.

    Between the two neurons there are `hidden` channels, twice dim by default.

    Shapes: membrane `[T, B, dim, H, W] -> [T, B, dim, H, W]`.

    >>> SeparableConvolution(32)(torch.randn(4, 2, 32, 8, 8)).shape
    torch.Size([4, 2, 32, 8, 8])
    """

    def __init__(
        self,
        dim: int,
        *,
        hidden: int | None = None,
        kernel_size: int = 7,
        neuron: NeuronLike = LIF,
    ) -> None:
        super().__init__()
        hidden = 2 * dim if hidden is None else hidden
        check_widths(dim=dim, hidden=hidden, kernel_size=kernel_size)
        self.dim = dim
        self.neuron1 = make_neuron(neuron, channels=dim)
        self.expand = ConvNorm(dim, hidden)
        self.neuron2 = make_neuron(neuron, channels=hidden)
        self.separable = SeparableConvNorm(hidden, dim, kernel_size)

    def forward(self, membrane: Tensor) -> Tensor:
        check_sequence(membrane, self.dim, "SeparableConvolution")
        return project(self.separable, project_and_fire(self.expand, self.neuron2, fire(self.neuron1, membrane)))


class ConvolutionBlock(nn.Module):
    """Separable convolution and two 3x3 convolutions, each within a membrane shortcut (Yao et al., 2024).

        u = u + SeparableConvolution(u);   u = u + BN(W2 LIF(BN(W1 LIF(u))))

    Between the two 3x3 convolutions there are `hidden` channels, four times dim by default.

    Shapes: membrane `[T, B, dim, H, W] -> [T, B, dim, H, W]`.

    >>> ConvolutionBlock(32)(torch.randn(4, 2, 32, 8, 8)).shape
    torch.Size([4, 2, 32, 8, 8])
    """

    def __init__(self, dim: int, *, hidden: int | None = None, neuron: NeuronLike = LIF) -> None:
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        check_widths(dim=dim, hidden=hidden)
        self.dim = dim
        self.separable = MembraneShortcut(SeparableConvolution(dim, neuron=neuron))
        self.neuron1 = make_neuron(neuron, channels=dim)
        self.conv1 = ConvNorm(dim, hidden, 3)
        self.neuron2 = make_neuron(neuron, channels=hidden)
        self.conv2 = ConvNorm(hidden, dim, 3)

    def forward(self, membrane: Tensor) -> Tensor:
        check_sequence(membrane, self.dim, "ConvolutionBlock")
        membrane = self.separable(membrane)
        spikes = project_and_fire(self.conv1, self.neuron2, fire(self.neuron1, membrane))
        return shortcut(membrane, project(self.conv2, spikes))
