"""The forms of layers in an event-driven plan: products of spikes, by events or dense, and of real values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import steps
from ..neuron import IntegerNeuron
from ..ops.integers import FEW_INPUTS, real_product_is_fast
from ..ops.packed import Epilogue, EventWeight, PackedSpikes, Result, pad_to_words, real_pool, spike_neuron
from ..ops.spec import LevelSpec, NeuronSpec, in_evaluation
from . import passes
from .integers import (
    FLOAT32,
    PIECES,
    Finished,
    IntegerProduct,
    OrderedLinear,
    OrderedSums,
    SpikeProduct,
    Stands,
    events_know,
    places_of,
    shown,
)
from .passes import COUNTS, LEVELS, SPIKES
from .plan import CALL, FIRE, MIX, PROJECT, Mixing, Node, chain, convolution, fold, is_kits_neuron, is_neuron
from .product import Geometry, Product

Known = tuple[nn.Conv2d, nn.BatchNorm2d | None]
"""A convolution and its norm."""

PACKED = (SPIKES, LEVELS, COUNTS)
"""The kinds of values that products take packed, at one bit per plane."""

CHUNK_BYTES = 8 << 20
"""How much is computed at a time of the real values between two layers, so that they stay in the cache."""


class Forms:
    """Chooses the layer that computes each node of an event-driven plan, by the kinds of values and what follows."""

    def __init__(
        self,
        kinds: dict[Node, str],
        counted: dict[Node, int],
        epilogues: dict[Node, passes.Epilogue],
        weights: str,
        exact: bool,
    ) -> None:
        self.kinds, self.counted, self.epilogues, self.weights, self.exact = kinds, counted, epilogues, weights, exact

    def of(self, node: Node) -> Any:
        if node.op == PROJECT and node in self.epilogues:
            known = convolution(node.target)
            if known is None:
                return None
            fire = self.epilogues[node].fire
            neuron = None if fire is None else fire.target
            if self.kinds[node.inputs()[0]] in PACKED and self._on_spikes(node.target, known[0]):
                return self._product([known], neuron, **self._planes(node))
            return self._on_reals(node.target, known, neuron)
        if node.op == FIRE and (is_neuron(node.target) or self.kinds[node] == LEVELS):
            return node.target
        if node.op == MIX and self.kinds[node.inputs()[0]] in PACKED:
            planes = self._planes(node)
            return self._side_by_side(node.target, planes) or self._apart(node.target, planes)
        if node.op == MIX and self.exact:
            return self._apart(node.target, None)
        if node.op == CALL and self.exact and steps.is_plain(node.target, nn.Linear):
            return OrderedLinear(node.target)
        return None

    def _on_spikes(self, unit: Any, conv: nn.Conv2d) -> bool:
        """Whether the kernels know a convolution of spikes; with integer weights also one that is always dense."""
        return on_bytes(unit, conv) if self.weights != FLOAT32 else _by_events(conv)

    def _product(
        self, known: list[Known], neuron: Any, *, leak: Tensor | None = None, words: bool = False, **planes: Any
    ) -> SpikeProduct:
        """Convolutions of spikes as one, each padded to whole words if `words` asks for it, and a neuron on all."""
        conv, pad = known[0][0], pad_to_words if words else lambda x: x
        spec, of_neuron = _constants(neuron, conv.out_channels)
        leak = of_neuron if leak is None else leak
        make: Any = EventProduct
        if self.weights == FLOAT32:
            epilogues = [epilogue_of(norm, None, bias=one.bias, channels=one.out_channels) for one, norm in known]
            weights: Sequence[Tensor] = [one.weight.detach() for one, _ in known]
            rows = {name: [getattr(one, name) for one in epilogues] for name in ("bias", "scale", "shift")}
        else:
            weights, biases = zip(*(fold(*one) for one in known), strict=True)
            rows = {"shift": list(biases)}
            make = partial(IntegerProduct, pieces=PIECES[self.weights], windows=Geometry.of(conv).windows)
        joined = {name: torch.cat([pad(part) for part in parts]) for name, parts in rows.items()}
        weight = torch.cat([pad(part) for part in weights])
        epilogue = Epilogue(len(weight), neuron=spec, inv_tau=leak, **joined)
        return make(weight, epilogue, [one.out_channels for one, _ in known] if words else (), **planes)

    def _on_reals(self, unit: Any, known: Known, neuron: Any) -> nn.Module | None:
        """A convolution of real values: by PyTorch, or summed in a fixed order if that is asked for or faster."""
        (conv, norm), channels = known, known[0].out_channels
        if not self.exact:
            layers = unit if isinstance(unit, nn.Conv2d) else unit.conv
            own = layers is conv and conv.groups == 1 and conv.weight[0].numel() <= FEW_INPUTS
            if own and real_product_is_fast():
                after = epilogue_of(norm, neuron, bias=conv.bias, channels=channels)
                return OrderedSums([(conv.weight.detach(), Geometry.of(conv))], after)
            return DenseSums(layers, conv, epilogue_of(norm, neuron, channels=channels))
        convs = chain(unit) or [conv]
        if any(one.groups > 1 and one.weight.shape[:2] != (one.in_channels, 1) for one in convs):
            return None
        weight, bias = fold(convs[-1], norm)
        spec, leak = _constants(neuron, channels)
        parts = [*((one.weight.detach(), Geometry.of(one)) for one in convs[:-1]), (weight, Geometry.of(convs[-1]))]
        return OrderedSums(parts, Epilogue(channels, shift=bias, neuron=spec, inv_tau=leak))

    def _side_by_side(self, mixing: Mixing, planes: dict[str, Any]) -> SpikeProduct | None:
        """q, k and v as one product with equal neurons, each filled up to whole words.

        Their inputs are spikes, or levels or counts with the options `planes`.
        """
        found = [convolution(unit) for unit in mixing.units]
        known = [one for one in found if one is not None and _by_events(one[0])]
        if len(known) != len(found) or not all(map(is_neuron, mixing.neurons)):
            return None
        constants = zip(mixing.neurons, known, strict=True)
        specs, leaks = zip(*(in_evaluation(one.spec, conv.out_channels) for one, (conv, _) in constants), strict=True)
        if len({(spec.threshold, spec.reset, spec.strict) for spec in specs}) > 1:
            return None
        if len({conv.weight.shape[1:] for conv, _ in known}) > 1:
            return None
        leak = torch.cat([pad_to_words(one) for one in leaks])
        return self._product(known, mixing.neurons[0], leak=leak, words=True, **planes)

    def _apart(self, mixing: Mixing, planes: dict[str, Any] | None) -> nn.ModuleList | None:
        """q, k and v each as a product with its neuron.

        Their inputs are spikes or levels, with the options `planes`, or real values if that is None.
        """
        if not all(map(is_kits_neuron, mixing.neurons)):
            return None
        parts = []
        for unit, neuron in zip(mixing.units, mixing.neurons, strict=True):
            one = convolution(unit)
            if one is None:
                return None
            part: Any
            if planes is not None:
                part = self._product([one], neuron, **planes) if _by_events(one[0]) else None
            else:
                part = self._on_reals(unit, one, neuron)
            if part is None:
                return None
            parts.append(part)
        return nn.ModuleList(parts)

    def _planes(self, node: Node) -> dict[str, Any]:
        """How the levels or counts that a node takes are packed, as the options of its products."""
        given = node.inputs()[0]
        if self.kinds[given] == COUNTS:
            return {"planes": self.counted[given]}
        return {} if self.kinds[given] == SPIKES else {"planes": given.target.levels, "norm": given.target.norm}


class EventProduct(SpikeProduct):
    """A convolution of stride 1 on spikes in float32, its norm, and what follows: a shortcut, a neuron.

    With more than one of `planes`, it is a convolution of levels / `norm`; see `PackedSpikes`.
    """

    def __init__(
        self, weight: Tensor, epilogue: Epilogue, parts: Sequence[int] = (), *, planes: int = 1, norm: float = 1.0
    ) -> None:
        super().__init__(epilogue, parts, planes)
        weight, self.norm = weight.detach().float(), norm
        self.convolution = Product(weight, weight.new_zeros(len(weight)), spikes=planes == norm == 1)

    @property
    def weight(self) -> EventWeight:  # type: ignore[override]
        made: EventWeight = self.made("weight", lambda: EventWeight(self.convolution.weight / self.norm))
        return made

    def dense(  # type: ignore[override]
        self,
        spikes: PackedSpikes,
        *,
        residual: Tensor | None = None,
        membrane: bool | Tensor = False,
        standing: Tensor | None = None,
    ) -> Result:
        """The sums from a dense convolution, in the way that is fastest on this machine, a few images at a time."""
        _, _, height, width, _ = spikes.words.shape

        def sums(some: slice) -> Tensor:
            part = spikes.images(some.start, some.stop)
            shape = torch.Size((part.words.shape[:2].numel(), height, width, spikes.channels))
            frames = part.unpack(self.convolution.input_dtype(shape)).movedim(2, -1).flatten(0, 1)
            return self.convolution(frames).unflatten(0, part.words.shape[:2])

        shape = self.result_shape(spikes)
        return _in_parts(sums, self.epilogue, shape, len(spikes.words) * height * width, residual, membrane, standing)


class DenseSums(Finished):
    """A unit's layers on frames of real values, and what follows them, a few images at a time.

    `like` is a single convolution with the windows of all of them together.
    """

    def __init__(self, layers: nn.Module, like: nn.Conv2d, epilogue: Epilogue) -> None:
        super().__init__(epilogue)
        self.layers = copy.deepcopy(layers).to(memory_format=torch.channels_last)
        self.windows, self.kernel = Geometry.of(like).windows, like.weight.shape[2:]

    def result_shape(self, frames: Tensor | PackedSpikes) -> torch.Size:
        """`[T, B, H, W, out]`."""
        time_steps, images, *size = places_of(frames)
        return torch.Size((time_steps, images, *self.windows.size(size, self.kernel), self.epilogue.channels))

    def forward(
        self,
        frames: Tensor | PackedSpikes,
        *,
        residual: Tensor | None = None,
        membrane: bool | Tensor = False,
        stands: Stands | None = None,
    ) -> Result:
        x, _ = shown(frames)

        def sums(some: slice) -> Tensor:
            made: Tensor = self.layers(x[:, some].flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            return made.unflatten(0, (len(x), -1)).contiguous()

        shape = self.result_shape(frames)
        standing = None if stands is None else stands(shape[1:])
        return _in_parts(sums, self.epilogue, shape, x[:, 0, ..., 0].numel(), residual, membrane, standing)


def _in_parts(
    sums: Callable[[slice], Tensor],
    epilogue: Epilogue,
    shape: torch.Size,
    pixels: int,
    residual: Tensor | None,
    membrane: bool | Tensor,
    standing: Tensor | None,
) -> Result:
    """The epilogue of sums that are computed for a few images at a time, of `pixels` pixels each; see `spike_product`.

    `shape` is that of the result, `[T, B, H, W, C]`; `sums` computes those of a slice of the images.
    """
    kept: Any = epilogue.constants.new_empty(shape) if membrane is True else membrane
    words, size = [], _chunk(pixels, epilogue.channels)
    for first in range(0, shape[1], size):
        some = slice(first, first + size)
        _, fired = spike_neuron(
            sums(some),
            epilogue,
            shape[0],
            residual=None if residual is None else residual[:, some],
            membrane=kept[:, some] if isinstance(kept, Tensor) else False,
            standing=None if standing is None else standing[some],
        )
        words += [] if fired is None else [fired.words]
    joined = epilogue.packed(words[0] if len(words) == 1 else torch.cat(words, dim=1)) if words else None
    return (kept if isinstance(kept, Tensor) else None), joined


def pooled_membrane(form: Any, x: Any) -> Tensor:
    """A product's membrane after the 3x3 maximum of stride 2, a few frames at a time; of a still frame only once."""
    if not isinstance(form, SpikeProduct):
        frames, time_steps = shown(x)
        return pool_frames(form(frames, membrane=True)[0]).expand(time_steps, -1, -1, -1, -1)
    frames = x.of(x.words.flatten(0, 1).unsqueeze(0))
    _, count, height, width, channels = form.result_shape(frames)
    made = form.constants.new_empty(1, count, (height + 1) // 2, (width + 1) // 2, channels)
    size = _chunk(height * width, channels)
    for first in range(0, count, size):
        real_pool(form(frames.images(first, first + size), membrane=True)[0], out=made[:, first : first + size])
    return made.view(*x.words.shape[:2], *made.shape[2:])


def pool_frames(real: Tensor) -> Tensor:
    """Real values `[T, B, H, W, C]` after the 3x3 maximum of stride 2, of a frame shown at every step only once."""
    return real_pool(steps.shown_frame(real)).expand(len(real), -1, -1, -1, -1)


def whole(node: Node, kinds: dict[Node, str]) -> bool:
    """Whether a node's weights meet spikes, levels or counts, so that they can be whole numbers."""
    if node.op not in (PROJECT, MIX) or kinds[node.inputs()[0]] not in PACKED:
        return False
    if node.op == PROJECT:
        known = convolution(node.target)
        return known is not None and on_bytes(node.target, known[0])
    units = [convolution(unit) for unit in node.target.units]
    fires = all(map(is_kits_neuron, node.target.neurons))
    return fires and all(one is not None and _by_events(one[0]) for one in units)


def on_bytes(unit: Any, conv: nn.Conv2d) -> bool:
    """Whether the weights of a unit can be whole numbers; `conv` is the unit as one convolution."""
    own = unit if isinstance(unit, nn.Conv2d) else unit.conv
    return _by_events(conv) or (isinstance(own, nn.Conv2d) and conv.groups == 1)


def _by_events(conv: nn.Conv2d) -> bool:
    """Whether the event-driven kernels know a convolution."""
    return conv.groups == 1 and events_know(conv.weight, Geometry.of(conv).windows)


def epilogue_of(norm: nn.BatchNorm2d | None, neuron: Any, *, bias: Tensor | None = None, channels: int) -> Epilogue:
    scale, shift = (None, None) if norm is None else _affine(norm)
    spec, leak = _constants(neuron, channels)
    return Epilogue(channels, bias=bias, scale=scale, shift=shift, neuron=spec, inv_tau=leak)


def _constants(neuron: Any, channels: int) -> tuple[NeuronSpec | LevelSpec | None, Tensor | None]:
    """A neuron's constants for an epilogue, and its `1 / tau`; an integer neuron has none."""
    if neuron is None or isinstance(neuron, IntegerNeuron):
        return (None if neuron is None else neuron.spec), None
    return in_evaluation(neuron.spec, channels)


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift of a norm in eval mode, rounded as in PyTorch."""
    assert norm.running_mean is not None and norm.running_var is not None
    ones = torch.ones_like(norm.running_mean)
    weight, bias = (ones, ones * 0) if norm.weight is None else (norm.weight.detach(), norm.bias.detach())
    scale = weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, (bias.double() - norm.running_mean.double() * scale.double()).float()


def _chunk(pixels: int, channels: int) -> int:
    """How many images of `pixels` pixels with `channels` real values each are computed at a time."""
    return max(1, CHUNK_BYTES // (4 * channels * pixels))
