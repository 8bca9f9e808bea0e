"""Tensors that are known to be spikes, and are kept for a gradient at one bit each."""

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
    """Spikes as bits, how many gradients still need them, and between two of these the unpacked spikes."""

    bits: Tensor
    wanted: int = 0
    spikes: Tensor | None = None


@dataclass
class _Known:
    """What is known about a tensor of spikes: the version that was seen, and its bits once they are made."""

    version: int
    packed: _Packed | None = None


# Keyed by the tensor itself: what a hook, a mixer or a layer makes of spikes is another tensor, with nothing known.
_known = WeakIdKeyDictionary()


def wants_bits(x: Tensor, *others: Any) -> bool:
    """Whether a kernel that makes spikes from x and `others` should write their bits too; only this function decides.

    It should on a GPU if gradients will run through the spikes: the next convolution keeps them as bits, and would
    otherwise need a kernel of its own that reads all spikes. If no convolution follows, the bits cost 1/8 byte a spike
    for as long as the spikes live. While torch.compile traces, only the bits that a convolution asks for are known (see
    `convolution`).
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    for value in (x, *others):
        if isinstance(value, Tensor) and value.requires_grad:
            return kernels(x).writes_bits
    return False


def as_spikes(result: Tensor, *of: Tensor, bits: Tensor | None = None) -> Tensor:
    """Note that `result` holds only zeros and ones, if that is known of all tensors `of` it is made; and its `bits`.

    The caller must know it from how `result` is computed: values are not checked, which would wait for the device.
    Without gradients, and in an export, nothing is noted.
    """
    if torch.is_grad_enabled() and not exporting() and all(are_spikes(tensor) for tensor in of):
        if torch.compiler.is_compiling():
            note_spikes_op(result)
        else:
            # A result that comes with a place for bits is new.
            packed = None if bits is not None and not bits.numel() else _packed(result)
            if packed is None and bits is not None and bits.numel():
                packed = _Packed(bits)
            _known[result] = _Known(result._version, packed)
    return result


def are_spikes(tensor: Tensor) -> bool:
    """Whether a tensor is known to hold only zeros and ones, and has not been changed in place since."""
    if not torch.is_grad_enabled() or exporting():
        return False
    if torch.compiler.is_compiling():
        return are_spikes_op(tensor).shape[0] == 1
    return _are_known(tensor)


def _are_known(tensor: Tensor) -> bool:
    known = _known.get(tensor)
    return known is not None and known.version == tensor._version


def bits_of(spikes: Tensor) -> Tensor | None:
    """The bits of spikes, if they have been made, also for another tensor with the same elements in the same order."""
    packed = None if torch.compiler.is_compiling() else _packed(spikes)
    return None if packed is None else packed.bits


def _packed(tensor: Tensor) -> _Packed | None:
    return _known[tensor].packed if _are_known(tensor) else None


# While torch.compile traces, the tensors are stand-ins with versions of their own, which only an op's `register_fake`
# gets to see. What it knows of them is passed on as the size of an empty result, the only thing that tracing can branch
# on. Nothing is known of a graph's inputs, and nothing of this remains in the compiled code.


@torch.library.custom_op("sdt_blocks::note_spikes", mutates_args=())
def note_spikes_op(tensor: Tensor) -> Tensor:
    """`as_spikes` while a graph is traced; returns an empty tensor."""
    return tensor.new_empty(0)


@note_spikes_op.register_fake
def _(tensor):
    _known[tensor] = _Known(tensor._version)
    return tensor.new_empty(0)


@torch.library.custom_op("sdt_blocks::are_spikes", mutates_args=())
def are_spikes_op(tensor: Tensor) -> Tensor:
    """`are_spikes` while a graph is traced: a result of size 1 means yes, of size 0 no."""
    return tensor.new_empty(int(_are_known(tensor)))


@are_spikes_op.register_fake
def _(tensor):
    return tensor.new_empty(int(_are_known(tensor)))


class SpikesAsBits(saved_tensors_hooks):
    """Within it, autograd keeps `spikes` at one bit an element instead of a float; all else is kept as usual.

    Entering returns copies of the spikes in `dtype`, or the tensors themselves if none is given; their bits are made
    once for all uses.

    Raises `ValueError` for a tensor that is not known to be spikes (see `as_spikes`).

    >>> spikes, weight = as_spikes(torch.ones(8, 16)), torch.rand(16, 4, requires_grad=True)
    >>> with SpikesAsBits(spikes) as (kept,):
    ...     (kept @ weight).sum().backward()
    """

    def __init__(self, *spikes: Tensor, dtype: torch.dtype | None = None) -> None:
        if not all(map(are_spikes, spikes)):
            raise ValueError("only tensors known to be spikes can be kept as bits; see as_spikes")
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
        # The gradients of q, k and v come one after the other.
        packed.spikes = spikes if packed.wanted > 0 else None
        return spikes
    # With hooks, autograd leaves this check to them.
    if kept.tensor._version != kept.version:
        raise RuntimeError(
            f"a tensor of shape {list(kept.tensor.shape)} that the gradient needs was modified in place after the "
            "forward pass"
        )
    return kept.tensor


def gapless(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, each once."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
