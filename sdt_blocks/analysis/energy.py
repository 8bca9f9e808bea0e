"""Theoretical energy in millijoules, layer by layer and step by step (45 nm figures of Horowitz, ISSCC 2014)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..blocks.sizes import check_shape
from ..evaluation import Batches
from .energy_models import (
    E_AC,
    E_MAC,
    ENERGY_MODELS,
    EXECUTED,
    FORMULA,
    PJ_IN_MJ,
    Cost,
    EnergyModel,
    Estimate,
    at_rates,
    estimate,
    step_costs,
    vanilla,
    with_rates,
)
from .operations import LayerOperations, NotCounted, Operations, count_operations
from .probe import Forward, check_weights, is_within, unwrap
from .silence import as_text, warn_if_dead
from .tables import counted

if TYPE_CHECKING:
    from rich.table import Table

CONVENTION = "A rate is the share of a layer's inputs that are not zero: after pooling, over all samples, at each step."
"""The meaning of every rate in a report."""

Rates = float | Sequence[float]


@dataclass
class LayerEnergy:
    """One row of the energy table: `energy_mj = E * macs * sum(rate)`, with E of a MAC or an AC, for one sample.

    `once_mj` charges a layer that sees the same still image at every step only once. `bound_mj` (attention only) is the
    mixer's estimate; for a mask it is the paper's `E_AC * N * D * sum(R)`, where R is the sum of the rates of k and v.
    """

    name: str
    type: str
    kind: str
    macs: float
    rate: list[float]
    synaptic_operations: float
    energy_mj: float
    once_mj: float
    bound_mj: float | None = None


@dataclass
class AttentionEnergy:
    """All spike-driven attention of a model against softmax attention of the same size, for one sample, in millijoules.

    `sdsa_mj` and `vanilla_mj` are the operators alone (the latter `2 N^2 D` multiply-accumulates, `N^2` for the scale
    and `2 N^2` for softmax); the `whole` figures add the four projections, `4 N D^2` multiply-accumulates for softmax
    attention. `bound_mj` is None if a mixer has no such estimate.
    """

    sdsa_mj: float
    bound_mj: float | None
    vanilla_mj: float
    whole_mj: float
    vanilla_whole_mj: float


@dataclass
class EnergyReport:
    """Energy of one inference, a mean over `samples`, with the same network as an ANN for comparison.

    `ann_mj` charges every layer once, as multiply-accumulates, and softmax attention instead of the spike-driven one.
    `not_counted` are operations that may multiply but have no rule, so that all totals lack them; `silence` says which
    neurons never fired, "" if all did. `estimates` are the energies by each model, `operations` what they charge.
    """

    layers: list[LayerEnergy]
    steps: int
    samples: int
    e_mac: float
    e_ac: float
    ann_mj: float
    attention: AttentionEnergy | None
    not_counted: list[NotCounted]
    silence: str
    estimates: dict[str, Estimate]
    operations: Operations = field(repr=False)

    def estimate(self, model: EnergyModel) -> Estimate:
        """The energy by a further model, from the operations that were counted; tables and files then include it.

        >>> from dataclasses import replace
        >>> report = energy(example_model(), example_images()[0])
        >>> without = report.estimate(replace(ENERGY_MODELS["executed"], name="without biases", biases=False))
        >>> without.cost.total_mj < report.estimates["executed"].cost.total_mj
        True
        """
        self.estimates[model.name] = estimate(self.operations, model)
        return self.estimates[model.name]

    @property
    def verdict(self) -> str:
        """In one sentence, by which models the spiking network would win against its ANNs."""
        bits = next(iter(self.estimates.values())).bits
        against = {
            "the same ANN": {name: (found.ann, found.cost) for name, found in self.estimates.items()},
            f"an ANN of {bits}-bit activations": {
                name: (found.quantised, found.cost) for name, found in self.estimates.items()
            },
        }
        return f"The spiking network would {'; '.join(_outcome(ann, costs) for ann, costs in against.items())}."

    @property
    def total_mj(self) -> float:
        return sum(layer.energy_mj for layer in self.layers)

    @property
    def total_once_mj(self) -> float:
        """The total if layers that see a still image are computed once instead of at every step."""
        return sum(layer.once_mj for layer in self.layers)

    @property
    def synaptic_operations(self) -> float:
        """Accumulates and multiply-accumulates of one inference."""
        return sum(layer.synaptic_operations for layer in self.layers)

    def __getitem__(self, name: str) -> LayerEnergy:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"there is no layer {name!r}; the layers are {', '.join(layer.name for layer in self.layers)}")

    def to_json(self, path: str | Path | None = None, confidence: float = 0.95) -> str:
        """The report as JSON text, also written to `path` if given, with intervals at the level `confidence`."""
        attention = None
        if self.attention is not None:
            attention = {
                **vars(self.attention),
                "operator_ratio": _ratio(self.attention.vanilla_mj, self.attention.sdsa_mj),
                "whole_ratio": _ratio(self.attention.vanilla_whole_mj, self.attention.whole_mj),
            }
        content = {
            "total_mj": self.total_mj,
            "total_once_mj": self.total_once_mj,
            "ann_mj": self.ann_mj,
            "ann_ratio": _ratio(self.ann_mj, self.total_mj),
            "synaptic_operations": self.synaptic_operations,
            "attention": attention,
            "steps": self.steps,
            "samples": self.samples,
            "e_mac_pj": self.e_mac,
            "e_ac_pj": self.e_ac,
            "layers": [vars(layer) for layer in self.layers],
            "not_counted": [vars(operation) for operation in self.not_counted],
            "silence": self.silence,
            "convention": CONVENTION,
            "verdict": self.verdict,
            "confidence": confidence,
            "estimates": {name: found.to_dict(confidence) for name, found in self.estimates.items()},
        }
        text = json.dumps(content, indent=2) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def table(self) -> Table:
        """A table for rich."""
        from rich.table import Table
        from rich.text import Text

        of = f"{counted(self.steps, 'step')}, mean of {counted(self.samples, 'sample')}"
        table = Table(title=f"Energy of one inference in mJ, {of}. {CONVENTION}", caption=self.verdict)
        table.add_column("layer", overflow="fold")
        table.add_column("kind")
        for name in ("MACs a step", "mean rate", "synaptic operations", *self.estimates):
            table.add_column(name, justify="right")

        def costs(values: Sequence[float | None]) -> list[str]:
            return ["-" if value is None else f"{value:.3g}" for value in values]

        found = self.estimates.values()
        for place, layer in enumerate(self.layers):
            mean = sum(layer.rate) / len(layer.rate)
            work = (f"{layer.macs:,.0f}", f"{mean:.4f}", f"{layer.synaptic_operations:,.0f}")
            row = costs([one.rows[place].cost.total_mj for one in found])
            table.add_row(Text(layer.name or "(model)"), layer.kind, *work, *row)
        for rows in zip(*(one.rows[len(self.layers) :] for one in found), strict=True):
            if any(row.cost.total_mj for row in rows):
                row = costs([row.cost.total_mj for row in rows])
                table.add_row(Text(rows[0].name or "(model)"), "neuron", "", f"{rows[0].rate:.4f}", "", *row)
        table.add_section()
        bits = f"{next(iter(found)).bits}-bit activations"
        for name, values in (
            ("total", [one.cost.total_mj for one in found]),
            ("± std over samples", [one.std_mj for one in found]),
            ("of that, memory", [one.cost.memory_mj for one in found]),
            ("the same network as an ANN", [one.ann.total_mj for one in found]),
            (f"as an ANN of {bits}", [one.quantised.total_mj for one in found]),
            ("break-even rate against the ANN", [one.break_even for one in found]),
            (f"break-even rate against {bits}", [one.break_even_quantised for one in found]),
        ):
            operations = f"{self.synaptic_operations:,.0f}" if name == "total" else ""
            table.add_row(name, "", "", "", operations, *costs(values))
        for operation in self.not_counted:
            table.add_row(Text(str(operation)), "not counted", "", "", "?", style="bold red")
        return table

    def __str__(self) -> str:
        return as_text([self.silence] if self.silence else [], self.table())


def energy(
    model: nn.Module,
    batches: Batches,
    e_mac: float = E_MAC,
    e_ac: float = E_AC,
    *,
    spike_input: bool = False,
    neurons: Sequence[type[nn.Module]] = (),
    forward: Forward | None = None,
    as_trained: bool = False,
) -> EnergyReport:
    """Energy of one inference: the operations of each layer times the rates of its real input, after any pooling.

        MAC layers (analog input)   E_MAC * macs * T; for frames that change, times their non-zero share
        AC layers (spikes)          E_AC * macs * sum over t of rate[t]; a level or count of n is charged n times
        mixers of an attention      E_AC for each of their `additions`: for a mask, each coincidence of k and v;
                                    in q (k^T v) also a row of counts for each spike of q

    A unit that is trained as several layers is charged as the one convolution that it is when deployed; with
    `as_trained` its layers are charged one by one.

    These are the papers' figures, and those of the report itself. `report.estimates` has an `Estimate` for each of
    `ENERGY_MODELS` by name, with the ANNs and the break-even rates; `report.estimate(model)` adds another.

    `e_mac` and `e_ac` are in picojoules, for the papers' formula and the executed operations. Batch normalization folds
    into the convolution before it and costs nothing, folded or not. The other arguments are those of
    `count_operations`.

    Raises `ValueError` if there is no batch, or if the weights are on the meta device.

    >>> report = energy(example_model(), example_images()[0])
    >>> report.total_mj < report.ann_mj, report["head"].synaptic_operations > 0, report.not_counted
    (True, True, [])
    """
    check_weights(model)
    operations = count_operations(
        model, batches, spike_input=spike_input, neurons=neurons, forward=forward, as_trained=as_trained
    )
    warn_if_dead(operations.silence)
    return _report(operations, e_mac, e_ac)


def energy_from_rates(
    model: nn.Module,
    rates: Rates | Mapping[str, Rates],
    input_shape: Sequence[int],
    e_mac: float = E_MAC,
    e_ac: float = E_AC,
    *,
    neurons: Sequence[type[nn.Module]] = (),
    forward: Forward | None = None,
    as_trained: bool = False,
) -> EnergyReport:
    """The energy table for given rates, such as a paper's: without data, and on the meta device without weights.

    `rates` is one number for all layers fed by spikes, or a mapping from layer names or patterns (`"blocks.*.mlp.*"`;
    the first that matches counts) to a number or one number per step. MAC layers that it does not name are charged in
    full. Neuron layers are named the same way; one that nothing names fires at the mean rate of all inputs that are
    spikes. The bound of an attention follows from the rates of the neurons whose spikes it gets. `input_shape` is that
    of one sample, `[C, H, W]` or `[T, C, H, W]`.

    Raises `ValueError` for a rate outside 0..1, a wrong number of steps, a layer without a rate, a key without a layer
    and a shape with sizes below 1, and `TypeError` for a rate or a size that is no number, such as the text in a CSV
    file.

    >>> with torch.device("meta"):
    ...     model = create_model("sdt_8_512")
    >>> round(energy_from_rates(model, 0.1, (3, 224, 224))["patch.stages.0.conv"].energy_mj, 3)
    1.595
    """
    check_shape("input_shape", input_shape)
    rates = rates if isinstance(rates, Mapping) else {"*": rates}
    where = next(unwrap(model).parameters(), torch.zeros(0))
    operations = count_operations(
        model, torch.rand(1, *input_shape, device=where.device), neurons=neurons, forward=forward, as_trained=as_trained
    )
    names = [record.name for record in operations.neurons] + [layer.name for layer in operations.layers]
    keys = {name: _key(name, rates) for name in names}
    for place, layer in enumerate(operations.layers):
        key = keys[layer.name]
        given = [1.0] * len(layer.rate)
        if layer.kind == "AC" or layer.name in rates:
            if key is None:
                raise ValueError(f"no rate fits the layer {layer.name!r}; name it, or add a pattern such as '*'")
            given = _checked(layer.name, rates[key], len(layer.rate))
        operations.layers[place] = with_rates(layer, given)
    unknown = [key for key in rates if key not in keys.values()]
    if unknown:
        listed = ", ".join(layer.name for layer in operations.layers)
        raise ValueError(f"no layer is called {', '.join(unknown)}; the layers are {listed}")
    fed = [layer for layer in operations.layers if layer.kind == "AC"]
    entries = sum(layer.inputs * len(layer.moved) for layer in fed)
    mean = sum(sum(layer.moved) for layer in fed) / entries if entries else 0.0
    fire = {}
    for place, neuron in enumerate(operations.neurons):
        key = keys[neuron.name]
        fire[neuron.name] = _checked(neuron.name, mean if key is None else rates[key], len(neuron.spikes))
        operations.neurons[place] = at_rates(neuron, fire[neuron.name])
    for layer in operations.layers:
        layer.bound_rate = _bound(layer, fire)
    operations.samples, operations.silence, operations.moments = 0, "", []
    return _report(operations, e_mac, e_ac)


def _key(name: str, rates: Mapping[str, Rates]) -> str | None:
    """The key under which a layer's rate is given: its own name, or the first pattern that matches."""
    return name if name in rates else next((key for key in rates if fnmatchcase(name, key)), None)


def _bound(layer: LayerOperations, fire: Mapping[str, list[float]]) -> list[float]:
    """A mixer's estimate of its additions, from the rates of the neurons whose spikes it gets."""
    if not layer.bound_shares or not all(source in fire for source in layer.sources):
        return []
    given = [fire[source] for source in layer.sources]
    return [
        sum(share * rate[step] for share, rate in zip(layer.bound_shares, given, strict=True))
        for step in range(len(layer.rate))
    ]


def _checked(name: str, rate: Rates, steps: int) -> list[float]:
    each: Any = [rate] * steps if isinstance(rate, Real) else rate
    if isinstance(each, str) or not isinstance(each, Iterable) or any(isinstance(one, str) for one in each):
        raise TypeError(f"{name}: a firing rate is a number, or one number a step, got {rate!r}")
    values = [float(one) for one in each]
    if len(values) != steps:
        raise ValueError(f"{name}: expected {steps} rates, one a step, got {len(values)}")
    if not all(0 <= value <= 1 for value in values):
        raise ValueError(f"{name}: a firing rate lies between 0 and 1, got {rate!r}")
    return values


def _report(operations: Operations, e_mac: float, e_ac: float) -> EnergyReport:
    if not (e_mac >= 0 and e_ac >= 0):
        raise ValueError(f"energies per operation must not be negative, got e_mac={e_mac!r} and e_ac={e_ac!r}")
    own = {model.name: replace(model, mac=e_mac, ac=e_ac) for model in (FORMULA, EXECUTED)}
    estimates = {name: estimate(operations, model) for name, model in {**ENERGY_MODELS, **own}.items()}
    formula = own[FORMULA.name]
    layers = [_layer(layer, formula) for layer in operations.layers]
    return EnergyReport(
        layers,
        operations.steps,
        operations.samples,
        e_mac,
        e_ac,
        estimates[FORMULA.name].ann.total_mj,
        _attention(operations, layers, e_mac * PJ_IN_MJ),
        operations.not_counted,
        operations.silence,
        estimates,
        operations,
    )


def _layer(layer: LayerOperations, formula: EnergyModel) -> LayerEnergy:
    energy_mj, once_mj = (
        Cost.sum(step_costs(layer, model)).total_mj for model in (formula, replace(formula, every_step=False))
    )
    bound = formula.ac * layer.macs * sum(layer.bound_rate) * PJ_IN_MJ if layer.bound_rate else None
    synaptic_operations = layer.macs * sum(layer.rate)
    return LayerEnergy(
        layer.name, layer.type, layer.kind, layer.macs, layer.rate, synaptic_operations, energy_mj, once_mj, bound
    )


def _outcome(ann: str, costs: Mapping[str, tuple[Cost, Cost]]) -> str:
    """The models by which the spiking network wins against an ANN, and by which it loses, with the factors."""
    ratios = {name: _ratio(other.total_mj, own.total_mj) for name, (other, own) in costs.items()}
    told = []
    for verb, names in (
        ("win", [name for name, ratio in ratios.items() if ratio is None or ratio > 1]),
        ("lose", [name for name, ratio in ratios.items() if ratio is not None and ratio <= 1]),
    ):
        listed = ", ".join(name if ratios[name] is None else f"{name} ({ratios[name]:.3g}x)" for name in names)
        if names:
            told.append(f"{verb} against {ann} by {listed}")
    return " and ".join(told)


def _attention(operations: Operations, rows: list[LayerEnergy], mac_mj: float) -> AttentionEnergy | None:
    attention = [layer for layer in operations.layers if layer.type == "attention"]
    if not attention:
        return None
    by_name = {row.name: row for row in rows}
    names = [layer.name for layer in attention]
    inside = sum(row.energy_mj for row in rows if row.name in names or any(is_within(row.name, one) for one in names))
    bounds = [by_name[layer.name].bound_mj for layer in attention]
    softmax = sum(vanilla(layer) for layer in attention) * mac_mj
    projections = sum(4 * layer.tokens * layer.channels**2 for layer in attention) * mac_mj
    return AttentionEnergy(
        sdsa_mj=sum(by_name[layer.name].energy_mj for layer in attention),
        bound_mj=None if None in bounds else sum(bound for bound in bounds if bound is not None),
        vanilla_mj=softmax,
        whole_mj=inside,
        vanilla_whole_mj=softmax + projections,
    )


def suitable_unit(millijoule: float) -> tuple[str, float]:
    """A suitable unit for an energy given in mJ, and how many of that unit are one mJ."""
    for unit, factor in (("mJ", 1.0), ("µJ", 1e3), ("nJ", 1e6)):
        if millijoule * factor >= 1:
            return unit, factor
    return "pJ", 1e9


def millijoules(value: float) -> str:
    """An energy given in mJ as text, in a suitable unit."""
    unit, factor = suitable_unit(value)
    return f"{value * factor:.3g} {unit}"


def _ratio(reference: float, value: float) -> Any:
    """`reference / value`, or None if value is zero."""
    return reference / value if value else None
