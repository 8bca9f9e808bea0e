"""Model families: by name, saved and loaded, and as their authors released them."""

from .backbone import Backbone
from .card import DataCard, transform_of
from .e_spikeformer import ESpikeFormer, ESpikeFormerLarge
from .family import Family, ReleasedKeys
from .meta_spikeformer import LinearAttentionBlock, MetaSpikeFormer
from .options import Option, keeps_options
from .qkformer import QKFormer, QKFormerBlock
from .registry import create_model, list_models, register
from .released import convert_released_state_dict, load_released_checkpoint
from .saved import load_model, save_model
from .sdt import SpikeDrivenBlock, SpikeDrivenTransformer
from .spikformer import Spikformer, SpikformerBlock

__all__ = [
    "Backbone",
    "DataCard",
    "ESpikeFormer",
    "ESpikeFormerLarge",
    "Family",
    "LinearAttentionBlock",
    "MetaSpikeFormer",
    "Option",
    "QKFormer",
    "QKFormerBlock",
    "ReleasedKeys",
    "SpikeDrivenBlock",
    "SpikeDrivenTransformer",
    "Spikformer",
    "SpikformerBlock",
    "convert_released_state_dict",
    "create_model",
    "keeps_options",
    "list_models",
    "load_model",
    "load_released_checkpoint",
    "register",
    "save_model",
    "transform_of",
]
