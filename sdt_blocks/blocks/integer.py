"""The blocks of E-SpikeFormer, with integer neurons (Yao et al., TPAMI 2025, https://arxiv.org/abs/2411.16061)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..neuron import NeuronFactory
from ..steps import (
    Unit,
    check_sequence,
    fire,
    is_affine,
    is_bare,
    project,
    project_and_fire,
    project_and_mix,
    shortcut,
)
from .mixers import LinearSpikeMixer
from .shortcut import MembraneShortcut
from .units import ConvNorm, affine_of, layers_of, merged_convolution

LAYER_SCALE = 1e-6
"""The initial value of the factors of a `ScaledShortcut`."""


class SeparableIntegerConvolution(nn.Module):
    """Separable convolution with a neuron before each layer: 1x1 to twice the channels, depthwise, 1x1 back to dim.

    Shapes: membrane `[T, B, dim, H, W] -> [T, B, dim, H, W]`.
    """

    def __init__(self, dim: int, *, kernel_size: int, neuron: NeuronFactory) -> None:
        super().__init__()
        self.dim = dim
        self.neurons = nn.ModuleList(neuron() for _ in range(3))
        self.expand = ConvNorm(dim, 2 * dim)
        self.depthwise = ConvNorm(2 * dim, 2 * dim, kernel_size, groups=2 * dim)
        self.reduce = ConvNorm(2 * dim, dim)

    def forward(self, membrane: Tensor) -> Tensor:
        check_sequence(membrane, self.dim, "SeparableIntegerConvolution")
        levels = project_and_fire(self.expand, self.neurons[1], fire(self.neurons[0], membrane))
        return project(self.reduce, project_and_fire(self.depthwise, self.neurons[2], levels))


class ConvolutionPair(nn.Module):
    """Two 3x3 convolutions with four times the channels between them, and a neuron before each.

    Shapes: membrane `[T, B, dim, H, W] -> [T, B, dim, H, W]`.
    """

    def __init__(self, dim: int, *, bias: bool, neuron: NeuronFactory) -> None:
        super().__init__()
        self.dim = dim
        self.neuron1, self.conv1 = neuron(), ConvNorm(dim, 4 * dim, 3, bias=bias)
        self.neuron2, self.conv2 = neuron(), ConvNorm(4 * dim, dim, 3, bias=bias)

    def forward(self, membrane: Tensor) -> Tensor:
        check_sequence(membrane, self.dim, "ConvolutionPair")
        return project(self.conv2, project_and_fire(self.conv1, self.neuron2, fire(self.neuron1, membrane)))


class LinearChain(Unit):
    """1x1, norm, 1x1, with `outer` another norm, then the unit's norm; without a neuron it is one 1x1 in eval mode.

    Shapes: frames `[N, dim, H, W] -> [N, dim, H, W]`.
    """

    def __init__(self, dim: int, hidden: int, *, outer: bool = True) -> None:
        super().__init__()
        layers: dict[str, nn.Module] = {
            "pointwise1": nn.Conv2d(dim, hidden, 1, bias=False),
            "norm1": nn.BatchNorm2d(hidden),
            "pointwise2": nn.Conv2d(hidden, dim, 1, bias=False),
        }
        if outer:
            layers["norm2"] = nn.BatchNorm2d(dim)
        self.conv = nn.Sequential(OrderedDict(layers))
        self.norm = nn.BatchNorm2d(dim)

    @torch.no_grad()
    def kernel(self) -> nn.Conv2d | None:
        chain: Any = self.conv
        names = ("pointwise1", "norm1", "pointwise2", "norm2")
        layers = layers_of(self, names[: 4 if "norm2" in dict(chain.named_children()) else 3])
        if layers is None or not all(map(is_bare, layers[::2], (1, 1))) or not all(map(is_affine, layers[1::2])):
            return None
        first = layers[0].weight
        weight, bias = torch.eye(first.shape[1]).to(first).double(), torch.zeros(first.shape[1]).to(first).double()
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                matrix = layer.weight.double()[..., 0, 0]
                weight, bias = matrix @ weight, matrix @ bias
            else:
                gain, offset = affine_of(layer)
                weight, bias = gain[:, None] * weight, gain * bias + offset
        return merged_convolution(weight[..., None, None], bias, like=layers[2])


class IntegerAttention(nn.Module):
    """Linear attention of levels: `unit(neuron(scale * q (k^T v)))` with `q, k, v = neuron(unit(neuron(u)))`.

    `make_unit(in_channels, out_channels)` makes the four units; v has `expansion` times the channels of q and k.

    Shapes: membrane `[T, B, dim, H, W] -> [T, B, dim, H, W]`.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        scale: float,
        expansion: int,
        make_unit: Callable[[int, int], nn.Module],
        neuron: NeuronFactory,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.mixer = LinearSpikeMixer(dim, num_heads=num_heads, scale=scale)
        self.neuron, self.mixer_neuron = neuron(), neuron()
        self.q, self.k, self.v = make_unit(dim, dim), make_unit(dim, dim), make_unit(dim, expansion * dim)
        self.q_neuron, self.k_neuron, self.v_neuron = neuron(), neuron(), neuron()
        self.proj = make_unit(expansion * dim, dim)

    def forward(self, membrane: Tensor) -> Tensor:
        check_sequence(membrane, self.dim, "IntegerAttention")
        units, neurons = (self.q, self.k, self.v), (self.q_neuron, self.k_neuron, self.v_neuron)
        mixed = project_and_mix(units, neurons, self.mixer, fire(self.neuron, membrane))
        return project(self.proj, fire(self.mixer_neuron, mixed))


class ScaledShortcut(MembraneShortcut):
    """`u + drop_path(scale * branch(u))` with a learned factor for each channel, which starts near 0 (`LAYER_SCALE`).

    Shapes: membrane `[T, B, dim, H, W] -> [T, B, dim, H, W]`.
    """

    def __init__(self, dim: int, branch: nn.Module, *, drop_path: float = 0.0) -> None:
        super().__init__(branch, drop_path=drop_path)
        self.scale = nn.Parameter(torch.full((dim,), LAYER_SCALE))

    def forward(self, membrane: Tensor) -> Tensor:
        change = self.branch(membrane) * self.scale.view(-1, 1, 1)
        return shortcut(membrane, change, self.drop_path if self.training else 0.0)


class RepBranch(nn.Module):
    """A neuron followed by a linear chain. Shapes: membrane `[T, B, dim, H, W] -> [T, B, dim, H, W]`."""

    def __init__(self, dim: int, *, neuron: NeuronFactory) -> None:
        super().__init__()
        self.neuron, self.unit = neuron(), LinearChain(dim, dim, outer=False)

    def forward(self, membrane: Tensor) -> Tensor:
        return project(self.unit, fire(self.neuron, membrane))
