"""What each layer of a model computes: multiply-accumulates, and the share of its inputs that are not zero."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..evaluation import Batches
from ..neuron import IntegerNeuron, states_of
from ..steps import find_mixers, tells
from .dataflow import COUNTS, LEVELS, MULTIPLIES, NOTHING, Follower, Value
from .moments import Moments, merged_steps, of_first_steps
from .operators import FREE
from .probe import Clock, Forward, Hook, Probe, add_at, gather
from .products import RULES, UNCOUNTED, Factors, Window
from .rates import Counts, SpikeCounts, merge_counts
from .silence import merge_fired, silence


@dataclass
class LayerOperations:
    """The work of one layer for one sample.

    `macs` are the multiply-accumulates of one step if every input counted, and `rate` the share of them that is charged
    at each step. `kind` is "AC" if the input is spikes, which only add, else "MAC". `repeated`: the layer sees the
    same analog input at every step. For the mixer of an attention of `tokens` and `channels`, `macs` are the additions
    if all of q, k and v fired, `rate` the share of them that happens, and `bound_rate` the mixer's estimate of it.

    `executed` are the operations that are really done at each step, without those on the padding of a convolution, and
    `executed_macs` those of one step if every input counted. `inputs` and `outputs` are the entries of one step,
    `moved` the inputs that are not zero at each step, `biases` the outputs of one step to which a bias is added,
    `weights` the parameters that are multiplied. For a mixer, `sources` are the neurons that its inputs come from, and
    `bound_shares` the part of its `macs` that its estimate has for each of them if it always fires. `varies`: the
    charges depend on the sample.

    Inputs that are whole numbers, levels or counts of spikes, are charged as that many additions: `rate` is their mean.
    `levels` is the largest level, for a mixer how often its `macs` are done if q, k and v all have that level.
    """

    name: str
    type: str
    kind: str
    macs: float
    rate: list[float]
    repeated: bool = False
    tokens: int = 0
    channels: int = 0
    bound_rate: list[float] = field(default_factory=list)
    executed: list[float] = field(default_factory=list)
    executed_macs: float = 0.0
    inputs: float = 0.0
    moved: list[float] = field(default_factory=list)
    outputs: float = 0.0
    biases: float = 0.0
    weights: int = 0
    sources: tuple[str, ...] = ()
    bound_shares: tuple[float, ...] = ()
    varies: bool = False
    levels: int = 1


@dataclass
class NeuronOperations:
    """The work of one neuron layer for one sample: its size, its spikes at each step, its memory.

    `states` is how many numbers each neuron keeps from step to step: 0 if it has no memory. A level is as many spikes,
    `levels` at most.
    """

    name: str
    neurons: float
    spikes: list[float]
    states: int = 1
    levels: int = 1


@dataclass
class NotCounted:
    """An operation of a module that may multiply but is not counted, and how often it was called."""

    module: str
    operation: str
    calls: int

    def __str__(self) -> str:
        return f"{self.module or 'the model'}: {self.operation}"


@dataclass
class Operations:
    """The layers' work in the order of the forward pass, for the mean of `samples`.

    `not_counted` are operations that may multiply and for which there is no rule; `silence` names neurons that never
    fired. `moments` are those of the charges of each sample in the first 1, 2, ... steps: for a layer
    `(name, "charged")`, `"executed"` and `"moved"`, for a neuron layer `(name, "spikes")`.
    """

    layers: list[LayerOperations]
    steps: int
    samples: int
    not_counted: list[NotCounted] = field(default_factory=list)
    silence: str = ""
    neurons: list[NeuronOperations] = field(default_factory=list)
    moments: list[Moments] = field(default_factory=list)


@dataclass
class _Site:
    """Sums over samples for one layer, per step."""

    type: str
    nonzero: np.ndarray = field(default_factory=lambda: np.zeros(0))
    entries: np.ndarray = field(default_factory=lambda: np.zeros(0))
    dense: np.ndarray = field(default_factory=lambda: np.zeros(0))
    bound: np.ndarray = field(default_factory=lambda: np.zeros(0))
    by_sample: dict[str, np.ndarray] = field(default_factory=dict)
    executed: np.ndarray = field(default_factory=lambda: np.zeros(0))
    executed_dense: np.ndarray = field(default_factory=lambda: np.zeros(0))
    moved: np.ndarray = field(default_factory=lambda: np.zeros(0))
    inputs: float = 0.0
    outputs: float = 0.0
    biases: float = 0.0
    first: bool = False
    analog: bool = False
    frames: bool = False
    tokens: int = 0
    channels: int = 0
    weights: int = 0
    sources: tuple[str, ...] = ()
    bound_shares: tuple[float, ...] = ()
    levels: int = 1

    def add(self, other: _Site) -> None:
        for name in ("nonzero", "entries", "dense", "bound", "executed", "executed_dense", "moved"):
            setattr(self, name, add_at(getattr(self, name), getattr(other, name)))
        for name in ("inputs", "outputs", "biases"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("first", "analog", "frames", "tokens", "channels", "weights", "sources", "bound_shares", "levels"):
            setattr(self, name, max(getattr(self, name), getattr(other, name)))


@dataclass
class _Call:
    """One call of a layer: non-zero inputs by row, the entries of a row, and the cost of the call if all count.

    `executed` and `executed_dense` are the same costs without operations on a padding; `moved` are the non-zero inputs
    by row if `nonzero` counts something else.
    """

    type: str
    nonzero: Tensor
    entries: int
    dense: float
    spikes: Tensor
    kept_input: Tensor | None = None
    bound: Tensor | None = None
    size: tuple[int, int] = (0, 0)
    executed: Tensor | None = None
    executed_dense: float = 0.0
    moved: Tensor | None = None
    inputs: float = 0.0
    outputs: float = 0.0
    biases: float = 0.0
    weights: int = 0
    sources: tuple[str, ...] = ()
    bound_shares: tuple[float, ...] = ()
    levels: int = 1


def count_operations(
    model: nn.Module,
    batches: Batches,
    *,
    spike_input: bool = False,
    neurons: Sequence[type[nn.Module]] = (),
    forward: Forward | None = None,
    as_trained: bool = False,
) -> Operations:
    """The operations of every convolution, linear layer, matrix product and attention of the model, over all batches.

    Counts are summed in float64 over batches and processes. Everything before the first neuron is analog (kind "MAC")
    unless `spike_input` says that the data are spikes; any other layer is "AC" if its inputs are zeros and one positive
    value in every batch. For `neurons`, `forward` and `as_trained` see `firing_rates`. One warning names operations
    that may multiply and are not counted. Raises `ValueError` if there is no batch.
    """
    sites: dict[str, _Site] = {}
    samples = steps = 0
    moments: list[Moments] = []
    with Probe(model, neurons, forward, as_trained=as_trained) as probe:
        recorder, fired = _Recorder(probe), SpikeCounts(probe, probe.neurons)
        for x in probe.run(batches):
            samples, steps = samples + probe.clock.batch, max(steps, probe.clock.steps)
            values: dict[Hashable, np.ndarray] = {}
            for name, calls in recorder.calls.items():
                site = _sum(name, calls, probe.clock, x)
                sites.setdefault(name, _Site(site.type)).add(site)
                values.update({(name, what): each for what, each in site.by_sample.items()})
            recorder.calls.clear()
            values.update({(name, "spikes"): each for name, each in fired.end_batch().items()})
            moments = merged_steps((moments, of_first_steps(values)))
        parts = gather((sites, samples, steps, recorder.not_counted(), probe.fired, fired.totals, moments))
    all_sites, all_samples, all_steps, left_out, all_fired, spikes, spread = zip(*parts, strict=True)
    result = Operations(_merge(all_sites, sum(all_samples), spike_input), max(all_steps), sum(all_samples))
    result.moments = merged_steps(spread)
    result.neurons = _neurons(probe.neurons, merge_counts(spikes), result.samples)
    uncounted = sum(left_out, Counter[tuple[str, str]]())
    result.not_counted = [NotCounted(module, name, calls) for (module, name), calls in uncounted.items()]
    result.silence = silence(probe.model, merge_fired(all_fired))
    if result.not_counted:
        listed = "; ".join(str(operation) for operation in result.not_counted)
        warnings.warn(f"not counted, as no rule knows what it costs: {listed}", stacklevel=3)
    return result


class _Recorder(Follower):
    """Records the work of every product of a forward pass, as the dispatcher sees it."""

    def __init__(self, probe: Probe) -> None:
        super().__init__(probe)
        self.calls: dict[str, list[_Call]] = {}
        self.numbers: Counter[str] = Counter()
        self.weights = {id(p): name for name, p in probe.model.named_parameters() if p.ndim}
        self.mixers = find_mixers(probe.model)
        rows = Counter(map(_parent, self.mixers))
        for name, mixer in self.mixers.items():
            own = rows[_parent(name)] > 1 or _parent(name) in self.mixers or _parent(name) in self.layers
            probe.watch(mixer, self._mixed(name if own else _parent(name), mixer))

    def entered(self, name: str) -> None:
        self.numbers.pop(name, None)

    def not_counted(self) -> Counter[tuple[str, str]]:
        """How often modules called operations that may multiply and for which there is no rule."""
        found: Counter[tuple[str, str]] = Counter()
        for product in self.products.values():
            whole = () if product.operation in RULES else (product.operation,)
            for left_out in UNCOUNTED.get(product.operation, whole) if product.verdict == MULTIPLIES else ():
                found[product.module, left_out] += product.calls
        return found

    def counts(self, name: str, args: Sequence[Any], output: Any) -> None:
        if name not in RULES:
            return
        outputs = output.numel() if isinstance(output, Tensor) else 0
        biased = any(isinstance(arg, Tensor) and arg.ndim == 1 and self._weight(arg) for arg in args)
        for factors in RULES[name](args, output):
            self._count(factors, outputs, biased)

    def inside_neuron(self, name: str, args: Sequence[Any], output: Any) -> None:
        # The membrane's own decay is free of charge, but the weights of a recurrent neuron are not.
        if name in FREE or not any(self._weight(arg) and arg.ndim > 1 for arg in args if isinstance(arg, Tensor)):
            return
        if name in RULES:
            self.counts(name, args, output)
        elif name not in ("mul", "div"):
            self.note(name, "", MULTIPLIES, "a weight inside of a neuron")

    def _count(self, factors: Factors, outputs: int, biased: bool) -> None:
        a, b, macs, kind, a_rows, b_rows, window = factors
        weights = [bool(self._weight(a)), bool(self._weight(b))]
        constant = [self.value(factor) is NOTHING for factor in (a, b)]
        if all(constant):
            if weights[0] == weights[1] and self.here() not in self.layers:
                return  # constants of the model: the same for every sample, so computed once
            constant = weights
        if not any(constant) and self.mixers.keys() & set(self.probe.path):
            return  # the additions of a mixer are a row of their own
        if constant[0] == constant[1]:
            a_adds, b_adds = (bool(_is_spikes(x, x.count_nonzero())) for x in (a, b))
            constant = [b_adds and not a_adds, False]
        rows, other = (b_rows, a) if constant[0] else (a_rows, b)
        here = self.here()
        layer = here in self.layers and not self.numbers[here]
        name = here if layer else self._weight(other) or f"{here}.{kind}{self.numbers[here] or ''}".lstrip(".")
        self.numbers[here] += 1
        kind = "linear" if layer and kind == "matmul" else kind
        value = self.value(b if constant[0] else a)
        whole = _whole(value, rows)
        covered = None if constant[0] else window
        call = self._call(name, kind, rows if whole is None else whole, macs, covered, whole=whole is not None)
        call.levels = value.levels
        call.outputs = float(outputs)
        module = self.probe.model.get_submodule(here) if layer else None
        call.biases = call.outputs * (biased or isinstance(getattr(module, "bias", None), Tensor))
        call.weights = other.numel() if layer or self._weight(other) else 0
        self.calls.setdefault(name, []).append(call)

    def _weight(self, factor: Tensor) -> str:
        """The name of the parameter that a factor is, whole, in part or transposed; "" if it is none."""
        whole = factor if factor._base is None else factor._base
        return self.weights.get(id(factor), "") or self.weights.get(id(whole), "")

    def _call(self, name: str, kind: str, rows: Tensor, macs: float, window: Window | None, *, whole: bool) -> _Call:
        arranged = rows.flatten(1) if kind == "conv" else self._arranged(rows)
        nonzero = arranged.sum(-1, dtype=torch.float64) if whole else _nonzero(arranged)
        executed, executed_dense = (None, float(macs)) if window is None else window.executed(rows, whole=whole)
        before = self.calls.get(name)
        first = before[0].kept_input is not None if before else not self.probe.clock.started
        kept = rows if first else None
        return _Call(
            kind,
            nonzero,
            arranged.shape[-1],
            float(macs),
            torch.tensor(True) if whole else _is_spikes(rows, nonzero),
            kept,
            executed=executed,
            executed_dense=executed_dense,
            inputs=float(arranged.numel()),
        )

    def _arranged(self, rows: Tensor) -> Tensor:
        """Rows as `[d0, k]` or `[d0, d1, k]`, where the axes before the last separate time, samples and positions."""
        rows = rows[0] if rows.ndim == 3 and len(rows) == 1 else rows
        leading = self.probe.shapes[-1][:-1] if self.probe.shapes else ()
        if rows.ndim == 2 and len(leading) > 1 and math.prod(leading) == len(rows):
            # A linear layer takes its rows flat; restore the axes that the module around it got.
            rows = rows.reshape(*leading, -1)
        return rows.flatten(2) if rows.ndim > 2 else rows

    def _mixed(self, row: str, mixer: Any) -> Hook:
        def mixed(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            spikes = [x for x in inputs if isinstance(x, Tensor)]
            where = "cpu" if spikes[0].is_meta else spikes[0].device
            ones = [torch.ones(1, 1, *x.shape[2:], device=where) for x in spikes]
            most = int(mixer.additions(*ones).sum())
            if not most:
                return
            frames = math.prod(spikes[0].shape[:2])
            values = [self.value(x) for x in spikes]
            whole = [_whole(value, x) for value, x in zip(values, spikes, strict=True)]
            entries = [(x != 0).float() if given is None else given for given, x in zip(whole, spikes, strict=True)]
            added = _summed(mixer.additions(*entries))
            bound = _summed(mixer.bound(*entries)) if tells(mixer, "bound") else None
            binary = [x for given, x in zip(whole, spikes, strict=True) if given is None]
            adds = torch.tensor(all(bool(_is_spikes(x, x.count_nonzero())) for x in binary))
            size = (math.prod(spikes[0].shape[3:]), spikes[0].shape[2])
            call = _Call("attention", added, most, float(frames * most), adds, None, bound, size)
            call.executed_dense, call.outputs = call.dense, float(output.numel())
            call.inputs = float(sum(x.numel() for x in spikes))
            call.moved = sum((_summed(x) for x in entries), torch.zeros(()))
            call.sources = tuple(value.origin for value in values)
            all_fire = mixer.additions(*(value.levels * x for value, x in zip(values, ones, strict=True)))
            call.levels = round(float(all_fire.sum()) / most)
            if bound is not None:
                alone = ([x if at == place else 0 * x for at, x in enumerate(ones)] for place in range(len(ones)))
                call.bound_shares = tuple(float(mixer.bound(*x).sum()) / most for x in alone)
            self.calls.setdefault(row, []).append(call)

        return mixed


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _summed(x: Tensor) -> Tensor:
    """The sums of the frames of `[T, B, ...]` as `[T * B]`; zeros for meta tensors, which have no values."""
    summed = x.flatten(0, 1).flatten(1).sum(1, dtype=torch.float64)
    return torch.zeros(summed.shape, dtype=torch.float64) if summed.is_meta else summed


def _nonzero(rows: Tensor) -> Tensor:
    """Non-zero entries along the last axis; zeros for a meta tensor, which has no values."""
    return torch.zeros(rows.shape[:-1], dtype=torch.int64) if rows.is_meta else rows.count_nonzero(dim=-1)


def _whole(value: Value, x: Tensor) -> Tensor | None:
    """Levels or counts of spikes as the numbers of additions that they stand for; None for anything else."""
    if value.kind not in (LEVELS, COUNTS) or x.is_meta:
        return None
    whole = (x * value.norm).round()
    return whole if bool((whole >= 0).all()) else None


def _is_spikes(x: Tensor, nonzero: Tensor) -> Tensor:
    """Whether all entries are 0 or the same positive number; `nonzero` holds counts of the non-zero ones."""
    if x.is_meta:
        return torch.tensor(True)
    top = x.amax()
    return (x == top).sum().where(top > 0, 0) == nonzero.sum()


def _sum(name: str, calls: list[_Call], clock: Clock, x: Tensor) -> _Site:
    """The calls of one forward pass of the input x.

    A first layer that ran once for all steps counts at each of them; a later one, such as a head that takes a mean over
    time, ran once, and so did a first layer that sees all frames `[T, B, C, H, W]` together.
    """
    by_sample = clock.split([call.nonzero for call in calls], name)
    nonzero = by_sample.sum(1)
    entries = clock.split([torch.full_like(call.nonzero, call.entries) for call in calls], name).sum(1)
    once = len(nonzero) < clock.steps
    kept = [call.kept_input for call in calls if call.kept_input is not None]
    frames = bool(kept) and not once and _are_frames(kept, clock.steps, x)
    dense = sum(call.dense for call in calls) / len(nonzero)
    bounds = [call.bound for call in calls if call.bound is not None]

    recording = x.ndim == 5 and x.shape[:2] == (clock.steps, clock.batch)
    together = recording and sum(one.numel() for one in kept) == x.numel()
    once = once and bool(kept) and not together
    steps = clock.steps if once else len(nonzero)
    share = steps / len(nonzero)

    def per_step(values: Tensor) -> np.ndarray:
        array = values.cpu().numpy().astype(np.float64)
        return np.repeat(array, clock.steps) if once else array

    def split(values: Sequence[Tensor | None], default: Tensor) -> Tensor:
        found = [value for value in values if value is not None]
        return clock.split(found, name) if found else default

    charged = by_sample / entries[:, None] * dense
    executed = split([call.executed for call in calls], charged)
    moved = split([call.moved for call in calls], by_sample)
    each = {"charged": charged, "executed": executed, "moved": moved}
    return _Site(
        calls[0].type,
        per_step(nonzero),
        per_step(entries),
        np.full(steps, dense),
        per_step(clock.split(bounds, name).sum(1)) if bounds else np.zeros(0),
        by_sample={what: _first_steps(value, steps) for what, value in each.items()},
        executed=per_step(executed.sum(1)),
        executed_dense=np.full(steps, sum(call.executed_dense for call in calls) / len(nonzero)),
        moved=per_step(moved.sum(1)),
        inputs=share * sum(call.inputs for call in calls),
        outputs=share * sum(call.outputs for call in calls),
        biases=share * sum(call.biases for call in calls),
        weights=calls[0].weights,
        sources=calls[0].sources,
        bound_shares=calls[0].bound_shares,
        levels=max(call.levels for call in calls),
        first=bool(kept),
        analog=not all(bool(call.spikes) for call in calls),
        frames=frames,
        tokens=calls[0].size[0],
        channels=calls[0].size[1],
    )


def _first_steps(value: Tensor, steps: int) -> np.ndarray:
    """The values of each sample at each step `[T or 1, B]`, summed over the first 1, 2, ... steps."""
    return value.double().expand(steps, value.shape[1]).cumsum(0).cpu().numpy()


def _are_frames(inputs: list[Tensor], steps: int, x: Tensor) -> bool:
    """Whether a layer that runs at every step sees frames of a recording, where one image `[B, T, ...]` is none."""
    shown = steps > 1 and any(not one.is_meta and bool(one.any()) for one in inputs)
    return _varies(inputs, steps) or (x.ndim == 5 and not shown)


def _varies(inputs: list[Tensor], steps: int) -> bool:
    """Whether the input of a layer, over the calls or along the leading axis of one, changes from step to step."""
    whole = torch.cat([x.flatten(0, -1) if x.ndim == 1 else x for x in inputs])
    if whole.is_meta or len(whole) % steps:
        return False
    by_step = whole.reshape(steps, -1)
    return bool((by_step != by_step[0]).any())


def _merge(parts: Iterable[Mapping[str, _Site]], samples: int, spike_input: bool) -> list[LayerOperations]:
    """The layers' work for the mean of all samples, from the sums of each process."""
    if samples == 0:
        raise ValueError("there was no batch to run; check that the data is not empty")
    sites: dict[str, _Site] = {}
    for part in parts:
        for name, site in part.items():
            sites.setdefault(name, _Site(site.type)).add(site)
    layers = []
    for name, site in sites.items():
        share = site.nonzero / site.entries
        analog = site.analog or (site.first and not spike_input)
        # A still image is charged in full, and so is an analog value inside the network.
        sparse = not analog or (site.first and site.frames)
        charged, executed = (share, site.executed) if sparse else (np.ones_like(share), site.executed_dense)
        calls = samples * len(share)
        layers.append(
            LayerOperations(
                name,
                site.type,
                "MAC" if analog else "AC",
                float(site.dense.sum() / calls),
                (charged * site.dense * len(share) / site.dense.sum()).tolist(),
                repeated=analog and site.first and not site.frames,
                tokens=site.tokens,
                channels=site.channels,
                bound_rate=(site.bound / site.entries).tolist() if len(site.bound) else [],
                executed=(executed / samples).tolist(),
                executed_macs=float(site.executed_dense.sum() / calls),
                inputs=site.inputs / calls,
                moved=(site.moved / samples).tolist() if sparse else [site.inputs / calls] * len(share),
                outputs=site.outputs / calls,
                biases=site.biases / calls,
                weights=site.weights,
                sources=site.sources,
                bound_shares=site.bound_shares,
                varies=sparse,
                levels=site.levels,
            )
        )
    return layers


def _neurons(modules: dict[str, nn.Module], counts: dict[str, Counts], samples: int) -> list[NeuronOperations]:
    found = []
    for name, count in counts.items():
        module, steps = modules[name], len(count.chances)
        levels = module.levels if isinstance(module, IntegerNeuron) else 1
        neurons, spikes = float(count.chances.sum() / (samples * steps)), (count.spikes / samples).tolist()
        found.append(NeuronOperations(name, neurons, spikes, states_of(module), levels))
    return found
