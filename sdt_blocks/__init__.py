"""Spiking blocks for transformers that add instead of multiply: neurons, attention, models, analysis."""

from .blocks import (
    ConvolutionBlock,
    Downsampling,
    LinearSpikeAttention,
    MembraneShortcut,
    SeparableConvolution,
    SpikeDrivenSelfAttention,
    SpikingMLP,
    SpikingPatchSplitting,
)
from .blocks.calibration import calibrate_norms
from .example import example_images, example_model
from .inference import EarlyAnswers, optimize_for_inference
from .models import (
    DataCard,
    ESpikeFormer,
    ESpikeFormerLarge,
    LinearAttentionBlock,
    MetaSpikeFormer,
    QKFormer,
    SpikeDrivenBlock,
    SpikeDrivenTransformer,
    Spikformer,
    convert_released_state_dict,
    create_model,
    list_models,
    load_model,
    load_released_checkpoint,
    save_model,
    transform_of,
)
from .neuron import LIF, ParametricLIF, Stream, over_time, replace_neurons

__version__ = "0.2.0"

__all__ = [
    "LIF",
    "ConvolutionBlock",
    "DataCard",
    "Downsampling",
    "ESpikeFormer",
    "ESpikeFormerLarge",
    "EarlyAnswers",
    "LinearAttentionBlock",
    "LinearSpikeAttention",
    "MembraneShortcut",
    "MetaSpikeFormer",
    "ParametricLIF",
    "QKFormer",
    "SeparableConvolution",
    "SpikeDrivenBlock",
    "SpikeDrivenSelfAttention",
    "SpikeDrivenTransformer",
    "Spikformer",
    "SpikingMLP",
    "SpikingPatchSplitting",
    "Stream",
    "calibrate_norms",
    "convert_released_state_dict",
    "create_model",
    "example_images",
    "example_model",
    "list_models",
    "load_model",
    "load_released_checkpoint",
    "optimize_for_inference",
    "over_time",
    "replace_neurons",
    "save_model",
    "transform_of",
]
