"""Functions without parameters: the equations beside their fused versions, one signature each."""

from .lif import lif, lif_reference

__all__ = ["lif", "lif_reference"]
