"""What a network answers: its accuracy after each time step, and samples of different classes with their answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from .probe import Batches, Probe, gather, input_of


@dataclass
class Outcome:
    """Accuracy of a network, and samples to draw.

    `accuracy[t]` is the share of samples for which the mean of the logits of the steps up to t is right; a single
    number if the logits of the steps are not available, none if the batches have no classes. `drawn` are samples of
    this process, of different classes if possible, with their classes and answers, -1 if unknown.
    """

    accuracy: list[float] = field(default_factory=list)
    samples: int = 0
    drawn: list[Tensor] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    answers: list[int] = field(default_factory=list)


def look(model: nn.Module, batches: Batches, images: int, axis: int = 0) -> Outcome:
    """Runs all batches and keeps up to `images` samples, which are on that axis of the inputs.

    Samples with a negative class are not counted.
    """
    right: Tensor | None = None
    samples = 0
    pool = _Pool(images)
    logits: list[Tensor | None] = [None]

    def forward(net: nn.Module, x: Tensor) -> None:
        with _every_step(net):
            logits[0] = _logits(net(x), x.shape[axis])

    with Probe(model, forward=forward) as probe:
        for batch in [batches] if isinstance(batches, Tensor) else batches:
            for x in probe.run([batch]):
                found, targets = logits[0], _targets(batch, x.shape[axis])
                so_far = None if found is None else found.cumsum(0)
                answers = None if so_far is None else so_far.argmax(-1).cpu()
                given = input_of(batch)
                pool.offer(given, axis, targets, None if answers is None else answers[-1])
                if answers is None or targets is None:
                    continue
                known = targets >= 0
                hits = (answers == targets)[:, known].sum(1)
                right = hits if right is None else right + hits
                samples += int(known.sum())
    parts = [(hits, count) for hits, count in gather((right, samples)) if hits is not None and count]
    result = Outcome(drawn=pool.drawn, targets=pool.targets, answers=pool.answers)
    if parts:
        result.samples = sum(count for _, count in parts)
        steps = min(len(hits) for hits, _ in parts)
        result.accuracy = (torch.stack([hits[:steps] for hits, _ in parts]).sum(0) / result.samples).tolist()
    return result


class _Pool:
    """Up to `size` samples: the first of each class, and others only as long as there is room."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.drawn: list[Tensor] = []
        self.targets: list[int] = []
        self.answers: list[int] = []

    def offer(self, x: Tensor, axis: int, targets: Tensor | None, answers: Tensor | None) -> None:
        for place in range(x.shape[axis]):
            target = -1 if targets is None else int(targets[place])
            new = target >= 0 and target not in self.targets
            if len(self.drawn) < self.size:
                at = len(self.drawn)
            else:
                twice = [i for i, one in enumerate(self.targets) if one < 0 or self.targets.index(one) < i]
                if not (new and twice):
                    continue
                at = twice[-1]
            for kept, value in (
                (self.drawn, x.select(axis, place).clone()),
                (self.targets, target),
                (self.answers, -1 if answers is None else int(answers[place])),
            ):
                cast(list[Any], kept)[at : at + 1] = [value]


@contextmanager
def _every_step(model: Any) -> Iterator[None]:
    """A context in which the model returns the logits of every step, if it can."""
    before = getattr(model, "per_step", None)
    if not isinstance(before, bool):
        yield
        return
    model.per_step = True
    try:
        yield
    finally:
        model.per_step = before


def _logits(output: Any, batch: int) -> Tensor | None:
    """The logits `[T, B, K]` in an output, or None if there are none."""
    first = output[0] if isinstance(output, Sequence) and output else output
    if not isinstance(first, Tensor) or not first.is_floating_point() or first.ndim not in (2, 3):
        return None
    steps = first if first.ndim == 3 else first[None]
    return steps.float() if steps.shape[1] == batch and steps.shape[2] > 1 else None


def _targets(batch: Any, count: int) -> Tensor | None:
    second = batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    fits = isinstance(second, Tensor) and second.dtype in (torch.int64, torch.int32) and second.shape == (count,)
    return cast(Tensor, second).cpu() if fits else None
