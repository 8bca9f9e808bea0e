"""Energy models: what a network is charged for, by constants with a source, and when an ANN would need less.

A model is a table of constants, `EnergyModel`; the functions below are its equations, applied to the records of
`count_operations`. The same equations serve all models, the spiking network and both of its ANNs.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from .moments import interval
from .operations import LayerOperations, NeuronOperations, Operations

E_MAC = 4.6
"""Energy of a multiply-accumulate in picojoules."""

E_AC = 0.9
"""Energy of an accumulate in picojoules."""

PJ_IN_MJ = 1e-9

WORD = 32
"""Bits in a word of memories that are priced by their size."""

Record = LayerOperations | NeuronOperations


@dataclass(frozen=True)
class EnergyModel:
    """What is charged, and how much. Energies are in picojoules: per operation, or per bit that is moved.

    Compute: `mac` and `ac`, an operation; `update`, a state at each step; `reset`, a spike that a neuron emits.
    `addressing`: one more addition for each operation that a spike causes and two `mac` for each spike into a
    convolution; for analog inputs an addition for each input and output.

    Memory: `weight`, each use of a weight or bias; `weight_once`, each weight once per inference; `state`, each number
    that a neuron keeps, once when it is read and once when it is written at each step, with `state_per_operation` a
    membrane also at each addition; `spike`, a spike that is read by a layer or written by a neuron; `activation`, an
    analog value instead of a spike. The `_bits` are their widths. `stationary`: a layer of analog values keeps its
    weights in place and fetches an input for each operation, where spikes fetch a weight. `buffers` are pairs of a
    memory's size in bytes and the price of a word of 32 bits, linear in between; the size of the memory that holds the
    values then determines all prices except `weight_once`. Spikes wait in `queue` bytes, and a convolution of analog
    values reads its input for each operation.

    What is counted: `padding`, a convolution's operations on its padding; `every_step`, a still image's first
    layer at every step although it is computed once; `biases`, an addition for each output of a layer that has one.
    """

    name: str
    source: str
    mac: float = E_MAC
    ac: float = E_AC
    update: float = 0.0
    reset: float = 0.0
    addressing: bool = False
    weight: float = 0.0
    weight_once: float = 0.0
    state: float = 0.0
    spike: float = 0.0
    activation: float = 0.0
    weight_bits: float = WORD
    state_bits: float = WORD
    spike_bits: float = 1
    activation_bits: float = WORD
    stationary: bool = False
    state_per_operation: bool = False
    buffers: tuple[tuple[float, float], ...] = ()
    queue: float = 4000.0
    padding: bool = False
    every_step: bool = False
    biases: bool = True

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, int | float) and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{self.name}: {item.name} must not be negative or infinite, got {value!r}")
        sizes = [size for size, _ in self.buffers]
        if sizes != sorted(set(sizes)) or any(not price >= 0 for _, price in self.buffers):
            raise ValueError(f"{self.name}: buffers must grow in size and cost no less than nothing: {self.buffers}")

    def price(self, flat: float, size: float) -> float:
        """Picojoules per bit of a memory of `size` bytes: `flat`, or the price from `buffers`."""
        if not self.buffers:
            return flat
        sizes, prices = np.array(self.buffers).T
        return float(np.interp(size, sizes, prices)) / WORD


HOROWITZ = "Horowitz, Computing's energy problem, ISSCC 2014: 45 nm, 32-bit floating point"

FORMULA = EnergyModel("formula", f"the papers' formula; {HOROWITZ}", padding=True, every_step=True, biases=False)

EXECUTED = EnergyModel("executed", f"the operations that are done; {HOROWITZ}")

STEP = EnergyModel(
    "step",
    f"operations; 3.12 pJ a bit for weights used and membranes (STEP, https://arxiv.org/abs/2505.11151); {HOROWITZ}",
    weight=3.12,
    state=3.12,
)

LEMAIRE = EnergyModel(
    "lemaire",
    "integer operations, addressing and words of SRAM by its size (Lemaire et al., https://arxiv.org/abs/2210.13107)",
    mac=3.2,
    ac=0.1,
    reset=0.1,
    update=3.2,
    addressing=True,
    spike_bits=WORD,
    state_per_operation=True,
    buffers=((0, 0), (8 * 1024, 10), (32 * 1024, 20), (1024 * 1024, 100)),
)

YAN = EnergyModel(
    "yan",
    "22 nm, 8-bit weights: from DRAM once, then by each spike, or in place (Yan et al., https://arxiv.org/abs/2409.08290)",
    mac=8 * 0.05448,
    ac=0.05448,
    update=0.05448,
    reset=0.05448,
    weight=0.25,
    weight_once=20.0,
    stationary=True,
    state=0.25,
    spike=3.0,
    activation=0.25,
    weight_bits=8,
    state_bits=16,
    activation_bits=8,
)

ENERGY_MODELS = {model.name: model for model in (FORMULA, EXECUTED, STEP, LEMAIRE, YAN)}
"""The models by name: two that charge only operations, three with memory."""


@dataclass(frozen=True)
class Cost:
    """Millijoules of operations, and of moving weights, membranes, and spikes (or activations, in an ANN)."""

    compute_mj: float = 0.0
    weights_mj: float = 0.0
    states_mj: float = 0.0
    spikes_mj: float = 0.0

    @property
    def memory_mj(self) -> float:
        return self.weights_mj + self.states_mj + self.spikes_mj

    @property
    def total_mj(self) -> float:
        return self.compute_mj + self.memory_mj

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(_parts(self), _parts(other), strict=True)))

    @classmethod
    def sum(cls, costs: Iterable[Cost]) -> Cost:
        return sum(costs, cls())


@dataclass
class RowEstimate:
    """One layer, or one neuron layer (type "neuron"), by one model, for one sample.

    `steps` are the costs of the spiking network step by step; `ann` and `quantised` those of the ANNs, which run once.
    `rate` is the mean over the steps of the share of its inputs that count (for a neuron: of its outputs).
    `break_even` is the rate at which the spiking layer would cost as much as the ANN's: above 1 it wins at any rate,
    below 0 it loses at any. It is None for analog inputs and for neurons. `std_mj` is the standard deviation of its
    cost over `samples`, None for fewer than two.
    """

    name: str
    type: str
    rate: float
    steps: list[Cost]
    ann: Cost
    quantised: Cost
    break_even: float | None = None
    break_even_quantised: float | None = None
    std_mj: float | None = None
    samples: int = 0

    def interval(self, confidence: float = 0.95) -> tuple[float, float] | None:
        """The confidence interval of the mean cost in mJ; None for fewer than two samples. Raises outside of 0..1."""
        return interval(self.cost.total_mj, self.std_mj, self.samples, confidence)

    @property
    def cost(self) -> Cost:
        """All steps together."""
        return Cost.sum(self.steps)


@dataclass
class Estimate:
    """The energy of one inference by one model, for one sample: `rows` are the layers, then the neuron layers.

    `ann` is the same network as an ANN: each layer once, in full, softmax attention instead of the spike-driven one.
    `quantised` is the ANN whose activations have as many values as a neuron has over all steps, `bits` wide; a product
    with one costs `bits` additions, or a multiplication if that is less. `break_even` is the common rate of all spikes
    at which the whole network would cost as much as the ANN; `std_mj` the standard deviation of the spiking network's
    cost over `samples`, `steps_std_mj` that of its first 1, 2, ... steps; None and empty for fewer than two samples.
    """

    model: EnergyModel
    rows: list[RowEstimate]
    bits: int
    break_even: float | None = None
    break_even_quantised: float | None = None
    samples: int = 0
    steps_std_mj: list[float] = field(default_factory=list)

    @property
    def std_mj(self) -> float | None:
        return self.steps_std_mj[-1] if self.steps_std_mj else None

    def interval(self, confidence: float = 0.95, *, steps: int | None = None) -> tuple[float, float] | None:
        """The confidence interval of the mean cost in mJ, or of that of the first `steps`.

        None for fewer than two samples. Raises `ValueError` for a confidence outside of 0..1.
        """
        if steps is None or not self.steps_std_mj:
            return interval(self.cost.total_mj, self.std_mj, self.samples, confidence)
        std = self.steps_std_mj[min(steps, len(self.steps_std_mj)) - 1]
        return interval(Cost.sum(self.steps[:steps]).total_mj, std, self.samples, confidence)

    @property
    def cost(self) -> Cost:
        return Cost.sum(row.cost for row in self.rows)

    @property
    def steps(self) -> list[Cost]:
        """The costs of all rows together, step by step."""
        most = max((len(row.steps) for row in self.rows), default=0)
        return [Cost.sum(row.steps[t] for row in self.rows if t < len(row.steps)) for t in range(most)]

    @property
    def ann(self) -> Cost:
        return Cost.sum(row.ann for row in self.rows)

    @property
    def quantised(self) -> Cost:
        return Cost.sum(row.quantised for row in self.rows)

    def to_dict(self, confidence: float = 0.95) -> dict[str, Any]:
        """Everything as JSON data; energies in millijoules, those of the spiking network also step by step."""
        rows = [
            {
                "name": row.name,
                "type": row.type,
                "rate": row.rate,
                **_flat(row.cost, row.steps, row.ann, row.quantised),
                "std_mj": row.std_mj,
                "interval_mj": row.interval(confidence),
                "break_even": row.break_even,
                "break_even_quantised": row.break_even_quantised,
            }
            for row in self.rows
        ]
        return {
            "model": asdict(self.model),
            **_flat(self.cost, self.steps, self.ann, self.quantised),
            "std_mj": self.std_mj,
            "interval_mj": self.interval(confidence),
            "quantised_bits": self.bits,
            "break_even": self.break_even,
            "break_even_quantised": self.break_even_quantised,
            "rows": rows,
        }


def estimate(operations: Operations, model: EnergyModel) -> Estimate:
    """The energy of counted operations by one model."""
    bits = math.ceil(math.log2(operations.steps + 1))
    records: list[Record] = [*operations.layers, *operations.neurons]
    rows = [_row(record, model, bits) for record in records]
    result = Estimate(model, rows, bits, samples=operations.samples)
    shares = [_shares(record, model) for record in records]
    for row, share in zip(rows, shares, strict=True):
        row.std_mj = operations.moments[-1].std(share) if operations.moments else None
        row.samples = operations.samples
    whole = {key: value for share in shares for key, value in share.items()}
    spread = [moments.std(whole) for moments in operations.moments]
    result.steps_std_mj = [std for std in spread if std is not None]
    none, all_fire = (
        sum(_total(at_rates(record, [rate] * len(_rates(record))), model) for record in records) for rate in (0.0, 1.0)
    )
    result.break_even = _break_even(result.ann.total_mj, none, all_fire)
    result.break_even_quantised = _break_even(result.quantised.total_mj, none, all_fire)
    return result


def _row(record: Record, model: EnergyModel, bits: int) -> RowEstimate:
    rates = _rates(record)
    ann, quantised = ann_cost(record, model), ann_cost(record, model, bits)
    type_ = record.type if isinstance(record, LayerOperations) else "neuron"
    row = RowEstimate(record.name, type_, sum(rates) / len(rates), step_costs(record, model), ann, quantised)
    if isinstance(record, LayerOperations) and record.kind == "AC":
        none, all_fire = (_total(at_rates(record, [rate] * len(rates)), model) for rate in (0.0, 1.0))
        row.break_even = _break_even(ann.total_mj, none, all_fire)
        row.break_even_quantised = _break_even(quantised.total_mj, none, all_fire)
    return row


def step_costs(record: Record, model: EnergyModel) -> list[Cost]:
    """The cost of one layer or neuron layer of the spiking network at each step."""
    if isinstance(record, NeuronOperations):
        return [_neuron_cost(record, model, spikes) for spikes in record.spikes]
    costs = []
    for step, (rate, executed, moved) in enumerate(zip(record.rate, record.executed, record.moved, strict=True)):
        if step and record.repeated and not model.every_step:
            costs.append(Cost())
            continue
        operations = record.macs * rate if model.padding else executed
        spikes = record.kind == "AC"
        cost = _product_cost(record, model, operations, model.ac if spikes else model.mac, moved, spikes=spikes)
        costs.append(cost + _loaded(record, model) if step == 0 else cost)
    return costs


def ann_cost(record: Record, model: EnergyModel, bits: int | None = None) -> Cost:
    """The cost of the same layer in an ANN, once; with activations of `bits` bits if given."""
    width = model.activation_bits if bits is None else bits
    if isinstance(record, NeuronOperations):
        price = model.price(model.activation, record.neurons * WORD / 8)
        return _mj(spikes=record.neurons * (WORD if model.buffers else width) * price)
    operations = record.macs if model.padding else record.executed_macs
    if record.type == "attention":
        operations = vanilla(record)
    price = model.mac if bits is None else min(model.mac, bits * model.ac)
    cost = _product_cost(record, model, operations, price, record.inputs, spikes=False, width=width)
    return cost + _loaded(record, model)


def _product_cost(
    layer: LayerOperations,
    model: EnergyModel,
    operations: float,
    price: float,
    moved: float,
    *,
    spikes: bool,
    width: float | None = None,
) -> Cost:
    """The equation for all products: `operations` at `price`, and `moved` inputs, spikes or values of `width` bits."""
    biases = layer.biases if model.biases else 0.0
    compute = price * operations + model.ac * biases
    convolution = layer.type == "conv"
    if model.addressing:
        compute += model.ac * operations + 2 * model.mac * moved * convolution if spikes else 0.0
        compute += 0.0 if spikes else model.ac * (layer.inputs + layer.outputs)
    fetches = operations * bool(layer.weights) + biases if spikes or not model.stationary else 0.0
    weights = fetches * model.weight_bits
    weights *= model.price(model.weight, layer.weights * WORD / 8)
    states = 2 * operations * model.state_bits * model.state_per_operation * spikes
    states *= model.price(model.state, layer.outputs * WORD / 8)
    if spikes:
        carried = moved * model.spike_bits * model.price(model.spike, model.queue)
    else:
        reads = operations if model.stationary or (model.buffers and convolution) else moved
        bits = WORD if model.buffers else model.activation_bits if width is None else width
        carried = reads * bits * model.price(model.activation, layer.inputs * WORD / 8)
    return _mj(compute, weights, states, carried)


def _loaded(layer: LayerOperations, model: EnergyModel) -> Cost:
    """Fetching the weights of a layer once per inference."""
    return _mj(weights=layer.weights * model.weight_bits * model.weight_once)


def _neuron_cost(neuron: NeuronOperations, model: EnergyModel, spikes: float) -> Cost:
    states = neuron.neurons * neuron.states
    return _mj(
        compute=states * model.update + spikes * model.reset,
        states=2 * states * model.state_bits * model.price(model.state, states * WORD / 8),
        spikes=spikes * model.spike_bits * model.price(model.spike, model.queue),
    )


def vanilla(layer: LayerOperations) -> float:
    """Operations of the softmax attention that a mixer of this size replaces."""
    n, d = layer.tokens, layer.channels
    return 2 * n * n * d + n * n + 2 * n * n


def at_rates(record: Record, rates: Sequence[float]) -> Any:
    """The record as if these shares of its inputs counted, one per step; for a neuron layer, as if that share fired.

    Layers on analog inputs are unchanged. For levels they are shares of all binary steps.
    """
    if isinstance(record, NeuronOperations):
        return replace(record, spikes=[record.neurons * record.levels * rate for rate in rates])
    if record.kind == "MAC":
        return record
    return with_rates(record, rates)


def with_rates(layer: LayerOperations, rates: Sequence[float]) -> LayerOperations:
    """A layer, fed by spikes or not, as if these shares of its inputs counted, one per step."""
    numbers = [layer.levels * rate for rate in rates]
    return replace(
        layer,
        rate=numbers,
        executed=[layer.executed_macs * number for number in numbers],
        moved=[layer.inputs * number for number in numbers],
    )


def read_energy_models(path: str | Path) -> dict[str, EnergyModel]:
    """Your own energy models from YAML: constants of `EnergyModel` by the model's name, on top of those of `base`.

    Raises `ValueError` for an unknown base or constant, or a value that is not a number.

        chip:
          base: step
          source: measured on our chip
          ac: 0.03
          buffers: [[0, 0], [8192, 10]]
    """
    from omegaconf import OmegaConf

    content: Any = OmegaConf.to_container(OmegaConf.load(path))
    if not isinstance(content, Mapping) or not all(isinstance(value, Mapping) for value in content.values()):
        raise ValueError(f"{path}: expected constants under the name of each model, got {content!r}")
    return {str(name): _read(path, str(name), dict(own)) for name, own in content.items()}


def _read(path: str | Path, name: str, own: dict[str, Any]) -> EnergyModel:
    where, base = f"{path}: {name}", own.pop("base", EXECUTED.name)
    if base not in ENERGY_MODELS:
        raise ValueError(f"{where}: base must be one of {', '.join(ENERGY_MODELS)}, got {base!r}")
    own.setdefault("source", f"constants of {Path(path).name} upon {base}")
    known = {item.name: item.default for item in fields(EnergyModel) if item.name != "name"}
    for key, value in own.items():
        if key not in known:
            raise ValueError(f"{where}: there is no constant {key!r}; there are base, {', '.join(known)}")
        if key == "buffers":
            if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
                raise ValueError(f"{where}: buffers must be pairs of a size in bytes and a price, got {value!r}")
            own[key] = tuple((float(size), float(price)) for size, price in value)
        elif key != "source":
            switch = isinstance(known[key], bool)
            if not isinstance(value, int | float) or isinstance(value, bool) != switch:
                raise ValueError(f"{where}: {key} must be {'true or false' if switch else 'a number'}, got {value!r}")
    return replace(ENERGY_MODELS[base], name=name, **own)


def _rates(record: Record) -> list[float]:
    if isinstance(record, LayerOperations):
        return [rate / record.levels for rate in record.rate]
    return [spikes / (record.neurons * record.levels) for spikes in record.spikes]


def _shares(record: Record, model: EnergyModel) -> dict[Hashable, float]:
    """The cost in mJ of one more unit of each value that differs between samples: costs are linear in them."""
    none = at_rates(record, [0.0] * len(_rates(record)))
    one = [1.0] + [0.0] * (len(_rates(record)) - 1)
    if isinstance(record, NeuronOperations):
        more = {"spikes": replace(none, spikes=one)}
    elif record.varies and record.macs:
        none = with_rates(record, [0.0] * len(record.rate))
        rate = [share / record.macs for share in one]
        more = {
            "charged": replace(none, rate=rate),
            "executed": replace(none, executed=one),
            "moved": replace(none, moved=one),
        }
    else:
        return {}
    return {(record.name, what): _total(each, model) - _total(none, model) for what, each in more.items()}


def _total(record: Record, model: EnergyModel) -> float:
    return sum(cost.total_mj for cost in step_costs(record, model))


def _break_even(ann: float, none: float, all_fire: float) -> float | None:
    """Where the line through the energies at the rates 0 and 1 meets the ANN's energy."""
    return (ann - none) / (all_fire - none) if all_fire != none else None


def _mj(compute: float = 0.0, weights: float = 0.0, states: float = 0.0, spikes: float = 0.0) -> Cost:
    return Cost(*(PJ_IN_MJ * part for part in (compute, weights, states, spikes)))


def _parts(cost: Cost) -> tuple[float, ...]:
    return cost.compute_mj, cost.weights_mj, cost.states_mj, cost.spikes_mj


def _flat(cost: Cost, steps: Sequence[Cost], ann: Cost, quantised: Cost) -> dict[str, Any]:
    return {
        "total_mj": cost.total_mj,
        **asdict(cost),
        "memory_mj": cost.memory_mj,
        "step_compute_mj": [step.compute_mj for step in steps],
        "step_memory_mj": [step.memory_mj for step in steps],
        "ann_mj": ann.total_mj,
        "ann_compute_mj": ann.compute_mj,
        "quantised_mj": quantised.total_mj,
        "quantised_compute_mj": quantised.compute_mj,
    }
