"""When events pay: up to which firing rate an event-driven product is cheaper, and which form of a network wins."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.packed import Epilogue, PackedSpikes, kernels_path
from ..ops.spec import NeuronSpec
from .events import EventProduct, Events
from .timings import Costs, best_seconds, timings
from .trace import plan

FITTED_ON = ((384, 1536, 1), (1536, 384, 1), (96, 192, 3))
"""Inputs, outputs and kernel of the products that a model of the costs is fitted on."""
RATES = (0.01, 0.05, 0.15, 0.3)
_ROUNDS, _SECONDS = 5, 0.5
WORTH = 0.98
"""The event-driven model is chosen below this share of the dense one's time: nearer ones are told apart by chance."""

Places = tuple[int, int, int, int]
"""Steps, images, height and width."""


@dataclass
class EventCosts:
    """Seconds of event-driven products by a linear model, and of dense ones by measurement.

        seconds = rows * (inputs * listing + outputs * (finishing + inputs * rate * adding))

    A row is a pixel at a step; a 3x3 kernel has nine inputs a channel. `relative_error` is that of the fit, its worst.
    """

    listing: float
    adding: float
    finishing: float
    relative_error: float

    @staticmethod
    def load() -> EventCosts:
        """The model of this machine and number of threads, fitted once, in a few seconds."""
        return EventCosts(**timings().of(f"events, {kernels_path().stem}", lambda: asdict(EventCosts.fit())))

    def __str__(self) -> str:
        costs = f"{self.listing:.2g} s an input listed, {self.adding:.2g} an addition, {self.finishing:.2g} an output"
        return f"{costs}; fitted within {self.relative_error:.0%}, kept in {timings().path}"

    @staticmethod
    def fit() -> EventCosts:
        """Measures a few products and fits the costs to them, all measurements weighing alike."""
        rows, seconds = [], []
        places = (4, 4, 14, 14)
        for inputs, outputs, kernel in FITTED_ON:
            product = EventProduct(torch.rand(outputs, inputs, kernel, kernel), Epilogue(outputs, neuron=NeuronSpec()))
            for rate in RATES:
                spikes = _random_spikes(places, inputs, rate)
                seconds.append(best_seconds(partial(product.events, spikes)))
                rows.append(_work(places, inputs, outputs, kernel, spikes.rate()))
        measured, work = torch.tensor(seconds, dtype=torch.float64), torch.tensor(rows, dtype=torch.float64)
        relative = work / measured.unsqueeze(1)
        costs = torch.linalg.lstsq(relative, torch.ones_like(measured)).solution.clamp(min=1e-13)
        error = (relative @ costs - 1).abs().max().item()
        listing, adding, finishing = costs.tolist()
        return EventCosts(listing, adding, finishing, relative_error=error)

    def events(self, places: Places, product: EventProduct, rate: float) -> float:
        """Predicted seconds of the event-driven product at a firing rate of its input."""
        out, into, kernel, _ = product.weight.weight.shape
        work = _work(places, into, out, kernel, rate)
        costs = (self.listing, self.adding, self.finishing)
        return sum(amount * cost for amount, cost in zip(work, costs, strict=True))

    def dense_seconds(self, places: Places, product: EventProduct) -> float:
        """Seconds of the dense product, which its input does not change; measured when a shape comes first."""
        out, into, kernel, _ = product.weight.weight.shape
        membrane = product.epilogue.neuron is None
        what = "membranes" if membrane else "spikes"

        def measure() -> Costs:
            dense = partial(product.dense, _random_spikes(places, into, 0.1), membrane=membrane)
            return {"seconds": best_seconds(dense)}

        name = f"dense {what} {'x'.join(map(str, places))} {into}->{out} {kernel}x{kernel}"
        return timings().of(name, measure)["seconds"]

    def break_even(self, places: Places, product: EventProduct) -> float:
        """The firing rate of the input at which both ways take as long."""
        # Of levels, every step of theirs is listed.
        listed = (places[0] * product.planes, *places[1:])
        silent, full = (self.events(listed, product, rate) for rate in (0.0, 1.0))
        return min(max((self.dense_seconds(places, product) - silent) / (full - silent), 0.0), 1.0)


class Layer(NamedTuple):
    """A product as it was calibrated: the firing rate of its input, and the rate from which it is computed densely."""

    name: str
    rate: float
    break_even: float


@dataclass(frozen=True)
class Calibration:
    """What `optimize_for_inference(model, sparse="auto")` measured and chose; printed as a table."""

    layers: list[Layer]
    event_driven_seconds: float
    dense_seconds: float
    costs: EventCosts

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
        lines += [f"a calibration batch, event-driven: {seconds}; chosen: {chosen}", f"costs: {self.costs}"]
        return "\n".join(lines)


def calibrate(model: Events, batches: Iterable[Any], costs: EventCosts) -> list[Layer]:
    """Sets the `break_even` of every product of the model from the shapes of its inputs; returns what was measured.

    `batches` are what the model takes, or tuples that start with it, as a data loader gives them.
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
            model(images_of(batch))
    finally:
        for hook in hooks:
            hook.remove()
    layers = []
    for name, product in model.products():
        product.break_even = costs.break_even(places[name], product)
        fired, neurons = spikes[name]
        layers.append(Layer(name, fired / neurons, product.break_even))
    return layers


def choose(model: nn.Module, dense: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """`dense`, or the event-driven model where that is faster on the calibration batches; `calibration` says why.

    Where `model` cannot run event-driven, one warning says so. Raises `ValueError` without batches.
    """
    batches = [images_of(batch) for batch in batches]
    if not batches:
        raise ValueError("calibrate must hold at least one batch of images or frames")
    try:
        event_driven = Events(plan(model))
    except (ValueError, RuntimeError) as error:
        warnings.warn(f"the model is optimised densely: {error}", stacklevel=3)
        return dense
    costs = EventCosts.load()
    layers = calibrate(event_driven, batches, costs)
    # In turn, so that a disturbance hits both; the shorter a run, the more of them.
    seconds, start = [math.inf, math.inf], time.perf_counter()
    for done in itertools.count():
        if done >= _ROUNDS and time.perf_counter() - start > _SECONDS:
            break
        for i, contestant in enumerate((event_driven, dense)):
            seconds[i] = min(seconds[i], best_seconds(partial(contestant, batches[0]), runs=1))
    calibration = Calibration(layers, seconds[0], seconds[1], costs)
    chosen: Any = event_driven if calibration.event_driven else dense
    chosen.calibration = calibration
    return chosen


def images_of(batch: Any) -> Tensor:
    """The images or frames of a batch: itself, or what a tuple or list starts with."""
    images = batch[0] if isinstance(batch, tuple | list) and len(batch) else batch
    if not isinstance(images, Tensor):
        raise TypeError(
            f"a calibration batch must be a tensor, or a tuple that starts with one, got {type(batch).__name__}"
        )
    return images


def _work(places: Places, inputs: int, outputs: int, kernel: int, rate: float) -> tuple[float, float, float]:
    rows, inputs = math.prod(places), inputs * kernel**2
    return rows * inputs, rows * inputs * outputs * rate, rows * outputs


def _random_spikes(places: Places, channels: int, rate: float) -> PackedSpikes:
    steps, images, height, width = places
    uniform = torch.rand(steps, images, channels, height, width, generator=torch.Generator().manual_seed(0))
    return PackedSpikes.pack(uniform < rate)
