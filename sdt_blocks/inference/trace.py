"""Makes the plan of a network: a coarse trace of `forward` at the level of the steps.

Units, neurons, mixers and torch's own layers are leaves, each kept whole as one node; the trace enters blocks,
containers and a user's own modules. A module whose forward cannot be traced (it branches on a tensor, or asks for a
shape in Python) becomes one opaque node, and one warning names it; everything else is optimized.
"""

from __future__ import annotations

import copy
import dis
import inspect
import operator
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from .. import steps
from ..neuron import Streamed
from .frames import on_sequences
from .frozen import Chance, asks_for_a_type, attribute, attributes, changed_since, first_unlike, holds_proxies, takes
from .plan import (
    ADD,
    CALL,
    CHECK,
    FIRE,
    INPUT,
    MIX,
    OUTPUT,
    POOL,
    PRESENT,
    PROJECT,
    Mixing,
    Node,
    Plan,
    is_neuron,
)
from .written import AUGMENTED, without_writing


def plan(model: nn.Module) -> Plan:
    """The plan of a frozen copy of the model in eval mode, as a function of its required inputs.

    One warning names the modules that could not be traced. Raises `TypeError` if the model is not a module.
    """
    traced = trace(model)
    if traced.opaque:
        told = "; ".join(f"{name or type(model).__name__} ({why})" for name, why in traced.opaque.items())
        warnings.warn(f"kept as it is, since only its own forward can compute it: {told}", stacklevel=3)
    return traced.plan


class Traced(NamedTuple):
    """A plan, the frozen copy of the network with its leaves, and the opaque modules by name with the reason."""

    plan: Plan
    network: nn.Module
    opaque: dict[str, str]


def trace(model: nn.Module) -> Traced:
    """The plan of a model and what it was made from, without a warning about opaque modules.

    Raises `TypeError` if the model is not a module, and `ValueError` if it requires more than four inputs.
    """
    model = unwrap(model)
    opaque: dict[str, str] = {}
    while True:
        root = _Root(_frozen(model))
        tracer, chance, before = _Tracer(opaque), Chance(), attributes(root)
        try:
            graph = tracer.trace(root)
        except Exception as error:
            if _NETWORK in opaque:
                raise
            opaque[tracer.failed or _NETWORK] = str(error).partition("\n")[0] or type(error).__name__
            continue
        if chance.taken():
            opaque[_NETWORK] = "it draws random numbers"
            continue
        stateful = [name for name, module in root.named_modules() if holds_proxies(module)]
        if not stateful and not _is_known(root):
            stateful = _grown(root, graph, opaque, before)
        if not stateful and _UNLIKE in opaque.values() and any(holds_proxies(one, 4) for one in root.modules()):
            stateful = [_NETWORK]  # an opaque module would find traced values that the trace has left behind
        if not stateful or _NETWORK in opaque:
            break
        part = next((name for name in reversed(stateful) if name not in opaque), _NETWORK)
        opaque[part] = _UNLIKE if changed_since(before, root) == [] else "it keeps a state in its attributes"
    without_writing(graph, root)
    told = {_short(name): why for name, why in (opaque | tracer.watched).items()}
    return Traced(Plan(on_sequences(list(_Lowering(root).nodes_of(graph)))), root.network, told)


def _is_known(module: nn.Module) -> bool:
    """Whether a trace looks into nothing but the kit's and PyTorch's own code, which keeps no state."""
    if is_leaf(module):
        return True
    own = type(module).__module__.partition(".")[0] in ("torch", __name__.partition(".")[0])
    replaced = steps.has_hooks(module) or any(map(inspect.isroutine, vars(module).values()))
    return own and not replaced and all(map(_is_known, module.children()))


def _grown(root: nn.Module, graph: fx.Graph, opaque: dict[str, str], before: Any) -> list[str]:
    """The modules with a state that makes a second call differ from the first."""
    # If a state is reset at every call, or a counter has no effect, a second trace is like the first.
    seen, left, again = changed_since(before, root) != [], attributes(root), _Tracer(opaque)
    try:
        other = again.trace(root)
    except Exception:  # for example because of a value that the first trace has left in a list
        return [again.failed or _NETWORK]
    changed, unlike = changed_since(left, root), first_unlike(graph, other, root)
    if unlike is None:
        held = seen and (takes(graph, changed) or takes(other, changed))
        return [path.rpartition(".")[0] for path in changed] if held else []
    if changed:
        return [path.rpartition(".")[0] for path in changed]
    # The state is somewhere else: in a list, in another object, or in a generator.
    within = list(unlike.meta.get("nn_module_stack", {}).values())
    return [within[-1][0] if within else _NETWORK]


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile` and data-parallel wrappers. Raises `TypeError` if it is not a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, _PARALLEL):
            inner = model.module
        if inner is None:
            return model
        model = inner


_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def _frozen(model: nn.Module) -> nn.Module:
    """A copy in eval mode without gradients, including any state of neurons that is part of an autograd graph."""
    values = (value for module in model.modules() for value in (*vars(module).values(), *module._buffers.values()))
    held = [value for value in values if isinstance(value, Tensor) and not value.is_leaf]
    memo: Any = {id(value): value.detach().clone() for value in held}
    return copy.deepcopy(model, memo).eval().requires_grad_(False)


_NETWORK = "network"
_UNLIKE = "it is another one from call to call"


class _Root(nn.Module):
    """The network as a function of its required inputs; optional ones keep their defaults."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        parameters = inspect.signature(network.forward).parameters.values()
        required = [
            p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
        if len(required) > 4:
            raise ValueError(
                f"a network of at most four inputs can be optimized, {type(network).__name__}.forward requires "
                f"{len(required)}: give the others defaults, or put them into one tensor"
            )
        # The tracer reads the inputs from the signature.
        self.__class__ = (_Root, _Root, _Two, _Three, _Four)[len(required)]

    def forward(self, x: Any) -> Any:
        return self.network(x)


class _Two(_Root):
    def forward(self, x: Any, y: Any) -> Any:  # type: ignore[override]
        return self.network(x, y)


class _Three(_Root):
    def forward(self, x: Any, y: Any, z: Any) -> Any:  # type: ignore[override]
        return self.network(x, y, z)


class _Four(_Root):
    def forward(self, x: Any, y: Any, z: Any, u: Any) -> Any:  # type: ignore[override]
        return self.network(x, y, z, u)


def _short(name: str) -> str:
    return name.removeprefix(_NETWORK).removeprefix(".")


_TYPES = "it asks for the type of a value, which a trace does not know"


class _Value(fx.Proxy):
    """A traced value, which is not a tensor: code that asks for its type would take another branch, so it raises."""

    @property
    def __class__(self) -> type:
        if _asks(sys._getframe(1)):
            raise TypeError(_TYPES)
        return _Value

    @__class__.setter
    def __class__(self, kind: type) -> None:
        raise TypeError("a traced value stays one")

    def __getattr__(self, name: str) -> _Attribute:
        if not hasattr(Tensor, name) and _asks(sys._getframe(1), ("hasattr", "getattr")):
            raise TypeError("it asks whether a value has an attribute, which a trace does not know")
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("tracer", "node", "root", "attr", "_node"):
            raise TypeError("it sets an attribute of a value, which a trace does not remember")
        super().__setattr__(name, value)

    def __setitem__(self, place: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, place, value), {})


class _Attribute(_Value, fx.proxy.Attribute):
    """An attribute of a traced value, or the result of its method when called."""


def _written_by(function: Callable[[Any, Any], Any]) -> Callable[[_Value, Any], fx.Proxy]:
    return lambda value, other: value.tracer.create_proxy("call_function", function, (value, other), {})


for _function in AUGMENTED:
    # Without these methods Python would rebind the name to a sum, and leave the value itself unchanged.
    setattr(_Value, f"__{_function.__name__}__", _written_by(_function))


def _asks(frame: Any, words: tuple[str, ...] = ("isinstance", "__class__")) -> bool:
    """Whether a frame's current line, outside of PyTorch and the kit, uses one of these words, or a class pattern."""
    while frame.f_globals.get("__name__") in ("abc", "typing"):
        frame = frame.f_back
    code, package = frame.f_code, str(frame.f_globals.get("__name__")).partition(".")[0]
    if package in ("torch", __name__.partition(".")[0]):
        return bool(code.co_name == "is_tensor")
    # PyTorch's own functions ask too, from within such a line: look at what the line itself says.
    here = [range(start, end) for start, end, line in code.co_lines() if line == frame.f_lineno]
    line = [one for one in dis.get_instructions(code) if any(one.offset in places for places in here)]
    return any(one.argval in words or one.opname == "MATCH_CLASS" for one in line)


class _Tracer(fx.Tracer):
    takes_modules = True

    def __init__(self, opaque: dict[str, str]) -> None:
        super().__init__()
        self.opaque = opaque
        self.failed: str | None = None
        self.autocast = _autocast()
        self.watched: dict[str, str] = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = module_qualified_name in self.opaque or is_leaf(m)
        if any(map(steps.has_hooks, m.modules() if leaf else (m,))):
            self.watched[module_qualified_name] = "it has hooks, or a call of its own"
            return True
        return leaf

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            inner = getattr(m, "_orig_mod", None)
            if isinstance(inner, nn.Module) and not m._forward_hooks and not m._forward_pre_hooks:
                return inner(*args, **kwargs)
            if not is_leaf(m) and self.path_of_module(m) not in self.opaque and asks_for_a_type(m):
                raise TypeError(_TYPES)
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            path = self.path_of_module(m)
            # A leaf is not the cause of an error in the code that calls it.
            if self.failed is None and path not in self.opaque and not is_leaf(m):
                self.failed = path
            raise

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        if _autocast() != self.autocast:
            raise RuntimeError("it sets autocast, which a traced call does not remember")
        return super().create_node(kind, *args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, nn.Module):
            path = self.path_of_module(a)
            # The leaf of a step is not a call of the tracer, so hooks are looked for here.
            self.is_leaf_module(a, path)
            return self.create_node("get_attr", path, (), {})
        return super().create_arg(a)


def _autocast() -> list[tuple[bool, torch.dtype]]:
    return [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")]


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is kept whole because of its type: torch's own layers, units, neurons, mixers."""
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict, *_PARALLEL)
    of_torch = type(module).__module__.startswith("torch.nn.") and not isinstance(module, containers)
    return of_torch or isinstance(module, steps.Unit | Streamed) or hasattr(module, "emits")


class Constant(nn.Module):
    """A tensor of the network itself, such as a position embedding."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value.detach())
        self.value: Tensor

    def forward(self) -> Tensor:
        return self.value


class _Lowering:
    """Turns the nodes of `torch.fx` into those of a plan: splits steps, drops what does nothing in eval mode."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.values: dict[fx.Node, Any] = {}

    def nodes_of(self, graph: fx.Graph) -> Iterator[Node]:
        for node in graph.nodes:
            made = list(self._lower(node))
            if made:
                self.values[node] = made[-1]
            yield from made

    def _lower(self, node: fx.Node) -> Iterator[Node]:
        args: Any = map_arg(node.args, self.values.__getitem__)
        kwargs: Any = map_arg(node.kwargs, self.values.__getitem__)
        if node.op == "placeholder":
            yield Node(str(node.target), INPUT)
        elif node.op == "get_attr":
            value = attribute(self.network, str(node.target))
            if not isinstance(value, Tensor):
                self.values[node] = value
            else:
                yield Node(_short(str(node.target)), CALL, Constant(value))
        elif node.op == "output":
            yield Node("output", OUTPUT, args=args)
        elif node.op == "call_module":
            yield from self._module(node, self.network.get_submodule(str(node.target)), args, kwargs)
        elif node.op == "call_function" and node.target in _STEPS:
            yield from self._step(node, _STEPS[node.target], args, kwargs)
        elif node.op == "call_function" and node.target in (operator.add, torch.add) and not kwargs:
            yield Node(node.name, ADD, operator.add, args)
        else:
            yield Node(node.name, CALL, node.target, args, kwargs)

    def _module(self, node: fx.Node, module: nn.Module, args: Any, kwargs: Any) -> Iterator[Node]:
        name = _short(str(node.target))
        if steps.is_plain(module, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d):
            self.values[node] = args[0] if args else kwargs["input"]
        elif is_neuron(module) and not kwargs and len(args) == 1:
            yield Node(name, FIRE, module, args)
        else:
            yield Node(name, CALL, module, args, kwargs)

    def _step(self, node: fx.Node, op: str, args: Any, kwargs: Any) -> Iterator[Node]:
        names = [_short(str(part.target)) for part in node.all_input_nodes if part.op == "get_attr"]
        if op == "project_and_fire":
            unit, neuron, x = args
            change = Node(names[0], PROJECT, unit, (x,))
            yield change
            yield Node(names[1], FIRE, neuron, (change,))
        elif op == MIX:
            units, neurons, mixer, x = args
            yield Node(names[-1], MIX, Mixing(tuple(units), tuple(neurons), mixer), (x,))
        elif op == POOL and steps.is_plain(args[0], nn.Identity):
            self.values[node] = args[1]
        elif op in (PROJECT, FIRE, POOL):
            yield Node(names[0], op, args[0], args[1:])
        elif op == ADD and not any(args[2:]):
            yield Node(node.name, ADD, steps.shortcut, args[:2])
        else:
            yield Node(node.name, CALL if op == ADD else op, node.target, args, kwargs)


_STEPS: dict[Any, str] = {
    steps.present: PRESENT,
    steps.check_sequence: CHECK,
    steps.project: PROJECT,
    steps.fire: FIRE,
    steps.project_and_fire: "project_and_fire",
    steps.project_and_mix: MIX,
    steps.pool: POOL,
    steps.shortcut: ADD,
}
