"""Event-driven inference on a CPU: spikes at one bit each, and ops that only work where there are some.

A product with spikes is a sum of weight rows, so a silent input costs nothing. Every op has its equations as
`..._reference`, in PyTorch on unpacked spikes, with the same signature. There are no gradients.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import bindings, build
from .levels import level_limits, levels_reference
from .lif import lif_reference
from .spec import LevelSpec, NeuronSpec, constant

WORD = 64
"""Spikes per word."""
MOST_INPUTS = (1 << 16) - 1
"""Inputs that an output may have: the kernels count them in 16 bits."""

Result = tuple[Any, Any]
"""The membrane `[T, B, H, W, out]` if it was asked for, else None; `PackedSpikes` if there is a neuron, else None."""


@dataclass(frozen=True)
class PackedSpikes:
    """Spikes of `channels` channels at one bit each: words `[T, B, H, W, planes * ceil(channels / 64)]` of int64.

    Channel c is bit `c % 64` of word `c // 64` of a plane; the bits behind the last channel are zero. Several planes
    represent the values `(sum over planes) / norm`: the levels of an integer neuron as spikes in binary steps, or
    counts, which are sums of spikes.
    """

    words: Tensor
    channels: int
    planes: int = 1
    norm: float = 1.0

    @staticmethod
    def pack(spikes: Tensor) -> PackedSpikes:
        """Packs `[T, B, C, H, W]`, of any dtype, whose values are all 0 or 1; raises `ValueError` for others.

        >>> PackedSpikes.pack(torch.ones(4, 1, 3, 2, 2)).words.unique()
        tensor([7])
        """
        if spikes.ndim != 5 or 0 in spikes.shape:
            raise ValueError(f"spikes must be [T, B, C, H, W] with no empty axis, got {list(spikes.shape)}")
        return PackedSpikes(_words(_bits(spikes).movedim(2, -1)), spikes.shape[2])

    @staticmethod
    def pack_levels(steps: Tensor, norm: float) -> PackedSpikes:
        """Pack zeros and ones `[planes, T, B, C, H, W]`, whose sums over planes are levels with the value level / norm.

        Raises `ValueError` for other values; those of a boolean tensor need no look.

        >>> PackedSpikes.pack_levels(torch.ones(4, 1, 1, 3, 2, 2), norm=8).unpack().unique()
        tensor([0.5000])
        """
        if steps.ndim != 6 or 0 in steps.shape:
            raise ValueError(f"levels must be [planes, T, B, C, H, W] with no empty axis, got {list(steps.shape)}")
        words = _words(_bits(steps).permute(1, 2, 4, 5, 0, 3)).flatten(-2)
        return PackedSpikes(words, steps.shape[3], len(steps), norm)

    @staticmethod
    def of_levels(levels: Tensor, planes: int, norm: float = 1.0) -> PackedSpikes:
        """Pack levels in float32, `[T, B, H, W, C]`, from 0 to `planes`; plane i holds which of them are above i.

        >>> PackedSpikes.of_levels(torch.full((1, 1, 2, 2, 3), 3.0), planes=4, norm=4).unpack().unique()
        tensor([0.7500])
        """
        if levels.ndim != 5 or 0 in levels.shape or levels.dtype != torch.float32:
            raise ValueError(
                f"levels must be float32 [T, B, H, W, C] with no empty axis, got {levels.dtype} {list(levels.shape)}"
            )
        *places, channels = levels.shape
        words = levels.new_empty(*places, planes * -(-channels // WORD), dtype=torch.int64)
        call("spike_pack", levels.contiguous(), words, words[..., 0].numel(), planes, channels)
        return PackedSpikes(words, channels, planes, norm)

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values `[T, B, C, H, W]` in float32, or zeros and ones (one plane, norm 1) in uint8.

        The channels are the innermost axis in memory. Raises `ValueError` for another dtype.
        """
        kernels = {torch.float32: "spike_expand_float"}
        if self.planes == self.norm == 1:
            kernels[torch.uint8] = "spike_expand_byte"
        if dtype not in kernels:
            known = " or ".join(map(str, kernels))
            raise ValueError(
                f"spikes of {self.planes} plane(s) with norm {self.norm:g} unpack to {known}, got {dtype}; "
                "convert the result with .to()"
            )
        words = self.words.contiguous()
        levels = words.new_empty(*words.shape[:-1], self.channels, dtype=dtype)
        call(kernels[dtype], words, levels, words[..., 0].numel(), self.planes, self.channels, c_float(self.norm))
        return levels.movedim(-1, 2)

    def unpack_reference(self) -> Tensor:
        """The same in PyTorch."""
        places = torch.arange(WORD, device=self.words.device)
        bits = (self.words.unflatten(-1, (self.planes, -1)).unsqueeze(-1) >> places) & 1
        return bits.flatten(-2)[..., : self.channels].sum(-2).movedim(-1, 2).float() / self.norm

    def images(self, first: int, last: int) -> PackedSpikes:
        """The spikes of the images `first` to `last - 1`, as a view."""
        return self.of(self.words[:, first:last])

    def split(self, channels: Sequence[int]) -> list[PackedSpikes]:
        """Spikes of several layers one after another, each filled up to whole words, as views.

        >>> packed = PackedSpikes.pack(torch.ones(1, 1, 128, 2, 2))
        >>> [part.unpack().shape[2] for part in packed.split([64, 3])]
        [64, 3]
        """
        words = [-(-count // WORD) for count in channels]
        if self.planes != 1 or sum(words) != self.words.shape[-1]:
            raise ValueError(
                f"parts of {list(channels)} channels take {sum(words)} words of one plane, got "
                f"{self.words.shape[-1]} of {self.planes}"
            )
        parts = zip(self.words.split(words, -1), channels, strict=True)
        return [PackedSpikes(part, count) for part, count in parts]

    def of(self, words: Tensor) -> PackedSpikes:
        """Spikes with other frames in the same arrangement."""
        return replace(self, words=words)

    def fits(self, other: Any) -> bool:
        """Whether `plus` accepts the other."""
        if not isinstance(other, PackedSpikes) or self.words.shape[:4] != other.words.shape[:4]:
            return False
        return (self.channels, self.norm) == (other.channels, other.norm)

    def plus(self, other: PackedSpikes) -> PackedSpikes:
        """The sum with spikes or counts of the same frames and norm: the planes of both together.

        >>> spikes = PackedSpikes.pack(torch.ones(1, 1, 3, 2, 2))
        >>> spikes.plus(spikes).unpack().unique()
        tensor([2.])
        """
        if not self.fits(other):
            raise ValueError(
                f"only frames of one size, channels and norm can be added, got {list(self.words.shape[:4])}, "
                f"{self.channels}, {self.norm:g} and {list(other.words.shape[:4])}, {other.channels}, {other.norm:g}"
            )
        words = torch.cat([self.words, other.words], dim=-1)
        return PackedSpikes(words, self.channels, self.planes + other.planes, self.norm)

    def count(self) -> int:
        """The number of spikes."""
        words = self.words.contiguous()
        return call("spike_count", words, words.numel())

    def rate(self) -> float:
        """The share of ones, over all planes."""
        return self.count() / (self.words[..., 0].numel() * self.channels * self.planes)


class EventWeight:
    """The float32 weight `[out, in, k, k]` (k = 1, 3) of a convolution of stride 1 that keeps a frame's size, in tiles.

    Raises `ValueError` for another kernel or for more inputs than an entry of a list can number.
    """

    def __init__(self, weight: Tensor) -> None:
        if weight.ndim != 4 or weight.shape[2:] not in ((1, 1), (3, 3)):
            raise ValueError(f"the weight must be [out, in, 1, 1] or [out, in, 3, 3], got {list(weight.shape)}")
        rows = weight.detach().float().permute(2, 3, 1, 0).flatten(0, 2)
        if len(rows) > MOST_INPUTS:
            raise ValueError(f"an output may have at most {MOST_INPUTS} inputs, got {len(rows)}")
        self.weight = weight.detach().float()
        # Shorter lists of a group are filled up with the row of zeros behind the last input.
        self.tiles = tiled(F.pad(rows, (0, 0, 0, 1)))

    kind = 0
    """How the kernel reads the rows of the tiles."""

    @property
    def radius(self) -> int:
        return self.weight.shape[-1] // 2


class Epilogue:
    """What follows the sums of a product: `u = residual + (sum + bias) * scale + shift`, and a neuron on u.

    `bias`, `scale` and `shift` are `[channels]`; `inv_tau`, a number or `[channels]`, replaces that of `neuron`, unless
    it is an integer neuron, whose levels are packed. Without a neuron there are no spikes.
    `(sum + bias) * scale + shift` is rounded as in PyTorch's batch normalization.
    """

    def __init__(
        self,
        channels: int,
        *,
        bias: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        neuron: NeuronSpec | LevelSpec | None = None,
        inv_tau: Tensor | None = None,
    ) -> None:
        self.channels, self.neuron = channels, neuron
        of_neuron = neuron.inv_tau if isinstance(neuron, NeuronSpec) else 0.0
        constants = ((bias, 0.0), (scale, 1.0), (shift, 0.0), (inv_tau, of_neuron))
        rows = [constant(default if given is None else given) for given, default in constants]
        self.constants = torch.stack([row.expand(channels) for row in rows])
        self.bias, self.scale, self.shift, self.inv_tau = self.constants
        self.tiles = tiled(self.constants)
        self.limits = level_limits(neuron) if isinstance(neuron, LevelSpec) else None

    @staticmethod
    def of(constants: Tensor, neuron: NeuronSpec | LevelSpec | None) -> Epilogue:
        """The epilogue with these `constants`, the four rows `[4, channels]` in the order of the options."""
        bias, scale, shift, inv_tau = constants
        return Epilogue(constants.shape[1], bias=bias, scale=scale, shift=shift, inv_tau=inv_tau, neuron=neuron)

    @property
    def planes(self) -> int:
        """How many planes of spikes there are, if there is a neuron."""
        return self.neuron.levels if isinstance(self.neuron, LevelSpec) else 1

    def packed(self, words: Tensor) -> PackedSpikes:
        """The words of the neuron's spikes or levels as such."""
        norm = self.neuron.norm if isinstance(self.neuron, LevelSpec) else 1.0
        return PackedSpikes(words, self.channels, self.planes, norm)

    def reference(
        self, sums: Tensor, residual: Tensor | None, steps: int, membrane: bool, standing: Tensor | None
    ) -> Result:
        """The equations on sums `[T or 1, B, H, W, channels]`."""
        u = torch.addcmul(self.shift.double(), sums + self.bias, self.scale.double()).float()
        u = u.expand(steps, *u.shape[1:])
        if residual is not None:
            u = residual + u
        spikes = None
        if isinstance(self.neuron, LevelSpec):
            level = levels_reference(u.movedim(-1, 2), self.neuron._replace(norm=1.0))
            above = torch.stack([level > plane for plane in range(self.planes)])
            spikes = PackedSpikes.pack_levels(above, self.neuron.norm)
        elif self.neuron is not None:
            before = None if standing is None else standing.movedim(-1, 1)
            fired, last = lif_reference(u.movedim(-1, 2), self.neuron._replace(inv_tau=self.inv_tau), before)
            if standing is not None:
                standing.copy_(last.movedim(1, -1))
            spikes = PackedSpikes.pack(fired)
        return (u if membrane else None), spikes


class RowWeight(Protocol):
    """A weight for products by events: `EventWeight`, or `IntegerWeight` of `ops.integers`."""

    @property
    def weight(self) -> Tensor:
        """`[out, in, k, k]`."""

    @property
    def kind(self) -> int:
        """How the kernel reads the rows of the tiles."""

    @property
    def tiles(self) -> Tensor:
        """`[tiles, inputs + 1, lanes]`."""

    @property
    def radius(self) -> int:
        """The radius of the kernel: 0 or 1."""


def spike_product(
    spikes: PackedSpikes,
    weight: RowWeight,
    epilogue: Epilogue,
    *,
    residual: Tensor | None = None,
    membrane: bool | Tensor = False,
    standing: Tensor | None = None,
) -> Result:
    """The convolution of spikes with a weight, and its epilogue: it only adds the weights of active inputs.

    For levels in several planes it is the convolution of level * norm, which are whole numbers: the weight includes the
    factor 1 / norm. `residual` is `[T, B, H, W, out]`. `membrane` asks for u, and may be the tensor to write it to,
    even `residual`. `standing`, `[B, H, W, out]`, is the neurons' state (the membrane before its reset, as in
    `lif_reference`): they start from it, and leave their last one in it. Without it they start at rest.

    >>> weight, neuron = torch.rand(8, 16, 1, 1), NeuronSpec()
    >>> spikes = PackedSpikes.pack(torch.ones(4, 1, 16, 2, 2))
    >>> spike_product(spikes, EventWeight(weight), Epilogue(8, neuron=neuron))[1].unpack().shape
    torch.Size([4, 1, 8, 2, 2])
    """
    check_product(spikes, weight, epilogue)
    steps, images, height, width, _ = spikes.words.shape
    frames = frames_of(spikes)
    kept, fired, arguments = outputs_of(epilogue, (steps, images, height, width), residual, membrane, standing)
    call("spike_product", frames, weight.radius, weight.kind, weight.tiles, arguments)
    return kept, fired


def spike_product_reference(
    spikes: PackedSpikes,
    weight: EventWeight,
    epilogue: Epilogue,
    *,
    residual: Tensor | None = None,
    membrane: bool | Tensor = False,
    standing: Tensor | None = None,
) -> Result:
    """`spike_product` as a dense convolution."""
    check_product(spikes, weight, epilogue)
    frames = replace(spikes, norm=1.0).unpack_reference()
    sums = F.conv2d(
        frames.flatten(0, 1).contiguous(memory_format=torch.channels_last),
        weight.weight.contiguous(memory_format=torch.channels_last),
        padding=weight.radius,
    )
    sums = sums.unflatten(0, frames.shape[:2]).movedim(2, -1)
    return epilogue.reference(sums, residual, len(frames), membrane is not False, standing)


def spike_neuron(
    x: Tensor,
    epilogue: Epilogue,
    steps: int,
    *,
    residual: Tensor | None = None,
    membrane: bool | Tensor = False,
    standing: Tensor | None = None,
) -> Result:
    """The epilogue alone, on x `[T or 1, B, H, W, C]`: a single frame is shown at each of the `steps`."""
    _check_neuron(x, epilogue, steps)
    x = _frames(x)
    frames, *places, _ = x.shape
    kept, fired, arguments = outputs_of(epilogue, (steps, *places), residual, membrane, standing)
    step = 0 if frames == 1 else x.stride(0)
    call("spike_neuron", x, frames, step, steps, x[0, ..., 0].numel(), arguments)
    return kept, fired


def spike_neuron_reference(
    x: Tensor,
    epilogue: Epilogue,
    steps: int,
    *,
    residual: Tensor | None = None,
    membrane: bool | Tensor = False,
    standing: Tensor | None = None,
) -> Result:
    """`spike_neuron` in PyTorch."""
    _check_neuron(x, epilogue, steps)
    return epilogue.reference(x, residual, steps, membrane is not False, standing)


def spike_pool(spikes: PackedSpikes) -> PackedSpikes:
    """3x3 max pooling, stride 2, padding 1, which is OR for spikes."""
    return spikes.of(_pool("spike_pool", spikes.words.contiguous()))


def spike_pool_reference(spikes: PackedSpikes) -> PackedSpikes:
    """`spike_pool` on unpacked spikes."""
    frames = spikes.unpack_reference()
    return PackedSpikes.pack(F.max_pool2d(frames.flatten(0, 1), 3, 2, 1).unflatten(0, frames.shape[:2]))


def real_pool(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """3x3 max pooling, stride 2, padding 1, of x `[T, B, H, W, C]` in float32, into `out` if that is given."""
    return _pool("real_pool", x.float().contiguous(), out)


def real_pool_reference(x: Tensor) -> Tensor:
    """`real_pool` in PyTorch, into a new tensor."""
    return F.max_pool2d(x.flatten(0, 1).movedim(-1, 1), 3, 2, 1).movedim(1, -1).unflatten(0, x.shape[:2])


def pad_to_words(x: Tensor) -> Tensor:
    """x `[C, ...]` padded with zeros to a multiple of 64 along the first axis."""
    return torch.cat([x, x.new_zeros(-len(x) % WORD, *x.shape[1:])])


def kernels_problem() -> str | None:
    """Why the kernels cannot run on this machine, or None if they can."""
    try:
        _library()
    except build.BuildError as error:
        return str(error)
    return None


def kernels_path() -> Path:
    """The file of the built kernels, which is named after the machine."""
    return Path(_library()._name)


# ---- from tensors to the kernels' arguments


class _Frames(ctypes.Structure):
    _fields_ = [
        ("words", c_void_p),
        *((name, c_int64) for name in ("step", "steps", "images", "height", "width", "channels", "planes")),
    ]


class _Epilogue(ctypes.Structure):
    _fields_ = [
        ("constants", c_void_p),
        ("channels", c_int64),
        ("residual", c_void_p),
        ("residual_step", c_int64),
        ("membrane", c_void_p),
        ("membrane_step", c_int64),
        ("spikes", c_void_p),
        ("spikes_step", c_int64),
        ("neuron", bindings.Neuron),
        ("standing", c_void_p),
        ("limits", c_void_p),
        ("planes", c_int64),
    ]


def frames_of(spikes: PackedSpikes) -> ctypes.Structure:
    """The kernels' description of spikes."""
    words = _frames(spikes.words)
    steps, images, height, width, _ = words.shape
    sizes = (steps, images, height, width, spikes.channels, spikes.planes)
    frames = _Frames(bindings.address(words), words.stride(0), *sizes)
    frames.kept = words  # the memory lives as long as its address
    return frames


def outputs_of(
    epilogue: Epilogue,
    places: tuple[int, ...],
    residual: Tensor | None,
    membrane: bool | Tensor,
    standing: Tensor | None,
) -> tuple[Tensor | None, PackedSpikes | None, ctypes.Structure]:
    """The results, and the kernels' description of where they go and of the epilogue."""
    shape = (*places, epilogue.channels)
    new = epilogue.constants.new_empty
    kept = new(shape) if membrane is True else membrane if isinstance(membrane, Tensor) else None
    for name, real in (("residual", residual), ("membrane", kept)):
        if real is not None:
            check_real(name, real, shape, real if real.is_contiguous() else real[0])
    if standing is not None:
        check_real("standing", standing, shape[1:], standing)
    neuron, limits = epilogue.neuron, epilogue.limits
    words, plane = None, -(-epilogue.channels // WORD)
    if neuron is not None:
        words = new(*places, epilogue.planes * plane, dtype=torch.int64)
        if epilogue.tiles.shape[0] * epilogue.tiles.shape[2] < plane * WORD:
            words.zero_()
    arguments = _Epilogue(bindings.address(epilogue.tiles), epilogue.channels, planes=epilogue.planes)
    for name, tensor in (("residual", residual), ("membrane", kept), ("spikes", words)):
        if tensor is not None:
            setattr(arguments, name, bindings.address(tensor))
            setattr(arguments, f"{name}_step", tensor.stride(0))
    if isinstance(neuron, NeuronSpec):
        arguments.neuron = bindings.neurons(neuron)[0]
        arguments.standing = None if standing is None else bindings.address(standing)
    if limits is not None:
        arguments.limits = bindings.address(limits)
    return kept, None if words is None else epilogue.packed(words), arguments


def check_real(name: str, real: Tensor, shape: tuple[int, ...], without_gaps: Tensor) -> None:
    if real.shape != shape or real.dtype != torch.float32 or not without_gaps.is_contiguous():
        raise ValueError(
            f"{name} must be float32 {list(shape)} with frames without gaps, got {real.dtype} {list(real.shape)}"
        )


def _bits(spikes: Tensor) -> Tensor:
    """Spikes as truth values. Raises `ValueError` unless all are 0 or 1."""
    bits = spikes != 0
    if spikes.dtype != torch.bool and not torch.equal(bits.to(spikes.dtype), spikes):
        raise ValueError("spikes must be 0 or 1; a membrane or an image has to go through a neuron first")
    return bits


def _words(bits: Tensor) -> Tensor:
    """Bits `[..., C]` -> words `[..., ceil(C / 64)]`."""
    padded = F.pad(bits, (0, -bits.shape[-1] % WORD))
    return torch.from_numpy(np.packbits(padded.contiguous().numpy(), axis=-1, bitorder="little").view(np.int64))


def _frames(x: Tensor) -> Tensor:
    """x itself if every frame `x[t]` has no gaps, else a copy."""
    return x if x.is_contiguous() or x[0].is_contiguous() else x.contiguous()


def _pool(kernel: str, x: Tensor, out: Tensor | None = None) -> Tensor:
    steps, images, height, width, channels = x.shape
    shape = (steps, images, (height + 1) // 2, (width + 1) // 2, channels)
    if out is not None and (out.shape != shape or out.dtype != x.dtype or not out.is_contiguous()):
        raise ValueError(f"out must be contiguous {x.dtype} {list(shape)}, got {out.dtype} {list(out.shape)}")
    pooled = x.new_empty(shape) if out is None else out
    call(kernel, x, pooled, steps * images, height, width, channels)
    return pooled


def tiled(rows: Tensor) -> Tensor:
    """Rows `[n, out]` -> `[tiles, n, lanes]`, with zeros behind the last output."""
    lanes = bindings.call("packed.cpp", "spike_lanes")
    padded = F.pad(rows, (0, -rows.shape[1] % lanes))
    return padded.unflatten(1, (-1, lanes)).transpose(0, 1).contiguous()


def check_product(spikes: PackedSpikes, weight: RowWeight, epilogue: Epilogue) -> None:
    out, into = weight.weight.shape[:2]
    if spikes.channels != into or epilogue.channels != out:
        raise ValueError(
            f"the weight takes {into} channels to {out}, but the spikes have {spikes.channels} and the epilogue "
            f"{epilogue.channels}"
        )


def _check_neuron(x: Tensor, epilogue: Epilogue, steps: int) -> None:
    if x.ndim != 5 or x.shape[-1] != epilogue.channels or x.shape[0] not in (1, steps) or x.dtype != torch.float32:
        raise ValueError(
            f"expected float32 [{steps} or 1, B, H, W, {epilogue.channels}], got {x.dtype} {list(x.shape)}"
        )


def _library() -> ctypes.CDLL:
    return bindings.built("packed.cpp")


def call(name: str, *arguments: Any) -> int:
    """Call a kernel; the number of threads is added as its last argument."""
    return bindings.call("packed.cpp", name, *arguments, torch.get_num_threads())
