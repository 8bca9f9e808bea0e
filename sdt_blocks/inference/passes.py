"""Properties of a plan that its forms need: pure functions of its nodes."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import steps
from ..neuron import IntegerNeuron
from .plan import (
    ADD,
    CALL,
    CHECK,
    COUNTS,
    FIRE,
    INPUT,
    LEVELS,
    MIX,
    OUTPUT,
    POOL,
    PRESENT,
    PROJECT,
    REAL,
    SPIKES,
    Node,
    Plan,
    convolution,
    is_kits_neuron,
    is_neuron,
    leaves,
    may_write,
)
from .written import called, names, writes

# Calls that move values without changing them.
_MOVES = names(
    """flatten unflatten reshape view permute transpose movedim contiguous clone squeeze unsqueeze expand getitem select
    narrow chunk split unbind repeat cat stack detach roll flip"""
)

# Calls that compute every value by itself.
_EACH = names("add sub mul truediv div neg abs relu clamp float to size dim getattr with_item")


def kinds(plan: Plan) -> dict[Node, str]:
    """For every node, whether it holds spikes (only zeros and ones), levels of integer neurons, counts or real values.

    Counts are sums of spikes, as shortcuts make them; `most_counted` says how large they can be.
    """
    if changes_in_place(plan):
        return dict.fromkeys(plan.nodes, REAL)
    found: dict[Node, str] = {}
    for node in plan.nodes:
        of = [found[given] for given in node.inputs()]
        all_spikes = bool(of) and set(of) == {SPIKES}
        if node.op == FIRE:
            spikes = steps.fires_spikes(node.target)
        elif node.op == MIX:
            # A mixer says what it emits.
            spikes = steps.emits_spikes(node.target.mixer) and all(map(steps.fires_spikes, node.target.neurons))
        elif node.op == POOL or (node.op == CALL and isinstance(node.target, nn.MaxPool2d)):
            spikes = all_spikes and steps.is_plain(node.target, nn.MaxPool2d) and not node.target.return_indices
        elif node.op == CALL and isinstance(node.target, nn.Module):
            spikes = steps.emits_spikes(node.target)
        elif node.op == CALL:
            # A product of spikes is spikes; spikes times a constant have another height.
            masks = node.target in (operator.mul, torch.mul) and all(isinstance(one, Node) for one in node.args)
            spikes = all_spikes and (called(node) in _MOVES or masks)
        else:
            spikes = False
        levels = node.op == FIRE and steps.is_plain(node.target, IntegerNeuron)
        counts = node.op == ADD and len(of) == 2 and set(of) <= {SPIKES, COUNTS}
        found[node] = SPIKES if spikes else LEVELS if levels else COUNTS if counts else REAL
    return found


def most_counted(plan: Plan) -> dict[Node, int]:
    """For every node that holds counts, the largest possible one."""
    found, of = dict[Node, int](), kinds(plan)
    for node in plan.nodes:
        if of[node] == COUNTS:
            found[node] = sum(found.get(given, 1) for given in node.inputs())
    return found


class Epilogue(NamedTuple):
    """What directly follows a product: the shortcut that it is added to, and the neuron on the sum."""

    total: Node
    """The sum with the shortcut, or the product itself."""
    residual: Node | None
    fire: Node | None
    """The one neuron on the sum."""
    keep: bool
    """Whether anything else than that neuron uses the sum."""


def epilogues(plan: Plan) -> dict[Node, Epilogue]:
    """For every product, what follows it, also across blocks, and can be computed with it.

    That is not so where code that may write into its inputs comes in between: the sum, or the neuron, sees what it has
    written.
    """
    users, place = plan.users(), {node: i for i, node in enumerate(plan.nodes)}
    writers = [place[node] for node in plan.nodes if _may_write(node)]

    def at_once(node: Node, later: Node) -> bool:
        return not any(place[node] < writer < place[later] for writer in writers)

    found = {}
    for node in plan.nodes:
        if node.op != PROJECT:
            continue
        total, residual = node, None
        followers = _values(users[node])
        if len(followers) == 1 and followers[0].op == ADD and followers[0].args[1] is node:
            before = followers[0].args[0]
            earlier = isinstance(before, Node) and before is not node and place[before] < place[node]
            if earlier and at_once(node, followers[0]):
                total, residual = followers[0], before
        takers = _values(users[total])
        fires = [taker for taker in takers if taker.op == FIRE and is_kits_neuron(taker.target)]
        fire = fires[0] if len(fires) == 1 and at_once(node, fires[0]) else None
        found[node] = Epilogue(total, residual, fire, keep=fire is None or len(takers) > 1)
    return found


def _may_write(node: Node) -> bool:
    """Whether a node is code that may write into its inputs, as far as is known before forms are made."""
    known = node.op == PROJECT and isinstance(node.target, nn.Module) and steps.is_unit(node.target)
    return not known and any(map(may_write, leaves(node.target)))


def _values(nodes: list[Node]) -> list[Node]:
    return [node for node in nodes if node.op != CHECK]


def last_uses(plan: Plan) -> dict[Node, Node]:
    """For every node, the last one that takes its value."""
    return {given: node for node in plan.nodes for given in node.inputs()}


def once(plan: Plan) -> set[Node]:
    """The nodes whose value is the same at every step of a still image."""
    found: set[Node] = set()
    for node in plan.nodes:
        known = node.op == INPUT or node.op in (PRESENT, PROJECT, POOL, ADD)
        if known and all(given in found for given in node.inputs()):
            found.add(node)
    return found


def of_samples(plan: Plan) -> list[Node]:
    """The nodes that treat every sample `[:, b]` of `[T, B, ...]` by itself, so that a batch may be split."""
    users = plan.users()
    found: dict[Node, None] = {}
    frames: set[Node] = set()  # those known to be [T, B, C, H, W]
    for node in plan.nodes:
        given = node.inputs()
        if node.op in (PRESENT, PROJECT, POOL, MIX) or (node.op in (FIRE, ADD) and frames.issuperset(given)):
            frames.add(node)
        if node.op == INPUT:
            takers = users[node]
            own = bool(takers) and all(taker.op in (PROJECT, FIRE, MIX, POOL, CHECK) for taker in takers)
        elif node.op == PRESENT:
            own = all(one.op == INPUT for one in given)  # not if the number of steps is computed
        elif node.op == FIRE:
            own = is_kits_neuron(node.target) and given[0] in found
        elif node.op in (PROJECT, POOL, ADD, CHECK):
            plain = not isinstance(node.target, nn.Module) or _independent(node.target)
            own = plain and bool(given) and all(one in found for one in given)
        elif node.op == MIX:
            mixing = node.target
            parts = (*mixing.units, *mixing.neurons, mixing.mixer)
            own = given[0] in found and all(map(_independent, parts))
        elif node.op == CALL and steps.is_plain(node.target, nn.Linear):
            own = given[0] in found
        else:
            places = node.op == CALL and node.target == "mean" and over_places(node) and given[0] in frames
            own = places and given[0] in found
        if own and node.op != OUTPUT:
            found[node] = None
    return list(found)


def _independent(leaf: nn.Module) -> bool:
    """Whether a leaf of the kit or of torch treats each frame by itself in eval mode."""
    known = convolution(leaf) is not None or steps.is_plain(leaf, nn.MaxPool2d, nn.AvgPool2d) or is_neuron(leaf)
    apart = steps.tells(leaf, "apart") and bool(leaf.apart)
    return (known or apart) and not steps.has_hooks(leaf)


def over_places(node: Node) -> bool:
    """Whether a mean is taken over exactly height and width."""
    axes = node.args[1] if len(node.args) == 2 else None
    return not node.kwargs and isinstance(axes, list | tuple) and sorted(axes) in ([-2, -1], [3, 4])


def axes_of_mean(node: Node) -> list[int] | None:
    """The axes over which a call of `mean` averages and which it removes; None for any other form of call."""
    axes: Any = node.args[1] if len(node.args) == 2 else node.kwargs.get("dim")
    if set(node.kwargs) - {"dim"} or len(node.args) + len(node.kwargs) != 2:
        return None
    axes = [axes] if isinstance(axes, int) else axes
    return list(axes) if isinstance(axes, list | tuple) and all(isinstance(axis, int) for axis in axes) else None


def keeps_values_apart(node: Node) -> bool:
    """Whether a call only moves values or computes each by itself, so that it has no sums whose order matters."""
    return called(node) in _MOVES | _EACH


def changes_in_place(plan: Plan) -> bool:
    """Whether a call writes into a value that others may use too."""
    return any(map(writes, plan.nodes))
