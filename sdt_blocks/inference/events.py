"""The event-driven form of a plan: products add the weights of active inputs, and spikes are one bit each."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import steps
from ..neuron import IntegerNeuron
from ..ops.packed import (
    Epilogue,
    EventWeight,
    PackedSpikes,
    Result,
    kernels_problem,
    pad_to_words,
    real_pool,
    spike_neuron,
    spike_pool,
    spike_product,
)
from ..ops.spec import NeuronSpec
from . import passes
from .passes import LEVELS, SPIKES, kinds, last_uses, over_places
from .plan import (
    ADD,
    CHECK,
    FIRE,
    INPUT,
    MIX,
    OUTPUT,
    POOL,
    PROJECT,
    Mixing,
    Node,
    Plan,
    convolution,
    evaluated,
    filled,
    is_neuron,
    leaves,
)
from .product import Geometry, Product

CHUNK_BYTES = 8 << 20
"""Real values between a convolution and a pooling are kept this few, so that they stay in the cache."""


class Events(nn.Module):
    """A network in eval mode on the CPU, whose products add the weights of active inputs and no others.

    Spikes are kept at one bit each; real values are written only for the membrane of the shortcuts. Norms follow the
    sums as they do in the network, not folded into the weights: so a silent frame gives the same membrane to the last
    bit, and sums take the roundings of a channels-last convolution that adds input by input. The levels of an integer
    neuron are as many spikes in binary steps, one bit each too, all of which are summed before the next neuron decides.

    Input and output are those of the network. A product whose input is denser than `break_even` of its layer is
    computed as a dense convolution instead, call by call; so is what the kernels do not know: the first layer, strides,
    groups, kernels other than 1x1 and 3x3.

    Raises `ValueError` for a network that is not in float32 on the CPU, and `RuntimeError` where the kernels cannot be
    built.
    """

    streams = False
    rebuilt = True
    """Layers are computed together: there is nothing for a hook to see."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        _check(plan)
        self.in_place = passes.changes_in_place(plan)
        self.inputs = [node for node in plan.nodes if node.op == INPUT]
        self.kinds, self.last = kinds(plan), last_uses(plan)
        self.epilogues = {} if self.in_place else passes.epilogues(plan)
        self.pooled = self._pooled_products()
        self.leaves = nn.ModuleList()
        self.forms: dict[Node, Any] = {}
        for node in plan.nodes:
            form = self._form(node)
            if form is not None:
                self.forms[node] = form
            self.leaves.extend(leaves(node.target) if form is None else [form])
            if node.op == PROJECT and form is not None:
                node.target = None
        super().train(False)

    def products(self) -> Iterator[tuple[str, EventProduct]]:
        """The layers that spikes drive, by name."""
        for node, form in self.forms.items():
            if isinstance(form, EventProduct):
                yield node.name, form
            elif isinstance(form, nn.ModuleList):
                parts: Any = form
                yield from ((f"{node.name}.{i}", part) for i, part in enumerate(parts))

    def _pooled_products(self) -> dict[Node, Node]:
        """Products whose membrane goes nowhere but into a 3x3 maximum of stride 2: that pooling by product."""
        users = self.plan.users()
        found = {}
        for node, after in self.epilogues.items():
            takers = users[node]
            if after.total is node and after.fire is None and len(takers) == 1 and _halves(takers[0]):
                found[node] = takers[0]
        return found

    def _form(self, node: Node) -> Any:
        if node.op == PROJECT and node in self.epilogues:
            known = convolution(node.target)
            if known is None:
                return None
            conv, norm = known
            fire = self.epilogues[node].fire
            neuron, channels = None if fire is None else fire.target, conv.out_channels
            if self.kinds[node.inputs()[0]] in (SPIKES, LEVELS) and _by_events(conv):
                epilogue = _epilogue(norm, neuron, bias=conv.bias, channels=channels)
                return EventProduct(conv.weight, epilogue, **self._planes(node))
            layers = node.target if isinstance(node.target, nn.Conv2d) else node.target.conv
            neuron = neuron if self.epilogues[node].residual is None else None
            return DenseSums(layers, _epilogue(norm, neuron, channels=channels))
        if node.op == FIRE and (is_neuron(node.target) or self.kinds[node] == LEVELS):
            return node.target
        if node.op == MIX and self.kinds[node.inputs()[0]] in (SPIKES, LEVELS):
            planes = self._planes(node)
            packed = _packed_mixing(node.target) if hasattr(node.target.mixer, "packed") and not planes else None
            return _apart(node.target, planes) if packed is None else packed
        return None

    def _planes(self, node: Node) -> dict[str, Any]:
        """How the levels that a node takes are packed, as the options of its products."""
        given = node.inputs()[0]
        return {} if self.kinds[given] == SPIKES else {"planes": given.target.levels, "norm": given.target.norm}

    @torch.no_grad()
    def forward(self, *inputs: Tensor) -> Any:
        if len(inputs) != len(self.inputs):
            raise TypeError(f"expected {len(self.inputs)} input(s), got {len(inputs)}; options keep their defaults")
        given = [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
        values: dict[Node, Any] = dict(zip(self.inputs, given, strict=True))
        for node in self.plan.nodes:
            if node.op == OUTPUT:
                return filled(node.args[0], lambda one: plain(values[one]))
            if node not in values:
                values[node] = self._run(node, values)
            for one in node.inputs():
                if self.last.get(one) is node and one.op != INPUT:
                    values.pop(one, None)
        raise AssertionError("a plan ends with its output")

    def _run(self, node: Node, values: dict[Node, Any]) -> Any:
        given = [values[one] for one in node.inputs()]
        if node.op == PROJECT:
            return self._project(node, given[0], values)
        if node.op == FIRE and node in self.forms:
            return self._fire(node, given[0])
        if node.op == MIX:
            return self._mix(node, given[0])
        if node.op == POOL:
            return self._pool(node, given[0])
        if node.op == CHECK:
            return node.target(*filled(node.args, values.__getitem__)) if isinstance(given[0], Tensor) else None
        if node.op == ADD:
            a, b = filled(node.args, values.__getitem__)
            if isinstance(a, Membrane) and isinstance(b, Membrane) and a.real.shape == b.real.shape:
                return Membrane(a.real + b.real)
        if node.target == "mean" and isinstance(given[0], Membrane) and over_places(node):
            return given[0].real.movedim(-1, 2).mean((-2, -1))
        args, kwargs = filled((node.args, node.kwargs), lambda one: plain(values[one]))
        if node.op == FIRE:
            return _repacked(node.target, evaluated(node.target)(*args))
        if isinstance(node.target, str):
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return evaluated(node.target)(*args, **kwargs)

    def _project(self, node: Node, x: Any, values: dict[Node, Any]) -> Any:
        form, source = self.forms.get(node), self._source(node, x)
        if form is None:
            return steps.project(node.target, plain(x))
        if source is None:
            given = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{node.name} expects floating-point [T, B, C, H, W] with nothing empty, got {given}")
        after = self.epilogues[node]
        if node in self.pooled:
            values[self.pooled[node]] = Membrane(_pooled_membrane(form, source))
            return None
        residual: Tensor | None = None
        into: bool | Tensor = after.keep
        if after.residual is not None:
            before = _membrane(values[after.residual])
            if before is None or isinstance(form, DenseSums) or before.real.shape != _result_shape(form, source):
                # Added by itself, and the neuron behind it fires by itself.
                return Membrane(form(source, membrane=True)[0], owned=True)
            residual = before.real
            # The shortcut's memory takes the sum where nothing reads it afterwards.
            if after.keep and before.owned and self.last[after.residual] is after.total:
                into = residual
        membrane, fired = form(source, residual=residual, membrane=into)
        if after.fire is not None:
            values[after.fire] = fired
        total = None if membrane is None else Membrane(membrane, owned=True)
        values[after.total] = total
        return total if after.total is node else None

    def _source(self, node: Node, x: Any) -> Any:
        """Input of a product: packed spikes for events, else frames with channels last, one if it is shown at all."""
        if isinstance(x, PackedSpikes):
            return x
        frames = _frames(x)
        if frames is None or not isinstance(self.forms.get(node), EventProduct):
            return frames
        return PackedSpikes.pack(frames.movedim(-1, 2))

    def _fire(self, node: Node, x: Any) -> Any:
        membrane = _membrane(x)
        if self.kinds[node] == LEVELS:
            real = plain(x)
            if real.ndim != 5 or 0 in real.shape:
                return node.target(real)
            return PackedSpikes.pack_levels(node.target.unfold(real), node.target.norm)
        if membrane is None or isinstance(x, PackedSpikes):
            return node.target(plain(x))
        real = membrane.real
        return spike_neuron(real, _epilogue(None, node.target, channels=real.shape[-1]), len(real))[1]

    def _mix(self, node: Node, x: Any) -> Any:
        mixing, form = node.target, self.forms.get(node)
        if isinstance(form, EventProduct) and isinstance(x, PackedSpikes):
            _, qkv = form(x)
            return mixing.mixer.packed(qkv, form.channels)
        if form is not None and isinstance(x, PackedSpikes):
            fired = [_fired(*both, x) for both in zip(form, mixing.neurons, strict=True)]
            return _repacked(mixing.mixer, mixing.mixer(*fired))
        mixed = steps.project_and_mix(mixing.units, mixing.neurons, mixing.mixer, plain(x))
        return _repacked(mixing.mixer, mixed)

    def _pool(self, node: Node, x: Any) -> Any:
        if not _halves(node):
            pooled = steps.pool(node.target, plain(x))
            return PackedSpikes.pack(pooled) if self.kinds[node] == SPIKES and pooled.ndim == 5 else pooled
        if isinstance(x, PackedSpikes):
            return spike_pool(x)
        membrane = _membrane(x)
        return steps.pool(node.target, x) if membrane is None else Membrane(real_pool(membrane.real), owned=True)

    def train(self, mode: bool = True) -> Events:
        """Raises `RuntimeError` for training mode: gradients do not flow."""
        if mode:
            raise RuntimeError("an event-driven model only evaluates; train the model it was made from")
        return self


class Membrane:
    """Real values `[T, B, H, W, C]`; `owned` where no one but the plan holds the tensor."""

    def __init__(self, real: Tensor, owned: bool = False) -> None:
        self.real, self.owned = real, owned


class EventProduct(nn.Module):
    """A convolution of stride 1 on spikes, its norm, and what follows: a shortcut's sum, a neuron.

    With more `planes` than one, the convolution of levels / `norm`; see `PackedSpikes`.

    `forward(spikes, residual, membrane)` is `spike_product`. `break_even` is the share of active inputs above which the
    sums come from a dense convolution instead; 1 never does that.
    """

    def __init__(
        self, weight: Tensor, epilogue: Epilogue, channels: int = 0, *, planes: int = 1, norm: float = 1.0
    ) -> None:
        super().__init__()
        weight = weight.detach().float()
        self.weight, self.epilogue, self.channels, self.planes = EventWeight(weight / norm), epilogue, channels, planes
        self.convolution = Product(weight, torch.zeros(len(weight)), spikes=planes == 1)
        self.break_even = 1.0

    def forward(
        self, spikes: PackedSpikes, *, residual: Tensor | None = None, membrane: bool | Tensor = False
    ) -> Result:
        by_events = self.break_even >= 1 or spikes.rate() <= self.break_even
        return (self.events if by_events else self.dense)(spikes, residual=residual, membrane=membrane)

    def events(
        self, spikes: PackedSpikes, *, residual: Tensor | None = None, membrane: bool | Tensor = False
    ) -> Result:
        """The sums from the weights of active inputs."""
        return spike_product(spikes, self.weight, self.epilogue, residual=residual, membrane=membrane)

    def dense(self, spikes: PackedSpikes, *, residual: Tensor | None = None, membrane: bool | Tensor = False) -> Result:
        """The sums from a dense convolution, by the fastest way of this machine, a few images at a time."""
        steps_, images, height, width, _ = spikes.words.shape
        channels = self.epilogue.channels
        kept = torch.empty(steps_, images, height, width, channels) if membrane is True else membrane
        words = []
        size = _chunk(steps_ * height * width, channels)
        for first in range(0, images, size):
            some = slice(first, first + size)
            part = spikes.of(spikes.words[:, some])
            shape = torch.Size((part.words.shape[:2].numel(), height, width, spikes.channels))
            frames = part.unpack(self.convolution.input_dtype(shape)).movedim(2, -1).flatten(0, 1)
            _, fired = spike_neuron(
                self.convolution(frames).unflatten(0, part.words.shape[:2]),
                self.epilogue,
                steps_,
                residual=None if residual is None else residual[:, some],
                membrane=kept[:, some] if isinstance(kept, Tensor) else False,
            )
            words += [] if fired is None else [fired.words]
        packed = PackedSpikes(words[0] if len(words) == 1 else torch.cat(words, dim=1), channels) if words else None
        return (kept if isinstance(kept, Tensor) else None), packed

    def extra_repr(self) -> str:
        out, into, kernel, _ = self.weight.weight.shape
        return f"{into}, {out}, kernel={kernel}, break_even={self.break_even:.3g}"


class DenseSums(nn.Module):
    """A unit's layers on any frames, and what follows them, a few images at a time."""

    def __init__(self, layers: nn.Module, epilogue: Epilogue) -> None:
        super().__init__()
        self.layers, self.epilogue = copy.deepcopy(layers).to(memory_format=torch.channels_last), epilogue

    def forward(
        self,
        frames: Tensor | PackedSpikes,
        *,
        residual: Tensor | None = None,
        membrane: bool | Tensor = False,
    ) -> Result:
        x, time_steps = _shown(frames)
        parts: list[Result] = []
        size, images = _chunk(x[:, 0, ..., 0].numel(), self.epilogue.channels), x.shape[1]
        for first in range(0, images, size):
            some = slice(first, first + size)
            sums = self.layers(x[:, some].flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            sums = sums.unflatten(0, (len(x), -1)).contiguous()
            before = None if residual is None else residual[:, some].contiguous()
            parts.append(spike_neuron(sums, self.epilogue, time_steps, residual=before, membrane=membrane is not False))
        if len(parts) == 1:
            return parts[0]
        kept = None if parts[0][0] is None else torch.cat([part[0] for part in parts], dim=1)
        words = None if parts[0][1] is None else torch.cat([part[1].words for part in parts], dim=1)
        return kept, None if words is None else PackedSpikes(words, self.epilogue.channels)


def _check(plan: Plan) -> None:
    held = [p for node in plan.nodes for leaf in leaves(node.target) for p in leaf.parameters()]
    others = {f"{p.dtype} on {p.device}" for p in held if p.device.type != "cpu" or p.dtype != torch.float32}
    if others:
        raise ValueError(
            f"event-driven inference runs in float32 on the CPU; the model has {', '.join(sorted(others))}"
        )
    problem = kernels_problem()
    if problem is not None:
        raise RuntimeError(f"the event-driven kernels cannot run: {problem}")


def plain(x: Any) -> Any:
    """A value as the network's own modules take it: `[T, B, C, H, W]`, without gaps."""
    if isinstance(x, PackedSpikes):
        return x.unpack().contiguous()
    return x.real.movedim(-1, 2).contiguous() if isinstance(x, Membrane) else x


def _membrane(x: Any) -> Membrane | None:
    if isinstance(x, Membrane):
        return x
    frames = _frames(x)
    return None if frames is None else Membrane(frames.contiguous())


def _frames(x: Any) -> Tensor | None:
    """x with the channels last, if it is `[T, B, C, H, W]`; what is shown at every step stays one frame in memory."""
    if isinstance(x, Membrane):
        return x.real
    if not isinstance(x, Tensor) or x.ndim != 5 or 0 in x.shape or not x.is_floating_point():
        return None
    shown = x[:1] if len(x) > 1 and x.stride(0) == 0 else x
    return shown.movedim(2, -1).contiguous().expand(len(x), *(x.shape[i] for i in (1, 3, 4, 2)))


def _result_shape(product: EventProduct, spikes: PackedSpikes) -> torch.Size:
    return torch.Size((*spikes.words.shape[:4], product.epilogue.channels))


def _shown(x: Tensor | PackedSpikes) -> tuple[Tensor, int]:
    """Frames `[T or 1, B, H, W, C]` in float32 and the number of steps."""
    if isinstance(x, PackedSpikes):
        x = x.unpack().movedim(2, -1)
    return (x[:1] if len(x) > 1 and x.stride(0) == 0 else x), len(x)


def _pooled_membrane(form: Any, x: Any) -> Tensor:
    """The maximum over windows of a product's membrane, a few frames at a time: no neuron joins its time steps."""
    if not isinstance(form, EventProduct):
        return real_pool(form(x, membrane=True)[0])
    words = x.words.contiguous()
    frames = x.of(words.flatten(0, 1).unsqueeze(0))
    size = _chunk(words[0, 0, ..., 0].numel(), form.epilogue.channels)
    parts = [
        real_pool(form(frames.images(first, first + size), membrane=True)[0])
        for first in range(0, frames.words.shape[1], size)
    ]
    return torch.cat(parts, dim=1).view(*words.shape[:2], *parts[0].shape[2:])


def _halves(node: Node) -> bool:
    return node.op == POOL and steps.is_plain(node.target, nn.MaxPool2d) and steps.halves(node.target)


def _by_events(conv: nn.Conv2d) -> bool:
    """Whether the kernels know a convolution: 1x1 or 3x3 of stride 1 that keeps the frame's size."""
    kernel = conv.kernel_size[0]
    plain_windows = Geometry.of(conv) == Geometry(padding=(kernel // 2, kernel // 2))
    return conv.kernel_size in ((1, 1), (3, 3)) and plain_windows and conv.in_channels * kernel**2 < 1 << 16


def _packed_mixing(mixing: Mixing) -> EventProduct | None:
    """q, k and v as one product with each padded to whole words, as the mixer's packed form takes them."""
    found = [convolution(unit) for unit in mixing.units]
    known = [one for one in found if one is not None and _by_events(one[0])]
    neurons = (*mixing.neurons, getattr(mixing.mixer, "neuron", None))
    if len(known) != len(mixing.units) or steps.has_hooks(mixing.mixer) or not all(map(is_neuron, neurons)):
        return None
    channels = known[0][0].out_channels
    specs, leaks = zip(*(_neuron(neuron, channels) for neuron in mixing.neurons), strict=True)
    if len({(spec.threshold, spec.reset, spec.strict) for spec in specs}) > 1:
        return None
    if len({conv.weight.shape for conv, _ in known}) > 1:
        return None
    epilogues = [_epilogue(norm, None, bias=conv.bias, channels=channels) for conv, norm in known]
    weights = torch.cat([pad_to_words(conv.weight.detach()) for conv, _ in known])
    rows = {
        name: torch.cat([pad_to_words(getattr(epilogue, name)) for epilogue in epilogues])
        for name in ("bias", "scale", "shift")
    }
    rows["inv_tau"] = torch.cat([pad_to_words(leak) for leak in leaks])
    return EventProduct(weights, Epilogue(len(weights), neuron=specs[0], **rows), channels)


def _apart(mixing: Mixing, planes: dict[str, Any]) -> nn.ModuleList | None:
    """q, k and v each as a product with its neuron, for a mixer without a packed form."""
    found = [convolution(unit) for unit in mixing.units]
    known = [is_neuron(neuron) or steps.is_plain(neuron, IntegerNeuron) for neuron in mixing.neurons]
    if not all(one is not None and _by_events(one[0]) for one in found) or not all(known):
        return None
    parts = []
    for one, neuron in zip(found, mixing.neurons, strict=True):
        assert one is not None
        conv, norm = one
        last: Any = neuron if is_neuron(neuron) else None
        epilogue = _epilogue(norm, last, bias=conv.bias, channels=conv.out_channels)
        parts.append(EventProduct(conv.weight, epilogue, **planes))
    return nn.ModuleList(parts)


def _fired(product: EventProduct, neuron: Any, x: PackedSpikes) -> Tensor:
    """What a neuron makes of a product, `[T, B, C, H, W]`."""
    if product.epilogue.neuron is not None:
        return plain(product(x)[1])
    levels: Tensor = neuron(plain(Membrane(product(x, membrane=True)[0])))
    return levels


def _epilogue(
    norm: nn.BatchNorm2d | None, neuron: nn.Module | None, *, bias: Tensor | None = None, channels: int
) -> Epilogue:
    scale, shift = (None, None) if norm is None else _affine(norm)
    spec, leak = (None, None) if neuron is None else _neuron(neuron, channels)
    return Epilogue(channels, bias=bias, scale=scale, shift=shift, neuron=spec, inv_tau=leak)


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift of a norm in eval mode, rounded as PyTorch rounds them."""
    assert norm.running_mean is not None and norm.running_var is not None
    ones = torch.ones_like(norm.running_mean)
    weight, bias = (ones, ones * 0) if norm.weight is None else (norm.weight.detach(), norm.bias.detach())
    scale = weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, (bias.double() - norm.running_mean.double() * scale.double()).float()


def _neuron(neuron: Any, channels: int) -> tuple[NeuronSpec, Tensor]:
    spec = NeuronSpec(threshold=neuron.threshold, reset=neuron.reset_mechanism, strict=neuron.strict)
    return spec, torch.as_tensor(neuron.inv_tau, dtype=torch.float32).detach().expand(channels)


def _repacked(leaf: Any, x: Any) -> Any:
    """What a leaf has emitted, packed where it emits spikes alone."""
    frames = isinstance(x, Tensor) and x.ndim == 5 and 0 not in x.shape
    return PackedSpikes.pack(x) if frames and passes.emits_spikes(leaf) else x


def _chunk(pixels: int, channels: int) -> int:
    """How many images of so many pixels are worked on at a time, for `channels` real values a pixel."""
    return max(1, CHUNK_BYTES // (4 * channels * pixels))
