"""Whether every sample of a batch is answered for itself, and where samples meet if they do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .dataflow import tensors_in
from .probe import Forward, Probe

Call = tuple[list[Tensor], list[Tensor]]
"""What a module was given and what it gave."""


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

    def run(batch: Tensor, seen: dict[str, list[Call]] | None = None) -> list[Tensor]:
        outputs: list[Any] = []

        def call(net: nn.Module, given: Tensor) -> None:
            outputs.append(net(given) if forward is None else forward(net, given))

        # Random draws are the same each time.
        with torch.random.fork_rng(range(torch.cuda.device_count())), Probe(model, neurons, call) as probe:
            torch.manual_seed(0)
            if seen is not None:
                _record(probe, seen)
            for _ in probe.run(batch):
                pass
        return tensors_in(outputs)

    size = batches[0].shape[axis]
    if x.shape[axis] == 1:
        try:
            run(batches[0])
        except Exception:  # whatever a network raises that takes one sample alone: none can meet there
            return []
    answers = [run(batch) for batch in batches]
    if not _meet(answers, size):
        return []
    calls: list[dict[str, list[Call]]] = [{}, {}, {}]
    for batch, seen in zip(batches, calls, strict=True):
        run(batch, seen)
    found = []
    for name, base in calls[0].items():
        for call in zip(base, *(other.get(name, []) for other in calls[1:]), strict=False):
            given, made = ([one[part] for one in call] for part in (0, 1))
            if _apart(given, size) and _meet(made, size):
                found.append(name)
                break
    return [name for name in found if not any(_within(other, name) for other in found)] or [""]


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


def _record(probe: Probe, seen: dict[str, list[Call]]) -> None:
    """Keeps what every module is given and gives, but for those within a neuron, which may be called with anything."""

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            given, made = ([one.clone() for one in tensors_in(some)] for some in (inputs, output))
            seen.setdefault(name, []).append((given, made))

        return hook

    for name, module in probe.model.named_modules():
        if not any(_within(name, neuron) for neuron in probe.neurons):
            probe.watch(module, keep(name))


def _meet(runs: Sequence[list[Tensor]], size: int) -> bool:
    """Whether an entry differs from the first run in both others, in tensors that have an axis for `size` samples."""
    return any(bool((one & other).any()) for one, other in _changes(runs) if _layouts(one.shape, size))


def _apart(runs: Sequence[list[Tensor]], size: int) -> bool:
    """Whether no sample of any tensor differs from the first run in both others, wherever its samples lie."""
    return all(
        not (one.any() and other.any())
        or any(
            not (_of_samples(one, layout, size) & _of_samples(other, layout, size)).any()
            for layout in _layouts(one.shape, size)
        )
        for one, other in _changes(runs)
    )


def _changes(runs: Sequence[list[Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Where the tensors differ from those of the first run, once for each of the two others."""
    base, *others = runs
    if all([one.shape for one in other] == [one.shape for one in base] for other in others):
        for first, *values in zip(base, *others, strict=True):
            one, other = ((first != value) & ~(first.isnan() & value.isnan()) for value in values)
            yield one, other


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
