"""Plans: what a network computes, as one list of nodes whose targets are its leaves.

`trace` makes plans; the forms (`dense`, `events`, `bytes`) and the `passes` that serve them read them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import steps
from ..neuron import IntegerNeuron, Streamed
from ..ops.dispatch import exporting
from ..surrogate import transformed
from .frozen import times_written

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


SPIKES, LEVELS, COUNTS, REAL = "spikes", "levels", "counts", "real"
"""What the value of a node may be."""


@dataclass(eq=False)
class Node:
    """One value of a plan and how it is computed.

    `op` is one of the names above. `target` is the leaf (a unit, a neuron, a pooling, a `Mixing`) or whatever is
    called: a module, a function or the name of a method. `args` and `kwargs` hold nodes and constants, nested as in the
    call. `name` is that of the leaf in the model, or of the call.
    """

    name: str
    op: str
    target: Any = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def inputs(self) -> list[Node]:
        """The nodes among the arguments."""
        found: list[Node] = []
        filled((self.args, self.kwargs), found.append)
        return found

    def __repr__(self) -> str:
        return f"{self.name} = {self.op}({', '.join(node.name for node in self.inputs())})"


@dataclass(frozen=True)
class Mixing:
    """q, k and v of an attention and the mixer: units and neurons are in the order in which it takes their spikes."""

    units: tuple[Any, ...]
    neurons: tuple[Any, ...]
    mixer: Any


@dataclass
class Plan:
    """The nodes of a network in their order; their targets are leaves of a frozen copy of it."""

    nodes: list[Node]

    def users(self) -> dict[Node, list[Node]]:
        """For every node, the nodes that take its value."""
        found: dict[Node, list[Node]] = {node: [] for node in self.nodes}
        for node in self.nodes:
            for given in dict.fromkeys(node.inputs()):
                found[given].append(node)
        return found

    def leaves(self) -> list[nn.Module]:
        """The modules that the nodes' targets consist of, one as often as it is used."""
        return [leaf for node in self.nodes for leaf in leaves(node.target)]

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the leaves."""
        return [parameter for leaf in self.leaves() for parameter in leaf.parameters()]

    def __str__(self) -> str:
        return "\n".join(map(repr, self.nodes))


class Form(nn.Module):
    """A network that computes a plan: input and output are those of the network in eval mode.

    There is no training mode, and there are no gradients. Real values are in `real_dtype`, which is chosen when the
    form is made: autocast around a call changes nothing, and a cast to another dtype is refused.
    """

    rebuilt = True
    """Layers are computed together, so there is nothing for a hook to see."""

    aliases: dict[Node, set[Node]]
    """For every node those that may be views of its value, or its value one of them."""
    kinds: dict[Node, str]
    """For every node what its value is."""
    last: dict[Node, Node]
    """For every node the last one that takes its value."""
    streamed: list[Streamed]
    """The neurons that a stream may run in."""

    def __init__(self, plan: Plan, real_dtype: torch.dtype) -> None:
        super().__init__()
        self.plan, self.real_dtype = plan, real_dtype
        self.inputs = [node for node in plan.nodes if node.op == INPUT]
        _check_finite(plan)
        # The device of the weights: a neuron's constants are plain numbers without one.
        self.made_on = next((p.device for p in plan.parameters()), None)

    def forward(self, *inputs: Any) -> Any:
        refuse_export()
        if len(inputs) != len(self.inputs):
            raise TypeError(f"expected {len(self.inputs)} input(s), got {len(inputs)}; options keep their defaults")
        if transformed():
            raise RuntimeError(
                "an optimized network has no rules for torch.func and forward-mode gradients: call the plain model, "
                "the one that optimize_for_inference was given"
            )
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        elsewhere = {str(x.device) for x in tensors if x.ndim and self.made_on not in (None, x.device)}
        if elsewhere:
            raise ValueError(
                f"an optimized network takes input on {self.made_on}, where it was made, got it on "
                f"{', '.join(elsewhere)}; move the input"
            )
        casts = {x.device.type for x in tensors if not x.is_meta and torch.is_autocast_enabled(x.device.type)}
        with ExitStack() as as_made:
            for device in casts:
                as_made.enter_context(torch.autocast(device, enabled=False))
            return self.compute(dict(zip(self.inputs, map(self._cast, inputs), strict=True)))

    @property
    def still(self) -> dict[Node, Tensor] | None:
        """If a stream shows the same images in every call: the outputs of the first layers, `[1, B, H, W, C]`, filled
        in as they are computed."""
        carriers = (neuron.carrier for neuron in self.streamed)
        return next((carrier.still for carrier in carriers if carrier is not None), None)

    def compute(self, values: dict[Node, Any]) -> Any:
        """The output for the values of the inputs."""
        raise NotImplementedError

    def tell_unfolded(self) -> None:
        """One warning that names the units which are computed as they are because their layers are no one convolution.

        Those with hooks have been named when the network was traced.
        """
        forms: dict[Node, Any] = self.forms  # type: ignore[assignment]
        rest = [node for node in self.plan.nodes if node.op in (PROJECT, MIX) and forms.get(node) is None]
        names = [node.name for node in rest if any(map(_is_unknown_unit, leaves(node.target)))]
        if names:
            warnings.warn(
                f"kept as it is, since its convolution is parametrized or its layers are no plain ones: "
                f"{', '.join(names)}",
                stacklevel=3,
            )

    def foreign(self) -> set[Node]:
        """The nodes that are computed by code not known to the kit, which may write into its inputs."""
        forms: dict[Node, Any] = self.forms  # type: ignore[assignment]
        rest = (node for node in self.plan.nodes if forms.get(node) is None)
        return {node for node in rest if any(map(may_write, leaves(node.target)))}

    def watched(
        self, node: Node, values: dict[Node, Any], plain: Callable[[Any], Any], run: Callable[[dict[Node, Any]], Any]
    ) -> Any:
        """The result of `run`, with the node's inputs as a network's own modules take them.

        If `run` writes into them, the values change accordingly. Raises `RuntimeError` if they should change for other
        nodes too, whose values lie elsewhere than in the network: the write would be lost.
        """
        taken = {one: plain(values[one]) for one in node.inputs()}
        for one, x in taken.items():
            shared = not isinstance(values[one], Tensor) and x.movedim(2, -1).is_contiguous()
            if shared or (isinstance(x, Tensor) and x.is_inference()):
                # With one place or one channel it shares memory that others still read; of inference_mode, it cannot be
                # written into.
                taken[one] = x.clone()
        before = {one: times_written(x) for one, x in taken.items()}
        result = run({**values, **taken})
        written = {one: x for one, x in taken.items() if times_written(x) != before[one]}
        values.update(written)
        order = {one: place for place, one in enumerate(self.plan.nodes)} if written else {}
        for one, x in written.items():
            for other in ({one} | self.aliases[one]) & values.keys():
                if other in self.last and order[self.last[other]] > order[node]:
                    self._check_written(node, other, values[other], x)
        return result

    def _check_written(self, node: Node, other: Node, value: Any, x: Tensor) -> None:
        """Raises `RuntimeError` where what was written into x changes another node's value otherwise than it should."""
        if not _same_memory(value, x):
            lost = f"into a view of {other.name}, which an optimized network keeps elsewhere"
        elif self.kinds[other] == SPIKES and not bool(((value == 0) | (value == 1)).all()):
            lost = f"other values than 0 and 1 into the spikes of {other.name}, which other layers take for spikes"
        else:
            return
        name = node.name or "the network"
        raise RuntimeError(f"{name} writes {lost}: let it return a new value, or write into a clone")

    def _cast(self, x: Any) -> Any:
        return x.to(self.real_dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    def train(self, mode: bool = True) -> Form:
        """Raises `RuntimeError` for training mode."""
        if mode:
            raise RuntimeError("an optimized model only evaluates; train the model that it was made from")
        super().train(False)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Form:
        given = torch.zeros(1, dtype=self.real_dtype, device=self.made_on or "cpu")
        made = fn(given)
        if made.dtype != self.real_dtype:
            raise TypeError(
                f"an optimized model keeps its {self.real_dtype}, it cannot be cast to {made.dtype}: build it again "
                "from the model, with dtype= of optimize_for_inference"
            )
        if self.made_on is not None and made.device != given.device:
            raise TypeError(
                f"an optimized model runs kernels of {self.made_on}, it cannot be moved to {made.device}: move the "
                "model there, and build it again"
            )
        super()._apply(fn, recurse)
        return self


def _check_finite(plan: Plan) -> None:
    """Raises `ValueError` for weights and norms from which no product can be made."""
    for node in plan.nodes:
        units = node.target.units if node.op == MIX else (node.target,) if node.op == PROJECT else ()
        for unit in units:
            for name, value in unit.state_dict().items():
                if not value.is_meta and not value.isfinite().all():
                    raise ValueError(
                        f"{name} of {node.name} holds values that are not finite numbers: the training went wrong "
                        "before these weights were saved, take earlier ones"
                    )


def refuse_export() -> None:
    """Raises `RuntimeError` while a form of a network is exported: it runs kernels of this machine."""
    if exporting():
        raise RuntimeError(
            "an optimized network runs kernels of this machine and cannot be exported: export the plain model, the one "
            "that optimize_for_inference was given (the runtime that reads it folds and fuses in its own way)"
        )


def no_frames(node: Node, x: Any) -> TypeError:
    """The error for a layer that gets anything but a sequence of frames."""
    given = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
    return TypeError(f"{node.name} expects floating-point [T, B, C, H, W] with nothing empty, got {given}")


# ---- what leaves are


def is_neuron(module: Any) -> bool:
    """Whether a leaf is a neuron that the forms can compute themselves."""
    return isinstance(module, nn.Module) and steps.is_neuron(module)


def is_kits_neuron(module: Any) -> bool:
    """Whether a leaf is a neuron of spikes or levels that the forms can compute themselves."""
    return is_neuron(module) or (isinstance(module, nn.Module) and steps.is_plain(module, IntegerNeuron))


def computed(target: Any, args: Any, kwargs: Any) -> Any:
    """The result of a call: of the method that is named, else of a leaf or function."""
    return getattr(args[0], target)(*args[1:], **kwargs) if isinstance(target, str) else target(*args, **kwargs)


def evaluated(leaf: Any) -> Any:
    """The function that computes a leaf in evaluation: its `evaluate` if it has one and no hooks, else itself."""
    own = (
        isinstance(leaf, nn.Module) and steps.tells(leaf, "evaluate") and not any(map(steps.has_hooks, leaf.modules()))
    )
    return leaf.evaluate if own else leaf


def may_write(leaf: nn.Module) -> bool:
    """Whether a leaf has code that might write into its inputs."""
    known = ("torch.nn.", "snntorch._neurons.", __name__.partition(".")[0] + ".")
    parts = list(leaf.modules())
    return any(getattr(part, "inplace", False) or not type(part).__module__.startswith(known) for part in parts)


def _same_memory(value: Any, x: Tensor) -> bool:
    """Whether a value lies in the memory of a tensor, or is none that could."""
    if isinstance(value, tuple | list):
        return all(_same_memory(part, x) for part in value)
    if isinstance(value, Tensor):
        return value.untyped_storage()._cdata == x.untyped_storage()._cdata
    return isinstance(value, bool | int | float | str | torch.device | torch.dtype | None)


def leaves(target: Any) -> list[nn.Module]:
    """The modules that a node's target consists of."""
    parts = (*target.units, *target.neurons, target.mixer) if isinstance(target, Mixing) else (target,)
    return [part for part in parts if isinstance(part, nn.Module)]


def convolution(unit: Any) -> tuple[nn.Conv2d, nn.BatchNorm2d | None] | None:
    """The convolution of a unit, or a bare `nn.Conv2d`, and its norm; `None` if the unit has to run as it is."""
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


def _is_unknown_unit(leaf: nn.Module) -> bool:
    """Whether a leaf is a unit without hooks that has to run as it is."""
    hooked = any(map(steps.has_hooks, leaf.modules()))
    return isinstance(leaf, steps.Unit) and not hooked and convolution(leaf) is None


def chain(unit: Any) -> list[nn.Conv2d] | None:
    """The convolutions of a unit that `convolution` merges into one, in their order; its norm follows the last."""
    layers: list[nn.Conv2d] | None = unit.chain() if isinstance(unit, steps.Unit) else None
    if layers is None:
        return None
    known = all(layer.padding_mode == "zeros" and not isinstance(layer.padding, str) for layer in layers)
    return layers if known else None


def fold(conv: nn.Conv2d, norm: nn.BatchNorm2d | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of `norm(conv(x))` in float64."""
    weight = conv.weight.double()
    bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.double()
    if norm is None:
        return weight, bias
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    bias = (bias - norm.running_mean.double()) * scale
    bias = bias if norm.bias is None else bias + norm.bias.double()
    return weight * scale.view(-1, 1, 1, 1), bias


def filled(nested: Any, value: Callable[[Node], Any]) -> Any:
    """The arguments of a node with every node replaced by its value."""
    if isinstance(nested, Node):
        return value(nested)
    if isinstance(nested, dict):
        return {key: filled(part, value) for key, part in nested.items()}
    if isinstance(nested, list):
        return [filled(part, value) for part in nested]  # a trace has lists that cannot be changed
    if isinstance(nested, tuple):
        parts = [filled(part, value) for part in nested]
        return type(nested)(*parts) if hasattr(nested, "_fields") else type(nested)(parts)
    if isinstance(nested, slice):
        return slice(*(filled(part, value) for part in (nested.start, nested.stop, nested.step)))
    return nested
