"""Follows what every tensor of a forward pass holds, from operation to operation: input, spikes or analog values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..neuron import IntegerNeuron, spikes_of
from ..steps import Unit
from .operators import (
    ADDITIONS,
    BATCH_NORMS,
    CHOOSES,
    COMPARES,
    FILLS,
    MEANS,
    MOVES,
    REASONS,
    SHAPES,
    UNWRITTEN,
    WEIGHTED,
    operation,
)
from .probe import Probe

ADDS, FIRST, MASKS, FOLDS, SCALES, LEAKS, MULTIPLIES = "AC", "MAC", "mask", "fold", "scale", "leak", "violation"
MIXES = "mixing"

INPUT, SPIKES, SCALED, ANALOG, CONSTANT = "input", "spikes", "scaled spikes", "analog", "constant"
LEVELS, COUNTS = "levels", "counts of spikes"
"""Whole numbers: the levels of a neuron, where l stands for l spikes in binary steps, and sums of spikes."""
UNSEEN = "unseen"

OUTER, SUMMED, FOREIGN = "outer", "sum of products", "foreign code"
"""Names for what is not a single operation: elementwise products that widen or are summed, and foreign code."""


@dataclass
class Product:
    """One product in one module: operands, verdict (a key of `VERDICTS`), reason, and how often it was called."""

    module: str
    operation: str
    operands: str
    verdict: str
    reason: str
    calls: int = 0
    merges: bool = False
    """Whether its layer is one of several that are merged when deployed, or is the merged convolution."""


@dataclass(frozen=True)
class Value:
    """What a tensor holds, where it came from, and the layer whose weights it has just passed through, if any.

    `factors` are those of an elementwise product, which a sum over `axes` (None: any) turns into a matrix product.
    `norm` is the divisor of levels, or of counts made from them, `levels` the largest level.
    """

    kind: str
    origin: str = ""
    layer: str = ""
    factors: tuple[Any, ...] = field(default=(), compare=False)
    axes: frozenset[int] | None = None
    norm: float = 1.0
    levels: int = 1

    @property
    def binary(self) -> bool:
        return self.kind in (SPIKES, SCALED)

    @property
    def adds(self) -> bool:
        """Whether a product with it only adds: once for a spike, l times for a level of l."""
        return self.binary or self.kind == LEVELS


NOTHING = Value(CONSTANT)


class Follower(TorchDispatchMode):
    """Sees every tensor operation below the model's own code; a tensor that it does not know is a constant."""

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self.probe = probe
        self.products: dict[tuple[str, ...], Product] = {}
        self._values: Any = WeakTensorKeyDictionary()
        self._read: set[float] = set()
        """Numbers that the network's code has read from values that depend on the input."""
        for name, neuron in probe.neurons.items():
            probe.watch(neuron, self._neuron(name))
        probe.follow(self.entered, self._left)
        probe.modes.append(self)
        named = probe.model.named_modules()
        self.layers = {name for name, module in named if isinstance(getattr(module, "weight", None), Tensor)}

    def start(self, x: Tensor) -> None:
        """Marks the input of the model."""
        self._read.clear()
        self._values[x] = Value(INPUT, "the input")

    def entered(self, name: str) -> None:
        """A module has been called."""

    def counts(self, name: str, args: Sequence[Any], output: Any) -> None:
        """An operation on the input, or on values derived from it, has been judged; outer products come as `OUTER`."""

    def inside_neuron(self, name: str, args: Sequence[Any], output: Any) -> None:
        """An operation inside a neuron, where nothing is judged."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.probe.looking:
            return output
        name, in_place = operation(func)
        if self.probe.neurons.keys() & set(self.probe.path):
            self.inside_neuron(name, args, output)
            return output
        if name in UNWRITTEN:
            self._mark(output, Value(UNSEEN), False)
            return output
        if not in_place and "out" not in (kwargs or {}) and name not in SHAPES:
            self._seen((args, kwargs))
        operands = [self.value(arg) for arg in tensors_in((args, kwargs or {}))]
        if name in ("_local_scalar_dense", "item") and type(output) is float and operands[0] is not NOTHING:
            self._read.add(output)
        if any(value is not NOTHING for value in operands) or name in WEIGHTED:
            value = self._judge(name, args, operands, output)
            self._mark(output, value, in_place or "out" in (kwargs or {}))
            self.counts(name, args, output)
        elif in_place:
            self._mark(output, NOTHING, True)
        return output

    def _left(self, name: str, output: Any) -> None:
        if not self.probe.neurons.keys() & set(self.probe.path):
            self._seen(output)

    def _seen(self, tensors: Any) -> None:
        """Notes tensors that are read although no operation wrote them: a kernel or extension did, unseen."""
        for tensor in tensors_in(tensors):
            if self.value(tensor).kind == UNSEEN and tensor.numel():
                self.note(FOREIGN, "", MULTIPLIES, "written by code that PyTorch does not see")
                self._mark(tensor, Value(ANALOG, f"foreign code in {self._here()}"), True)

    def _judge(self, name: str, args: Any, operands: list[Value], output: Any) -> Value:
        """What the result holds; products are noted on the way."""
        known = [value for value in operands if value is not NOTHING]
        if name in SHAPES:
            return NOTHING
        if name == "copy_":
            return self.value(args[1])
        if name in COMPARES:
            return Value(SPIKES, f"comparison in {self._here()}")
        if name in MOVES or name in CHOOSES:
            value = _joined(known, output, constants=len(known) < len(operands))
            if name in CHOOSES or name in FILLS:
                value = _as_found(value, output)
            if name in CHOOSES:
                return Value(value.kind, value.origin)
            return value if value.axes is None else replace(value, factors=(), axes=None)
        if name in WEIGHTED:
            return self._weighted(name, *(args[place] for place in WEIGHTED[name]))
        if name in ("mul", "div"):
            return self._multiplied(name, args[0], args[1], output)
        if name in BATCH_NORMS:
            return self._normalized(name, args)
        if name in ("sum", "cumsum", "mean") and len(known) == 1:
            self._summed(args, known[0], output)
        if name in MEANS:
            self.note(name, known[0].kind, SCALES, "a sum times a constant")
            return Value(INPUT if known[0].kind == INPUT else ANALOG, f"{name} of {known[0].kind} in {self._here()}")
        if name in ADDITIONS:
            return self._added(name, known, args, output)
        reason = REASONS.get(name, "not known to be free of multiplications")
        self.note(name, " x ".join(value.kind for value in operands), MULTIPLIES, reason)
        return Value(ANALOG, f"{name} in {self._here()}")

    def _weighted(self, name: str, first: Any, second: Any) -> Value:
        a, b = self.value(first), self.value(second)
        if a is NOTHING and b is NOTHING:
            if self.here() not in self.layers:
                return NOTHING
            a = Value(ANALOG, "values of unknown origin")
        kinds = f"{a.kind} x {b.kind}"
        analog = [value for value in (a, b) if value.kind in (ANALOG, COUNTS)]
        if a.adds or b.adds:
            scaled = "; their scale is absorbed by the weights" if SCALED in (a.kind, b.kind) else ""
            what = "spikes" if a.binary or b.binary else "levels, each as many binary spikes"
            merged = self._merged()
            self.note(name, kinds, ADDS, f"{what}{scaled}{merged}", merges=bool(merged))
            if NOTHING not in (a, b) and {a.kind, b.kind} <= {SPIKES, COUNTS, LEVELS}:
                return Value(COUNTS, f"a product of spikes in {self._here()}, which counts", norm=a.norm * b.norm)
        elif not analog and NOTHING in (a, b):
            self.note(name, kinds, FIRST, "the analog input")
        else:
            source = analog[0].origin if analog else "the input"
            hint = f"; no neuron since {analog[0].layer}" if analog and analog[0].layer else ""
            merging = self._merging()
            self.note(
                name, kinds, MULTIPLIES, f"its input is not spikes: {source}{hint}{merging}", merges=bool(merging)
            )
        layer = self._here() if NOTHING in (a, b) else ""
        return Value(ANALOG, f"{name} in {self._here()}", layer)

    def _merged(self) -> str:
        """What the convolution that is running was trained as, if it replaces several layers."""
        layers = getattr(self.probe.model.get_submodule(self.here()), "trained_as", ())
        return f"; trained as {', '.join(layers)}, which are this one convolution" if layers else ""

    def _merging(self) -> str:
        """What the layer that is running becomes, if it is one of several that are merged."""
        for name in reversed(self.probe.path):
            unit = self.probe.model.get_submodule(name)
            if isinstance(unit, Unit) and not isinstance(unit.conv, nn.Conv2d) and unit.kernel() is not None:
                return f"; deployed, the layers of {name} are one convolution of its input"
        return ""

    def _multiplied(self, name: str, first: Any, second: Any, output: Any) -> Value:
        a, b = self.value(first), self.value(second)
        kinds = f"{a.kind} x {b.kind}"
        if name == "div" and b is not NOTHING:
            self.note(name, kinds, MULTIPLIES, "divides by a value that depends on the input")
            return Value(ANALOG, f"{name} in {self._here()}")
        if a is NOTHING or b is NOTHING:
            value, constant = (a, second) if b is NOTHING else (b, first)
            if _all_ones(constant):
                return value
            if type(constant) is float and constant in self._read:
                self.note(name, kinds, MULTIPLIES, "its factor is a number that was read from a value of the network")
                return Value(ANALOG, f"{name} in {self._here()}")
            wide = _widens(first, second, output)
            if wide:
                self.counts(OUTER, (first, second), output)
            self.note(name, kinds, SCALES, "a constant factor")
            if value.kind == SPIKES:
                value = Value(SCALED, f"scaled in {self._here()}")
            elif value.kind in (LEVELS, COUNTS):
                value = Value(ANALOG, f"scaled {value.kind} in {self._here()}")
            axes = frozenset() if wide else _varying(constant)
            return replace(value, factors=(first, second) if axes else (), axes=axes or None)
        factors: tuple[Any, ...] = (first, second)
        if _widens(first, second, output):
            name, factors = OUTER, ()
            self.counts(OUTER, (first, second), output)
        if a.binary or b.binary:
            self.note(name, kinds, MASKS, "passes or blocks")
            kind = (a if b.binary else b).kind
            if a.binary and b.binary:
                kind = SCALED if SCALED in (a.kind, b.kind) else SPIKES
            return Value(kind, f"mask in {self._here()}", factors=factors)
        self.note(name, kinds, MULTIPLIES, "both factors depend on the input and neither is spikes")
        return Value(ANALOG, f"{name} in {self._here()}", factors=factors)

    def _summed(self, args: Sequence[Any], value: Value, output: Tensor) -> None:
        """A sum of an elementwise product, over an axis on which its factors vary, is a matrix product."""
        x = args[0]
        if not value.factors or x.numel() <= 1:
            return
        dims = args[1] if len(args) > 1 and args[1] is not None else range(x.ndim)
        over = {dim % x.ndim - x.ndim for dim in ([dims] if isinstance(dims, int) else dims or range(x.ndim))}
        if value.axes is None or value.axes & over:
            self.counts(SUMMED, value.factors, x)

    def _normalized(self, name: str, args: Any) -> Value:
        x = self.value(args[0])
        training = len(args) > 5 and args[5] is True
        if training:
            self.note(name, x.kind, MULTIPLIES, "divides by the standard deviation of its own input")
        elif x.layer:
            self.note(name, x.kind, FOLDS, f"into {x.layer}")
        else:
            self.note(name, x.kind, SCALES, "constants that the next weights or thresholds absorb")
        return Value(INPUT if x.kind == INPUT else ANALOG, f"{name} of {x.kind} in {self._here()}", x.layer)

    def _added(self, name: str, known: Sequence[Value], args: Any, output: Any) -> Value:
        kinds = {value.kind for value in known}
        if kinds == {SPIKES} and len(known) == 1 and name in ("rsub", "sub") and _complements(name, args):
            return Value(SPIKES, f"complement in {self._here()}")
        if kinds == {INPUT}:
            return known[0]
        if len(known) > 1 and kinds <= {SPIKES, COUNTS} and name == "add" and all(value.norm == 1 for value in known):
            return Value(COUNTS, f"a sum of spikes in {self._here()}, which can exceed 1")
        if len(known) > 1 and all(value.binary for value in known):
            return Value(ANALOG, f"a sum of spikes in {self._here()}, which can exceed 1")
        if kinds in ({SPIKES}, {COUNTS}) and name in ("sum", "cumsum"):
            return Value(COUNTS, f"{name} of {known[0].kind} in {self._here()}", norm=known[0].norm)
        if all(value.binary for value in known):
            return Value(ANALOG, f"{name} of spikes in {self._here()}")
        # A constant added to a layer's output is a bias; after adding a second signal it is no single layer's output.
        layer = known[0].layer if len(known) == 1 and name in ("add", "sub", "neg") else ""
        return Value(ANALOG, f"{name} in {self._here()}" if not layer else known[0].origin, layer)

    def _neuron(self, name: str) -> Any:
        def fired(module: nn.Module, inputs: Any, output: Any) -> None:
            for part in tensors_in(output):
                self._mark(part, Value(ANALOG, f"the membrane of {name}"), False)
            spikes = spikes_of(output)
            if isinstance(module, IntegerNeuron):
                self._mark(spikes, _levels(name, module, spikes), False)
                return
            top = None if spikes.is_meta else spikes.max().clamp(min=0)
            if top is not None and not bool(((spikes == 0) | (spikes == top)).all()):
                value = Value(ANALOG, f"{name}, a neuron that emits other values than 0 and 1")
            else:
                value = Value(SPIKES if top is None or top.item() in (0, 1) else SCALED, name)
            self._mark(spikes, value, False)
            self.note("membrane", "", LEAKS, "the decay by 1 / tau and the reset")

        return fired

    def value(self, tensor: Any) -> Value:
        """What a tensor, or the one it is a view of, holds; `NOTHING` for a constant."""
        if not isinstance(tensor, Tensor):
            return NOTHING
        found: Value | None = self._values.get(tensor)
        if found is None and tensor._base is not None:
            found = self._values.get(tensor._base)
        return found or NOTHING

    def _mark(self, output: Any, value: Value, in_place: bool) -> None:
        for tensor in tensors_in(output):
            whole = tensor._base if in_place else None
            before = None if whole is None else self._values.get(whole)
            if value is NOTHING:
                self._values.pop(tensor, None)
                if before is not None and before.kind == UNSEEN:
                    self._values.pop(whole, None)
                elif before is not None:
                    self._values[whole] = _as_found(before, whole)
                continue
            self._values[tensor] = value
            if whole is not None:
                same = before is None or before.kind in (value.kind, UNSEEN)
                self._values[whole] = value if same else Value(ANALOG, f"values written together in {self._here()}")
            if in_place:
                self._seen_by_views(tensor, value)

    def _seen_by_views(self, written: Tensor, value: Value) -> None:
        """Updates what other views of the memory hold that was written into."""
        memory = written.untyped_storage()
        for other, before in list(self._values.items()):
            whole = other is written or other is written._base
            if whole or before.kind == value.kind or other.untyped_storage()._cdata != memory._cdata:
                continue
            share = _share_written(other, written)
            if share:
                mixed = Value(ANALOG, f"values written together in {self._here()}")
                self._values[other] = value if share == 1 else mixed

    def here(self) -> str:
        """The name of the module whose code is running, "" for the model itself."""
        return self.probe.path[-1] if self.probe.path else ""

    def _here(self) -> str:
        return self.here() or "the model"

    def note(self, operation: str, operands: str, verdict: str, reason: str, *, merges: bool = False) -> None:
        key = (self.here(), operation, operands, verdict, reason)
        self.products.setdefault(key, Product(*key, merges=merges)).calls += 1


def _levels(name: str, neuron: IntegerNeuron, output: Tensor) -> Value:
    """What a neuron of levels has emitted; a hook on it may have changed that."""
    levels = output * neuron.norm
    nearest = levels.round().clamp(0, neuron.levels)
    if not output.is_meta and not bool(torch.isclose(levels, nearest, atol=1e-3).all()):
        return Value(ANALOG, f"{name}, a neuron that emits other values than its levels")
    return Value(LEVELS, name, norm=neuron.norm, levels=neuron.levels)


def tensors_in(nested: Any) -> list[Tensor]:
    """The tensors of nested lists, tuples and dictionaries, in their order."""
    if isinstance(nested, Tensor):
        return [nested]
    if isinstance(nested, dict):
        nested = list(nested.values())
    if isinstance(nested, tuple | list):
        return [tensor for part in nested for tensor in tensors_in(part)]
    return []


def _joined(known: Sequence[Value], output: Any, constants: bool) -> Value:
    """What a tensor holds that joins values unchanged; constants next to spikes must be zeros and ones."""
    first = known[0]
    kinds = {value.kind for value in known}
    if kinds == {SPIKES} and constants and not all(_zeros_and_ones(tensor) for tensor in tensors_in(output)):
        return Value(ANALOG, "spikes beside constants other than 0 and 1")
    if len(kinds) == 1:
        return first if len({value.layer for value in known}) == 1 else Value(first.kind, first.origin)
    mixed = (value.origin for value in known if value.kind in (ANALOG, COUNTS, LEVELS))
    return Value(ANALOG, next(mixed, "the input beside spikes"))


def _as_found(value: Value, output: Any) -> Value:
    """What a tensor of spikes holds after constants may have been written into it: spikes, scaled or analog values."""
    for x in tensors_in(output) if value.binary else ():
        if x.is_meta or not x.is_floating_point() or not x.numel():
            continue
        top = x.max()
        if not bool(((x == 0) | (x == top)).all()):
            return Value(ANALOG, "spikes beside constants other than 0 and 1")
        value = Value(SCALED, value.origin) if top.item() not in (0, 1) else value
    return value


def _share_written(view: Tensor, written: Tensor) -> float:
    """The share of a view's values that lie where those of another view of the same memory do."""
    if view.is_meta or view.itemsize != written.itemsize:
        return 0.5  # unknown
    places = torch.zeros(written.untyped_storage().nbytes() // written.itemsize, dtype=torch.bool)
    places.as_strided(written.shape, written.stride(), written.storage_offset()).fill_(True)
    return places.as_strided(view.shape, view.stride(), view.storage_offset()).double().mean().item()


def _zeros_and_ones(x: Tensor) -> bool:
    return x.is_meta or bool(((x == 0) | (x == 1)).all()) or not x.is_floating_point()


def _all_ones(constant: Any) -> bool:
    if not isinstance(constant, Tensor):
        return bool(constant == 1)
    return not constant.is_meta and bool((constant == 1).all())


def _varying(constant: Any) -> frozenset[int]:
    """The axes, counted from the last, along which a constant factor varies."""
    shape = constant.shape if isinstance(constant, Tensor) else ()
    return frozenset(-axis for axis, size in enumerate(reversed(shape), 1) if size > 1)


def _widens(a: Any, b: Any, product: Any) -> bool:
    """Whether an elementwise product is larger than both of its factors, like an outer product."""
    return all(isinstance(factor, Tensor) and factor.numel() < product.numel() for factor in (a, b))


def _complements(name: str, args: Any) -> bool:
    """Whether `1 - spikes` is computed."""
    whole = args[1] if name == "rsub" else args[0]
    spikes_last = isinstance(args[0] if name == "rsub" else args[1], Tensor)
    return spikes_last and _all_ones(whole)
