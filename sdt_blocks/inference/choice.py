"""When events pay: up to which firing rate an event-driven product is cheaper, and which form is faster."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ..evaluation import Batches, each_of, input_of
from ..ops.packed import PackedSpikes, kernels_path
from .events import Events
from .integers import FLOAT32, SpikeProduct
from .timings import best_seconds, timings

RATE = 0.2
"""The firing rate at which the additions of a product are timed."""
_ROUNDS, _SECONDS = 5, 0.5
WORTH = 0.98
"""A form is chosen if it takes less than this share of another one's time: smaller differences are chance."""

Places = tuple[int, int, int, int]
"""Steps, images, height and width."""


class ProductCosts(NamedTuple):
    """Seconds of one product: by events on silent inputs and on inputs that fire at `RATE`, and densely on any input.

    They are measured in turn, so that another process that loads the machine meanwhile slows down all of them.
    """

    silent: float
    firing: float
    dense: float

    @staticmethod
    def of(places: Places, product: SpikeProduct) -> ProductCosts:
        """The costs of a product on frames of this shape, measured once per machine and shape."""
        out, into, kernel, _ = product.weight.weight.shape
        fired = product.epilogue.planes
        what = "membranes" if product.epilogue.neuron is None else "spikes" if fired == 1 else f"{fired} levels"
        what = what if product.kind == FLOAT32 else f"{product.kind} {what}"
        shape = f"{'x'.join(map(str, places))} {into}x{product.planes}->{out} {kernel}x{kernel}"
        costs = timings().of(
            f"{kernels_path().stem}, {what} {shape}", lambda: ProductCosts.measure(places, product)._asdict()
        )
        return ProductCosts(**costs)

    @staticmethod
    def measure(places: Places, product: SpikeProduct) -> ProductCosts:
        """The best of a few rounds of each."""
        silent, firing = (_random_spikes(places, product, rate) for rate in (0.0, RATE))
        membrane = product.epilogue.neuron is None
        calls = [
            partial(product.events, silent, membrane=membrane),
            partial(product.events, firing, membrane=membrane),
            partial(product.dense, firing, membrane=membrane),
        ]
        return ProductCosts(*_in_turn(calls, _ROUNDS))

    def break_even(self) -> float:
        """The firing rate of the input at which both ways take equally long, between 0 and 1."""
        adding = (self.firing - self.silent) / RATE
        if adding <= 0:
            return float(self.silent <= self.dense)
        return min(max((self.dense - self.silent) / adding, 0.0), 1.0)


class Layer(NamedTuple):
    """A calibrated product: the firing rate of its input, and the rate above which it is computed densely."""

    name: str
    rate: float
    break_even: float


@dataclass(frozen=True)
class Calibration:
    """What `optimize_for_inference(model, sparse="auto")` measured and chose; prints as a table."""

    layers: list[Layer]
    event_driven_seconds: float
    dense_seconds: float

    @property
    def event_driven(self) -> bool:
        """Whether the event-driven model is clearly the faster one."""
        return self.event_driven_seconds <= WORTH * self.dense_seconds

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=0)
        lines = [f"{'layer':{width}}  input rate  break-even  computed"]
        lines += [
            f"{name:{width}}  {rate:10.2%}  {limit:10.2%}  {'by events' if rate <= limit else 'densely'}"
            for name, rate, limit in self.layers
        ]
        seconds = f"{self.event_driven_seconds:.4g} s, all dense: {self.dense_seconds:.4g} s"
        chosen = "event-driven" if self.event_driven else "dense"
        lines += [f"a calibration batch, event-driven: {seconds}; chosen: {chosen}", f"costs: {timings().path}"]
        return "\n".join(lines)


def calibrate(model: Events, batches: Iterable[Any]) -> list[Layer]:
    """Sets the `break_even` of every product of the model for the shapes of its inputs; returns what was measured.

    `batches` are inputs of the model, or tuples that start with one, as from a data loader.
    """
    spikes: dict[str, list[int]] = {}
    places: dict[str, Places] = {}

    def note(name: str, packed: PackedSpikes) -> None:
        steps, images, height, width = packed.words.shape[:4]
        shape = (steps, images, height, width)
        seen = spikes.setdefault(name, [0, 0])
        seen[0] += packed.count()
        seen[1] += math.prod(shape) * packed.channels * packed.planes
        places[name] = max(places.get(name, shape), shape, key=math.prod)

    hooks = [
        product.register_forward_pre_hook(lambda _, given, name=name: note(name, given[0]))
        for name, product in model.products()
    ]
    try:
        for batch in batches:
            model(input_of(batch))
    finally:
        for hook in hooks:
            hook.remove()
    layers = []
    for name, product in model.products():
        product.break_even = ProductCosts.of(places[name], product).break_even() if product.has_events else 0.0
        fired, neurons = spikes[name]
        layers.append(Layer(name, fired / neurons, product.break_even))
    return layers


def choose(make: Callable[[], Events], dense: nn.Module, batches: Batches) -> nn.Module:
    """`dense`, or the event-driven model from `make` if that is faster on the batches; `calibration` says why.

    The event-driven model uses its layers' break-even rates, unless it is clearly faster with every layer by events. If
    the model cannot run event-driven, one warning says so. Raises `ValueError` without batches.
    """
    batches = [input_of(batch) for batch in each_of(batches)]
    if not batches:
        raise ValueError("calibrate must hold at least one batch of images or frames")
    try:
        event_driven = make()
    except (ValueError, RuntimeError) as error:
        warnings.warn(f"the model is optimized densely: {error}", stacklevel=3)
        return dense
    layers = calibrate(event_driven, batches)
    by_events = [
        layer._replace(break_even=float(product.has_events))
        for layer, (_, product) in zip(layers, event_driven.products(), strict=True)
    ]

    def limited(limits: list[Layer]) -> None:
        for (_, product), layer in zip(event_driven.products(), limits, strict=True):
            product.break_even = layer.break_even

    def run(limits: list[Layer]) -> None:
        limited(limits)
        event_driven(batches[0])

    ways = [partial(run, layers), partial(run, by_events), partial(dense, batches[0])]
    by_layer, all_events, all_dense = _in_turn(ways, _ROUNDS, _SECONDS)
    fastest, seconds = (by_events, all_events) if all_events < WORTH * by_layer else (layers, by_layer)
    limited(fastest)
    calibration = Calibration(fastest, seconds, all_dense)
    chosen: Any = event_driven if calibration.event_driven else dense
    chosen.calibration = calibration
    return chosen


def _in_turn(ways: Sequence[Callable[[], object]], rounds: int, seconds: float = 0.0) -> list[float]:
    """The best time of each way in at least `rounds` and `seconds`; in turn, so that a disturbance hits all."""
    best, start = [math.inf] * len(ways), time.perf_counter()
    for done in itertools.count():
        if done >= rounds and time.perf_counter() - start >= seconds:
            return best
        best = [min(was, best_seconds(way, runs=1, warmup=not done)) for was, way in zip(best, ways, strict=True)]
    raise AssertionError("counting does not end")


def _random_spikes(places: Places, product: SpikeProduct, rate: float) -> PackedSpikes:
    steps, images, height, width = places
    shape = (product.planes, steps, images, product.weight.weight.shape[1], height, width)
    chance = torch.Generator("cpu").manual_seed(0)
    uniform = torch.rand(shape, generator=chance, dtype=torch.float32, device="cpu")
    return PackedSpikes.pack_levels(uniform < rate, norm=1.0)
