"""Firing rates: for each neuron layer and time step, the share of its outputs that are spikes."""

from __future__ import annotations

import csv
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..evaluation import Batches
from ..neuron import IntegerNeuron, spikes_of, takes_sequence
from ..steps import find_mixers
from .moments import Moments, interval, merged
from .probe import Clock, Forward, Hook, Probe, add_at, check_weights, gather
from .silence import as_text, merge_fired, silence, warn_if_dead
from .tables import counted, csv_cell

if TYPE_CHECKING:
    from rich.table import Table

SATURATED = 0.95
"""A channel that fires at this share of its chances or more carries no information any more."""


@dataclass
class LayerRates:
    """The firing rates of one layer.

    `rate` has one value per step; `silent` and `saturated` are the shares of its channels that never fired, and that
    fired at 95 % or more of all positions, steps and samples. `neurons` is its size for one sample, 0 if the layer is a
    product of spikes. `std` is the standard deviation over `samples` of a sample's mean over the steps, None for fewer
    than two samples.
    """

    name: str
    rate: list[float]
    channel_rate: list[float]
    neurons: int
    std: float | None = None
    samples: int = 0

    def interval(self, confidence: float = 0.95) -> tuple[float, float] | None:
        """The confidence interval of the mean, over samples; None for fewer than two. Raises outside of 0..1."""
        return interval(self.mean, self.std, self.samples, confidence)

    @property
    def mean(self) -> float:
        """The mean over the steps."""
        return float(np.mean(self.rate))

    @property
    def silent(self) -> float:
        return float(np.mean(np.asarray(self.channel_rate) == 0))

    @property
    def saturated(self) -> float:
        return float(np.mean(np.asarray(self.channel_rate) >= SATURATED))


@dataclass
class FiringRates:
    """Firing rates of a model by layer name, in the order of the forward pass; `rates["head_neuron"].rate[0]`.

    `silence` says which neurons never fired, "" if all did. `std` is the standard deviation over the samples of
    `mean`, None for fewer than two.
    """

    layers: dict[str, LayerRates]
    samples: int
    silence: str = ""
    std: float | None = None

    def interval(self, confidence: float = 0.95) -> tuple[float, float] | None:
        """The confidence interval of `mean`, over samples; None for fewer than two. Raises outside of 0..1."""
        return interval(self.mean, self.std, self.samples, confidence)

    def __getitem__(self, name: str) -> LayerRates:
        if name not in self.layers:
            raise KeyError(f"there is no layer {name!r}; the layers are {', '.join(self.layers)}")
        return self.layers[name]

    @property
    def steps(self) -> int:
        """The largest number of time steps of any layer."""
        return max((len(layer.rate) for layer in self.layers.values()), default=0)

    @property
    def mean(self) -> float:
        """The share of all neurons that fire at a step, averaged over steps and samples."""
        neurons = sum(layer.neurons for layer in self.layers.values())
        return sum(layer.neurons * layer.mean for layer in self.layers.values()) / neurons

    def to_csv(self, path: str | Path, confidence: float = 0.95) -> None:
        """Writes a line per layer: mean, deviation, interval, silent and saturated channels, the rate of every step."""
        header = ["layer", "mean", "std", "low", "high", "silent", "saturated"]
        header += [f"step_{t}" for t in range(self.steps)]
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            for layer in self.layers.values():
                low, high = layer.interval(confidence) or ("", "")
                name = csv_cell(layer.name)
                writer.writerow([name, layer.mean, layer.std, low, high, layer.silent, layer.saturated, *layer.rate])

    def table(self) -> Table:
        """A table for rich."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=f"Firing rates over {counted(self.samples, 'sample')}")
        table.add_column("layer", overflow="fold")
        for name in ("mean", "± std", "silent", "saturated", *(f"step {t}" for t in range(self.steps))):
            table.add_column(name, justify="right")
        for layer in self.layers.values():
            shares = (f"{share:.1%}" for share in (layer.silent, layer.saturated))
            std = "-" if layer.std is None else f"{layer.std:.4f}"
            table.add_row(Text(layer.name), f"{layer.mean:.4f}", std, *shares, *(f"{rate:.4f}" for rate in layer.rate))
        return table

    def __str__(self) -> str:
        return as_text([self.silence] if self.silence else [], self.table())


@dataclass
class Counts:
    """Spikes, and positions where there could be one, per step and per channel, in float64."""

    spikes: np.ndarray = field(default_factory=lambda: np.zeros(0))
    chances: np.ndarray = field(default_factory=lambda: np.zeros(0))
    channel_spikes: np.ndarray = field(default_factory=lambda: np.zeros(0))
    channel_chances: float = 0.0

    def add(self, other: Counts) -> None:
        self.spikes = add_at(self.spikes, other.spikes)
        self.chances = add_at(self.chances, other.chances)
        self.channel_spikes = add_at(self.channel_spikes, other.channel_spikes)
        self.channel_chances += other.channel_chances


class SpikeCounts:
    """Counts the spikes of layers while a probe runs: `totals` by layer, updated by `end_batch` after each batch.

    A level l counts as l spikes of one step, or with `unfold` as a spike in l steps of its own.
    """

    def __init__(self, probe: Probe, layers: Mapping[str, nn.Module], *, unfold: bool = False) -> None:
        self._unfold = unfold
        self.totals: dict[str, Counts] = {}
        self._probe = probe
        self._calls: dict[str, list[_Call]] = {}
        for name, module in layers.items():
            probe.watch(module, self._noting(name, name not in probe.neurons or takes_sequence(module)))

    def _noting(self, name: str, sequence: bool) -> Hook:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            spikes, whole = spikes_of(output), False
            if isinstance(module, IntegerNeuron):
                levels, whole = (spikes * module.norm).round(), not self._unfold
                spikes = levels if whole else _binary_steps(levels, module.levels)
            self._calls.setdefault(name, []).append(_count(spikes, sequence, whole=whole))

        return note

    def end_batch(self) -> dict[str, np.ndarray]:
        """Adds the calls of the batch that has run, and returns the spikes of each of its samples `[T, B]`.

        They are cumulative sums over the first 1, 2, ... steps.
        """
        by_sample = {}
        for name, calls in self._calls.items():
            self.totals.setdefault(name, Counts()).add(_sum(calls, self._probe.clock))
            by_sample[name] = _by_sample(calls, self._probe.clock)
        self._calls.clear()
        return by_sample


def merge_counts(parts: Iterable[Mapping[str, Counts]]) -> dict[str, Counts]:
    """The counts of several processes, summed by layer."""
    merged: dict[str, Counts] = {}
    for part in parts:
        for name, counts in part.items():
            merged.setdefault(name, Counts()).add(counts)
    return merged


@dataclass
class _Call:
    """One call of a layer: spikes by step and channel `[t, c]`, positions for one, and spikes by step and sample."""

    sequence: bool
    spikes: Tensor
    chances: int
    by_sample: Tensor


def firing_rates(
    model: nn.Module,
    batches: Batches,
    *,
    neurons: Sequence[type[nn.Module]] = (),
    forward: Forward | None = None,
    as_trained: bool = False,
) -> FiringRates:
    """Firing rates of every neuron layer at every time step, averaged over all samples of all batches and processes.

    Counts are summed in float64 and divided at the end: a short last batch counts by its samples, and memory does not
    grow with the number of batches. Besides the neurons, `coincidences` (k * v) and `masked` (q * a) of a spike-driven
    self-attention are layers, and with event pooling `k_pool` and `v_pool`. A rate is the share of non-zero entries.
    An `IntegerNeuron` has as many steps as levels for each frame: in step i it fires where its level is above i.

    `model` runs in eval mode; `neurons` are further types of modules to count, called with `[T, B, ...]`;
    `forward(model, batch)` runs one batch if `model(x)` does not. The network is judged as it is deployed, with norms
    folded and chains of layers merged, unless `as_trained`. Under `torch.distributed` each process calls this with its
    own share.

    Raises `ValueError` if there is no neuron layer or no batch, or if the weights are on the meta device.

    >>> rates = firing_rates(example_model(), example_images()[0])
    >>> [rate > 0.4 for rate in rates["head_neuron"].rate]  # one value per step
    [True, True, True, True]
    """
    check_weights(model)
    samples = 0
    with Probe(model, neurons, forward, as_trained=as_trained) as probe:
        if not probe.neurons:
            owner = type(probe.model).__name__
            raise ValueError(f"{owner} has no known neuron layer; name the types of its neurons in neurons=")
        counts = SpikeCounts(probe, _watched(probe), unfold=True)
        moments = Moments()
        for _ in probe.run(batches):
            samples += probe.clock.batch
            moments.add(Moments.of({name: each[-1] for name, each in counts.end_batch().items()}))
        parts = gather((counts.totals, samples, probe.fired, moments))
    totals, all_samples, fired, spread = zip(*parts, strict=True)
    result = _rates(merge_counts(totals), sum(all_samples), merged(spread), probe.neurons)
    result.silence = silence(probe.model, merge_fired(fired))
    warn_if_dead(result.silence)
    return result


def _watched(probe: Probe) -> dict[str, nn.Module]:
    layers = dict(probe.neurons)
    for name, mixer in find_mixers(probe.model).items():
        for part in getattr(mixer, "seen", ("",) if mixer.emits != "counts" else ()):
            layers[f"{name}.{part}".strip(".")] = mixer.get_submodule(part)
    return layers


def _binary_steps(levels: Tensor, most: int) -> Tensor:
    """Levels `[T, ...]` as spikes `[T * most, ...]`: step i of a frame has a spike where the level is above i."""
    steps = torch.arange(most, device=levels.device).view(1, -1, *[1] * (levels.ndim - 1))
    return (levels.unsqueeze(1) > steps).flatten(0, 1)


def _count(spikes: Tensor, sequence: bool, *, whole: bool = False) -> _Call:
    by_step = spikes if sequence else spikes.unsqueeze(0)
    by_step = by_step if by_step.ndim > 1 else by_step.unsqueeze(1)
    if by_step.is_meta:
        counts = torch.zeros(*by_step.shape[:3], dtype=torch.int64)
    elif by_step.ndim > 3:
        places = tuple(range(3, by_step.ndim))
        counts = by_step.sum(places) if whole else by_step.count_nonzero(dim=places)
    else:
        counts = by_step if whole else (by_step != 0).long()
    counts = counts if counts.ndim > 2 else counts.unsqueeze(2)
    chances = by_step.numel() // (len(counts) * counts.shape[2])
    return _Call(sequence, counts.sum(1), chances, counts.sum(2))


def _sum(calls: list[_Call], clock: Clock) -> Counts:
    """The calls of one forward pass. A neuron that is called step by step has one call per step, or more if shared."""
    result = Counts()
    for call, offset in _placed(calls, clock):
        counts = call.spikes.cpu().numpy().astype(np.float64)
        spikes = np.pad(counts.sum(1), (offset, 0))
        chances = np.pad(np.full(len(counts), float(call.chances * counts.shape[1])), (offset, 0))
        result.add(Counts(spikes, chances, counts.sum(0), float(call.chances * len(counts))))
    return result


def _by_sample(calls: list[_Call], clock: Clock) -> np.ndarray:
    """The spikes of each sample in the first 1, 2, ... steps `[T, B]`."""
    total = np.zeros((0, clock.batch))
    for call, offset in _placed(calls, clock):
        counts = call.by_sample.cpu().numpy().astype(np.float64)
        if counts.shape[1] != clock.batch:
            counts = np.repeat(counts.sum(1, keepdims=True) / clock.batch, clock.batch, axis=1)
        missing = offset + len(counts) - len(total)
        total = np.pad(total, ((0, max(missing, 0)), (0, 0)))
        total[offset : offset + len(counts)] += counts
    return total.cumsum(0)


def _placed(calls: list[_Call], clock: Clock) -> Iterator[tuple[_Call, int]]:
    """Each call and the step at which it starts."""
    steps = clock.steps if len(calls) % clock.steps == 0 else len(calls)
    for i, call in enumerate(calls):
        yield call, 0 if call.sequence else i * steps // len(calls)


def _rates(counts: Mapping[str, Counts], samples: int, moments: Moments, neurons: Container[str]) -> FiringRates:
    if samples == 0:
        raise ValueError("there was no batch to run; check that the data is not empty")
    if not counts:
        raise ValueError("no neuron layer took part in the forward pass; give forward= where it is not model(x)")
    chances = {name: layer.chances.sum() / samples for name, layer in counts.items()}
    layers = {
        name: LayerRates(
            name,
            [float(rate) for rate in layer.spikes / layer.chances],
            [float(rate) for rate in layer.channel_spikes / layer.channel_chances],
            round(layer.chances[0] / samples) if name in neurons else 0,
            moments.std({name: 1 / chances[name]}),
            samples,
        )
        for name, layer in counts.items()
    }
    every = sum(layer.neurons for layer in layers.values())
    share = {name: layer.neurons / (every * chances[name]) for name, layer in layers.items() if layer.neurons}
    return FiringRates(layers, samples, std=moments.std(share))
