"""Model families: by name, saved and loaded, and as their authors released them."""

from .meta_spikeformer import LinearAttentionBlock, MetaSpikeFormer
from .registry import create_model, list_models
from .released import convert_released_state_dict, load_released_checkpoint
from .saved import load_model, save_model
from .sdt import SpikeDrivenBlock, SpikeDrivenTransformer

__all__ = [
    "LinearAttentionBlock",
    "MetaSpikeFormer",
    "SpikeDrivenBlock",
    "SpikeDrivenTransformer",
    "convert_released_state_dict",
    "create_model",
    "list_models",
    "load_model",
    "load_released_checkpoint",
    "save_model",
]
