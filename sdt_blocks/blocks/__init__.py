"""Blocks of spiking transformers: each an `nn.Module` that works alone, made of steps."""

from .attention import LinearSpikeAttention, SpikeDrivenSelfAttention
from .convolution import ConvolutionBlock, Downsampling, SeparableConvolution
from .mixers import LinearSpikeMixer, MaskMixer
from .mlp import SpikingMLP
from .patch import SpikingPatchSplitting
from .shortcut import MembraneShortcut
from .units import ConvNorm, RepConv, SeparableConvNorm

__all__ = [
    "ConvNorm",
    "ConvolutionBlock",
    "Downsampling",
    "LinearSpikeAttention",
    "LinearSpikeMixer",
    "MaskMixer",
    "MembraneShortcut",
    "RepConv",
    "SeparableConvNorm",
    "SeparableConvolution",
    "SpikeDrivenSelfAttention",
    "SpikingMLP",
    "SpikingPatchSplitting",
]
