"""Finds what a trace would wrongly freeze into a plan: random numbers, and values that change from call to call."""

from __future__ import annotations

import dis
import functools
import itertools
import random
from collections import deque
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg


class Chance:
    """The state of the random number generators of PyTorch, NumPy and Python."""

    def __init__(self) -> None:
        # The legacy generator of NumPy is the one that code draws from without naming a generator.
        self.torch, self.python = torch.get_rng_state(), random.getstate()
        self.numpy = np.random.get_state()  # noqa: NPY002

    def taken(self) -> bool:
        """Whether numbers have been drawn since; restores the generators."""
        before: Any = self.numpy
        now: Any = np.random.get_state()  # noqa: NPY002
        same = torch.equal(self.torch, torch.get_rng_state()) and self.python == random.getstate()
        same = same and bool(np.array_equal(before[1], now[1])) and before[2:] == now[2:]
        torch.set_rng_state(self.torch)
        random.setstate(self.python)
        np.random.set_state(before)  # noqa: NPY002
        return not same


def attributes(root: nn.Module) -> dict[str, tuple[Any, int]]:
    """The attributes of modules by path: numbers and strings, and tensors with their versions."""
    found = {}
    for name, module in root.named_modules():
        for key, value in (*vars(module).items(), *module._buffers.items(), *module._parameters.items()):
            if isinstance(value, _COMPARED):
                found[f"{name}.{key}"] = value, times_written(value)
    return found


_COMPARED = (bool, int, float, str, Tensor)  # asking with a union of types takes four times as long


def times_written(x: Any) -> int:
    """How often a tensor has been written into, as far as PyTorch counts that; 0 for anything else."""
    return x._version if isinstance(x, Tensor) and not x.is_inference() else 0


def changed_since(before: dict[str, tuple[Any, int]], root: nn.Module) -> list[str]:
    """The paths of attributes that are new, have another value now, or were written into."""
    now = attributes(root)
    changed = [path for path in now if path not in before]
    for path, (value, version) in before.items():
        other, its_version = now.get(path, (None, 0))
        if isinstance(value, Tensor) and isinstance(other, Tensor):
            same = version == its_version if other is value else _equal(value, other)
        else:
            same = not isinstance(other, Tensor) and other == value
        if not same:
            changed.append(path)
    return changed


def _equal(value: Tensor, other: Tensor) -> bool:
    """Whether a tensor was replaced by an equal one, as when a state is reset."""
    if (value.shape, value.dtype, value.device) != (other.shape, other.dtype, other.device):
        return False
    return not value.is_meta and torch.equal(value, other)


def first_unlike(one: fx.Graph, other: fx.Graph, root: nn.Module) -> fx.Node | None:
    """The first node in which two traces of a network differ; `None` if they are the same."""
    places, its_places = ({node: place for place, node in enumerate(graph.nodes)} for graph in (one, other))
    for node, its in itertools.zip_longest(one.nodes, other.nodes):
        if node is None or its is None:
            return node or its
        given = repr(map_arg((node.args, node.kwargs), places.get))
        its_given = repr(map_arg((its.args, its.kwargs), its_places.get))
        same = node.op == its.op and given == its_given
        if not same or not (_held_alike(node, its, root) if node.op == "get_attr" else node.target == its.target):
            return its
    return None


def _held_alike(node: fx.Node, its: fx.Node, root: nn.Module) -> bool:
    held, other = (attribute(root, str(one.target)) for one in (node, its))
    return held is other or (isinstance(held, Tensor) and isinstance(other, Tensor) and _equal(held, other))


def takes(graph: fx.Graph, paths: list[str]) -> bool:
    """Whether a trace reads one of these attributes."""
    return not {str(node.target) for node in graph.nodes if node.op == "get_attr"}.isdisjoint(paths)


def asks_for_a_type(module: nn.Module) -> bool:
    """Whether a module's code takes `type(x)` of a local x, for which a traced value has another, and not for its name.

    That of `forward`, and of methods, functions in attributes and functions of the same package that it names;
    PyTorch's and the kit's is known.
    """
    kind = type(module)
    package = kind.__module__.partition(".")[0]
    if package in ("torch", __name__.partition(".")[0]):
        return False
    functions: list[Any] = [kind.forward]
    seen = set[Any]()
    while functions:
        function = functions.pop()
        code = getattr(function, "__code__", None)
        if code is None or code in seen or str(function.__module__).partition(".")[0] != package:
            continue
        seen.add(code)
        if _asks_for_a_type(code):
            return True
        places = vars(module), function.__globals__
        functions += [place.get(name) for place in places for name in code.co_names]
        functions += [getattr(kind, name, None) for name in code.co_names]
    return False


@functools.cache
def _asks_for_a_type(code: CodeType) -> bool:
    idle = ("PUSH_NULL", "PRECALL", "CACHE")
    found = [one for one in dis.get_instructions(code) if one.opname not in idle]
    for place, (one, given, call) in enumerate(zip(found, found[1:], found[2:], strict=False)):
        asks = one.argval == "type" and one.opname in ("LOAD_GLOBAL", "LOAD_NAME") and call.opname.startswith("CALL")
        if asks and given.opname.startswith("LOAD_FAST") and given.argval != "self":
            use, *after = found[place + 3 : place + 9]
            named = use.argval == "__name__" or use.opname.startswith(("FORMAT", "CONVERT"))
            if not named or any(each.opname in ("IS_OP", "COMPARE_OP", "CONTAINS_OP") for each in after):
                return True
    return any(_asks_for_a_type(inner) for inner in code.co_consts if isinstance(inner, CodeType))


def holds_proxies(module: nn.Module, depth: int = 1) -> bool:
    """Whether tracing has left a traced value in the module's attributes, or inside them, up to `depth` levels deep."""
    return any(_holds(value, depth) for value in (*vars(module).values(), *module._buffers.values()))


def _holds(value: Any, depth: int) -> bool:
    if type(value).__mro__.count(fx.Proxy):
        return True
    if depth <= 1 or isinstance(value, nn.Module | Tensor | str | type):
        return False
    parts: Any = value.values() if isinstance(value, dict) else value if isinstance(value, _SEVERAL) else ()
    inner = getattr(value, "__dict__", {}).values() if not isinstance(value, (dict, *_SEVERAL)) else ()
    return any(_holds(part, depth - 1) for part in (*parts, *inner))


_SEVERAL = (list, tuple, set, frozenset, deque)


def attribute(module: nn.Module, path: str) -> Any:
    """The attribute at a dotted path."""
    for name in path.split("."):
        module = getattr(module, name)
    return module
