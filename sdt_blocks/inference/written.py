"""Writing in place: where it makes no difference, a new value replaces the one that a network writes into.

    x += y        becomes x' = x + y, and everything that follows uses x' for x

This is possible if no view of x, nor any other name for its memory, is used afterwards. A network that still writes
(`writes`) is computed one call after another, in its own order.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Container, Iterable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .. import steps
from ..neuron import OverTime, takes_sequence
from .frozen import attribute
from .plan import CALL, Node, convolution, is_neuron

T = TypeVar("T", Node, fx.Node)

AUGMENTED = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
}
"""Python's augmented assignments, which write into a tensor, and the operators that return a new one."""


def names(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


# Calls that return a new tensor in memory of its own.
_FRESH = names(
    """add sub mul truediv div floordiv mod pow neg abs relu leaky_relu elu gelu silu sigmoid tanh hardtanh softmax
    log_softmax clamp clamp_min clamp_max masked_fill where exp sqrt rsqrt log floor ceil round sign lerp addcmul
    addcdiv matmul bmm mm mean sum amax amin cumsum cat stack clone empty_like zeros_like ones_like full_like
    new_zeros new_ones new_empty conv1d conv2d conv3d linear batch_norm layer_norm group_norm instance_norm
    max_pool2d avg_pool2d eq ne lt le gt ge and_ or_ xor"""
)

# Those of them that have an in-place form, named with a trailing `_`, with the same result.
_WRITING = names(
    """add sub mul div pow neg abs relu leaky_relu elu sigmoid tanh hardtanh clamp clamp_min clamp_max masked_fill exp
    sqrt rsqrt log floor ceil round sign lerp addcmul addcdiv"""
)

# Attributes and methods of a tensor that do not return a tensor.
_NUMBERS = names(
    """shape ndim dtype device size dim numel nelement item tolist stride layout is_cuda is_contiguous requires_grad
    element_size storage_offset data_ptr get_device is_floating_point"""
)

# Views that are not contiguous.
_TURNS = names("transpose permute movedim swapaxes mT")

_PARTS = names("chunk split unbind tensor_split")

_STEPS: tuple[Any, ...] = (steps.present, steps.project, steps.fire, steps.project_and_fire, steps.project_and_mix)
_STEPS += (steps.pool, steps.shortcut)

_LAYERS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)
_LAYERS += (nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm, nn.MaxPool2d, nn.AvgPool2d, nn.ReLU, nn.Sigmoid, nn.GELU)


def writes(node: Node) -> bool:
    """Whether a node of a plan writes into its inputs."""
    if node.op != CALL:
        return False
    return _names_writing(called(node), node.target, node.kwargs)


def sharing_memory(nodes: Iterable[Node], writers: Container[Node]) -> dict[Node, set[Node]]:
    """For every node the others whose values the network may keep in its memory, as views of them.

    `writers` are the nodes of code of other make, which may give back what it was given.
    """
    found: dict[Node, set[Node]] = {}
    for node in nodes:
        found[node] = {node}
        copies = called(node) == "contiguous" and all(called(one) in _TURNS for one in node.inputs())
        fresh = isinstance(node.target, nn.Module) or called(node) in _FRESH or copies
        if node in writers or (node.op == CALL and not fresh):
            _join(found, node, node.inputs())
    return {node: together - {node} for node, together in found.items()}


def _join(memory: dict[T, set[T]], node: T, others: Iterable[T]) -> None:
    """Makes one set of the nodes that share memory with a node and of those that do with the others."""
    together = set[T]().union(memory[node], *(memory[one] for one in others))
    for one in together:
        memory[one] = together


def without_writing(graph: fx.Graph, root: nn.Module) -> None:
    """Replaces writing into values by new values, where no other name for their memory is used later."""
    _Rewriting(graph, root).run()


def with_item(x: Any, place: Any, value: Any) -> Any:
    """x as it is after `x[place] = value`."""
    made = x.clone() if isinstance(x, Tensor) else copy.copy(x)
    made[place] = value
    return made


def _names_writing(name: str, target: Any, kwargs: dict[str, Any]) -> bool:
    if isinstance(target, nn.Module):
        return bool(getattr(target, "inplace", False))
    by_name = name.endswith("_") and not name.endswith("__") and target not in AUGMENTED.values()
    return (
        by_name or target in AUGMENTED or target is operator.setitem or bool(kwargs.get("inplace")) or "out" in kwargs
    )


class _Rewriting:
    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.graph, self.root = graph, root
        self.place = {node: place for place, node in enumerate(graph.nodes)}
        self.memory: dict[fx.Node, set[fx.Node]] = {}
        """For every node, the nodes that may share its memory."""
        self.same: dict[fx.Node, list[fx.Node]] = {}
        """For every node, the nodes that are the same tensor."""
        self.tensors: set[fx.Node] = set()
        self.layers: dict[nn.Module, bool] = {}
        """The layers that write, and whether everything that they write can be replaced by new values."""

    def run(self) -> None:
        if all(self._written(node) is None for node in self.graph.nodes):
            return
        for node in list(self.graph.nodes):
            written, module = self._written(node), self._module(node)
            self.memory[node], self.same[node] = {node}, [node]
            if node.op == "get_attr" and not isinstance(self._leaf(node), Tensor):
                continue
            if self._is_tensor(node):
                self.tensors.add(node)
            if written is not None and self._may_be_new(node, written):
                self._renew(node, written)
                if module is not None:
                    self.layers.setdefault(module, True)
                continue
            if written is not None and module is not None:
                self.layers[module] = False
            if written is not None or not self._is_fresh(node):
                self._join(node)
        for layer, new in self.layers.items():
            if new:
                layer.inplace = False  # type: ignore[assignment]

    def _join(self, node: fx.Node) -> None:
        given = (one for one in node.all_input_nodes if one.op != "get_attr" or isinstance(self._leaf(one), Tensor))
        _join(self.memory, node, given)

    def _may_be_new(self, node: fx.Node, written: fx.Node) -> bool:
        """Whether a call can return a new value instead of writing, without any difference to what follows."""
        if written not in self.tensors or self._new(node) is None:
            return False
        others = self.memory[written] - set(self.same[written])
        # A tensor that belongs to the network must keep what is written into it.
        held = any(one.op == "get_attr" for one in self.memory[written])
        return not held and not any(self.place[user] > self.place[node] for one in others for user in one.users)

    def _renew(self, node: fx.Node, written: fx.Node) -> None:
        new = self._new(node)
        assert new is not None
        node.target, node.args, node.kwargs = new
        names = [*self.same[written], node]
        for name in names[:-1]:
            for user in list(name.users):
                if self.place[user] > self.place[node]:
                    user.replace_input_with(name, node)
        together = set(names)
        for name in names:
            self.memory[name], self.same[name] = together, names
        self.tensors.add(node)

    def _new(self, node: fx.Node) -> tuple[Any, Any, Any] | None:
        """Target and arguments of a call that returns a new value instead of writing; `None` if there is none."""
        target, name = node.target, called(node)
        kwargs = {key: value for key, value in node.kwargs.items() if key not in ("inplace", "out")}
        if node.op == "call_module":
            module = self._module(node)
            known = type(module).__module__.startswith("torch.nn.") and self.layers.get(module, True)  # type: ignore[arg-type]
            return (target, node.args, node.kwargs) if known else None
        if target in AUGMENTED:
            return AUGMENTED[target], node.args, node.kwargs
        if target is operator.setitem:
            return with_item, node.args, node.kwargs
        if "inplace" in node.kwargs or ("out" in node.kwargs and name in _FRESH):
            return target, node.args, kwargs
        plain = name.removesuffix("_")
        if plain not in _WRITING or not name.endswith("_") or "out" in node.kwargs:
            return None
        if node.op == "call_method":
            return plain, node.args, node.kwargs
        return getattr(torch, plain, None) or getattr(F, plain), node.args, node.kwargs

    def _written(self, node: fx.Node) -> fx.Node | None:
        """The node that a call writes into."""
        module = self._module(node)
        if node.op not in ("call_function", "call_method", "call_module"):
            return None
        if not _names_writing(called(node), node.target if module is None else module, node.kwargs):
            return None
        if isinstance(module, nn.modules.dropout._DropoutNd):
            return None  # dropout does nothing in evaluation
        into: Any = node.kwargs.get("out", node.args[0] if node.args else node.kwargs.get("input"))
        return into if isinstance(into, fx.Node) else None

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _leaf(self, node: Any) -> Any:
        """The leaf that a step was given."""
        return attribute(self.root, str(node.target)) if isinstance(node, fx.Node) else node

    def _is_fresh(self, node: fx.Node) -> bool:
        """Whether a node's value is known to be in memory of its own."""
        module = self._module(node)
        if module is not None:
            return steps.is_plain(module, *_LAYERS) or _fires_anew(module)
        if node.target in _STEPS:
            return self._is_fresh_step(node)
        return node.op in ("call_function", "call_method") and called(node) in _FRESH

    def _is_fresh_step(self, node: fx.Node) -> bool:
        step, (leaf, *others) = node.target, node.args
        if step is steps.project:
            return convolution(self._leaf(leaf)) is not None
        if step is steps.project_and_fire:
            return _fires_anew(self._leaf(others[0]))
        if step is steps.fire:
            return _fires_anew(self._leaf(leaf))
        if step is steps.pool:
            return steps.is_plain(self._leaf(leaf), nn.MaxPool2d, nn.AvgPool2d)
        return step is steps.shortcut

    def _is_tensor(self, node: fx.Node) -> bool:
        """Whether a node's value is known to be a tensor."""
        module, name = self._module(node), called(node)
        if module is not None:
            known = steps.is_plain(module, *_LAYERS) or is_neuron(module)
            return known or isinstance(module, steps.Unit | OverTime)
        if node.target in _STEPS:
            return True
        of = [given for given in node.all_input_nodes if given in self.tensors]
        if node.target is getattr:
            return bool(of) and node.args[1] not in _NUMBERS
        if node.target is operator.getitem:
            whole: Any = node.args[0]
            return bool(of) or called(whole) in _PARTS
        if node.op == "call_method":
            return hasattr(Tensor, name) and name not in _NUMBERS and name not in _PARTS
        if node.op != "call_function":
            return False
        of_python = getattr(node.target, "__module__", "") in ("_operator", "builtins")
        return bool(of) if of_python else name in _FRESH


def _fires_anew(neuron: Any) -> bool:
    return is_neuron(neuron) or (type(neuron) is OverTime and not takes_sequence(neuron.neuron))


def called(node: Node | fx.Node) -> str:
    """The name of the function or method that a node calls, empty for anything else."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
