"""Products of spikes with weights that are whole numbers: exact sums, the same by events, densely and in any order.

A weight is `integers * scale` with one scale per output channel. Spikes and levels are whole numbers already, so a sum
is one too, without any rounding; the epilogue multiplies it by the scale (see `Epilogue`). The product of real values
in a fixed order is here as well, for layers whose input is not spikes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu import bindings
from .packed import MOST_INPUTS, Epilogue, PackedSpikes, Result, call, check_product, frames_of, outputs_of, tiled

PIECES = {torch.int8: 1, torch.int32: 3}
"""The number of 8-bit digits in a whole number of each dtype."""
FEW_INPUTS = 256
"""Number of real inputs per output up to which a product is computed row by row of its result."""
MOST_PLANES = 128
"""Number of levels up to which the sum of two products of a level and an 8-bit weight fits 16 bits."""
_LARGEST_SUM = 2**31 - 1


def largest(pieces: int) -> int:
    """The largest whole number with so many digits, each -127..127, in base 256."""
    return 127 * sum(256**place for place in range(pieces))


def quantize(weight: Tensor, pieces: int, planes: int = 1) -> tuple[Tensor, Tensor]:
    """Whole numbers and one float32 scale per output channel such that `integers * scale` is close to `weight`.

    One piece gives int8, -127..127. Three give 24 bits, as int32, or fewer in channels whose sums over `planes` planes
    of spikes could exceed 32 bits. Weights `[out, ...]`, scales `[out]`.
    >>> quantize(torch.tensor([[0.25, -1.0]]), pieces=1)[0]
    tensor([[  32, -127]], dtype=torch.int8)
    """
    dtype = next(dtype for dtype, count in PIECES.items() if count == pieces)
    rows = weight.detach().double().flatten(1)
    sums = torch.maximum(rows.clamp(min=0).sum(1), -rows.clamp(max=0).sum(1)) * planes
    # Each weight may be rounded away from zero by a half.
    room = _LARGEST_SUM - planes * rows.shape[1]
    scale = torch.maximum(rows.abs().amax(1) / largest(pieces), sums / room).clamp(min=1e-30)
    # Upwards, so that rounding the scale to float32 leaves no weight outside.
    scale = scale.float()
    scale = torch.nextafter(scale, torch.full_like(scale, torch.inf))
    integers = (rows / scale.double().unsqueeze(1)).round().to(dtype)
    return integers.view(weight.shape), scale


class IntegerWeight:
    """The whole numbers `[out, in, height, width]` of a convolution's weight, as the kernels take them.

    int8 holds -127..127, int32 what three 8-bit digits can hold (see `quantize`). Their sums have to fit 32 bits.

    Raises `ValueError` for another dtype, or a value that is too large.
    """

    def __init__(self, integers: Tensor) -> None:
        if integers.dtype not in PIECES or integers.ndim != 4:
            raise ValueError(
                f"weights must be int8 or int32 [out, in, height, width], got {integers.dtype} {list(integers.shape)}"
            )
        self.weight, self.pieces = integers, PIECES[integers.dtype]
        most = largest(self.pieces)
        if (integers.long().abs() > most).any():
            raise ValueError(f"{integers.dtype} weights must lie within {-most}..{most}")

    @property
    def kind(self) -> int:
        return 2 if self.pieces == 1 else 1

    @property
    def radius(self) -> int:
        return self.weight.shape[-1] // 2

    @cached_property
    def tiles(self) -> Tensor:
        """The rows that events select."""
        rows = self.weight.permute(2, 3, 1, 0).flatten(0, 2)
        if self.weight.shape[2:] not in ((1, 1), (3, 3)) or len(rows) > MOST_INPUTS:
            raise ValueError(
                f"events need weights [out, in, 1, 1] or [out, in, 3, 3] with at most {MOST_INPUTS} inputs, got "
                f"{list(self.weight.shape)}"
            )
        return tiled(F.pad(rows, (0, 0, 0, 1)))

    @cached_property
    def digits(self) -> Tensor:
        """`[tiles, pieces, inputs / 4, lanes, 4]` in int8, the highest digit first, taps before channels."""
        rest, digits = self.weight.long().permute(2, 3, 1, 0), []
        for _ in range(self.pieces):
            digit = (rest + 128) % 256 - 128
            digits.append(digit)
            rest = (rest - digit) >> 8
        stacked = torch.stack(digits[::-1]).flatten(1, 2)
        padded = F.pad(stacked, (0, -self.weight.shape[0] % lanes(), 0, -self.weight.shape[1] % 4))
        # [pieces, taps, in, out] -> [tiles, pieces, taps * in / 4, lanes, 4]
        groups = padded.flatten(1, 2).unflatten(1, (-1, 4)).unflatten(-1, (-1, lanes()))
        return groups.permute(3, 0, 1, 4, 2).to(torch.int8).contiguous()


class RealWeight:
    """The float32 weight `[out, in, height, width]` of an ungrouped convolution, in tiles."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach().float()
        self.tiles = tiled(self.weight.permute(2, 3, 1, 0).flatten(0, 2))

    @property
    def by_rows(self) -> bool:
        """Whether an output has few inputs."""
        return self.weight[0].numel() <= FEW_INPUTS


class Windows(NamedTuple):
    """Stride, padding and dilation of a convolution, each for height and width."""

    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (0, 0)
    dilation: Sequence[int] = (1, 1)

    @staticmethod
    def same(weight: Tensor) -> Windows:
        """The windows that keep the size of a frame, for an odd kernel."""
        return Windows(padding=tuple(size // 2 for size in weight.shape[2:]))

    def size(self, frame: Sequence[int], kernel: Sequence[int]) -> tuple[int, int]:
        """Height and width of the result, from those of a frame and of the kernel."""
        height, width = (
            (n + 2 * around - gap * (k - 1) - 1) // step + 1
            for n, k, step, around, gap in zip(frame, kernel, *self, strict=True)
        )
        return height, width

    def structure(self, weight: Tensor, size: tuple[int, int]) -> ctypes.Structure:
        return _Windows(*weight.shape[2:], *self.stride, *self.padding, *self.dilation, *size)


def spike_product_dense(
    spikes: PackedSpikes,
    weight: IntegerWeight,
    epilogue: Epilogue,
    *,
    windows: Windows | None = None,
    residual: Tensor | None = None,
    membrane: bool | Tensor = False,
    standing: Tensor | None = None,
) -> Result:
    """`spike_product` with all inputs multiplied, active or not: the same sums, for any ungrouped convolution.

    Spikes and levels are bytes, which the processor multiplies with 8-bit weights by its dot products of bytes, if it
    has them. Without `windows` the result has the frame's size.

    >>> weight = IntegerWeight(torch.ones(8, 16, 1, 1, dtype=torch.int8))
    >>> spikes = PackedSpikes.pack(torch.ones(4, 1, 16, 2, 2))
    >>> spike_product_dense(spikes, weight, Epilogue(8), membrane=True)[0].unique()
    tensor([16.])
    """
    check_product(spikes, weight, epilogue)
    if spikes.planes > MOST_PLANES:
        raise ValueError(f"levels must be at most {MOST_PLANES}, got {spikes.planes}")
    windows = windows or Windows.same(weight.weight)
    steps, images, *frame = spikes.words.shape[:4]
    size = windows.size(frame, weight.weight.shape[2:])
    frames = frames_of(spikes)
    kept, fired, arguments = outputs_of(epilogue, (steps, images, *size), residual, membrane, standing)
    shape = windows.structure(weight.weight, size)
    call("spike_product_dense", frames, shape, weight.pieces, weight.digits, arguments)
    return kept, fired


def real_product(
    x: Tensor,
    weight: RealWeight,
    epilogue: Epilogue,
    steps: int,
    *,
    windows: Windows | None = None,
    residual: Tensor | None = None,
    membrane: bool | Tensor = False,
    standing: Tensor | None = None,
) -> Result:
    """The convolution of real values `[T or 1, B, H, W, in]` in float32, summed in a fixed order, and its epilogue.

    Every output is summed over taps, then channels, in ascending order, with one rounding per product added. So an
    output has the same bits for any batch size, number of threads and processor. A single frame is shown at each of the
    `steps`.
    """
    windows = windows or Windows.same(weight.weight)
    size = _size_of(x, weight, epilogue, steps, windows)
    x = x if weight.by_rows else x.contiguous()
    kept, fired, arguments = outputs_of(epilogue, (steps, x.shape[1], *size), residual, membrane, standing)
    shape = windows.structure(weight.weight, size)
    call("real_product", _Picture.of(x), shape, weight.tiles, arguments, steps, weight.by_rows, False)
    return kept, fired


def pooled_product(
    x: Tensor, weight: RealWeight, epilogue: Epilogue, steps: int, *, windows: Windows | None = None
) -> PackedSpikes:
    """`spike_pool` of the spikes of `real_product`, from rest, for few inputs: the spikes never leave the cache."""
    if epilogue.neuron is None or not weight.by_rows:
        raise ValueError(
            f"pooling needs a neuron and a weight of at most {FEW_INPUTS} inputs an output, got "
            f"{weight.weight[0].numel()} and {epilogue.neuron}"
        )
    windows = windows or Windows.same(weight.weight)
    size = _size_of(x, weight, epilogue, steps, windows)
    places = (steps, x.shape[1], *((side + 1) // 2 for side in size))
    _, fired, arguments = outputs_of(epilogue, places, None, False, None)
    assert fired is not None
    shape = windows.structure(weight.weight, size)
    call("real_product", _Picture.of(x), shape, weight.tiles, arguments, steps, True, True)
    return fired


def real_product_is_fast() -> bool:
    """Whether this processor has an instruction that multiplies and adds with one rounding."""
    return bool(call("real_product_is_fast"))


def byte_product(x: Tensor, weight: IntegerWeight, epilogue: Epilogue, *, windows: Windows | None = None) -> Tensor:
    """`spike_product_dense` for bytes 0..128: uint8 `[N, H, W, in]` -> float32 `[N, H', W', out]`."""
    out, into = weight.weight.shape[:2]
    if x.ndim != 4 or x.shape[-1] != into or x.dtype != torch.uint8 or epilogue.channels != out:
        raise ValueError(
            f"expected uint8 [N, H, W, {into}] and an epilogue of {out} channels, got {x.dtype} {list(x.shape)} and "
            f"{epilogue.channels}"
        )
    windows, x = windows or Windows.same(weight.weight), x.contiguous()
    size = windows.size(x.shape[1:3], weight.weight.shape[2:])
    kept, _, arguments = outputs_of(epilogue, (1, len(x), *size), None, True, None)
    shape = windows.structure(weight.weight, size)
    call("byte_product", x, (ctypes.c_int64 * 4)(*x.shape), shape, weight.pieces, weight.digits, arguments)
    assert kept is not None
    return kept[0]


def depthwise_product(x: Tensor, weight: Tensor, *, windows: Windows | None = None) -> Tensor:
    """The depthwise convolution of x `[N, H, W, C]` with a weight `[C, 1, height, width]`, also in a fixed order."""
    if x.ndim != 4 or x.shape[-1] != len(weight) or weight.shape[1] != 1 or x.dtype != torch.float32:
        raise ValueError(
            f"expected float32 [N, H, W, C] and a weight [C, 1, height, width], got {x.dtype} {list(x.shape)} and "
            f"{list(weight.shape)}"
        )
    windows, x = windows or Windows.same(weight), x.contiguous()
    size = windows.size(x.shape[1:3], weight.shape[2:])
    out = x.new_empty(len(x), *size, len(weight))
    taps = weight.detach().float().flatten(1).T.contiguous()
    call("depthwise_product", x, (ctypes.c_int64 * 4)(*x.shape), windows.structure(weight, size), taps, out)
    return out


def lanes() -> int:
    """Number of output channels in a tile."""
    return bindings.call("packed.cpp", "spike_lanes")


class _Picture(ctypes.Structure):
    _fields_ = [
        ("values", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("frames", "images", "height", "width", "channels")),
        *((f"to_{name}", ctypes.c_int64) for name in ("frame", "image", "row", "column", "channel")),
    ]

    @staticmethod
    def of(x: Tensor) -> ctypes.Structure:
        return _Picture(bindings.address(x), *x.shape, *x.stride())


def _size_of(x: Tensor, weight: RealWeight, epilogue: Epilogue, steps: int, windows: Windows) -> tuple[int, int]:
    """Height and width of the product of real values; raises `ValueError` if they do not fit the weight."""
    out, into = weight.weight.shape[:2]
    if x.ndim != 5 or x.shape[0] not in (1, steps) or x.shape[-1] != into or x.dtype != torch.float32:
        raise ValueError(f"expected float32 [{steps} or 1, B, H, W, {into}], got {x.dtype} {list(x.shape)}")
    if epilogue.channels != out:
        raise ValueError(f"the weight gives {out} channels, but the epilogue has {epilogue.channels}")
    return windows.size(x.shape[2:4], weight.weight.shape[2:])


class _Windows(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("kernel_height", "kernel_width", "stride_y", "stride_x", "padding_y", "padding_x"),
            *("dilation_y", "dilation_x", "height", "width"),
        )
    ]
