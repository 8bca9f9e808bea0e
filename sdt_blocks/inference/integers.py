"""Layers with integer weights, whose sums are exact in any order, and layers that sum real values in a fixed order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.integers import (
    FEW_INPUTS,
    IntegerWeight,
    RealWeight,
    Windows,
    depthwise_product,
    pooled_product,
    quantize,
    real_product,
    spike_product_dense,
)
from ..ops.packed import MOST_INPUTS, Epilogue, PackedSpikes, Result, spike_neuron, spike_product
from ..steps import shown_frame
from .product import Geometry

FLOAT32, INT8, INT24 = "float32", "int8", "int24"
"""The kinds of weights of products on spikes."""
PIECES = {INT8: 1, INT24: 3}

Stands = Callable[[Sequence[int]], Tensor]
"""For a shape `[B, H, W, C]`, the membranes of neurons in a stream, which kernels update in place."""


class Finished(nn.Module):
    """A layer and the epilogue of its sums, whose constants are part of its state.

    What the kernels take is made from the buffers on first use, and again after they were loaded.
    """

    def __init__(self, epilogue: Epilogue) -> None:
        super().__init__()
        self.neuron = epilogue.neuron
        self.register_buffer("constants", epilogue.constants)
        self.constants: Tensor
        self._made: dict[str, Any] = {"epilogue": epilogue}

    @property
    def epilogue(self) -> Epilogue:
        made: Epilogue = self.made("epilogue", lambda: Epilogue.of(self.constants, self.neuron))
        return made

    def made(self, name: str, make: Any) -> Any:
        """The result of `make()`, kept until the state changes."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._made = {}

    def _apply(self, fn: Any, recurse: bool = True) -> Finished:
        super()._apply(fn, recurse)
        self._made = {}
        return self

    def __getstate__(self) -> dict[str, Any]:
        # What kernels take is arranged for this machine's vectors.
        return {**self.__dict__, "_made": {}}


class SpikeProduct(Finished):
    """A convolution on spikes, what follows it, and two ways to compute its sums: by `events`, or `dense`.

    `forward(spikes, residual, membrane)` is `spike_product`; in a stream, `stands` gives its `standing` for a shape.
    `break_even` is the share of active inputs above which the sums are dense: with 1 they never are, with 0 always.
    They also always are if the product cannot be computed by events (`has_events`). `parts` are the channels of several
    layers that it computes as one, each filled up to whole words; empty for a single one.
    """

    kind = FLOAT32
    weight: Any
    has_events = True

    def __init__(self, epilogue: Epilogue, parts: Sequence[int], planes: int) -> None:
        super().__init__(epilogue)
        self.parts, self.planes, self.break_even = tuple(parts), planes, 1.0

    def forward(self, spikes: PackedSpikes, *, stands: Stands | None = None, **options: Any) -> Result:
        if stands is not None:
            options["standing"] = stands(self.result_shape(spikes)[1:])
        return (self.events if self._pays(spikes) else self.dense)(spikes, **options)

    def _pays(self, spikes: PackedSpikes) -> bool:
        if not self.has_events or self.break_even <= 0:
            return False
        return self.break_even >= 1 or spikes.rate() <= self.break_even

    def events(self, spikes: PackedSpikes, **options: Any) -> Result:
        """The sums from the weights of active inputs."""
        return spike_product(spikes, self.weight, self.epilogue, **options)

    def dense(self, spikes: PackedSpikes, **options: Any) -> Result:
        """The sums from all inputs."""
        raise NotImplementedError

    def result_shape(self, spikes: PackedSpikes) -> torch.Size:
        """`[T, B, H, W, out]`."""
        return torch.Size((*spikes.words.shape[:4], self.epilogue.channels))

    def extra_repr(self) -> str:
        out, into, kernel, _ = self.weight.weight.shape
        return f"{into}, {out}, kernel={kernel}, {self.kind}, break_even={self.break_even:.3g}"


class IntegerProduct(SpikeProduct):
    """A product with whole numbers as weights, of `pieces` digits with 8 bits each (see `ops.integers.quantize`).

    Both ways give the same bits. The epilogue's shift is the folded bias; its scale must be 1 and becomes that of the
    weights. `planes` and `norm` are those of `PackedSpikes`.
    """

    def __init__(
        self,
        weight: Tensor,
        epilogue: Epilogue,
        parts: Sequence[int] = (),
        *,
        planes: int = 1,
        norm: float = 1.0,
        pieces: int = 1,
        windows: Windows | None = None,
    ) -> None:
        integers, scale = quantize(weight, pieces, planes)
        constants = epilogue.constants.clone()
        constants[1] = (scale.double() / norm).float()
        super().__init__(Epilogue.of(constants, epilogue.neuron), parts, planes)
        self.register_buffer("integers", integers)
        self.integers: Tensor
        self.windows = windows or Windows.same(weight)
        self.kind = next(name for name, count in PIECES.items() if count == pieces)
        self.has_events = events_know(weight, self.windows)

    @property
    def weight(self) -> IntegerWeight:  # type: ignore[override]
        made: IntegerWeight = self.made("weight", lambda: IntegerWeight(self.integers))
        return made

    def dense(self, spikes: PackedSpikes, **options: Any) -> Result:
        return spike_product_dense(spikes, self.weight, self.epilogue, windows=self.windows, **options)

    def result_shape(self, spikes: PackedSpikes) -> torch.Size:
        size = self.windows.size(spikes.words.shape[2:4], self.integers.shape[2:])
        return torch.Size((*spikes.words.shape[:2], *size, self.epilogue.channels))


class OrderedSums(Finished):
    """A chain of convolutions of real values, each summed in a fixed order, and what follows the last.

    `layers` are pairs of a weight and its geometry, ungrouped or depthwise.
    """

    weight0: Tensor

    def __init__(self, layers: Sequence[tuple[Tensor, Geometry]], epilogue: Epilogue) -> None:
        super().__init__(epilogue)
        self.geometries = [geometry for _, geometry in layers]
        for place, (weight, _) in enumerate(layers):
            self.register_buffer(f"weight{place}", weight.float())
        self.pools = len(layers) == 1 and self.geometries[0].groups == 1 and layers[0][0][0].numel() <= FEW_INPUTS
        """Whether `pooled` can compute it."""

    def forward(self, frames: Tensor | PackedSpikes, *, stands: Stands | None = None, **options: Any) -> Result:
        x, time_steps = shown(frames)
        if stands is not None:
            options["standing"] = stands(self.result_shape(frames)[1:])
        for place, geometry in enumerate(self.geometries):
            last = place == len(self.geometries) - 1
            windows, weight = geometry.windows, getattr(self, f"weight{place}")
            if geometry.groups == 1:
                made = self.made(f"weight{place}", lambda weight=weight: RealWeight(weight))
                if last:
                    return real_product(x, made, self.epilogue, time_steps, windows=windows, **options)
                x = real_product(x, made, Epilogue(len(weight)), len(x), windows=windows, membrane=True)[0]
            else:
                x = depthwise_product(x.flatten(0, 1), weight, windows=windows).unflatten(0, x.shape[:2])
        return spike_neuron(x, self.epilogue, time_steps, **options)

    def result_shape(self, frames: Tensor | PackedSpikes) -> torch.Size:
        """`[T, B, H, W, out]`."""
        time_steps, images, *size = places_of(frames)
        for place, geometry in enumerate(self.geometries):
            size = [*geometry.windows.size(size, getattr(self, f"weight{place}").shape[2:])]
        return torch.Size((time_steps, images, *size, self.epilogue.channels))

    def pooled(self, frames: Tensor | PackedSpikes) -> PackedSpikes:
        """The spikes after a 3x3 maximum of stride 2, from neurons that start at rest."""
        x, time_steps = shown(frames)
        weight = self.made("weight0", lambda: RealWeight(self.weight0))
        return pooled_product(x, weight, self.epilogue, time_steps, windows=self.geometries[0].windows)


class OrderedLinear(Finished):
    """A linear layer on real values `[..., in]`, each output summed over the inputs in ascending order."""

    def __init__(self, linear: nn.Linear) -> None:
        bias = linear.bias
        super().__init__(Epilogue(linear.out_features, shift=bias))
        self.register_buffer("weight", linear.weight.detach().float().clone())
        self.weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        weight = self.made("weight", lambda: RealWeight(self.weight[..., None, None]))
        rows = x.reshape(1, -1, 1, 1, x.shape[-1]).contiguous()
        out, _ = real_product(rows, weight, self.epilogue, 1, membrane=True)
        result: Tensor = out.view(*x.shape[:-1], -1)
        return result


def events_know(weight: Tensor, windows: Windows) -> bool:
    """Whether the event-driven kernels know an ungrouped convolution: 1x1 or 3x3 with stride 1, keeping the size."""
    known = tuple(weight.shape[2:]) in ((1, 1), (3, 3)) and windows == Windows.same(weight)
    return known and weight[0].numel() <= MOST_INPUTS


def ordered_mean(x: Tensor, axes: Sequence[int]) -> Tensor:
    """The mean over axes, which are removed, summed pairwise: the same bits for any batch, threads and processor."""
    axes = sorted(axis % x.ndim for axis in axes)
    count = math.prod(x.shape[axis] for axis in axes)
    for axis in reversed(axes):
        while x.shape[axis] > 1:
            half = x.shape[axis] // 2
            pairs = x.narrow(axis, 0, half) + x.narrow(axis, half, half)
            x = torch.cat([pairs, x.narrow(axis, 2 * half, 1)], axis) if x.shape[axis] % 2 else pairs
        x = x.squeeze(axis)
    return x / count


def places_of(x: Tensor | PackedSpikes) -> Sequence[int]:
    """`[T, B, H, W]` of frames `[T, B, H, W, C]`."""
    return (x.words if isinstance(x, PackedSpikes) else x).shape[:4]


def shown(x: Tensor | PackedSpikes) -> tuple[Tensor, int]:
    """Frames `[T or 1, B, H, W, C]` in float32 and the number of steps."""
    if isinstance(x, PackedSpikes):
        x = x.unpack().movedim(2, -1)
    return shown_frame(x), len(x)
