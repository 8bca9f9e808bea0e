"""Blocks of spiking transformers: each an `nn.Module` that works alone, made of steps."""

from .attention import LinearSpikeAttention, SpikeDrivenSelfAttention
from .convolution import ConvolutionBlock, Downsampling, SeparableConvolution
from .mixers import LinearSpikeMixer, MaskMixer, QKMixer
from .mlp import SpikingMLP
from .patch import SpikingPatchSplitting
from .shortcut import MembraneShortcut
from .spike_level import AcrossImages, QKAttention, SpikeLevelMLP, SpikeShortcut, SpikingSelfAttention
from .units import ConvNorm, RepConv, SeparableConvNorm

__all__ = [
    "AcrossImages",
    "ConvNorm",
    "ConvolutionBlock",
    "Downsampling",
    "LinearSpikeAttention",
    "LinearSpikeMixer",
    "MaskMixer",
    "MembraneShortcut",
    "QKAttention",
    "QKMixer",
    "RepConv",
    "SeparableConvNorm",
    "SeparableConvolution",
    "SpikeDrivenSelfAttention",
    "SpikeLevelMLP",
    "SpikeShortcut",
    "SpikingMLP",
    "SpikingPatchSplitting",
    "SpikingSelfAttention",
]
