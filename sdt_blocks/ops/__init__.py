"""Functions without parameters: the equations and their fused versions, both with one signature."""

from .attention import attend, attend_reference
from .levels import batch_norm_levels, batch_norm_levels_reference, levels, levels_reference
from .lif import lif, lif_reference
from .norm_lif import batch_norm_lif, batch_norm_lif_reference
from .pool import max_pool, max_pool_reference
from .spec import LevelSpec, NeuronSpec, Norm

__all__ = [
    "LevelSpec",
    "NeuronSpec",
    "Norm",
    "attend",
    "attend_reference",
    "batch_norm_levels",
    "batch_norm_levels_reference",
    "batch_norm_lif",
    "batch_norm_lif_reference",
    "levels",
    "levels_reference",
    "lif",
    "lif_reference",
    "max_pool",
    "max_pool_reference",
]
