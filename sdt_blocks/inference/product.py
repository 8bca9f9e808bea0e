"""The products of an optimized model: weights times frames, in the way that is fastest on this machine."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.integers import IntegerWeight, Windows, byte_product, quantize
from ..ops.packed import Epilogue
from .timings import Costs, timings

_ROUNDS = 5
_SLICE_BYTES = 5 << 20


class Geometry(NamedTuple):
    """The geometry of a convolution: `Windows` and the number of groups."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1

    @staticmethod
    def of(conv: nn.Conv2d) -> Geometry:
        assert not isinstance(conv.padding, str)
        return Geometry(conv.stride, conv.padding, conv.dilation, conv.groups)

    @property
    def windows(self) -> Windows:
        return Windows(self.stride, self.padding, self.dilation)


class Convolution:
    """A channels-last convolution of the library."""

    def __init__(self, product: Product) -> None:
        self.product = product

    @staticmethod
    def applies(product: Product) -> bool:
        return True

    @staticmethod
    def input_dtype(product: Product, shape: torch.Size) -> torch.dtype:
        """The dtype in which the neuron before it should emit frames of this shape."""
        return product.weight.dtype

    def __call__(self, frames: Tensor) -> Tensor:
        images = frames.permute(0, 3, 1, 2)
        return F.conv2d(images, self.product.weight, self.product.bias, *self.product.geometry).permute(0, 2, 3, 1)


class Linear(Convolution):
    """A 1x1 convolution as a matrix product for each group."""

    @staticmethod
    def applies(product: Product) -> bool:
        return product.weight.shape[2:] == (1, 1) and product.geometry._replace(groups=1) == Geometry()

    def __call__(self, frames: Tensor) -> Tensor:
        weight, bias, groups = self.product.weight.flatten(1), self.product.bias, self.product.geometry.groups
        if groups == 1:
            return F.linear(frames, weight, bias)
        x, out = frames.flatten(0, -2), frames.new_empty(frames.shape[:-1].numel(), len(weight))
        parts = zip(x.chunk(groups, 1), weight.chunk(groups), bias.chunk(groups), out.chunk(groups, 1), strict=True)
        for some, weights, offset, into in parts:
            torch.addmm(offset, some, weights.T, out=into)
        return out.view(*frames.shape[:-1], -1)


class Integers(Convolution):
    """Spikes times weights that are split into three 8-bit integers each, `s (q1 + q2 / 254 + q3 / 254^2)`.

    A spike is an integer, and sums of integers are exact. With 24 bits of each weight, the result is as close to the
    true sum as float32 additions input by input, while processors multiply 8-bit integers several times faster.
    """

    BASE = 254

    def __init__(self, product: Product) -> None:
        super().__init__(product)
        weight = product.weight.double()
        scale = weight.abs().amax((1, 2, 3)).clamp(min=1e-30) / 127
        rest = weight / scale.view(-1, 1, 1, 1)
        self.scales, pieces = [], []
        for _ in range(3):
            whole = rest.round().clamp(-127, 127)
            pieces.append(whole.to(torch.int8))
            self.scales.append(scale.float())
            rest, scale = (rest - whole) * self.BASE, scale / self.BASE
        self.zeros = torch.zeros_like(self.scales[0], dtype=torch.int32)
        self.packed = [self._pack(piece) for piece in pieces]

    @staticmethod
    def applies(product: Product) -> bool:
        on_cpu = product.weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
        wanted = product.spikes and product.weight.dtype == torch.float32
        return on_cpu and wanted and all(hasattr(torch.ops.onednn, f"q{op}_pointwise") for op in ("linear", "conv2d"))

    @staticmethod
    def input_dtype(product: Product, shape: torch.Size) -> torch.dtype:
        return torch.uint8

    def __call__(self, frames: Tensor) -> Tensor:
        out = self.product.weight.shape[0]
        if self._is_matrix:
            x = frames.flatten(0, -2)
            return self._sliced(x, out).view(*frames.shape[:-1], out)
        return self._sliced(frames.permute(0, 3, 1, 2), out * frames.shape[1:3].numel()).permute(0, 2, 3, 1)

    def _sliced(self, x: Tensor, out: int) -> Tensor:
        """The product in slices, whose sums stay in the cache while the three pieces are added."""
        parts = x.split(max(1, _SLICE_BYTES // (4 * out)))
        if len(parts) == 1:
            return self._sum(x)
        size = self.product.geometry.windows.size(x.shape[2:], self.product.weight.shape[2:]) if x.ndim == 4 else ()
        shape = (len(x), len(self.zeros), *size)
        order = torch.channels_last if x.ndim == 4 else torch.contiguous_format
        total = torch.empty(shape, dtype=torch.float32, device=x.device, memory_format=order)
        for part, into in zip(parts, total.split(len(parts[0])), strict=True):
            self._sum(part, into)
        return total

    def _sum(self, x: Tensor, into: Tensor | None = None) -> Tensor:
        total = self._multiply(x, 0)
        if into is not None:
            total = into.copy_(total)
        for piece in (1, 2):
            self._multiply(x, piece, total)
        return total

    def _pack(self, piece: Tensor) -> Tensor:
        if self._is_matrix:
            packed: Tensor = torch.ops.onednn.qlinear_prepack(piece.flatten(1), None)
        else:
            ones = torch.ones_like(self.scales[0])
            packed = torch.ops.onednn.qconv_prepack(piece, ones, 1.0, 0, *self.geometry, None)
        return packed

    @property
    def _is_matrix(self) -> bool:
        return Linear.applies(self.product) and self.product.geometry.groups == 1

    @property
    def geometry(self) -> tuple[Any, ...]:
        return (*map(list, self.product.geometry[:3]), self.product.geometry.groups)

    def _multiply(self, x: Tensor, piece: int, total: Tensor | None = None) -> Tensor:
        """x times one piece of the weights, plus the bias; with `total`, it is added to that in place instead."""
        op = torch.ops.onednn.qlinear_pointwise if x.ndim == 2 else torch.ops.onednn.qconv2d_pointwise
        geometry = () if x.ndim == 2 else self.geometry
        head = (x, 1.0, 0, self.packed[piece], self.scales[piece], self.zeros)
        if total is None:
            result: Tensor = op(*head, self.product.bias, *geometry, 1.0, 0, torch.float32, "none", [], "")
            return result
        op.binary(*head, total, None, *geometry, 1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "none", [], "")
        return total


class Digits(Convolution):
    """The same weights as whole numbers of three 8-bit digits, in one pass of the kit's kernel (`ops.integers`).

    `Integers` needs three passes over memory: without matrix units for bytes they take about as long as one in float32.
    """

    def __init__(self, product: Product) -> None:
        super().__init__(product)
        integers, scale = quantize(product.weight, pieces=3)
        self.weight, self.epilogue = IntegerWeight(integers), Epilogue(len(scale), scale=scale, shift=product.bias)

    @staticmethod
    def applies(product: Product) -> bool:
        wanted = product.spikes and product.weight.dtype == torch.float32 and product.geometry.groups == 1
        return wanted and product.weight.device.type == "cpu"

    @staticmethod
    def input_dtype(product: Product, shape: torch.Size) -> torch.dtype:
        return torch.uint8

    def __call__(self, frames: Tensor) -> Tensor:
        return byte_product(frames, self.weight, self.epilogue, windows=self.product.geometry.windows)


class Chain(Convolution):
    """The layers that a unit is trained as, which may need fewer multiply-adds than the one convolution."""

    @staticmethod
    def applies(product: Product) -> bool:
        return len(product.chain) > 0

    @staticmethod
    def input_dtype(product: Product, shape: torch.Size) -> torch.dtype:
        first: Any = product.chain[0]
        dtype: torch.dtype = first.input_dtype(shape)
        return dtype

    def __call__(self, frames: Tensor) -> Tensor:
        for product in self.product.chain:
            frames = product(frames)
        return frames.to(self.product.weight.dtype)


PATHS: dict[str, type[Convolution]] = {
    "convolution": Convolution,
    "linear": Linear,
    "integers": Integers,
    "digits": Digits,
    "chain": Chain,
}
"""The ways to compute a product."""


class Product(nn.Module):
    """A convolution with bias on contiguous channels-last frames; without a `geometry` it keeps the frame's size.

    Every product of an optimized model is one of these. `path` is a key of `PATHS`; "auto" takes the one that was
    fastest when a shape was first seen. `spikes` says that frames hold only zeros and ones; the products of `chain`,
    one after another, compute the same.

    Shapes: frames `[N, H, W, in] -> [N, H', W', out]`, in the dtype that `input_dtype` returns.

    Raises `ValueError` for a path that is unknown or cannot compute this product.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        geometry: Geometry | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        spikes: bool = True,
        path: str = "auto",
        chain: Iterable[Product] = (),
    ) -> None:
        super().__init__()
        self.chain = nn.ModuleList(chain)
        self.spikes = spikes
        self.geometry = geometry or Geometry(padding=tuple(size // 2 for size in weight.shape[2:]))
        self.register_buffer("weight", weight.to(dtype).contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", bias.to(dtype))
        self.weight: Tensor
        self.bias: Tensor
        possible = [name for name, way in PATHS.items() if way.applies(self)]
        if path not in (*possible, "auto"):
            raise ValueError(f"path {path!r} cannot compute this product; choose one of auto, {', '.join(possible)}")
        self.paths = possible if path == "auto" else [path]
        self._ways: dict[str, Convolution] = {}
        self._chosen: dict[tuple[int, int], str] = {}

    def input_dtype(self, shape: torch.Size) -> torch.dtype:
        """The dtype in which the neuron before it should emit frames of the shape `[N, H, W, in]`."""
        return PATHS[self._choose(shape)].input_dtype(self, shape)

    def forward(self, frames: Tensor) -> Tensor:
        return self._way(self._choose(frames.shape))(frames)

    def _choose(self, shape: torch.Size) -> str:
        if len(self.paths) == 1:
            return self.paths[0]
        # Shapes of about the same size share a choice, so that a smaller last batch is not measured again.
        size = (shape[:-1].numel().bit_length(), torch.get_num_threads())
        if size not in self._chosen:
            costs = timings().of(self._timed_as(size[0]), lambda: self._compare(shape))
            self._chosen[size] = min(costs, key=lambda name: costs[name])
        return self._chosen[size]

    def _timed_as(self, size: int) -> str:
        """The name of this product's costs at about 2^size rows."""
        weight, chain = self.weight, f" chain {self.chain}" if len(self.chain) else ""
        where = torch.cuda.get_device_name(weight.device) if weight.is_cuda else weight.device.type
        stride, padding, dilation, groups = self.geometry
        windows = f"{'x'.join(map(str, weight.shape))} stride {stride} padding {padding} dilation {dilation}"
        return f"{', '.join(self.paths)}: {windows} groups {groups} {weight.dtype} {where} 2^{size}{chain}"

    def _compare(self, shape: torch.Size) -> Costs:
        """Seconds of each path; one that fails on this machine, or gives another result, is left out."""
        spikes = torch.zeros(shape, device=self.weight.device, dtype=self.weight.dtype)
        spikes.flatten()[::7] = 1
        expected = self._way(self.paths[0])(spikes)
        if not expected.isfinite().all():
            raise ValueError(f"this product has weights that are not finite numbers: {self}")
        frames = {}
        for name in self.paths:
            taken = spikes.to(PATHS[name].input_dtype(self, shape))
            try:
                error = (self._way(name)(taken) - expected).abs().max()
            except (RuntimeError, NotImplementedError):
                continue
            if error <= 1e-4 * expected.abs().max() or self.weight.dtype != torch.float32:
                frames[name] = taken
        # The best of several rounds: a disturbance only makes a run longer, and hits all paths in turn.
        seconds = [{name: self._seconds(name, taken) for name, taken in frames.items()} for _ in range(_ROUNDS)]
        return {name: min(times[name] for times in seconds) for name in frames}

    def _way(self, name: str) -> Convolution:
        if name not in self._ways:
            self._ways[name] = PATHS[name](self)
        return self._ways[name]

    def _seconds(self, name: str, frames: Tensor) -> float:
        _wait_for(frames.device)
        start = time.perf_counter()
        self._way(name)(frames)
        _wait_for(frames.device)
        return time.perf_counter() - start

    def _apply(self, fn: Any, recurse: bool = True) -> Product:
        self._ways, self._chosen = {}, {}
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._ways = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ways": {}, "_chosen": {}}

    def extra_repr(self) -> str:
        out, into, kernel, _ = self.weight.shape
        return f"{into * self.geometry.groups}, {out}, kernel={kernel}, dtype={self.weight.dtype}, paths={self.paths}"


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
