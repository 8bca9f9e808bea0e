"""The arguments of the ops and their kernels as small tuples, and the memory layout of a sequence."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..surrogate import KINDS, Scheduled, Surrogate, sigmoid

RESETS = ("zero", "subtract", "none")
ROUNDINGS = ("even", "up")
"""How a level and a half is rounded: to the even neighbor, as in `torch.round`, or up."""
SIGMOID = sigmoid()

# Shorter runs of consecutive elements are copied first instead of being read in place.
SHORTEST_CHUNK = 16

# Tokens of an image that one program of the attention holds in its registers.
MOST_TOKENS = 1 << 14


def state_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the membrane: float32 for half precision."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class NeuronSpec(NamedTuple):
    """A layer of neurons: the constants of `lif_reference`.

    `inv_tau`, `1 / tau`, is a number, a 0-d tensor or one value per channel `[C]`; `surrogate` may be any callable like
    a snnTorch `spike_grad`. The constants for a kernel (see `lif.constants`) have only numbers and a `Surrogate`:
    tensors are passed separately.
    """

    threshold: float = 1.0
    reset: str = "zero"
    surrogate: Surrogate | Callable[[Tensor], Tensor] = SIGMOID
    detach_reset: bool = True
    strict: bool = False
    inv_tau: float | Tensor = 0.5

    def encode(self) -> list[float]:
        """The constants as numbers, which a registered op can take."""
        assert not isinstance(self.inv_tau, Tensor)
        kind, alpha = self.gradient()
        return [
            self.threshold,
            RESETS.index(self.reset),
            kind,
            alpha,
            self.detach_reset,
            self.strict,
            self.inv_tau,
        ]

    def gradient(self) -> tuple[int, float]:
        """Number and sharpness of the surrogate, as the kernels know it."""
        assert isinstance(self.surrogate, Surrogate)
        return KINDS.index(self.surrogate.kind), self.surrogate.alpha

    @staticmethod
    def decode(numbers: Sequence[float]) -> NeuronSpec:
        """The inverse of `encode`."""
        return _decode(tuple(numbers))


def schedule_of(neuron: NeuronSpec) -> Tensor | None:
    """The numbers that a graph takes as inputs because a schedule changes them."""
    # Not a property: in PyTorch 2.6 a graph finds the property itself in a named tuple, and no value.
    return neuron.surrogate.numbers if isinstance(neuron.surrogate, Scheduled) else None


def in_evaluation(neuron: NeuronSpec, channels: int) -> tuple[NeuronSpec, Tensor]:
    """The constants without those of a gradient, and `1 / tau` as float32 `[channels]`, for the kernels of evaluation.

    Raises `ValueError` if the number of time constants is not that of the channels.
    """
    inv_tau = constant(neuron.inv_tau)
    check_time_constants(inv_tau, (channels,))
    return NeuronSpec(neuron.threshold, neuron.reset, strict=neuron.strict), inv_tau.expand(channels)


def constant(given: float | Tensor) -> Tensor:
    """A number or a tensor as the CPU kernels take it: float32, whatever PyTorch's default dtype and device are."""
    if isinstance(given, Tensor):
        return given.detach().float()
    return torch.tensor(given, dtype=torch.float32, device="cpu")


def check_membrane(membrane: Tensor | None, x: Tensor) -> None:
    """Raise `ValueError` if the membrane before the sequence x `[T, ...]` has another shape than a step of it."""
    if membrane is not None and membrane.shape != x.shape[1:]:
        raise ValueError(f"the initial membrane must have the shape {list(x.shape[1:])}, got {list(membrane.shape)}")


def check_time_constants(inv_tau: float | Tensor, channels: Sequence[int]) -> None:
    """Raise `ValueError` if `1 / tau` is neither one number nor one for each of the `channels`."""
    if isinstance(inv_tau, Tensor) and inv_tau.ndim and inv_tau.shape != torch.Size(channels):
        raise ValueError(
            f"a time constant per channel must have one value for each channel of [T, B, C, ...]; got "
            f"{list(inv_tau.shape)} for the channels {list(channels)}"
        )


@functools.lru_cache(maxsize=256)
def _decode(numbers: tuple[float, ...]) -> NeuronSpec:
    threshold, reset, kind, alpha, detach_reset, strict, inv_tau = numbers
    surrogate = Surrogate(KINDS[int(kind)], alpha)
    return NeuronSpec(threshold, RESETS[int(reset)], surrogate, bool(detach_reset), bool(strict), inv_tau)


class LevelSpec(NamedTuple):
    """A layer of integer neurons: the constants of `levels_reference`."""

    levels: int = 4
    norm: float = 4.0
    rounding: str = "even"
    threshold: float = 1.0

    def encode(self) -> list[float]:
        """The constants as numbers, which a registered op can take."""
        return [self.levels, self.norm, ROUNDINGS.index(self.rounding), self.threshold]

    @staticmethod
    def decode(numbers: Sequence[float]) -> LevelSpec:
        """The inverse of `encode`."""
        levels, norm, rounding, threshold = numbers
        return LevelSpec(int(levels), norm, ROUNDINGS[int(rounding)], threshold)


class Norm(NamedTuple):
    """A batch normalization: the arguments of `F.batch_norm`, in its order, and how many batches it has seen.

    While `training`, running statistics are updated in place if given, and `batches`, a 0-d integer tensor, is
    increased by one. `momentum` may be a 0-d tensor, which need not be read back from its device. With the name of a
    `group` of processes the batch is shared by all of them, as in `nn.SyncBatchNorm`; for this there is no reference.
    """

    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float | Tensor = 0.1
    eps: float = 1e-5
    batches: Tensor | None = None
    group: str = ""

    def count_batch(self) -> None:
        """Count one more batch."""
        if self.training and self.batches is not None:
            self.batches.add_(1)


@dataclass(frozen=True)
class Affine:
    """A normalization, `(x - mean) * inv_std * weight + bias`, or those of q, k and v.

    All tensors have the state's dtype: mean and inv_std `[C]`, or `[3, C]`; weight and bias `[C]`, one for each.
    """

    mean: Tensor
    inv_std: Tensor
    weight: Sequence[Tensor] | None
    bias: Sequence[Tensor] | None
    of_batch: bool
    """Whether mean and inv_std are computed from x, so that the gradient flows through them too."""
    group: str = ""
    """The processes that share the batch, if there are several."""

    @staticmethod
    def of_one(
        mean: Tensor, inv_std: Tensor, weight: Tensor | None, bias: Tensor | None, of_batch: bool, group: str = ""
    ) -> Affine:
        weights, biases = (None if value is None else (value,) for value in (weight, bias))
        return Affine(mean, inv_std, weights, biases, of_batch, group)

    @functools.cached_property
    def scale(self) -> Tensor:
        """Together with `shift`, the same as `x * scale + shift`."""
        return self.inv_std if self.weight is None else self.inv_std * _rows(self.weight)

    @functools.cached_property
    def shift(self) -> Tensor:
        return -self.mean * self.scale if self.bias is None else _rows(self.bias) - self.mean * self.scale

    def row(self, i: int) -> Affine:
        """The normalization of q, k or v."""
        weight, bias = (None if values is None else (values[i],) for values in (self.weight, self.bias))
        return Affine(self.mean[i], self.inv_std[i], weight, bias, self.of_batch, self.group)


def _rows(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack([*values])


class ByteLayer(NamedTuple):
    """A convolution of 8 bits: `weight` int8 `[out, height, width, in]`, scale and shift of a sum float32 `[out]`.

    `windows` are stride, padding and dilation, each for height and width.
    """

    weight: Tensor
    scale: Tensor
    shift: Tensor
    windows: Sequence[Sequence[int]] = ((1, 1), (0, 0), (1, 1))


class Spikes(NamedTuple):
    """Where a kernel writes spikes and, if there is room for them, their bits."""

    values: Tensor
    bits: Tensor | None = None
    """See `Layout.empty_bits`; the result of `Kernels.pack_bits` for the values."""


class Arriving(NamedTuple):
    """The gradients that a backward pass starts from."""

    spikes: Tensor | None = None
    """`[T, ...]`, like the spikes."""
    last: Tensor | None = None
    """The gradient of the last membrane, `x.shape[1:]`."""


class Masks(NamedTuple):
    """The factors of a gradient on its way to the spikes of q, k and v."""

    of_q: Tensor
    """Multiplies the gradient of q, `[T, B, C]` in the state's dtype."""
    of_sums: Tensor
    """The gradient of the sums of `k * v`, like `of_q`: it is that of k where v fired, and that of v where k fired."""
    codes: Tensor
    """The spikes, see `Kernels.attend`."""


@dataclass(frozen=True)
class Layout:
    """The memory layout of x `[T, ...]` and of the results.

    Neuron i of a frame is the element `i // chunk * chunk_stride + i % chunk` of that frame of x, and element i of a
    frame of the results, which have the same order of axes without gaps. Its channel is `i // inner % channels`.
    """

    steps: int
    size: int
    chunk: int
    chunk_stride: int
    x_step: int
    """Distance from one time step of x to the next, in elements."""
    repeat: bool
    """Whether x is one frame `[1, ...]` that is shown at every step."""
    channels: int
    inner: int
    frame_strides: tuple[int, ...]

    @property
    def dense(self) -> bool:
        """Whether the neurons of a frame of x are contiguous in memory."""
        return self.chunk == self.size or self.chunk_stride == self.chunk

    def has_groups(self, of: int, images: int = 1) -> bool:
        """Whether groups of `of` neurons are contiguous in x, and within one channel or all channels of one position.

        If all channels are one, a group lies within one of `images` parts of a frame.
        """
        innermost = self.inner == 1 and self.channels > 1
        run = self.channels if innermost else self.inner if self.channels > 1 else self.size // images
        gaps = () if self.dense else (self.chunk, self.chunk_stride)
        return all(number % of == 0 for number in (run, self.x_step, *gaps))

    def empty_bits(self, x: Tensor, wanted: bool) -> Tensor:
        """An uninitialized bit for each element of `empty(x, steps)`; empty if not `wanted`.

        Also empty if a byte would not be of one group.
        """
        return x.new_empty(self.steps * self.size // 8 if wanted and self.has_groups(8) else 0, dtype=torch.uint8)

    def empty(self, x: Tensor, frames: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialized result `[frames, ...]`."""
        return x.new_empty_strided((frames, *x.shape[1:]), (self.size, *self.frame_strides), dtype=dtype)

    def empty_frame(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """An uninitialized result like one frame of x."""
        return x.new_empty_strided(x.shape[1:], self.frame_strides, dtype=dtype)

    def frame(self, frame: Tensor) -> Tensor:
        """`frame` (of `x.shape[1:]`) in this order of axes, copied only if it has another one."""
        if frame.stride() == self.frame_strides:
            return frame
        return frame.new_empty_strided(frame.shape, self.frame_strides).copy_(frame)

    def frames(self, frames: Tensor) -> Tensor:
        """Like `frame`, for `[T, ...]`; the time steps may be any distance apart."""
        if frames.stride()[1:] == self.frame_strides:
            return frames
        return frames.new_empty_strided(frames.shape, (self.size, *self.frame_strides)).copy_(frames)


def channels_last(x: Tensor) -> bool:
    """Whether the channels of x `[T, B, C, ...]` are the innermost axis in memory."""
    return x.stride(2) == 1 and x.shape[2] > 1


def arrange(x: Tensor, steps: int, per_channel: bool) -> tuple[Tensor, Layout]:
    """The layout of x `[T or 1, ...]`, and x itself, copied if a layout cannot describe its gaps or overlaps.

    With `per_channel` the channels are the third axis of x.
    """
    # Under dynamic shapes sizes are symbols, which no cache can hold.
    plain = {int}.issuperset(map(type, (*x.shape, *x.stride(), steps)))
    lay_out = _layout if plain else _layout.__wrapped__
    layout = lay_out(tuple(x.shape), x.stride(), steps, per_channel)
    if layout is None:
        strides = _dense(x.shape[1:], _order(x.shape[1:], x.stride()[1:]))
        x = x.new_empty_strided(x.shape, (x[0].numel(), *strides)).copy_(x)
        layout = lay_out(tuple(x.shape), x.stride(), steps, per_channel)
        assert layout is not None
    return x, layout


def _order(shape: Sequence[int], strides: Sequence[int]) -> list[int]:
    """The axes from the outermost in memory to the innermost."""
    if any(stride == 0 and size > 1 for size, stride in zip(shape, strides, strict=True)):
        return list(range(len(shape)))
    return sorted(range(len(shape)), key=lambda axis: -strides[axis])


def _dense(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    strides, stride = [0] * len(shape), 1
    for axis in reversed(order):
        strides[axis] = stride
        stride *= max(shape[axis], 1)
    return tuple(strides)


@functools.lru_cache(maxsize=4096)
def _layout(x_shape: tuple[int, ...], x_strides: tuple[int, ...], steps: int, per_channel: bool) -> Layout | None:
    shape, strides = x_shape[1:], x_strides[1:]
    order = _order(shape, strides)
    chunk, outer = 1, list(order)
    while outer and (shape[outer[-1]] == 1 or strides[outer[-1]] == chunk):
        chunk *= shape[outer.pop()]
    chunk_stride = expected = strides[outer[-1]] if outer else chunk
    size = chunk
    for axis in reversed(outer):
        if shape[axis] != 1 and strides[axis] != expected:
            return None
        expected *= shape[axis]
        size *= shape[axis]
    channels = inner = 1
    if per_channel:
        channels = shape[1]
        for axis in order[order.index(1) + 1 :]:
            inner *= shape[axis]
    if outer and (chunk < SHORTEST_CHUNK or chunk_stride < chunk or chunk % (inner if inner > 1 else channels)):
        return None
    repeat = x_shape[0] != steps
    x_step = 0 if repeat else x_strides[0]
    return Layout(steps, size, chunk, chunk_stride, x_step, repeat, channels, inner, _dense(shape, order))
