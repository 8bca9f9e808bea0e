"""What a network computes, as one list of nodes: the data of a plan, and what its leaves are.

`trace` makes plans; the executors, and the passes that serve them, read them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import steps
from ..ops.dispatch import exporting

INPUT, PRESENT, CHECK, PROJECT, FIRE, MIX, POOL, ADD, CALL, OUTPUT = (
    "input",
    "present",
    "check",
    "project",
    "fire",
    "mix",
    "pool",
    "add",
    "call",
    "output",
)


@dataclass(eq=False)
class Node:
    """One value of a plan and how it comes about.

    `op` is one of the names above. `target` is the leaf (a unit, a neuron, a pooling, a `Mixing`), or what is called:
    a module, a function or the name of a method. `args` and `kwargs` hold nodes and constants, nested as the call has
    them. `name` is that of the leaf in the model, or of the call.
    """

    name: str
    op: str
    target: Any = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def inputs(self) -> list[Node]:
        """The nodes among the arguments."""
        return list(_nodes((self.args, self.kwargs)))

    def __repr__(self) -> str:
        return f"{self.name} = {self.op}({', '.join(node.name for node in self.inputs())})"


@dataclass(frozen=True)
class Mixing:
    """q, k and v of an attention and what mixes them: units and neurons in the mixer's order, and the unit's names."""

    units: tuple[Any, ...]
    neurons: tuple[Any, ...]
    mixer: Any


@dataclass
class Plan:
    """The nodes of a network in their order; their targets are leaves of a frozen copy of it."""

    nodes: list[Node]

    def users(self) -> dict[Node, list[Node]]:
        """For every node those that take its value."""
        found: dict[Node, list[Node]] = {node: [] for node in self.nodes}
        for node in self.nodes:
            for given in dict.fromkeys(node.inputs()):
                found[given].append(node)
        return found

    def __str__(self) -> str:
        return "\n".join(map(repr, self.nodes))


class Form(nn.Module):
    """A network as its plan is computed: input and output are those of the network in eval mode.

    There is no training mode, and gradients do not flow. Real values are of `real_dtype`, which was chosen when the
    form was made: autocast around a call changes nothing, and a cast to another dtype is refused.
    """

    rebuilt = True
    """Layers are computed together: there is nothing for a hook to see."""

    still: dict[Node, Tensor] | None = None
    """Where the same images come again and again, for one time step each time: what the first layers make of them,
    `[1, B, H, W, C]`, filled in as they are computed."""

    def __init__(self, plan: Plan, real_dtype: torch.dtype) -> None:
        super().__init__()
        self.plan, self.real_dtype = plan, real_dtype
        self.inputs = [node for node in plan.nodes if node.op == INPUT]

    def forward(self, *inputs: Any) -> Any:
        refuse_export()
        if len(inputs) != len(self.inputs):
            raise TypeError(f"expected {len(self.inputs)} input(s), got {len(inputs)}; options keep their defaults")
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        casts = {x.device.type for x in tensors if not x.is_meta and torch.is_autocast_enabled(x.device.type)}
        with ExitStack() as as_made:
            for device in casts:
                as_made.enter_context(torch.autocast(device, enabled=False))
            return self.compute(dict(zip(self.inputs, map(self._cast, inputs), strict=True)))

    def compute(self, values: dict[Node, Any]) -> Any:
        """The output for the values of the inputs."""
        raise NotImplementedError

    def foreign(self) -> set[Node]:
        """The nodes that code of other make computes, which may write into what it is given."""
        forms: dict[Node, Any] = self.forms  # type: ignore[assignment]
        rest = (node for node in self.plan.nodes if forms.get(node) is None)
        return {node for node in rest if any(map(_may_write, leaves(node.target)))}

    def watched(
        self, node: Node, values: dict[Node, Any], plain: Callable[[Any], Any], run: Callable[[dict[Node, Any]], Any]
    ) -> Any:
        """What `run` makes of the values, those of the node's inputs as a network's own modules take them.

        What it writes into them is theirs from then on.
        """
        taken = {one: plain(values[one]) for one in node.inputs()}
        for one, x in taken.items():
            if not isinstance(values[one], Tensor) and x.movedim(2, -1).is_contiguous():
                taken[one] = x.clone()  # of one place or one channel it lies where others still look
        before = {one: _version(x) for one, x in taken.items()}
        result = run({**values, **taken})
        values.update({one: x for one, x in taken.items() if _version(x) != before[one]})
        return result

    def _cast(self, x: Any) -> Any:
        return x.to(self.real_dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    def train(self, mode: bool = True) -> Form:
        """Raises `RuntimeError` for training mode."""
        if mode:
            raise RuntimeError("an optimised model only evaluates; train the model that it was made from")
        super().train(False)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Form:
        cast = fn(torch.zeros(1, dtype=self.real_dtype)).dtype
        if cast != self.real_dtype:
            raise TypeError(
                f"an optimised model keeps its {self.real_dtype}, it cannot be cast to {cast}: build it anew from the "
                "model, with dtype= of optimize_for_inference"
            )
        super()._apply(fn, recurse)
        return self


def refuse_export() -> None:
    """Raises `RuntimeError` while a form of a network is exported: it runs what this machine alone has."""
    if exporting():
        raise RuntimeError(
            "an optimised network runs kernels of this machine and cannot be exported: export the plain model, the one "
            "that optimize_for_inference was given (the runtime that reads it folds and fuses in its own way)"
        )


# ---- what leaves are


def is_neuron(module: Any) -> bool:
    """Whether a leaf is a neuron whose steps the executors know."""
    return isinstance(module, nn.Module) and steps.is_neuron(module)


def evaluated(leaf: Any) -> Any:
    """What computes a leaf's value in evaluation: its `evaluate` where it has one and nobody looks on, else itself."""
    own = (
        isinstance(leaf, nn.Module) and steps.tells(leaf, "evaluate") and not any(map(steps.has_hooks, leaf.modules()))
    )
    return leaf.evaluate if own else leaf


def _may_write(leaf: nn.Module) -> bool:
    """Whether a leaf has code that is not known to leave alone what it is given."""
    known = ("torch.nn.", "snntorch._neurons.", __name__.partition(".")[0] + ".")
    parts = list(leaf.modules())
    return any(getattr(part, "inplace", False) or not type(part).__module__.startswith(known) for part in parts)


def _version(x: Any) -> int:
    """How often a tensor has been written into, as far as that is counted."""
    return x._version if isinstance(x, Tensor) and not x.is_inference() else 0


def leaves(target: Any) -> list[nn.Module]:
    """The modules that a node's target is made of."""
    parts = (*target.units, *target.neurons, target.mixer) if isinstance(target, Mixing) else (target,)
    return [part for part in parts if isinstance(part, nn.Module)]


def convolution(unit: Any) -> tuple[nn.Conv2d, nn.BatchNorm2d | None] | None:
    """The convolution of a unit, or of a bare `nn.Conv2d`, and its norm; `None` where a unit has to run as it is."""
    if isinstance(unit, nn.Conv2d):
        conv, norm = unit, None
    elif steps.is_unit(unit) and not any(map(steps.has_hooks, unit.modules())):
        conv, norm = unit.kernel(), unit.norm
    else:
        return None
    norm = None if norm is None or steps.is_plain(norm, nn.Identity) else norm
    batch_norm = steps.is_plain(norm, nn.BatchNorm2d, nn.SyncBatchNorm) if norm is not None else False
    plain_norm = norm is None or (batch_norm and norm.running_var is not None)
    if conv is None or not plain_norm or not steps.is_plain(conv, nn.Conv2d):
        return None
    return (conv, norm) if conv.padding_mode == "zeros" and not isinstance(conv.padding, str) else None


def chain(unit: Any) -> list[nn.Conv2d] | None:
    """The convolutions of a unit that `convolution` has as one, one after the other, its norm behind the last."""
    layers: list[nn.Conv2d] | None = unit.chain() if isinstance(unit, steps.Unit) else None
    if layers is None:
        return None
    known = all(layer.padding_mode == "zeros" and not isinstance(layer.padding, str) for layer in layers)
    return layers if known else None


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of `norm(conv(x))` in float64."""
    bias = torch.zeros(conv.out_channels).double() if conv.bias is None else conv.bias.double()
    if norm is None:
        return conv.weight.double(), bias.to(conv.weight.device)
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    bias = (bias.to(scale.device) - norm.running_mean.double()) * scale
    bias = bias if norm.bias is None else bias + norm.bias.double()
    return conv.weight.double() * scale.view(-1, 1, 1, 1), bias


def _nodes(nested: Any) -> Iterator[Node]:
    if isinstance(nested, Node):
        yield nested
    elif isinstance(nested, dict):
        for value in nested.values():
            yield from _nodes(value)
    elif isinstance(nested, list | tuple):
        for value in nested:
            yield from _nodes(value)
    elif isinstance(nested, slice):
        yield from _nodes((nested.start, nested.stop, nested.step))


def filled(nested: Any, value: Callable[[Node], Any]) -> Any:
    """The arguments of a node with values in the place of nodes."""
    if isinstance(nested, Node):
        return value(nested)
    if isinstance(nested, dict):
        return {key: filled(part, value) for key, part in nested.items()}
    if isinstance(nested, list | tuple):
        parts = [filled(part, value) for part in nested]
        return type(nested)(*parts) if hasattr(nested, "_fields") else type(nested)(parts)
    if isinstance(nested, slice):
        return slice(*(filled(part, value) for part in (nested.start, nested.stop, nested.step)))
    return nested
