"""Theoretical energy in millijoules, layer by layer and step by step (45 nm figures of Horowitz, ISSCC 2014)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .operations import LayerOperations, NotCounted, Operations, count_operations
from .probe import Batches, Forward, check_weights, unwrap
from .silence import as_text, warn_if_dead

if TYPE_CHECKING:
    from rich.table import Table

E_MAC = 4.6
"""Energy of a multiply-accumulate in picojoules."""

E_AC = 0.9
"""Energy of an accumulate in picojoules."""

PJ_IN_MJ = 1e-9

Rates = float | Sequence[float]


@dataclass
class LayerEnergy:
    """One row of the energy table: `energy_mj = E * macs * sum(rate)`, with E of a MAC or an AC, for one sample.

    `once_mj` counts a layer that sees the same still image at every step once. `bound_mj` (attention alone) is the
    mixer's estimate; for a mask the paper's `E_AC * N * D * sum(R)`, R being the rates of k and v added up.
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
    and `2 N^2` for softmax); the `whole` figures add the four projections, `4 N D^2` multiply-accumulates if vanilla.
    `bound_mj` is None where a mixer has no such estimate.
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
    neurons never fired, "" where all did.
    """

    layers: list[LayerEnergy]
    steps: int
    samples: int
    e_mac: float
    e_ac: float
    ann_mj: float
    attention: AttentionEnergy | None
    not_counted: list[NotCounted] = field(default_factory=list)
    silence: str = ""

    @property
    def total_mj(self) -> float:
        return sum(layer.energy_mj for layer in self.layers)

    @property
    def total_once_mj(self) -> float:
        """The total with the layers that see a still image computed once instead of at every step."""
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

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text, also written to `path` if given."""
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
        }
        text = json.dumps(content, indent=2) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def table(self) -> Table:
        """A table for rich."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"Energy of one inference, {self.steps} steps, mean of {self.samples} samples")
        table.add_column("layer", overflow="fold")
        table.add_column("kind")
        for name in ("MACs a step", "mean rate", "synaptic operations", "mJ"):
            table.add_column(name, justify="right")
        for layer in self.layers:
            mean = sum(layer.rate) / len(layer.rate)
            operations = (f"{layer.macs:,.0f}", f"{mean:.4f}", f"{layer.synaptic_operations:,.0f}")
            table.add_row(Text(layer.name or "(model)"), layer.kind, *operations, f"{layer.energy_mj:.3g}")
        table.add_section()
        table.add_row("total", "", "", "", f"{self.synaptic_operations:,.0f}", f"{self.total_mj:.4g}")
        table.add_row("total, with a still image's first layer once", "", "", "", "", f"{self.total_once_mj:.4g}")
        table.add_row("the same network as an ANN", "MAC", "", "", "", f"{self.ann_mj:.4g}")
        for operation in self.not_counted:
            table.add_row(Text(str(operation)), "not counted", "", "", "", "?", style="bold red")
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
        AC layers (spikes)          E_AC * macs * sum over t of rate[t]
        mixers of an attention      E_AC for each of their `additions`: a coincidence of k and v where a mask is made
                                    of them; in q (k^T v) also a row of counts for each spike of q

    A unit that is trained as several layers is charged as the one convolution that it is when deployed; with
    `as_trained` its layers are charged one by one.

    `e_mac` and `e_ac` are in picojoules. Batch normalisation folds into the convolution before it and costs nothing,
    folded or not; biases are not counted. The arguments are those of `count_operations`.

    Raises `ValueError` where there is no batch, or the weights are on the meta device.

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

    `rates` is one number for all layers fed by spikes, or a mapping from layer names or patterns ("blocks.*.mlp.*"; the
    first that fits counts) to a number or one number a step. MAC layers that it does not name are charged in full.
    `input_shape` is that of one sample, `[C, H, W]` or `[T, C, H, W]`.

    Raises `ValueError` for a rate outside 0..1, a wrong number of steps, a layer without a rate, a key without a layer.

    >>> with torch.device("meta"):
    ...     model = create_model("sdt_8_512")
    >>> round(energy_from_rates(model, 0.1, (3, 224, 224))["patch.stages.0.conv"].energy_mj, 3)
    1.595
    """
    rates = rates if isinstance(rates, Mapping) else {"*": rates}
    where = next(unwrap(model).parameters(), torch.zeros(0))
    operations = count_operations(
        model, torch.rand(1, *input_shape, device=where.device), neurons=neurons, forward=forward, as_trained=as_trained
    )
    used = set()
    for layer in operations.layers:
        exact = layer.name in rates
        pattern = layer.name if exact else next((key for key in rates if fnmatchcase(layer.name, key)), None)
        if layer.kind == "MAC" and not exact:
            layer.rate = [1.0] * len(layer.rate)
            used.add(pattern)
            continue
        if pattern is None:
            raise ValueError(f"no rate fits the layer {layer.name!r}; name it, or add a pattern such as '*'")
        used.add(pattern)
        layer.rate = _checked(layer.name, rates[pattern], len(layer.rate))
        layer.bound_rate = []
    unknown = [key for key in rates if key not in used]
    if unknown:
        names = ", ".join(layer.name for layer in operations.layers)
        raise ValueError(f"no layer is called {', '.join(unknown)}; the layers are {names}")
    operations.samples, operations.silence = 0, ""
    return _report(operations, e_mac, e_ac)


def _checked(name: str, rate: Rates, steps: int) -> list[float]:
    values = [float(rate)] * steps if isinstance(rate, int | float) else [float(r) for r in rate]
    if len(values) != steps:
        raise ValueError(f"{name}: expected {steps} rates, one a step, got {len(values)}")
    if not all(0 <= value <= 1 for value in values):
        raise ValueError(f"{name}: a firing rate lies between 0 and 1, got {rate!r}")
    return values


def _report(operations: Operations, e_mac: float, e_ac: float) -> EnergyReport:
    if not (e_mac >= 0 and e_ac >= 0):
        raise ValueError(f"energies per operation must not be negative, got e_mac={e_mac!r} and e_ac={e_ac!r}")
    layers = [_layer(layer, e_mac, e_ac) for layer in operations.layers]
    mac_mj = e_mac * PJ_IN_MJ
    ann = sum(mac_mj * (_vanilla(layer) if layer.type == "attention" else layer.macs) for layer in operations.layers)
    return EnergyReport(
        layers,
        operations.steps,
        operations.samples,
        e_mac,
        e_ac,
        ann,
        _attention(operations, layers, mac_mj),
        operations.not_counted,
        operations.silence,
    )


def _layer(layer: LayerOperations, e_mac: float, e_ac: float) -> LayerEnergy:
    picojoules = e_mac if layer.kind == "MAC" else e_ac
    synaptic_operations = layer.macs * sum(layer.rate)
    energy_mj = picojoules * synaptic_operations * PJ_IN_MJ
    once_mj = energy_mj / len(layer.rate) if layer.repeated else energy_mj
    bound = e_ac * layer.macs * sum(layer.bound_rate) * PJ_IN_MJ if layer.bound_rate else None
    return LayerEnergy(
        layer.name, layer.type, layer.kind, layer.macs, layer.rate, synaptic_operations, energy_mj, once_mj, bound
    )


def _vanilla(layer: LayerOperations) -> float:
    """Operations of the softmax attention that a mixer of this size replaces."""
    n, d = layer.tokens, layer.channels
    return 2 * n * n * d + n * n + 2 * n * n


def _attention(operations: Operations, rows: list[LayerEnergy], mac_mj: float) -> AttentionEnergy | None:
    attention = [layer for layer in operations.layers if layer.type == "attention"]
    if not attention:
        return None
    by_name = {row.name: row for row in rows}
    inside = sum(row.energy_mj for row in rows if any(_within(row.name, layer.name) for layer in attention))
    bounds = [by_name[layer.name].bound_mj for layer in attention]
    vanilla = sum(_vanilla(layer) for layer in attention) * mac_mj
    projections = sum(4 * layer.tokens * layer.channels**2 for layer in attention) * mac_mj
    return AttentionEnergy(
        sdsa_mj=sum(by_name[layer.name].energy_mj for layer in attention),
        bound_mj=None if None in bounds else sum(bound for bound in bounds if bound is not None),
        vanilla_mj=vanilla,
        whole_mj=inside,
        vanilla_whole_mj=vanilla + projections,
    )


def _within(name: str, module: str) -> bool:
    return name == module or not module or name.startswith(f"{module}.")


def suitable_unit(millijoule: float) -> tuple[str, float]:
    """The unit in which an energy given in mJ reads well, and how many of it are one mJ."""
    for unit, factor in (("mJ", 1.0), ("µJ", 1e3), ("nJ", 1e6)):
        if millijoule * factor >= 1:
            return unit, factor
    return "pJ", 1e9


def millijoules(value: float) -> str:
    """An energy given in mJ as text, in a suitable unit."""
    unit, factor = suitable_unit(value)
    return f"{value * factor:.3g} {unit}"


def _ratio(reference: float, value: float) -> Any:
    """`reference / value`, or None where nothing was spent."""
    return reference / value if value else None
