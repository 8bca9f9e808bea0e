"""Whether every sample of a batch is answered independently, and if not, where samples meet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..inference.frozen import times_written
from .dataflow import tensors_in
from .probe import Forward, Probe, is_within

Changes = tuple[Tensor | None, Tensor | None]
"""Where a tensor differs from that of the first run in each of two other runs; None if that is unknown."""

Keep = Callable[[str, list[Tensor], list[Tensor]], None]
"""Called with the name of a module, its inputs and its outputs."""


def where_samples_meet(
    model: nn.Module,
    x: Tensor,
    axis: int = 0,
    *,
    neurons: Sequence[type[nn.Module]] = (),
    forward: Forward | None = None,
) -> list[str]:
    """The innermost modules that combine samples of the batch x, which are on `axis`; [] if there are none.

    One sample is replaced by another one, then its neighbor instead: a value that changes both times depends on both.
    The output is checked first. Modules after such a module are not named, since their inputs already depend on both.
    On the meta device there are no values to look at, and nothing is found.
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
        except Exception:  # the network takes one sample only, and may raise anything: then none can meet
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
    return [name for name in found if not any(is_within(other, name) for other in found)] or [""]


class _Calls:
    """The inputs and outputs of modules in one run, and where they change in two others.

    Tensors are kept as they are, not copied: one that is written to later is not compared.
    """

    def __init__(self) -> None:
        self.base: dict[str, list[tuple[list[Tensor], list[Tensor]]]] = {}
        self.versions: dict[int, int] = {}
        self.changes: tuple[dict[int, Tensor | None], ...] = ({}, {})

    def keep(self, name: str, given: list[Tensor], made: list[Tensor]) -> None:
        self.base.setdefault(name, []).append((given, made))
        for tensor in (*given, *made):
            self.versions.setdefault(id(tensor), times_written(tensor))

    def comparing(self, changes: dict[int, Tensor | None]) -> Keep:
        """A function that records where another run differs from the first one."""
        places: Counter[str] = Counter()

        def keep(name: str, given: list[Tensor], made: list[Tensor]) -> None:
            calls, place = self.base.get(name, []), places[name]
            places[name] += 1
            for before, after in zip(calls[place], (given, made), strict=True) if place < len(calls) else ():
                for old, new in zip(before, after, strict=False):
                    if id(old) not in changes:
                        same = times_written(old) == self.versions[id(old)]
                        changes[id(old)] = _differ(old, new) if same else None

        return keep

    def compared(self) -> Iterator[tuple[str, list[Changes], list[Changes]]]:
        """For every call the module's name, and where its inputs and outputs differ in each of the two runs."""
        one, other = self.changes
        for name, calls in self.base.items():
            for call in calls:
                given, made = ([(one.get(id(t)), other.get(id(t))) for t in part] for part in call)
                yield name, given, made


def _replaced(x: Tensor, axis: int) -> list[Tensor] | None:
    """The batch, with at least two samples, and twice with one of the first two replaced; None if all are alike."""
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


def _watch(probe: Probe, keep: Keep) -> None:
    """Watches every module's calls, except those inside a neuron, which may be called with anything."""

    def watcher(name: str) -> Any:
        return lambda module, inputs, output: keep(name, tensors_in(inputs), tensors_in(output))

    for name, module in probe.model.named_modules():
        if not any(is_within(name, neuron) for neuron in probe.neurons):
            probe.watch(module, watcher(name))


def _meet(tensors: Sequence[Changes], size: int) -> bool:
    """Whether an entry changes in both runs, in tensors that have an axis for `size` samples."""
    return any(
        one is not None and other is not None and bool(_layouts(one.shape, size)) and bool((one & other).any())
        for one, other in tensors
    )


def _apart(tensors: Sequence[Changes], size: int) -> bool:
    """Whether no sample of any tensor changes in both runs, wherever its samples are."""
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
    """Where two tensors differ; None if their shapes do."""
    return (a != b) & ~(a.isnan() & b.isnan()) if a.shape == b.shape else None


def _layouts(shape: Sequence[int], size: int) -> list[tuple[int, int]]:
    """Where the samples may be: an axis, and whether they are the inner or the outer part of a folded axis."""
    if len(shape) == 1:
        return [(0, 1)] if shape[0] == size else []
    axes = [axis for axis in (0, 1) if len(shape) > 1 and shape[axis] % size == 0]
    return [(axis, place) for axis in axes for place in (0, 1)]


def _of_samples(changed: Tensor, layout: tuple[int, int], size: int) -> Tensor:
    """Whether any value of each sample has changed, `[size]`."""
    axis, place = layout
    folded = changed.movedim(axis, 0).unflatten(0, (-1, size) if place else (size, -1))
    return folded.movedim(place, 0).flatten(1).any(1)
