"""Spikes kept for a gradient at one bit each."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .dispatch import fused, kernels


class SpikesAsBits(saved_tensors_hooks):
    """Within it, what autograd keeps of `spikes` (the tensor or a cast of it) takes one bit an element, not a float.

    All else that is kept stays as it is. On the CPU a tensor that is not all 0 and 1 is noticed and kept whole;
    elsewhere only the caller can know that `spikes` is binary.

    >>> spikes, weight = torch.ones(8, 16), torch.rand(16, 4, requires_grad=True)
    >>> with SpikesAsBits(spikes):
    ...     (spikes @ weight).sum().backward()
    """

    def __init__(self, spikes: Tensor) -> None:
        super().__init__(self._pack, _unpack)
        self.spikes = spikes
        self.packed: dict[tuple[Any, ...], tuple[_Bits, Tensor]] = {}

    def _pack(self, tensor: Tensor) -> _Bits | _Kept:
        of_spikes = tensor.data_ptr() == self.spikes.data_ptr() or tensor.dtype != self.spikes.dtype
        if not of_spikes or tensor.numel() != self.spikes.numel() or not _dense(tensor) or not fused(tensor):
            return _Kept(tensor, tensor._version)
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if key not in self.packed:
            bits = kernels(tensor).pack_bits(tensor)
            if bits is None:
                return _Kept(tensor, tensor._version)
            # The tensor is held meanwhile, so that its place in memory stays its own.
            self.packed[key] = _Bits(bits, tensor.shape, tensor.stride(), tensor.dtype), tensor
        return self.packed[key][0]

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.packed.clear()
        del self.spikes


class _Bits(NamedTuple):
    bits: Tensor
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype


class _Kept(NamedTuple):
    tensor: Tensor
    version: int


def _unpack(kept: _Bits | _Kept) -> Tensor:
    if isinstance(kept, _Bits):
        spikes = kept.bits.new_empty_strided(kept.shape, kept.strides, dtype=kept.dtype)
        kernels(spikes).unpack_bits(kept.bits, spikes)
        return spikes
    # With hooks autograd leaves this check to them.
    if kept.tensor._version != kept.version:
        raise RuntimeError(
            f"a tensor of shape {list(kept.tensor.shape)} that the gradient needs was modified in place after the "
            "forward pass"
        )
    return kept.tensor


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, each once."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
