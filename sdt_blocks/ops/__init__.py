"""Functions without parameters: the equations beside their fused versions, one signature each."""

from .attention import attend, attend_reference
from .lif import lif, lif_reference
from .norm_lif import batch_norm_lif, batch_norm_lif_reference
from .pool import max_pool, max_pool_reference
from .spec import NeuronSpec, Norm

__all__ = [
    "NeuronSpec",
    "Norm",
    "attend",
    "attend_reference",
    "batch_norm_lif",
    "batch_norm_lif_reference",
    "lif",
    "lif_reference",
    "max_pool",
    "max_pool_reference",
]
