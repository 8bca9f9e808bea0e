"""What every tensor of a forward pass holds, from operation to operation: the input, spikes or analog values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from .probe import Probe, spikes_of

ADDS, FIRST, MASKS, FOLDS, SCALES, LEAKS, MULTIPLIES = "AC", "MAC", "mask", "fold", "scale", "leak", "violation"

INPUT, SPIKES, SCALED, ANALOG, CONSTANT = "input", "spikes", "scaled spikes", "analog", "constant"


@dataclass
class Product:
    """One product in one module: operands and verdict (a key of `VERDICTS`), why, and how often it was called."""

    module: str
    operation: str
    operands: str
    verdict: str
    reason: str
    calls: int = 0


@dataclass(frozen=True)
class Value:
    """What a tensor holds, where it became so, and the layer whose weights it has just gone through, if any."""

    kind: str
    origin: str = ""
    layer: str = ""

    @property
    def binary(self) -> bool:
        return self.kind in (SPIKES, SCALED)


NOTHING = Value(CONSTANT)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Operations that move values keep spikes spikes; so do those that choose among them.
MOVES = _names(
    """view _unsafe_view _reshape_alias reshape t transpose permute expand expand_as squeeze unsqueeze select slice
    narrow index index_select gather take clone detach alias contiguous _to_copy to unfold unbind split split_with_sizes
    chunk flatten unflatten cat stack constant_pad_nd pad reflection_pad2d replication_pad2d repeat repeat_interleave
    roll flip pixel_shuffle pixel_unshuffle as_strided lift_fresh upsample_nearest1d upsample_nearest2d channel_shuffle
    im2col index_put index_copy scatter select_scatter slice_scatter movedim"""
)
CHOOSES = _names(
    """masked_fill where max amax min amin maximum minimum max_pool1d max_pool2d max_pool2d_with_indices max_pool3d
    max_pool3d_with_indices adaptive_max_pool2d relu clamp clamp_min clamp_max sort topk cummax bitwise_and
    bitwise_or"""
)
COMPARES = _names("ge gt le lt eq ne logical_and logical_or logical_xor logical_not heaviside isfinite isnan")
ADDITIONS = _names("add sub rsub sum cumsum neg abs sign round floor ceil trunc diff argmax argmin count_nonzero")
MEANS = _names(
    """mean avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool2d _adaptive_avg_pool2d _adaptive_avg_pool3d
    upsample_bilinear2d upsample_bicubic2d"""
)
# The two factors' places among the arguments.
WEIGHTED = {
    **dict.fromkeys(_names("mm bmm mv dot matmul linear convolution conv1d conv2d conv3d"), (0, 1)),
    **dict.fromkeys(_names("addmm baddbmm addbmm addmv"), (1, 2)),
}
BATCH_NORMS = _names(
    """native_batch_norm cudnn_batch_norm miopen_batch_norm batch_norm _native_batch_norm_legit
    _native_batch_norm_legit_no_training _batch_norm_no_update"""
)
# Operations that only ask about a tensor, or make one from nothing but its shape.
SHAPES = _names(
    """zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full is_same_size
    _local_scalar_dense item equal zero fill bernoulli arange size sym_size dim numel"""
)
REASONS = {
    "native_layer_norm": "divides by the standard deviation of its own input",
    "native_group_norm": "divides by the standard deviation of its own input",
    "_softmax": "takes exponentials and divides by their sum",
    "_log_softmax": "takes exponentials and divides by their sum",
}


class Follower(TorchDispatchMode):
    """Sees every tensor operation below the model's own code; a tensor it knows nothing of is a constant."""

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self.probe = probe
        self.products: dict[tuple[str, ...], Product] = {}
        self._values: Any = WeakTensorKeyDictionary()
        for name, neuron in probe.neurons.items():
            probe.watch(neuron, self._neuron(name))
        probe.follow(lambda name: None)

    def start(self, x: Tensor) -> None:
        """Marks the input of the model."""
        self._values[x] = Value(INPUT, "the input")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self.probe.neurons.keys() & set(self.probe.path):
            packet = func.overloadpacket.__name__
            in_place = packet.endswith("_") and not packet.endswith("__")
            name = packet.rstrip("_") if in_place and packet != "copy_" else packet
            operands = [self._value(arg) for arg in _tensors((args, kwargs or {}))]
            if any(value is not NOTHING for value in operands) or name in WEIGHTED:
                value = self._judge(name, args, operands, output)
                self._mark(output, value, in_place)
        return output

    def _judge(self, name: str, args: Any, operands: list[Value], output: Any) -> Value:
        """What the result holds; products are noted on the way."""
        known = [value for value in operands if value is not NOTHING]
        if name in SHAPES:
            return NOTHING
        if name == "copy_":
            return self._value(args[1])
        if name in COMPARES:
            return Value(SPIKES, f"comparison in {self._here()}")
        if name in MOVES or name in CHOOSES:
            value = _joined(known, output, constants=len(known) < len(operands))
            return Value(value.kind, value.origin, "" if name in CHOOSES else value.layer)
        if name in WEIGHTED:
            return self._weighted(name, *(args[place] for place in WEIGHTED[name]))
        if name in ("mul", "div"):
            return self._multiplied(name, args[0], args[1], output)
        if name in BATCH_NORMS:
            return self._normalized(name, args)
        if name in MEANS:
            self._note(name, known[0].kind, SCALES, "a sum times a constant")
            return Value(INPUT if known[0].kind == INPUT else ANALOG, f"{name} of {known[0].kind} in {self._here()}")
        if name in ADDITIONS:
            return self._added(name, known, args, output)
        reason = REASONS.get(name, "not known to be free of multiplications")
        self._note(name, " x ".join(value.kind for value in operands), MULTIPLIES, reason)
        return Value(ANALOG, f"{name} in {self._here()}")

    def _weighted(self, name: str, first: Any, second: Any) -> Value:
        a, b = self._value(first), self._value(second)
        inside_layer = isinstance(self._module(), nn.Linear | nn.modules.conv._ConvNd)
        if a is NOTHING and b is NOTHING:
            if not inside_layer:
                return NOTHING
            a = Value(ANALOG, "values of unknown origin")
        kinds = f"{a.kind} x {b.kind}"
        analog = [value for value in (a, b) if value.kind == ANALOG]
        if a.binary or b.binary:
            scaled = SCALED in (a.kind, b.kind)
            self._note(name, kinds, ADDS, "spikes; their scale is absorbed by the weights" if scaled else "spikes")
        elif not analog and NOTHING in (a, b):
            self._note(name, kinds, FIRST, "the analog input")
        else:
            source = analog[0].origin if analog else "the input"
            hint = f"; no neuron since {analog[0].layer}" if analog and analog[0].layer else ""
            self._note(name, kinds, MULTIPLIES, f"its input is not spikes: {source}{hint}")
        layer = self._here() if NOTHING in (a, b) else ""
        return Value(ANALOG, f"{name} in {self._here()}", layer)

    def _multiplied(self, name: str, first: Any, second: Any, output: Any) -> Value:
        a, b = self._value(first), self._value(second)
        kinds = f"{a.kind} x {b.kind}"
        if name == "div" and b is not NOTHING:
            self._note(name, kinds, MULTIPLIES, "divides by a value that depends on the input")
            return Value(ANALOG, f"{name} in {self._here()}")
        if a is NOTHING or b is NOTHING:
            value, constant = (a, second) if b is NOTHING else (b, first)
            if _all_ones(constant):
                return value
            self._note(name, kinds, SCALES, "a constant factor")
            if value.kind == SPIKES:
                return Value(SCALED, f"scaled in {self._here()}")
            return value
        if a.binary or b.binary:
            self._note(name, kinds, MASKS, "passes or blocks")
            if a.binary and b.binary:
                return Value(SCALED if SCALED in (a.kind, b.kind) else SPIKES, f"mask in {self._here()}")
            return Value((a if b.binary else b).kind, f"mask in {self._here()}")
        self._note(name, kinds, MULTIPLIES, "both factors depend on the input and neither is spikes")
        return Value(ANALOG, f"{name} in {self._here()}")

    def _normalized(self, name: str, args: Any) -> Value:
        x = self._value(args[0])
        training = len(args) > 5 and args[5] is True
        if training:
            self._note(name, x.kind, MULTIPLIES, "divides by the standard deviation of its own input")
        elif x.layer:
            self._note(name, x.kind, FOLDS, f"into {x.layer}")
        else:
            self._note(name, x.kind, SCALES, "constants that the next weights or thresholds absorb")
        return Value(INPUT if x.kind == INPUT else ANALOG, f"{name} of {x.kind} in {self._here()}", x.layer)

    def _added(self, name: str, known: Sequence[Value], args: Any, output: Any) -> Value:
        kinds = {value.kind for value in known}
        if kinds == {SPIKES} and len(known) == 1 and name in ("rsub", "sub") and _complements(name, args):
            return Value(SPIKES, f"complement in {self._here()}")
        if kinds == {INPUT}:
            return known[0]
        if len(known) > 1 and all(value.binary for value in known):
            return Value(ANALOG, f"a sum of spikes in {self._here()}, which can exceed 1")
        if all(value.binary for value in known):
            return Value(ANALOG, f"{name} of spikes in {self._here()}")
        # A constant added to a layer's output is a bias; a second signal added makes it no layer's own output any more.
        layer = known[0].layer if len(known) == 1 and name in ("add", "sub", "neg") else ""
        return Value(ANALOG, f"{name} in {self._here()}" if not layer else known[0].origin, layer)

    def _neuron(self, name: str) -> Any:
        def fired(module: nn.Module, inputs: Any, output: Any) -> None:
            for part in _tensors(output):
                self._mark(part, Value(ANALOG, f"the membrane of {name}"), False)
            spikes = spikes_of(output)
            top = spikes.max().clamp(min=0)
            if not bool(((spikes == 0) | (spikes == top)).all()):
                value = Value(ANALOG, f"{name}, a neuron that emits other values than 0 and 1")
            else:
                value = Value(SPIKES if top.item() in (0, 1) else SCALED, name)
            self._mark(spikes, value, False)
            self._note("membrane", "", LEAKS, "the decay by 1 / tau and the reset")

        return fired

    def _value(self, tensor: Any) -> Value:
        if not isinstance(tensor, Tensor):
            return NOTHING
        found: Value | None = self._values.get(tensor)
        if found is None and tensor._base is not None:
            found = self._values.get(tensor._base)
        return found or NOTHING

    def _mark(self, output: Any, value: Value, in_place: bool) -> None:
        for tensor in _tensors(output):
            if value is NOTHING:
                self._values.pop(tensor, None)
                continue
            self._values[tensor] = value
            whole = tensor._base
            if in_place and whole is not None:
                before = self._values.get(whole)
                same = before is None or before.kind == value.kind
                self._values[whole] = value if same else Value(ANALOG, f"values written together in {self._here()}")

    def _here(self) -> str:
        return (self.probe.path[-1] if self.probe.path else "") or "the model"

    def _module(self) -> nn.Module | None:
        return self.probe.model.get_submodule(self.probe.path[-1]) if self.probe.path else None

    def _note(self, operation: str, operands: str, verdict: str, reason: str) -> None:
        module = self.probe.path[-1] if self.probe.path else ""
        key = (module, operation, operands, verdict, reason)
        self.products.setdefault(key, Product(*key)).calls += 1


def _tensors(nested: Any) -> list[Tensor]:
    if isinstance(nested, Tensor):
        return [nested]
    if isinstance(nested, dict):
        nested = list(nested.values())
    if isinstance(nested, tuple | list):
        return [tensor for part in nested for tensor in _tensors(part)]
    return []


def _joined(known: Sequence[Value], output: Any, constants: bool) -> Value:
    """What holds where values come together unchanged; constants beside spikes must be zeros and ones."""
    first = known[0]
    kinds = {value.kind for value in known}
    if kinds == {SPIKES} and constants and not all(_zeros_and_ones(tensor) for tensor in _tensors(output)):
        return Value(ANALOG, "spikes beside constants other than 0 and 1")
    if len(kinds) == 1:
        return first if len({value.layer for value in known}) == 1 else Value(first.kind, first.origin)
    return Value(ANALOG, next((value.origin for value in known if value.kind == ANALOG), "the input beside spikes"))


def _zeros_and_ones(x: Tensor) -> bool:
    return bool(((x == 0) | (x == 1)).all()) or not x.is_floating_point()


def _all_ones(constant: Any) -> bool:
    return bool((constant == 1).all()) if isinstance(constant, Tensor) else constant == 1


def _complements(name: str, args: Any) -> bool:
    """Whether `1 - spikes` is computed."""
    whole = args[1] if name == "rsub" else args[0]
    spikes_last = isinstance(args[0] if name == "rsub" else args[1], Tensor)
    return spikes_last and _all_ones(whole)
