"""The dense form of a plan: norms are folded, neurons fused with an adjacent shortcut, pooling or mask."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import steps
from ..neuron import LIF, IntegerNeuron, Streamed
from ..ops import LevelSpec
from ..ops import dense as kernels
from ..ops.spec import check_time_constants
from .passes import SPIKES, changes_in_place, kinds, last_uses, of_samples, once, over_places
from .plan import (
    FIRE,
    INPUT,
    MIX,
    OUTPUT,
    PRESENT,
    PROJECT,
    Form,
    Mixing,
    Node,
    Plan,
    chain,
    computed,
    convolution,
    evaluated,
    filled,
    fold,
    is_neuron,
    leaves,
    no_frames,
)
from .product import Geometry, Product
from .written import sharing_memory

_PASS_BYTES = 48 << 20
"""About how large the first layer's output may be when a batch is computed in parts."""


class Firing(nn.Module, Streamed):
    """A layer of `LIF` neurons; `compile` says whether its steps are compiled (see `ops.dense`)."""

    op = staticmethod(kernels.fire)

    def __init__(self, neuron: LIF, dtype: torch.dtype, device: torch.device | None, compile: bool) -> None:
        super().__init__()
        self.compiled = compile
        spec = neuron.spec
        self.register_buffer("inv_tau", torch.as_tensor(spec.inv_tau, dtype=dtype, device=device).detach().clone())
        self.inv_tau: Tensor
        self.constants = (spec.threshold, spec.reset, spec.strict)

    def settings(self) -> dict[str, Any]:
        """Its constants."""
        return super().settings() | dict(zip(("threshold", "reset", "strict"), self.constants, strict=True))

    def neuron(self, shape: Sequence[int]) -> kernels.Neuron:
        """The layer as the ops take it, for membranes of this shape; in a stream it continues from its state."""
        check_time_constants(self.inv_tau, shape[-1:])
        neuron = kernels.Neuron(self.inv_tau, *self.constants)
        if self.carrier is None:
            return neuron
        before = self.carrier.membrane(self, shape)
        after = torch.empty(
            shape, dtype=torch.promote_types(self.inv_tau.dtype, torch.float32), device=self.inv_tau.device
        )
        self.carrier.keep_state(self, after)
        return neuron._replace(before=before, after=after)


class LevelFiring(nn.Module):
    """A layer of integer neurons, used like `Firing`."""

    op = staticmethod(kernels.fire_levels)

    def __init__(self, neuron: IntegerNeuron, compile: bool) -> None:
        super().__init__()
        self.compiled, self.spec = compile, neuron.spec

    def neuron(self, shape: Sequence[int]) -> LevelSpec:
        return self.spec


class Joined(NamedTuple):
    """The convolutions of several units on the same frames as one, with their norms folded in, in float64."""

    weight: Tensor
    bias: Tensor
    geometry: Geometry
    norms: list[nn.BatchNorm2d | None]
    channels: list[int]


def side_by_side(units: Any) -> Joined | None:
    """Joins the convolutions of units; `None` if one has to run as it is, or if their windows or groups differ."""
    found = [convolution(unit) for unit in units]
    known = [one for one in found if one is not None]
    geometries = {(Geometry.of(conv), conv.weight.shape[1:]) for conv, _ in known}
    if len(known) != len(found) or len(geometries) > 1 or (len(known) > 1 and known[0][0].groups > 1):
        return None
    weights, biases = zip(*(fold(conv, norm) for conv, norm in known), strict=True)
    geometry, norms = Geometry.of(known[0][0]), [norm for _, norm in known]
    return Joined(torch.cat(weights), torch.cat(biases), geometry, norms, [conv.out_channels for conv, _ in known])


class Mixed(nn.Module):
    """An attention: q, k and v as one product with `channels` of each, the neurons on them, and the mixer.

    If it is `fused`, the mixer's dense form does everything after the product, and `fires` ends with its neuron.
    """

    def __init__(
        self, product: Product, channels: list[int], fires: list[nn.Module], mixer: nn.Module, *, fused: bool
    ) -> None:
        super().__init__()
        self.product, self.channels, self.fires, self.mixer = product, channels, nn.ModuleList(fires), mixer
        self.fused = fused


class Membrane:
    """Real values `[T, B, H, W, C]`: one tensor, or a shortcut and a change that have not been added yet."""

    def __init__(self, *terms: Tensor) -> None:
        self.terms = terms

    @property
    def shape(self) -> torch.Size:
        return self.terms[0].shape

    def real(self, dtype: torch.dtype | None = None) -> Tensor:
        if len(self.terms) > 1:
            self.terms = (self.terms[0] + self.terms[1],)
        return self.terms[0] if dtype is None else self.terms[0].to(dtype)


class Spiking:
    """Spikes `[T, B, H, W, C]` that are computed when a layer first needs them, in the dtype that it asks for.

    Levels of integer neurons are divided by their `norm`, except in int8.
    """

    def __init__(
        self, shape: torch.Size, fired: Callable[[torch.dtype], Tensor], source: Any = None, norm: float = 1.0
    ) -> None:
        self.shape, self.fired, self.source, self.norm = shape, fired, source, norm
        self.made: Tensor | None = None

    def real(self, dtype: torch.dtype) -> Tensor:
        if self.made is None:
            self.made = self.fired(dtype)
            self.source = None
        if self.norm != 1 and torch.int8 in (dtype, self.made.dtype) and dtype != self.made.dtype:
            return (self.made * self.norm).round().to(dtype) if dtype == torch.int8 else self.made.to(dtype) / self.norm
        return self.made.to(dtype)


Frames = Membrane | Spiking


class Dense(Form):
    """The form that `optimize_for_inference` makes unless it is asked for events or whole numbers."""

    def __init__(self, plan: Plan, dtype: torch.dtype = torch.float32, compile: bool = True, paths: str = "auto"):
        super().__init__(plan, torch.promote_types(dtype, torch.float32))
        self.dtype, self.compiled = dtype, compile
        self.in_place = changes_in_place(plan)
        self.once = set() if self.in_place else once(plan)
        self.leaves = nn.ModuleList()
        self.forms: dict[Node, Any] = {}
        self.kinds = self._kinds(plan)
        if any(p.is_floating_point() and p.dtype != self.real_dtype for p in plan.parameters()):
            # Layers that run as they are must accept the results of the others.
            for leaf in plan.leaves():
                leaf.to(self.real_dtype)
        for node in plan.nodes:
            self.forms[node] = self._form(node, paths)
        self.watched_nodes = self.foreign()
        self.aliases = sharing_memory(plan.nodes, self.watched_nodes)
        self.together = [] if self.in_place else self._in_time(of_samples(plan))
        self.apart = [node for node in plan.nodes if node not in set(self.together)]
        crossing = {given for node in self.apart for given in node.inputs()}
        self.crossing = {node: None for node in self.together if node in crossing}
        self.last, self.given = last_uses(plan), {node: node.inputs() for node in plan.nodes}
        self.streamed = [module for module in self.modules() if isinstance(module, Streamed)]
        self.train(False)

    def _in_time(self, nodes: list[Node]) -> list[Node]:
        """Those of some nodes that can be computed before all others: no foreign code has had their inputs before."""
        place = {node: i for i, node in enumerate(self.plan.nodes)}
        had: dict[Node, int] = {}
        for node in self.watched_nodes:
            seen = set().union(*({one} | self.aliases[one] for one in node.inputs()))
            had.update({one: min(place[node], had.get(one, place[node])) for one in seen})
        found: dict[Node, None] = {}
        of = set(nodes)
        for node in nodes:
            given = of.intersection(node.inputs())
            if all(one in found and place[node] < had.get(one, math.inf) for one in given):
                found[node] = None
        return list(found)

    def _kinds(self, plan: Plan) -> dict[Node, str]:
        return kinds(plan)

    def _form(self, node: Node, paths: str) -> Any:
        form: nn.Module | None = None
        if node.op == PROJECT:
            made = self._product([node.target], node, paths)
            form = None if made is None else made[0]
        elif node.op == FIRE and is_neuron(node.target):
            form = Firing(node.target, self.real_dtype, self.made_on, self.compiled)
        elif node.op == FIRE and steps.is_plain(node.target, IntegerNeuron):
            form = LevelFiring(node.target, self.compiled)
        elif node.op == MIX:
            # q, k and v are one product, and all that follows is one op if the mixer has a dense form.
            made = self._product(node.target.units, node, paths)
            form = None if made is None else self._mixed(node.target, *made)
        if form is None:
            self.leaves.extend(leaves(node.target))
        else:
            self.leaves.append(form)
            if node.op == FIRE:
                self.leaves.append(node.target)  # it fires on inputs that are not frames, and a stream has to find it
            # The form has the weights, so the frozen copy of the network need not stay in memory.
            if node.op == PROJECT:
                node.target = None
            elif node.op == MIX:
                node.target = Mixing((), (), node.target.mixer)
        return form

    def _mixed(self, mixing: Mixing, product: Product, channels: list[int]) -> Mixed:
        fused = _fuses(mixing)
        neurons = (*mixing.neurons, *([mixing.mixer.neuron] if fused else []))
        made = (self.real_dtype, self.made_on, self.compiled)
        fires = [Firing(one, *made) if is_neuron(one) else one for one in neurons]
        return Mixed(product, channels, fires, mixing.mixer, fused=fused)

    def _product(self, units: Any, node: Node, paths: str) -> tuple[Product, list[int]] | None:
        """The units' convolutions as one product, and the channels of each; `None` if they cannot be joined."""
        joined = side_by_side(units)
        if joined is None:
            return None
        spikes = self.kinds[node.inputs()[0]] == SPIKES
        product = Product(
            joined.weight.to(self.real_dtype),
            joined.bias.to(self.real_dtype),
            joined.geometry,
            dtype=self.dtype,
            spikes=spikes,
            chain=self._chain(units, joined.norms, spikes),
        )
        if paths != "auto":
            product.paths = [paths if paths in product.paths else "convolution"]
        return product, joined.channels

    def _chain(self, units: Any, norms: list[nn.BatchNorm2d | None], spikes: bool) -> list[Product]:
        """The chains of units that see the same frames, joined layer by layer into products; empty if they cannot be.

        Real values pass from one layer to the next, so they have the dtype of membranes.
        """
        chains = [chain(unit) for unit in units]
        layers = [list(side) for side in zip(*(one for one in chains if one is not None), strict=False)]
        alike = all(len({(Geometry.of(conv), conv.weight.shape) for conv in side}) == 1 for side in layers)
        shared = len(units) == 1 or (layers and layers[0][0].groups == 1)
        if not layers or len({one and len(one) for one in chains}) > 1 or not alike or not shared:
            return []
        products = []
        for place, side in enumerate(layers):
            behind = norms if place == len(layers) - 1 else [None] * len(side)
            weights, biases = zip(*(fold(conv, norm) for conv, norm in zip(side, behind, strict=True)), strict=True)
            geometry = Geometry.of(side[0])
            if place:
                geometry = geometry._replace(groups=geometry.groups * len(side))
            weight, bias = (torch.cat(parts).to(self.real_dtype) for parts in (weights, biases))
            products.append(Product(weight, bias, geometry, dtype=self.real_dtype, spikes=spikes and not place))
        return products

    def compute(self, values: dict[Node, Any]) -> Any:
        # Ordinary tensors even inside inference_mode, so that nothing compiles twice and results can be used anywhere.
        with torch.inference_mode(False), torch.no_grad():
            if self.together:
                self._together(values)
            for node in self.apart:
                if node.op == OUTPUT:
                    return filled(node.args[0], lambda given: self._plain(values[given]))
                if node.op != INPUT:
                    self._run(node, values)
        raise AssertionError("a plan ends with its output")

    def _together(self, values: dict[Node, Any]) -> None:
        """Computes the nodes that treat every sample by itself, a few samples at a time."""
        starts = [node for node in self.together if node.op in (PRESENT, INPUT)]
        first: dict[Node, Tensor] = {}
        for node in starts:
            if node.op == PRESENT:
                self._run(node, values)
            if not isinstance(values[node], Tensor):
                raise TypeError(f"{node.name} must be a tensor [T, B, ...], got {type(values[node]).__name__}")
            first[node] = values[node]
        rest = [node for node in self.together if node not in first]
        results: list[dict[Node, Any]] = []
        for part in self._parts(list(first.values())):
            some = {node: value[:, part] for node, value in first.items() if value.ndim > 1}
            for node in rest:
                if any(given in some for given in self.given[node]):
                    self._run(node, some)
            results.append({node: self._plain(some[node]) for node in self.crossing if node in some})
        for node in self.crossing:
            parts = [result[node] for result in results]
            values[node] = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _parts(self, starts: list[Tensor]) -> list[slice]:
        """How a batch is split: on a CPU a few images at a time stay in its caches and in reused memory."""
        x = next((x for x in starts if x.ndim == 5), None)
        if len({one.shape[1] for one in starts if one.ndim > 1}) > 1:
            return [slice(None)]  # one sample is broadcast over another batch
        products = [form for form in self.forms.values() if isinstance(form, Product)]
        if any(neuron.carrier is not None for neuron in self.streamed):
            return [slice(None)]  # a neuron's state is that of the whole batch
        if x is None or 0 in x.shape or x.device.type != "cpu" or not products:
            return [slice(None)]
        image_bytes = self.dtype.itemsize * len(x) * x.shape[-2:].numel() * len(products[0].bias)
        images = x.shape[1]
        passes = math.ceil(images / max(1, _PASS_BYTES // image_bytes))
        size = math.ceil(images / passes)
        return [slice(first, first + size) for first in range(0, images, size)]

    def _run(self, node: Node, values: dict[Node, Any]) -> None:
        if node not in values:  # else it was computed together with a node before it
            watched = node in self.watched_nodes
            make = partial(self._made, node)
            result = self.watched(node, values, self._plain, make) if watched else make(values)
            values[node] = self._plain(result) if self.in_place else result
        for one in self.given[node]:
            if self.last.get(one) is node and one in values and one not in self.crossing:
                del values[one]

    # ---- what a node gives

    def _made(self, node: Node, values: dict[Node, Any]) -> Any:
        return getattr(self, f"_{node.op}")(node, [values[one] for one in self.given[node]], values)

    def _present(self, node: Node, given: list[Any], values: dict[Node, Any]) -> Any:
        return self._call(node, given, values)

    def _check(self, node: Node, given: list[Any], values: dict[Node, Any]) -> None:
        if isinstance(given[0], Tensor):
            node.target(*filled(node.args, values.__getitem__), **node.kwargs)

    def _project(self, node: Node, given: list[Any], values: dict[Node, Any]) -> Any:
        product = self.forms[node]
        if product is None:
            return steps.project(node.target, self._plain(given[0]))
        still = self.still if node in self.once else None
        if still is None:
            return self._multiplied(product, self._frames_of(node, given[0]))
        if node not in still:
            still[node] = self._multiplied(product, self._frames_of(node, given[0])).real()
        return Membrane(still[node])

    def _multiplied(self, product: Product, frames: Frames) -> Membrane:
        time_steps, *_ = frames.shape
        alone = frames.terms[0] if isinstance(frames, Membrane) and len(frames.terms) == 1 else None
        once = alone is not None and len(steps.shown_frame(alone)) < time_steps
        shape = torch.Size(((1 if once else time_steps) * frames.shape[1], *frames.shape[2:]))
        x = frames.real(product.input_dtype(shape))
        x = x[:1] if once else x
        y = product(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return Membrane(y.expand(time_steps, *y.shape[1:]) if once else y)

    def _fire(self, node: Node, given: list[Any], values: dict[Node, Any]) -> Any:
        firing, frames = self.forms[node], self._frames(given[0])
        if firing is None or frames is None:
            return evaluated(node.target)(self._plain(given[0]))
        membrane = frames if isinstance(frames, Membrane) else Membrane(frames.real(self.real_dtype))
        neuron = firing.neuron(membrane.shape[1:])

        def fired(dtype: torch.dtype) -> Tensor:
            options = {"compiled": firing.compiled}
            if len(membrane.terms) == 1:
                return firing.op(membrane.terms[0], neuron, dtype, **options)[1]
            u, change = membrane.terms
            total, spikes = firing.op(change, neuron, dtype, shortcut=u, **options)
            membrane.terms = (total,)
            return spikes

        if isinstance(firing, LevelFiring):
            return Spiking(membrane.shape, fired, norm=firing.spec.norm)
        return Spiking(membrane.shape, fired, (membrane, neuron, firing.compiled))

    def _pool(self, node: Node, given: list[Any], values: dict[Node, Any]) -> Any:
        layer, x = node.target, given[0]
        frames = self._frames(x)
        if frames is None or len(frames.shape) != 5 or node in self.watched_nodes:
            return steps.pool(layer, self._plain(x))
        halves = steps.halves(layer)
        if isinstance(frames, Membrane) or not halves:
            real = frames.real() if isinstance(frames, Membrane) and halves else frames.real(self.real_dtype)
            return Membrane(steps.pool(layer, real.movedim(-1, 2)).movedim(2, -1))
        steps_, batch, height, width, channels = frames.shape
        shape = torch.Size((steps_, batch, (height + 1) // 2, (width + 1) // 2, channels))
        source = frames.source
        if source is not None and frames.made is None and len(source[0].terms) == 1:
            (u,), (neuron, compiled) = source[0].terms, source[1:]
            return Spiking(shape, lambda dtype: kernels.fire_and_pool(u, neuron, dtype, compiled=compiled))
        return Spiking(shape, self._pooled(node, frames))

    def _pooled(self, node: Node, frames: Spiking) -> Callable[[torch.dtype], Tensor]:
        """The 3x3 maximum of stride 2 of spikes, as a function of the dtype asked for."""
        return lambda dtype: kernels.pool(frames.real(self.real_dtype)).to(dtype)

    def _mix(self, node: Node, given: list[Any], values: dict[Node, Any]) -> Any:
        mixing, form = node.target, self.forms[node]
        if form is None:
            return steps.project_and_mix(mixing.units, mixing.neurons, mixing.mixer, self._plain(given[0]))
        qkv = self._multiplied(form.product, self._frames_of(node, given[0])).real()
        return self._mixed_of(node, qkv, list(form.fires))

    def _mixed_of(self, node: Node, qkv: Tensor, fires: list[Any]) -> Any:
        """The mixer's result from the product `[T, B, H, W, C]` of q, k and v and the neurons on it."""
        mixing, form = node.target, self.forms[node]
        if not form.fused:
            parts = zip(fires[: len(form.channels)], qkv.split(form.channels, dim=-1), strict=True)
            return form.mixer(*(self._fired(one, membrane) for one, membrane in parts))
        shape = torch.Size((*qkv.shape[:-1], form.channels[0]))
        shapes = [*[shape[1:]] * len(form.channels), (shape[1], shape[-1])]
        neurons = [firing.neuron(of) for firing, of in zip(fires, shapes, strict=True)]
        return Spiking(shape, lambda dtype: mixing.mixer.dense(qkv, neurons, dtype, compiled=self.compiled))

    def _fired(self, neuron: Any, membrane: Tensor) -> Tensor:
        """The spikes of one of an attention's neurons for its part of the product, as the mixer takes them."""
        if isinstance(neuron, Firing):
            x = membrane.contiguous()
            spikes = kernels.fire(x, neuron.neuron(x.shape[1:]), self.real_dtype, compiled=neuron.compiled)[1]
            return spikes.movedim(-1, 2).contiguous()
        x, own = membrane.movedim(-1, 2).contiguous(), evaluated(neuron)
        fired: Tensor = steps.fire(neuron, x) if own is neuron else own(x)
        return fired

    def _add(self, node: Node, given: list[Any], values: dict[Node, Any]) -> Any:
        a, b = filled(node.args, values.__getitem__)
        if isinstance(a, Membrane | Spiking) and isinstance(b, Membrane | Spiking) and a.shape == b.shape:
            change = b.real() if isinstance(b, Membrane) else b.real(self.real_dtype)
            return Membrane(a.real(self.real_dtype), change)
        return node.target(*(self._plain(part) if isinstance(part, Membrane | Spiking) else part for part in (a, b)))

    def _call(self, node: Node, given: list[Any], values: dict[Node, Any]) -> Any:
        if node.target == "mean" and len(given) == 1 and isinstance(given[0], Membrane) and over_places(node):
            means = [part.mean((2, 3), dtype=self.real_dtype) for part in given[0].terms]
            return means[0] if len(means) == 1 else means[0] + means[1]
        args, kwargs = filled((node.args, node.kwargs), lambda one: self._plain(values[one]))
        return computed(evaluated(node.target), args, kwargs)

    def _plain(self, x: Any) -> Any:
        """A value as the network's own modules take it: `[T, B, C, H, W]`, contiguous."""
        return x.real(self.real_dtype).movedim(-1, 2).contiguous() if isinstance(x, Membrane | Spiking) else x

    def _frames_of(self, node: Node, x: Any) -> Frames:
        frames = self._frames(x)
        if frames is None:
            raise no_frames(node, x)
        return frames

    def _frames(self, x: Any) -> Frames | None:
        """x as frames with the channels last, if it is `[T, B, C, H, W]`."""
        if isinstance(x, Membrane | Spiking):
            return x
        if not isinstance(x, Tensor) or x.ndim != 5 or 0 in x.shape or not x.is_floating_point():
            return None
        frames = steps.shown_frame(x).movedim(2, -1).contiguous().to(self.real_dtype)
        return Membrane(frames.expand(len(x), *frames.shape[1:]))


def _fuses(mixing: Mixing) -> bool:
    """Whether the mixer's dense form can do everything: it has one, knows all neurons, and there are no hooks."""
    if not steps.tells(mixing.mixer, "dense") or any(map(steps.has_hooks, mixing.mixer.modules())):
        return False
    return all(map(is_neuron, (*mixing.neurons, mixing.mixer.neuron)))
