"""Blocks of spiking transformers: each an `nn.Module` that works alone, made of steps."""

from .attention import SpikeDrivenSelfAttention
from .mixers import MaskMixer
from .mlp import SpikingMLP
from .patch import SpikingPatchSplitting
from .shortcut import MembraneShortcut
from .units import ConvNorm

__all__ = [
    "ConvNorm",
    "MaskMixer",
    "MembraneShortcut",
    "SpikeDrivenSelfAttention",
    "SpikingMLP",
    "SpikingPatchSplitting",
]
