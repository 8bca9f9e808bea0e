"""Spikes that are known as such, and kept for a gradient at one bit each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakIdKeyDictionary

from .dispatch import exporting, kernels


@dataclass
class _Packed:
    """Spikes as bits, how many gradients still want them, and between two of these the spikes unpacked."""

    bits: Tensor
    wanted: int = 0
    spikes: Tensor | None = None


@dataclass
class _Known:
    """What is known of a tensor of spikes: which version of it was seen, and its bits once they are made."""

    version: int
    packed: _Packed | None = None


# By the tensor itself: what a hook, a mixer or a layer makes of spikes is another tensor, of which nothing is known.
_known = WeakIdKeyDictionary()


def wants_bits(x: Tensor, *others: Any) -> bool:
    """Whether a kernel that makes spikes of x and `others` shall write their bits too: it alone decides that.

    It shall on a GPU where gradients will run through the spikes: then the next convolution keeps them as bits, which a
    kernel of its own would else read all spikes for. Of spikes that nobody convolves they take 1/8 byte each while
    these are there. What torch.compile traces knows of no bits but those that a convolution asks for (see
    `convolution`).
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    for value in (x, *others):
        if isinstance(value, Tensor) and value.requires_grad:
            return kernels(x).writes_bits
    return False


def as_spikes(result: Tensor, *of: Tensor, bits: Tensor | None = None) -> Tensor:
    """Notes that `result` holds zeros and ones alone, if all that it was made `of` is known to; and its `bits`, if any.

    The caller must know it from how `result` is computed: values are not looked at, which would wait for the device.
    Without gradients, and in what is exported, nothing is noted.
    """
    if torch.is_grad_enabled() and not exporting() and all(are_spikes(tensor) for tensor in of):
        if torch.compiler.is_compiling():
            note_spikes_op(result)
        else:
            # What comes with a place for bits is new.
            packed = None if bits is not None and not bits.numel() else _packed(result)
            if packed is None and bits is not None and bits.numel():
                packed = _Packed(bits)
            _known[result] = _Known(result._version, packed)
    return result


def are_spikes(tensor: Tensor) -> bool:
    """Whether it is known that a tensor holds zeros and ones alone; a change in place since makes it unknown."""
    if not torch.is_grad_enabled() or exporting():
        return False
    if torch.compiler.is_compiling():
        return are_spikes_op(tensor).shape[0] == 1
    return _are_known(tensor)


def _are_known(tensor: Tensor) -> bool:
    known = _known.get(tensor)
    return known is not None and known.version == tensor._version


def bits_of(spikes: Tensor) -> Tensor | None:
    """The bits of spikes, if they have been made: those of each tensor that holds the same in this order."""
    packed = None if torch.compiler.is_compiling() else _packed(spikes)
    return None if packed is None else packed.bits


def _packed(tensor: Tensor) -> _Packed | None:
    return _known[tensor].packed if _are_known(tensor) else None


# While torch.compile traces, the tensors are stand-ins with versions of their own, which only an op's `register_fake`
# is shown. What it knows of them is told by the size of an empty result, the one thing that tracing can branch on. Of
# what comes into a graph nothing is known, and nothing of this is left in what is compiled.


@torch.library.custom_op("sdt_blocks::note_spikes", mutates_args=())
def note_spikes_op(tensor: Tensor) -> Tensor:
    """`as_spikes` while a graph is traced; gives nothing."""
    return tensor.new_empty(0)


@note_spikes_op.register_fake
def _(tensor):
    _known[tensor] = _Known(tensor._version)
    return tensor.new_empty(0)


@torch.library.custom_op("sdt_blocks::are_spikes", mutates_args=())
def are_spikes_op(tensor: Tensor) -> Tensor:
    """`are_spikes` while a graph is traced: a result of the size 1 says yes, of the size 0 no."""
    return tensor.new_empty(int(_are_known(tensor)))


@are_spikes_op.register_fake
def _(tensor):
    return tensor.new_empty(int(_are_known(tensor)))


class SpikesAsBits(saved_tensors_hooks):
    """Within it, what autograd keeps of `spikes` takes one bit an element, not a float; all else stays as it is.

    It gives a copy of the spikes in `dtype`, the tensors themselves without one, whose bits are made once for all uses.

    Raises `ValueError` for a tensor that is not known to be spikes (see `as_spikes`).

    >>> spikes, weight = as_spikes(torch.ones(8, 16)), torch.rand(16, 4, requires_grad=True)
    >>> with SpikesAsBits(spikes) as (kept,):
    ...     (kept @ weight).sum().backward()
    """

    def __init__(self, *spikes: Tensor, dtype: torch.dtype | None = None) -> None:
        if not all(map(are_spikes, spikes)):
            raise ValueError("only what is known to be spikes can be kept as bits; see as_spikes")
        super().__init__(self._pack, _unpack)
        self.known = [_known[tensor] for tensor in spikes]
        self.spikes = [tensor if dtype is None else tensor.to(dtype) for tensor in spikes]
        self.versions = [tensor._version for tensor in self.spikes]

    def __enter__(self) -> list[Tensor]:  # type: ignore[override]
        super().__enter__()
        return self.spikes

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        del self.spikes

    def _pack(self, tensor: Tensor) -> _Bits | _Kept:
        for spikes, known, version in zip(self.spikes, self.known, self.versions, strict=True):
            if tensor._version == version and _holds_all(tensor, spikes):
                if known.packed is None and (bits := kernels(tensor).pack_bits(tensor)) is not None:
                    known.packed = _Packed(bits)
                if known.packed is not None:
                    known.packed.wanted += 1
                    return _Bits(known.packed, tensor.shape, tensor.stride(), tensor.dtype)
        return _Kept(tensor, tensor._version)


def _holds_all(tensor: Tensor, spikes: Tensor) -> bool:
    """Whether a tensor is a view of all the spikes."""
    same = tensor.data_ptr() == spikes.data_ptr() and tensor.dtype == spikes.dtype
    return same and tensor.numel() == spikes.numel() and gapless(tensor)


class _Bits(NamedTuple):
    packed: _Packed
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bits(self) -> Tensor:
        return self.packed.bits


class _Kept(NamedTuple):
    tensor: Tensor
    version: int


def _unpack(kept: _Bits | _Kept) -> Tensor:
    if isinstance(kept, _Bits):
        packed = kept.packed
        packed.wanted -= 1
        spikes = packed.spikes
        if spikes is None or (spikes.shape, spikes.stride(), spikes.dtype) != kept[1:]:
            spikes = packed.bits.new_empty_strided(kept.shape, kept.strides, dtype=kept.dtype)
            kernels(spikes).unpack_bits(packed.bits, spikes)
        # Of q, k and v one gradient comes after the other.
        packed.spikes = spikes if packed.wanted > 0 else None
        return spikes
    # With hooks autograd leaves this check to them.
    if kept.tensor._version != kept.version:
        raise RuntimeError(
            f"a tensor of shape {list(kept.tensor.shape)} that the gradient needs was modified in place after the "
            "forward pass"
        )
    return kept.tensor


def gapless(tensor: Tensor) -> bool:
    """Whether the elements fill a stretch of memory, each once."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
