"""Turns layers that a network's own code calls on frames into steps on a sequence.

A network of plain PyTorch layers goes from a sequence `[T, B, C, H, W]` to its frames and back:

    x = norm(conv(x.flatten(0, 1))).unflatten(0, x.shape[:2])

This is `project(unit, x)`, and can then be folded, fused with its neuron and computed by events like a unit of the kit.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import steps
from ..neuron import Streamed
from .plan import CALL, FIRE, POOL, PROJECT, Node, convolution, filled
from .written import writes


class Frames(NamedTuple):
    """The frames `[T * B, ...]` of a node's sequence `[T, B, ...]`."""

    of: Node


class ConvAndNorm(steps.Unit):
    """A convolution and a norm from different places of a network, as one unit."""

    def __init__(self, conv: nn.Conv2d, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm = conv, norm
        self.training = conv.training


def on_sequences(nodes: list[Node]) -> list[Node]:
    """The nodes, with convolutions, norms and poolings on frames replaced by steps on the sequence; same values.

    All other nodes still take frames, which are flattened for them. Nodes that only ask for sizes to get back to the
    sequence are removed. A network that writes into its values is not changed, since its frames are views of sequences.
    """
    if any(map(writes, nodes)):
        return nodes
    rewriting = _Rewriting(nodes)
    for node in nodes:
        rewriting.values[node] = rewriting.rewritten(node)
    return _without_idle(rewriting.made)


class _Rewriting:
    def __init__(self, nodes: list[Node]) -> None:
        self.made: list[Node] = []
        self.values: dict[Node, Node | Frames] = {}
        self.flattened: dict[Node, Node] = {}
        self.uses: dict[Node, int] = dict.fromkeys(nodes, 0)
        for node in nodes:
            for given in node.inputs():
                self.uses[given] += 1

    def rewritten(self, node: Node) -> Node | Frames:
        """What replaces a node of the network."""
        given = self.values.get(node.args[0]) if node.args and isinstance(node.args[0], Node) else None
        flattens = options_of(node, "flatten", start_dim=0, end_dim=-1) == [0, 1]
        if node.op == CALL and isinstance(given, Node) and flattens:
            return Frames(given)
        if node.op == CALL and isinstance(given, Frames):
            sizes = options_of(node, "unflatten", dim=None, sizes=None)
            if sizes is not None and sizes[0] == 0 and self._are_first_two(sizes[1], given.of):
                return given.of
            if isinstance(node.target, nn.Module) and len(node.args) == 1 and not node.kwargs:
                made = self._layer(node, given.of)
                if made is not None:
                    return Frames(made)
        node.args, node.kwargs = filled(node.args, self._plain), filled(node.kwargs, self._plain)
        self.made.append(node)
        return node

    def _layer(self, node: Node, sequence: Node) -> Node | None:
        """The step for a layer that is called on the frames of a sequence; `None` if there is none."""
        layer, before = node.target, node.args[0]
        if steps.is_plain(layer, nn.Conv2d) and convolution(layer) is not None:
            made = Node(node.name, PROJECT, layer, (sequence,))
        elif steps.is_plain(layer, nn.MaxPool2d, nn.AvgPool2d) and not getattr(layer, "return_indices", False):
            made = Node(node.name, POOL, layer, (sequence,))
        elif steps.is_plain(layer, nn.BatchNorm2d, nn.SyncBatchNorm):
            # Only with the convolution that made these frames, and only if nothing else uses them.
            own = before.op == CALL and before.target is sequence.target and self.uses[before] == 1
            if not own or sequence.op != PROJECT or not isinstance(sequence.target, nn.Conv2d):
                return None
            unit = ConvAndNorm(sequence.target, layer)
            if convolution(unit) is None:
                return None
            sequence.target = unit
            return sequence
        else:
            return None
        self.made.append(made)
        return made

    def _plain(self, node: Node) -> Node:
        """The node for a value as other nodes take it: frames are flattened."""
        value = self.values[node]
        if isinstance(value, Node):
            return value
        if value.of not in self.flattened:
            self.flattened[value.of] = Node(f"{value.of.name}.flatten", CALL, "flatten", (value.of, 0, 1))
            self.made.append(self.flattened[value.of])
        return self.flattened[value.of]

    def _are_first_two(self, sizes: Any, sequence: Node) -> bool:
        """Whether sizes are time and batch of a sequence, taken from it or from one that has the same."""
        root = _as_long(sequence)
        if isinstance(sizes, Node):
            asked = _asked(self.values[sizes])
            return asked is not None and asked[1] == slice(0, 2) and _as_long(asked[0]) is root
        if not isinstance(sizes, list | tuple) or len(sizes) != 2:
            return False
        both = [_asked(self.values[size]) if isinstance(size, Node) else None for size in sizes]
        return all(one is not None and one[1] == place and _as_long(one[0]) is root for place, one in enumerate(both))


def options_of(node: Node, name: str, **defaults: Any) -> list[Any] | None:
    """The arguments after the first in a call of this method or function; `None` for any other call."""
    if node.target not in (name, getattr(torch, name)) or len(node.args) > 1 + len(defaults):
        return None
    given = dict(zip(defaults, node.args[1:], strict=False))
    return [(node.kwargs | given).get(key, default) for key, default in defaults.items()]


def _asked(size: Node | Frames) -> tuple[Node, Any] | None:
    """Whose size a node asks for, and which axes: a number, `slice(0, 2)` for the first two, `None` for all."""
    if not isinstance(size, Node) or size.op != CALL or not size.args or not isinstance(size.args[0], Node):
        return None
    source, *rest = size.args
    if (size.target is getattr and rest == ["shape"]) or (size.target == "size" and not rest):
        return source, None
    if size.target == "size":
        return source, rest[0]
    inner = _asked(source) if size.target is operator.getitem else None
    if inner is None or not (inner[1] is None or (inner[1] == slice(0, 2) and rest[0] in (0, 1))):
        return None
    first_two = isinstance(rest[0], slice) and (rest[0].start or 0, rest[0].stop, rest[0].step or 1) == (0, 2, 1)
    return inner[0], slice(0, 2) if first_two else rest[0]


def _as_long(node: Node) -> Node:
    """The earliest node before this one whose value has the same time steps and batch."""
    while True:
        neuron = node.op == CALL and isinstance(node.target, Streamed) and len(node.args) == 1
        kept = node.op in (PROJECT, POOL, FIRE) or neuron or (node.target is steps.shortcut)
        if not kept or not isinstance(node.args[0], Node):
            return node
        node = node.args[0]


def _without_idle(nodes: list[Node]) -> list[Node]:
    """The nodes without those that ask for sizes, or flatten, and whose result is not used."""
    wanted: set[Node] = set()
    kept: list[Node] = []
    for node in reversed(nodes):
        idle = node.op == CALL and (node.target in ("flatten", "size", operator.getitem) or node.target is getattr)
        if not idle or node in wanted:
            kept.append(node)
            wanted.update(node.inputs())
    return kept[::-1]
