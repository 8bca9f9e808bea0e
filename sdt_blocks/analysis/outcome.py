"""What a network answers: its accuracy after each time step, and samples of different classes with their answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..evaluation import Batches, each_of, input_of
from .probe import Probe, gather


@dataclass
class Outcome:
    """Accuracy of a network, and samples to draw.

    `accuracy[t]` is the share of samples for which the mean of the logits of the steps up to t is right; a single
    number if the logits of the steps are not available, none if the batches have no classes. Samples with fewer steps
    than others keep their last answer. `drawn` are samples of this process, of different classes if possible, with
    their classes and answers, -1 if unknown.
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
    right: list[list[int]] = []  # of each batch, by step
    samples = 0
    result = Outcome()
    logits: Tensor | None = None

    def forward(net: nn.Module, x: Tensor) -> None:
        nonlocal logits
        with _every_step(net):
            logits = _logits(net(x), x.shape[axis])

    with Probe(model, forward=forward) as probe:
        for batch in each_of(batches):
            for x in probe.run([batch]):
                targets = _targets(batch, x.shape[axis])
                answers = None if logits is None else logits.cumsum(0).argmax(-1).cpu()
                _draw(
                    result, images, input_of(batch).movedim(axis, 0), targets, None if answers is None else answers[-1]
                )
                if answers is None or targets is None:
                    continue
                known = targets >= 0
                right.append((answers == targets)[:, known].sum(1).tolist())
                samples += int(known.sum())
    parts = gather((right, samples))
    right, result.samples = [one for part, _ in parts for one in part], sum(count for _, count in parts)
    if result.samples:
        steps = range(max(map(len, right)))
        hits = [sum(one[min(step, len(one) - 1)] for one in right) for step in steps]
        result.accuracy = [count / result.samples for count in hits]
    return result


def _draw(result: Outcome, size: int, x: Tensor, targets: Tensor | None, answers: Tensor | None) -> None:
    """Keeps up to `size` samples: the first of each class, and others only as long as there is room."""
    for place, sample in enumerate(x):
        target = -1 if targets is None else int(targets[place])
        twice = [i for i, one in enumerate(result.targets) if one < 0 or result.targets.index(one) < i]
        if len(result.drawn) < size:
            at = len(result.drawn)
        elif target >= 0 and target not in result.targets and twice:
            at = twice[-1]
        else:
            continue
        result.drawn[at : at + 1] = [sample.clone()]
        result.targets[at : at + 1] = [target]
        result.answers[at : at + 1] = [-1 if answers is None else int(answers[place])]


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
