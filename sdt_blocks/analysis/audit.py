"""Is a network spike-driven? Every product of one forward pass, its operands, and why it is allowed or not."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.overrides import TorchFunctionMode

from ..evaluation import input_of
from .dataflow import (
    ADDS,
    COUNTS,
    FIRST,
    FOLDS,
    LEAKS,
    LEVELS,
    MASKS,
    MIXES,
    MULTIPLIES,
    NOTHING,
    SCALES,
    Follower,
    Product,
)
from .independence import where_samples_meet
from .probe import Forward, Probe, batch_axis
from .silence import DEAD, as_text, silence, warn_if_dead

if TYPE_CHECKING:
    from rich.table import Table

VERDICTS = {
    FIRST: "multiplies the analog input, in the first layer",
    ADDS: "one operand is spikes: weights are added, not multiplied",
    MASKS: "one operand is spikes: the other is passed or blocked",
    FOLDS: "batch normalization that folds into the layer before it",
    SCALES: "a constant factor that weights or thresholds absorb",
    LEAKS: "a neuron's own membrane, once a step",
    MULTIPLIES: "a real multiplication",
    MIXES: "values of several samples of the batch in one",
}
"""The verdicts on a product or module, with their meaning."""

BREAKS = (MULTIPLIES, MIXES)
"""The verdicts that are violations: a device adds weights for the spikes of the one sample that it sees."""

MEETING = "what it gives for one sample depends on others in the batch, which a device that sees one has not got"

_LISTED = 3


class NotSpikeDrivenError(ValueError):
    """Raised by a strict audit of a network that is not spike-driven."""


_READS = ("item", "tolist", "numpy", "__array__", "__float__")


class Readings(TorchFunctionMode):
    """Sees which modules read real values of the network as numbers, of which nothing below sees what becomes."""

    def __init__(self, follower: Follower) -> None:
        super().__init__()
        self.follower = follower
        self.modules: dict[str, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        probe = self.follower.probe
        unseen = probe.looking or probe.neurons.keys() & set(probe.path)
        reads = getattr(func, "__name__", "") in _READS and not unseen and args[0].is_floating_point()
        if reads and self.follower.value(args[0]) is not NOTHING:
            self.modules[self.follower.here() or "the model"] = None
        return func(*args, **(kwargs or {}))


@dataclass
class Audit:
    """The products of one forward pass, and what mixes samples; `spike_driven` if none of them is a violation.

    `silence` says which neurons never fired; if none did, `spike_driven` describes only the construction. `form` is
    the network that was judged, as it is "deployed" or as it is "trained". `reads` names the modules that read numbers
    from values of the network: what Python computes with them is not judged.
    """

    products: list[Product]
    silence: str = ""
    form: str = "deployed"
    reads: list[str] = field(default_factory=list)

    @property
    def violations(self) -> list[Product]:
        return [product for product in self.products if product.verdict in BREAKS]

    @property
    def spike_driven(self) -> bool:
        return not self.violations

    def of(self, verdict: str) -> list[Product]:
        """The products with this verdict, a key of `VERDICTS`."""
        return [product for product in self.products if product.verdict == verdict]

    def raise_for_violations(self) -> None:
        """Raises `NotSpikeDrivenError`, listing what multiplies real values or mixes samples, if anything does."""
        told = {"it multiplies in": self.of(MULTIPLIES), "samples of a batch are mixed in": self.of(MIXES)}
        listed = [
            "\n".join([what, *(f"  {p.module or 'the model'}, {p.operation}: {p.reason}" for p in products)])
            for what, products in told.items()
            if products
        ]
        if listed:
            text = "\n".join(listed)
            raise NotSpikeDrivenError(f"the network is not spike-driven; {text}")

    @property
    def dead(self) -> bool:
        """Whether no neuron fired at all."""
        return self.silence.startswith(DEAD)

    @property
    def finding(self) -> str:
        """The result in one sentence."""
        if not self.spike_driven:
            merging = all(product.merges for product in self.violations)
            until = " until the layers of its units are merged, as they are when it is deployed" if merging else ""
            mixing = ": answers depend on what else is in the batch" if self.of(MIXES) else ""
            return f"The network is NOT spike-driven{until}{mixing}."
        if self.dead:
            return "The network is built to be spike-driven, but it does nothing here: no neuron fired."
        merged = len({product.module for product in self.products if product.merges})
        where = f" as it is deployed, {merged} chains of layers merged into one convolution each" if merged else ""
        return f"The network is spike-driven{where}."

    @property
    def judged(self) -> str:
        """The form that was judged, as a sentence."""
        return f"It is judged as it is {self.form}."

    @property
    def unjudged(self) -> str:
        """What is not judged, as a sentence; "" if all is."""
        where = ", ".join(self.reads)
        return f"Not judged is what Python computes with numbers read from values, in {where}." if where else ""

    @property
    def counts(self) -> list[tuple[int, str, str]]:
        """For each verdict that was found: how many products have it, the verdict, and its meaning."""
        found = [(len(self.of(verdict)), verdict, why) for verdict, why in VERDICTS.items()]
        return [row for row in found if row[0]]

    @property
    def reasons(self) -> list[str]:
        """The reasons in a few words each: what multiplies or mixes, and what turns out to be additions."""
        sums = [product for product in self.of(MULTIPLIES) if COUNTS in product.operands]
        others = [product for product in self.of(MULTIPLIES) if COUNTS not in product.operands]
        adds = self.of(ADDS)
        counts = [product for product in adds if COUNTS in product.operands]
        levels = [product for product in adds if LEVELS in product.operands and product not in counts]
        scales = [product for product in self.of(SCALES) if product.operation in ("mul", "div")]
        numbers = {
            "layer(s) multiply counts of spikes": sums,
            "product(s) of counts with spikes, each of which adds a whole number": counts,
            "product(s) of levels, each of which adds as many times": levels,
            "constant scale(s) to be absorbed by weights or thresholds": scales,
        }
        found = [f"{len(products)} {what}" for what, products in numbers.items() if products]
        listed = [f"{product.module or 'the model'}: {product.reason}" for product in self.of(MIXES) + others[:_LISTED]]
        more = [f"{len(others) - _LISTED} more"] if len(others) > _LISTED else []
        return [*found[: bool(sums)], *listed, *more, *found[bool(sums) :]]

    def summary(self) -> list[str]:
        """The neurons that never fired, if any; the finding; the number of products for each verdict."""
        lines = [f"{n:4d} {verdict}: {why}" for n, verdict, why in self.counts]
        told = (self.silence, self.finding, self.judged, self.unjudged)
        return [*filter(None, told), *lines]

    def table(self) -> Table:
        """A table for rich, violations in red."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title="Products of one forward pass")
        for name in ("module", "operation", "operands", "verdict", "why"):
            table.add_column(name, overflow="fold")
        for p in self.products:
            style = "bold red" if p.verdict in BREAKS else None
            cells = (Text(cell) for cell in (p.module or "(model)", p.operation, p.operands, p.verdict, p.reason))
            table.add_row(*cells, style=style)
        return table

    def __str__(self) -> str:
        return as_text([*self.summary(), ""], self.table())


def audit(
    model: nn.Module,
    batch: Any,
    *,
    strict: bool = False,
    neurons: Sequence[type[nn.Module]] = (),
    forward: Forward | None = None,
    as_trained: bool = False,
) -> Audit:
    """Follows the spikes through one forward pass and judges every product by what its operands are by construction.

    Neurons emit spikes. Max pooling, reshaping, selecting and products of spikes keep them spikes; a sum or a mean does
    not, whatever its values happen to be. A convolution or matrix product with spikes only adds, and so does one with
    the levels of an `IntegerNeuron`, since a level l stands for l spikes in binary steps. The first layer may multiply
    the analog input; batch normalization after a convolution folds into it; constant factors are absorbed. Everything
    else is a violation: analog values in a later layer, softmax, layer normalization, a product of two analog values,
    and any operation that is not known to be free of multiplications. That neurons really emit zeros and one other
    value is checked on the batch. Operations inside a neuron are listed, not judged.

    It is also a violation to combine several samples of the batch into one value, which a device that sees one sample
    at a time cannot do: batch statistics, or a neuron that carries its state from sample to sample. This is found by
    replacing samples in three further passes and comparing values, however they are computed; a batch of one sample
    gets a second one.

    The network is judged as it is deployed: a unit that is trained as several layers without a neuron in between is one
    convolution of its input, so that every weight sees spikes. With `as_trained` its layers are judged one by one; all
    but the first see sums of weights, and the reason then says that merging removes the violation.

    What Python computes with numbers that the network's code reads from its values (`item`, `tolist`, `numpy`) is out
    of sight: a factor that is such a number is a violation, and a warning names the modules that read any.

    `neurons` names further types of neurons, which take `[T, B, ...]`; `forward(model, batch)` runs the batch if
    `model(x)` does not. With `strict`, raises `NotSpikeDrivenError` if the network is not spike-driven.

    >>> found = audit(example_model(), example_images()[0])
    >>> found.spike_driven, found.silence
    (True, '')
    """
    x = input_of(batch)
    with Probe(model, neurons, forward, as_trained=as_trained) as probe:
        follower = Follower(probe)
        with Readings(follower) as readings:
            for _ in probe.run([batch]):
                pass
    products = list(follower.products.values())
    axis = batch_axis(probe.model, x, neurons, forward, clock=probe.clock)
    for name in where_samples_meet(probe.model, x, axis, neurons=neurons, forward=forward):
        products.append(Product(name, "batch", "several samples", MIXES, MEETING, 1))
    form = "trained" if as_trained else "deployed"
    result = Audit(products, silence(probe.model, probe.fired), form, list(readings.modules))
    warn_if_dead(result.silence)
    if result.unjudged:
        warnings.warn(result.unjudged, stacklevel=2)
    if strict:
        result.raise_for_violations()
    return result
