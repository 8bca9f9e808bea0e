"""What a trace would freeze into a plan: random numbers, and numbers that change from call to call."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg


class Chance:
    """Where the generators of random numbers of PyTorch, NumPy and Python stand."""

    def __init__(self) -> None:
        # The legacy generator is the one that a network's code draws from without a word.
        self.torch, self.python = torch.get_rng_state(), random.getstate()
        self.numpy = np.random.get_state()  # noqa: NPY002

    def taken(self) -> bool:
        """Whether numbers have been drawn since; puts the generators back."""
        before: Any = self.numpy
        now: Any = np.random.get_state()  # noqa: NPY002
        same = torch.equal(self.torch, torch.get_rng_state()) and self.python == random.getstate()
        same = same and bool(np.array_equal(before[1], now[1])) and before[2:] == now[2:]
        torch.set_rng_state(self.torch)
        random.setstate(self.python)
        np.random.set_state(before)  # noqa: NPY002
        return not same


def attributes(root: nn.Module) -> dict[str, tuple[Any, int]]:
    """What modules hold beside their parts, by path: numbers and texts, and tensors with their versions."""
    found = {}
    for name, module in root.named_modules():
        for key, value in (*vars(module).items(), *module._buffers.items(), *module._parameters.items()):
            if isinstance(value, bool | int | float | str | Tensor):
                version = value._version if isinstance(value, Tensor) and not value.is_inference() else 0
                found[f"{name}.{key}"] = value, version
    return found


def changed_since(before: dict[str, tuple[Any, int]], root: nn.Module) -> list[str]:
    """The paths of attributes that are new, have other values now, or were written into."""
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
    """Whether a tensor was replaced by one like it, as where a state is reset."""
    if (value.shape, value.dtype, value.device) != (other.shape, other.dtype, other.device):
        return False
    return not value.is_meta and torch.equal(value, other)


def alike(one: fx.Graph, other: fx.Graph, root: nn.Module, changed: list[str]) -> bool:
    """Whether two traces are the same, and neither takes an attribute that has `changed`."""

    def told(graph: fx.Graph) -> list[Any]:
        places: dict[fx.Node, Any] = {node: place for place, node in enumerate(graph.nodes)}
        found = []
        for node in graph.nodes:
            target: Any = node.target
            if node.op == "get_attr":
                value = attribute(root, str(target))
                target = value.tolist() if isinstance(value, Tensor) else target
            found.append((node.op, target, repr(map_arg((node.args, node.kwargs), places.__getitem__))))
        return found

    taken = {str(node.target) for graph in (one, other) for node in graph.nodes if node.op == "get_attr"}
    return not taken & set(changed) and told(one) == told(other)


def holds_proxies(module: nn.Module) -> bool:
    """Whether tracing has left a traced value in the module's attributes."""
    values = (*vars(module).values(), *module._buffers.values())
    return any(isinstance(value, fx.Proxy) for value in values)


def attribute(module: nn.Module, path: str) -> Any:
    """What lies at a path of names."""
    for name in path.split("."):
        module = getattr(module, name)
    return module
