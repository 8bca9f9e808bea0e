"""The event-driven form of a plan: products add the weights of active inputs, and spikes are one bit each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import steps
from ..neuron import IntegerNeuron, Streamed
from ..ops.integers import MOST_PLANES
from ..ops.packed import (
    WORD,
    PackedSpikes,
    kernels_problem,
    spike_neuron,
    spike_pool,
)
from . import passes
from .forms import Forms, epilogue_of, pool_frames, pooled_membrane
from .integers import (
    FLOAT32,
    INT8,
    OrderedSums,
    SpikeProduct,
    Stands,
    ordered_mean,
)
from .passes import COUNTS, LEVELS, REAL, SPIKES, axes_of_mean, kinds, last_uses, most_counted, over_places
from .plan import (
    ADD,
    CALL,
    CHECK,
    FIRE,
    INPUT,
    MIX,
    OUTPUT,
    POOL,
    PRESENT,
    PROJECT,
    Form,
    Node,
    Plan,
    computed,
    evaluated,
    filled,
    is_neuron,
    leaves,
    no_frames,
)
from .trace import Constant
from .written import sharing_memory


class Events(Form):
    """A network in eval mode on the CPU whose products add only the weights of active inputs.

    Spikes are stored as one bit each; real values are written only for the membranes of shortcuts. Norms are applied to
    the sums, as in the network, instead of being folded into the weights: a silent frame gives the same membrane to the
    last bit, and sums round like a channels-last convolution that adds input by input. A level of an integer neuron is
    that many spikes in binary steps, one bit each, all of which are summed before the next neuron fires.

    Input and output are those of the network. In each call, a product whose input is denser than the layer's
    `break_even` is computed as a dense convolution instead. So is everything that the kernels do not know: the first
    layer, strides, groups, kernels other than 1x1 and 3x3.

    With other `weights` than FLOAT32, weights are whole numbers (see `IntegerProduct`): norms are folded into them, a
    dense product gives the same bits as the event-driven one, and every ungrouped convolution of spikes, or of the
    counts that shortcuts between spikes make, is such a product. Layers on real values stay in float32; with `exact`
    they are summed in a fixed order, so that all answers have the same bits for every batch, number of threads and way
    of computing a product.

    Raises `ValueError` for a network that is not in float32 on the CPU, or in which `exact` cannot fix the order of all
    sums, and `RuntimeError` if the kernels cannot be built.
    """

    def __init__(self, plan: Plan, weights: str = FLOAT32, exact: bool = False) -> None:
        super().__init__(plan, torch.float32)
        self.weights, self.exact = weights, exact
        self.dtype = torch.int8 if weights == INT8 else torch.float32
        _check(plan)
        self.in_place = passes.changes_in_place(plan)
        self.counted, self.last = most_counted(plan), last_uses(plan)
        self.kinds = kinds(plan)
        for node, most in self.counted.items():
            # In float32 a product of counts has to round like the network's own.
            if weights == FLOAT32 or most > MOST_PLANES:
                self.kinds[node] = REAL
        self.given = {node: node.inputs() for node in plan.nodes}
        self.epilogues = {} if self.in_place else passes.epilogues(plan)
        self.pooled, self.pooled_spikes = self._pooled_products(), dict[Node, Node]()
        self.in_place_of = self._last_users()
        self.once = set() if self.in_place else passes.once(plan)
        forms = Forms(self.kinds, self.counted, self.epilogues, weights, exact)
        self.leaves = nn.ModuleList()
        self.forms: dict[Node, Any] = {}
        for node in plan.nodes:
            form = forms.of(node)
            if form is not None:
                self.forms[node] = form
            self.leaves.extend(leaves(node.target) if form is None else [form])
            pool = self._pool_of_spikes(node) if isinstance(form, OrderedSums) and form.pools else None
            if pool is not None:
                self.pooled_spikes[node] = pool
            if node.op == MIX and form is not None:
                # For streams, which carry the neurons' states.
                parts = (*node.target.neurons, node.target.mixer)
                self.leaves.extend(part for part in parts if isinstance(part, nn.Module))
            if node.op == PROJECT and form is not None:
                node.target = None
        if exact:
            _refuse_unordered(plan, self.forms)
        self.watched_nodes = self.foreign()
        self.aliases = sharing_memory(plan.nodes, self.watched_nodes)
        self.streamed = [module for module in self.modules() if isinstance(module, Streamed)]
        self.train(False)

    def mean_of_steps(self, x: Tensor) -> Tensor:
        """The mean over the first axis, summed as the network does it; for a `Stream` of its logits."""
        return ordered_mean(x, (0,)) if self.exact else x.mean(0)

    def products(self) -> Iterator[tuple[str, SpikeProduct]]:
        """The products whose inputs are spikes, by name."""
        for node, form in self.forms.items():
            parts: Any = form if isinstance(form, nn.ModuleList) else [form]
            for i, part in enumerate(parts):
                if isinstance(part, SpikeProduct):
                    yield (f"{node.name}.{i}" if isinstance(form, nn.ModuleList) else node.name), part

    def _pooled_products(self) -> dict[Node, Node]:
        """For each product whose membrane goes only into a 3x3 maximum of stride 2, that pooling."""
        users = self.plan.users()
        found = {}
        for node, after in self.epilogues.items():
            takers = users[node]
            if after.total is node and after.fire is None and len(takers) == 1 and _halves(takers[0]):
                found[node] = takers[0]
        return found

    def _last_users(self) -> set[Node]:
        """The products after which nothing reads the shortcut that they are added to."""
        users, place = self.plan.users(), {node: i for i, node in enumerate(self.plan.nodes)}
        found = set()
        for node, after in self.epilogues.items():
            others = [one for one in users[after.residual] if one is not after.total] if after.residual else []
            if after.residual and all(place[one] < place[node] for one in others):
                found.add(node)
        return found

    def _pool_of_spikes(self, node: Node) -> Node | None:
        """The 3x3 maximum of stride 2 that is the only user of a product's spikes, if there is one."""
        after, users = self.epilogues[node], self.plan.users()
        if after.fire is None or after.residual is not None or after.keep or len(users[after.fire]) != 1:
            return None
        if self.kinds[after.fire] != SPIKES:
            return None
        (taker,) = users[after.fire]
        return taker if _halves(taker) else None

    def compute(self, values: dict[Node, Any]) -> Any:
        # Inside inference_mode PyTorch does not count writes, and results could not be written into outside of it.
        with torch.inference_mode(False), torch.no_grad():
            return self._computed(values)

    def _computed(self, values: dict[Node, Any]) -> Any:
        for node in self.plan.nodes:
            if node.op == OUTPUT:
                return filled(node.args[0], lambda one: plain(values[one]))
            if node not in values:
                run = partial(self._run, node)
                made = self.watched(node, values, plain, run) if node in self.watched_nodes else run(values)
                values[node] = plain(made) if self.in_place else made
            for one in self.given[node]:
                if self.last.get(one) is node and one.op != INPUT:
                    values.pop(one, None)
        raise AssertionError("a plan ends with its output")

    def _run(self, node: Node, values: dict[Node, Any]) -> Any:
        given = [values[one] for one in self.given[node]]
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
            if self.kinds[node] == COUNTS and isinstance(a, PackedSpikes) and a.fits(b):
                return a.plus(b)
            if isinstance(a, Membrane) and isinstance(b, Membrane) and a.real.shape == b.real.shape:
                return Membrane(a.real + b.real)
        if node.target == "mean" and isinstance(given[0], Membrane) and over_places(node):
            places = given[0].real
            return ordered_mean(places, (2, 3)) if self.exact else places.movedim(-1, 2).mean((-2, -1))
        args, kwargs = filled((node.args, node.kwargs), lambda one: plain(values[one]))
        if self.exact and node.target == "mean":
            return ordered_mean(args[0], axes_of_mean(node) or ())
        if node in self.forms:
            return self.forms[node](*args)
        if node.op == FIRE:
            return self._repacked(node, evaluated(node.target)(*args))
        return computed(evaluated(node.target), args, kwargs)

    def _project(self, node: Node, x: Any, values: dict[Node, Any]) -> Any:
        form, source = self.forms.get(node), self._source(node, x)
        if form is None:
            return steps.project(node.target, plain(x))
        if source is None:
            raise no_frames(node, x)
        after = self.epilogues[node]
        still = self.still if node in self.once and after.residual is None else None
        if still is not None:
            return self._known(node, source, values, still)
        if node in self.pooled:
            values[self.pooled[node]] = Membrane(pooled_membrane(form, source))
            return None
        stands = None if after.fire is None else _stands(after.fire.target)
        if node in self.pooled_spikes and after.fire is not None and stands is None:
            values[after.fire], values[self.pooled_spikes[node]] = None, form.pooled(source)
            return None
        residual: Tensor | None = None
        into: bool | Tensor = after.keep
        if after.residual is not None:
            before = _membrane(values[after.residual])
            if before is None or before.real.shape != form.result_shape(source):
                # The shortcut is added, and the neuron fires, as nodes of their own.
                return Membrane(form(source, membrane=True)[0], owned=True)
            residual = before.real
            # The sum is written into the shortcut's memory if nothing reads that afterwards.
            if after.keep and before.owned and node in self.in_place_of:
                into = residual
        membrane, fired = form(source, residual=residual, membrane=into, stands=stands)
        if after.fire is not None:
            values[after.fire] = fired
        total = None if membrane is None else Membrane(membrane, owned=True)
        values[after.total] = total
        return total if after.total is node else None

    def _known(self, node: Node, source: Any, values: dict[Node, Any], still: dict[Node, Tensor]) -> Any:
        """The first layer on the same images in every call: its membrane is computed only once."""
        form, after, pooled = self.forms[node], self.epilogues[node], self.pooled.get(node)
        if node not in still:
            still[node] = pooled_membrane(form, source) if pooled else form(source, membrane=True)[0]
        known = Membrane(still[node])
        if pooled is not None:
            values[pooled] = known
            return None
        if after.fire is not None:
            values[after.fire] = self._fire(after.fire, known)
        values[after.total] = known if after.keep else None
        return values[after.total] if after.total is node else None

    def _source(self, node: Node, x: Any) -> Any:
        """The input of a product: packed spikes, or frames with channels last, a single one if all are the same."""
        if isinstance(x, PackedSpikes):
            return x
        form = self.forms.get(node)
        frames = _frames(x, any_order=isinstance(form, OrderedSums))
        if frames is None or not isinstance(form, SpikeProduct):
            return frames
        return _packed(frames, form)

    def _fire(self, node: Node, x: Any) -> Any:
        neuron, levels = node.target, self.kinds[node] == LEVELS
        membrane = _membrane(plain(x) if levels and isinstance(x, PackedSpikes) else x)
        if membrane is None:
            return neuron(plain(x))
        real = membrane.real
        epilogue, stands = epilogue_of(None, neuron, channels=real.shape[-1]), _stands(neuron)
        standing = None if stands is None else stands(real.shape[1:])
        return spike_neuron(real, epilogue, len(real), standing=standing)[1]

    def _mix(self, node: Node, x: Any) -> Any:
        mixing, form = node.target, self.forms.get(node)
        source = x if isinstance(x, PackedSpikes) else _frames(x)
        if form is None or source is None:
            mixed = steps.project_and_mix(mixing.units, mixing.neurons, mixing.mixer, plain(x))
            return self._repacked(node, mixed)
        product = form if isinstance(form, SpikeProduct) else form[0]
        if isinstance(source, Tensor) and isinstance(product, SpikeProduct):
            source = _packed(source, product)
        if isinstance(form, SpikeProduct):
            parts = _fired_together(form, mixing.neurons, source)
        else:
            parts = [_fired(*both, source) for both in zip(form, mixing.neurons, strict=True)]
        if not _packs(mixing.mixer, parts):
            return self._repacked(node, mixing.mixer(*map(plain, parts)))
        mixed = mixing.mixer.packed(*parts)
        return Membrane(mixed, owned=True) if isinstance(mixed, Tensor) else mixed

    def _repacked(self, node: Node, x: Any) -> Any:
        """The output of a node's leaf, packed if it is spikes."""
        frames = isinstance(x, Tensor) and x.ndim == 5 and 0 not in x.shape
        return PackedSpikes.pack(x) if frames and self.kinds[node] == SPIKES else x

    def _pool(self, node: Node, x: Any) -> Any:
        if not _halves(node) or self.kinds[node.inputs()[0]] == COUNTS:
            pooled = steps.pool(node.target, plain(x))
            return PackedSpikes.pack(pooled) if self.kinds[node] == SPIKES and pooled.ndim == 5 else pooled
        if isinstance(x, PackedSpikes):
            return spike_pool(x)
        membrane = _membrane(x)
        if membrane is None:
            return steps.pool(node.target, x)
        real = pool_frames(membrane.real)
        return Membrane(real, owned=len(steps.shown_frame(real)) == len(real))


class Membrane:
    """Real values `[T, B, H, W, C]`; `owned` if only the plan holds the tensor."""

    def __init__(self, real: Tensor, owned: bool = False) -> None:
        self.real, self.owned = real, owned


def _check(plan: Plan) -> None:
    held = plan.parameters()
    others = {f"{p.dtype} on {p.device}" for p in held if p.device.type != "cpu" or p.dtype != torch.float32}
    if others:
        raise ValueError(
            "event-driven inference and exact sums run in float32 on the CPU, 8 bits there or by Triton on a CUDA "
            f"device; the model has {', '.join(sorted(others))}: call model.float().cpu(). On a GPU dense products are "
            "faster at the rates of published models (docs/performance.md): leave sparse and exact out there"
        )
    problem = kernels_problem()
    if problem is not None:
        raise RuntimeError(f"the event-driven kernels cannot run: {problem}")


def _refuse_unordered(plan: Plan, forms: dict[Node, Any]) -> None:
    """Raises `ValueError` if a library would choose the order of a sum."""
    unordered = []
    for node in plan.nodes:
        known = node in forms or node.op in (INPUT, PRESENT, CHECK, ADD, OUTPUT)
        if node.op == POOL:
            known = steps.is_plain(node.target, nn.MaxPool2d)
        elif node.op == MIX:
            known = known and steps.tells(node.target.mixer, "exact") and node.target.mixer.exact
            # Levels divided by a power of two are exact in float32, and so are the sums of their products.
            norms = [one.norm for one in node.target.neurons if isinstance(one, IntegerNeuron)]
            known = known and all(math.frexp(norm)[0] == 0.5 for norm in norms)
        elif node.op == CALL and node not in forms:
            known = passes.keeps_values_apart(node) or isinstance(node.target, Constant)
            known = known or (node.target == "mean" and axes_of_mean(node) is not None)
        if not known:
            unordered.append(f"{node.name} ({_called(node)})")
    if unordered:
        raise ValueError(
            f"exact=True needs sums in a fixed order, and these are computed by code that may choose one: "
            f"{', '.join(unordered)}; leave exact out"
        )


def _called(node: Node) -> str:
    target = node.target.mixer if node.op == MIX else node.target
    return target if isinstance(target, str) else getattr(target, "__name__", type(target).__name__)


def plain(x: Any) -> Any:
    """A value as the network's own modules take it: `[T, B, C, H, W]`, contiguous."""
    if isinstance(x, PackedSpikes):
        return x.unpack().contiguous()
    if not isinstance(x, Membrane):
        return x
    made = x.real.movedim(-1, 2).contiguous()
    # With one place or one channel it is the same memory, which others may hold from now on.
    x.owned = x.owned and made.data_ptr() != x.real.data_ptr()
    return made


def _membrane(x: Any) -> Membrane | None:
    if isinstance(x, Membrane):
        return x
    frames = _frames(x)
    return None if frames is None else Membrane(frames)


def _frames(x: Any, any_order: bool = False) -> Tensor | None:
    """x with the channels last, if it is `[T, B, C, H, W]`; a frame shown at every step stays one frame in memory.

    The channels are last in memory too, unless `any_order` is acceptable.
    """
    if isinstance(x, Membrane):
        return x.real
    if not isinstance(x, Tensor) or x.ndim != 5 or 0 in x.shape or not x.is_floating_point():
        return None
    shown = steps.shown_frame(x).movedim(2, -1)
    return (shown if any_order else shown.contiguous()).expand(len(x), *shown.shape[1:])


def _halves(node: Node) -> bool:
    return node.op == POOL and steps.halves(node.target)


def _packed(frames: Tensor, product: SpikeProduct) -> PackedSpikes:
    """Frames `[T, B, H, W, C]` of spikes or counts as a product takes them."""
    x = frames.movedim(-1, 2)
    if product.planes == 1:
        return PackedSpikes.pack(x)
    packed = PackedSpikes.of_levels(frames, product.planes)
    if not torch.equal(packed.unpack(), x):
        raise ValueError(
            f"sums of spikes must be whole numbers from 0 to {product.planes}; something between the neurons and the "
            f"product changes them"
        )
    return packed


def _fired(product: Any, neuron: Any, x: PackedSpikes | Tensor) -> PackedSpikes:
    """The spikes of a neuron on a product."""
    fired: PackedSpikes = product(x, stands=_stands(neuron))[1]
    return fired


def _fired_together(product: SpikeProduct, neurons: Sequence[Any], x: Any) -> list[PackedSpikes]:
    """The spikes of several layers that are one product, each layer's by itself."""
    *places, _ = product.result_shape(x)[1:]
    widths = [-(-count // WORD) * WORD for count in product.parts]
    stands = [(one, width) for one, width in zip(map(_stands, neurons), widths, strict=True) if one is not None]
    standing = torch.cat([one((*places, width)) for one, width in stands], dim=-1) if stands else None
    _, fired = product(x, stands=None if standing is None else lambda _: standing)
    if standing is not None:
        for neuron, own in zip(neurons, standing.split(widths, -1), strict=True):
            neuron.carrier.keep_state(neuron, own)
    parts: list[PackedSpikes] = fired.split(product.parts)
    return parts


def _packs(mixer: Any, parts: Sequence[PackedSpikes]) -> bool:
    """Whether a mixer can take these packed spikes or levels: it says so, knows its neuron, and nothing has a hook."""
    if not steps.tells(mixer, "packed") or any(map(steps.has_hooks, mixer.modules())):
        return False
    spikes = all(part.planes == part.norm == 1 for part in parts)
    neuron = getattr(mixer, "neuron", None)
    known = neuron is None or is_neuron(neuron)
    return known and (spikes or (steps.tells(mixer, "packs_levels") and mixer.packs_levels))


def _stands(neuron: Any) -> Stands | None:
    """In a stream, the function that gives kernels the neuron's membrane; else `None`, and it starts at rest."""
    carrier = getattr(neuron, "carrier", None)
    return None if carrier is None else partial(carrier.membrane_in_place, neuron)
