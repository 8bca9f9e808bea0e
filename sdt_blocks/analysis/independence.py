"""Whether every sample of a batch is answered for itself, and where samples meet if they do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .dataflow import tensors_in
from .probe import Forward, Probe

Changes = tuple[Tensor | None, Tensor | None]
"""Where a tensor differs from that of the first run in either of two others; None where nobody can tell."""

Keep = Callable[[str, list[Tensor], list[Tensor]], None]
"""Called with the name of a module, what it was given and what it gave."""


def where_samples_meet(
    model: nn.Module,
    x: Tensor,
    axis: int = 0,
    *,
    neurons: Sequence[type[nn.Module]] = (),
    forward: Forward | None = None,
) -> list[str]:
    """The innermost modules that make one value of two samples of the batch x, which lie on `axis`; [] if none does.

    One sample is replaced by another one, and then its neighbour instead: what changes both times depends on both. It
    is looked for in the output first. What stands behind such a module is not named, as it is given such values. On the
    meta device there are no values to look at, and nothing is found.
    """
    batches = _replaced(x, axis)
    if batches is None or any(parameter.is_meta for parameter in model.parameters()):
        return []

    def run(batch: Tensor, keep: Keep | None = None) -> list[Tensor]:
        outputs: list[Any] = []

        def call(net: nn.Module, given: Tensor) -> None:
            outputs.append(net(given) if forward is None else forward(net, given))

        # Random draws are the same each time.
        with torch.random.fork_rng(range(torch.cuda.device_count())), Probe(model, neurons, call) as probe:
            torch.manual_seed(0)
            if keep is not None:
                _watch(probe, keep)
            for _ in probe.run(batch):
                pass
        return tensors_in(outputs)

    size = batches[0].shape[axis]
    if x.shape[axis] == 1:
        try:
            run(batches[0])
        except Exception:  # whatever a network raises that takes one sample alone: none can meet there
            return []
    first, *others = (run(batch) for batch in batches)
    if not _meet([_changed(*both) for both in zip(first, *others, strict=False)], size):
        return []
    calls = _Calls()
    run(batches[0], calls.keep)
    for changes, batch in zip(calls.changes, batches[1:], strict=True):
        run(batch, calls.comparing(changes))
    meeting = (name for name, given, made in calls.compared() if _apart(given, size) and _meet(made, size))
    found = list(dict.fromkeys(meeting))
    return [name for name in found if not any(_within(other, name) for other in found)] or [""]


class _Calls:
    """What the modules are given and give in one run, and where that changes in two others.

    Tensors are kept as they are, not copied: one that is written to later is not looked at.
    """

    def __init__(self) -> None:
        self.base: dict[str, list[tuple[list[Tensor], list[Tensor]]]] = {}
        self.versions: dict[int, int] = {}
        self.changes: tuple[dict[int, Tensor | None], ...] = ({}, {})

    def keep(self, name: str, given: list[Tensor], made: list[Tensor]) -> None:
        self.base.setdefault(name, []).append((given, made))
        for tensor in (*given, *made):
            self.versions.setdefault(id(tensor), _version(tensor))

    def comparing(self, changes: dict[int, Tensor | None]) -> Keep:
        """What keeps, of another run, where it differs from the first one."""
        places: Counter[str] = Counter()

        def keep(name: str, given: list[Tensor], made: list[Tensor]) -> None:
            calls, place = self.base.get(name, []), places[name]
            places[name] += 1
            for before, after in zip(calls[place], (given, made), strict=True) if place < len(calls) else ():
                for old, new in zip(before, after, strict=False):
                    if id(old) not in changes:
                        same = _version(old) == self.versions[id(old)]
                        changes[id(old)] = _differ(old, new) if same else None

        return keep

    def compared(self) -> Iterator[tuple[str, list[Changes], list[Changes]]]:
        """For every call the module's name, and where its inputs and its outputs differ in either run."""
        one, other = self.changes
        for name, calls in self.base.items():
            for call in calls:
                given, made = ([(one.get(id(t)), other.get(id(t))) for t in part] for part in call)
                yield name, given, made


def _replaced(x: Tensor, axis: int) -> list[Tensor] | None:
    """The batch, of two samples at least, and twice with one of the first two replaced; None where no two differ."""
    if x.is_meta or x.ndim < axis + 2:
        return None
    first = x.select(axis, 0)
    others = [first.flip(-1), first.roll(1, -1), first.flip(0), torch.zeros_like(first)]
    if x.shape[axis] == 1:
        different = next((other for other in others if not torch.equal(other, first)), None)
        if different is None:
            return None
        x = torch.stack([first, different], axis)
    pair = [x.select(axis, place) for place in (0, 1)]
    new = next((other for other in others if not any(torch.equal(other, one) for one in pair)), None)
    if new is None:
        return None
    batches = [x]
    for place in (0, 1):
        batch = x.clone()
        batch.select(axis, place).copy_(new)
        batches.append(batch)
    return batches


def _version(tensor: Tensor) -> int:
    """How often a tensor has been written to, as far as it counts."""
    return 0 if tensor.is_inference() else tensor._version


def _watch(probe: Probe, keep: Keep) -> None:
    """Shows every module's calls, but for those within a neuron, which may be called with anything."""

    def watcher(name: str) -> Any:
        return lambda module, inputs, output: keep(name, tensors_in(inputs), tensors_in(output))

    for name, module in probe.model.named_modules():
        if not any(_within(name, neuron) for neuron in probe.neurons):
            probe.watch(module, watcher(name))


def _meet(tensors: Sequence[Changes], size: int) -> bool:
    """Whether an entry changes in both runs, in tensors that have an axis for `size` samples."""
    return any(
        one is not None and other is not None and bool(_layouts(one.shape, size)) and bool((one & other).any())
        for one, other in tensors
    )


def _apart(tensors: Sequence[Changes], size: int) -> bool:
    """Whether no sample of any tensor changes in both runs, wherever its samples lie."""
    return all(one is not None and other is not None and _one_each(one, other, size) for one, other in tensors)


def _one_each(one: Tensor, other: Tensor, size: int) -> bool:
    return not (one.any() and other.any()) or any(
        not (_of_samples(one, layout, size) & _of_samples(other, layout, size)).any()
        for layout in _layouts(one.shape, size)
    )


def _changed(first: Tensor, *others: Tensor) -> Changes:
    one, other = (_differ(first, value) for value in others)
    return one, other


def _differ(a: Tensor, b: Tensor) -> Tensor | None:
    """Where two tensors differ; None where their shapes do."""
    return (a != b) & ~(a.isnan() & b.isnan()) if a.shape == b.shape else None


def _layouts(shape: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Where the samples may lie: an axis, and whether they are the inner or the outer part of what is folded in it."""
    if len(shape) == 1:
        return [(0, 1)] if shape[0] == size else []
    axes = [axis for axis in (0, 1) if len(shape) > 1 and shape[axis] % size == 0]
    return [(axis, place) for axis in axes for place in (0, 1)]


def _of_samples(changed: Tensor, layout: tuple[int, int], size: int) -> Tensor:
    """Whether anything of each sample has changed, `[size]`."""
    axis, place = layout
    folded = changed.movedim(axis, 0).unflatten(0, (-1, size) if place else (size, -1))
    return folded.movedim(place, 0).flatten(1).any(1)


def _within(name: str, owner: str) -> bool:
    """Whether a module stands within another one."""
    return name != owner and (not owner or name.startswith(f"{owner}."))
