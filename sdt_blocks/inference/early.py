"""Early answers: still images are shown step by step, and a sample leaves as soon as its answer is sure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..neuron import Stream
from .plan import PRESENT, Form

MEASURES = ("entropy", "margin")

CANDIDATES = 200
"""The most thresholds that a fit tries."""


class Early(NamedTuple):
    """Logits `[B, K]`, and after how many steps each sample left `[B]`."""

    logits: Tensor
    steps: Tensor


class Point(NamedTuple):
    """One threshold, the accuracy with it (0 to 1), and the mean number of steps per sample."""

    threshold: float
    accuracy: float
    steps: float


class EarlyAnswers:
    """Answers still images with only as many time steps as each needs. A model does not do this unless asked.

    Steps are computed one after another. After each, the samples that are sure of their answer so far, the mean of
    their logits, leave; the others continue in a smaller batch. How sure a sample is, from 0 to 1, depends on `measure`

        "entropy":  1 - H(softmax(logits)) / log K
        "margin":   the largest probability minus the second largest

    and it leaves at `threshold` or above, or after all `time_steps`. `EarlyAnswers.fit(model, batches)` chooses the
    threshold on a validation set. `model` may be of any family or form that `Stream` accepts, with one head;
    `time_steps` is the model's own by default.

    With a threshold that is never reached, such as infinity, the logits are those of the whole model, as exactly as
    those of a `Stream`. The first layer sees the same image at each step: the forms of `optimize_for_inference` compute
    it once and keep it for the samples that stay; a model as it was trained computes it at each step.

    Raises `TypeError` for a model that cannot be streamed and `ValueError` for an unknown measure, a threshold that is
    not a number of at least 0, or if the number of steps is unknown.

    >>> model, (digits, labels) = example_model(), example_images()
    >>> early = EarlyAnswers(model, threshold=0.5)
    >>> logits, steps = early(digits)
    >>> steps.unique(), (logits.argmax(1) == labels).float().mean() > 0.9
    (tensor([1, 2, 3, 4]), tensor(True))
    """

    def __init__(
        self, model: nn.Module, *, threshold: float, measure: str = "entropy", time_steps: int | None = None
    ) -> None:
        if measure not in MEASURES:
            raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}")
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not threshold >= 0:
            raise ValueError(f"threshold must be a number of at least 0 (infinity is never met), got {threshold!r}")
        self.stream = Stream(model)
        self.model, self.threshold, self.measure = model, float(threshold), measure
        self.time_steps = _time_steps(model) if time_steps is None else time_steps
        if isinstance(self.time_steps, bool) or not isinstance(self.time_steps, int) or self.time_steps < 1:
            raise ValueError(f"time_steps must be a whole number of at least 1, got {time_steps!r}")
        self.curve: list[Point] = []

    def __call__(self, images: Tensor) -> Early:
        """The answers to images `[B, C, H, W]`. Raises `ValueError` for another shape."""
        _check_images(images)
        waiting = torch.arange(len(images), device=images.device)
        steps = torch.full((len(images),), self.time_steps, device="cpu")
        logits: Tensor | None = None
        stream = self._stream()
        for step in range(1, self.time_steps + 1):
            answer = _one_head(stream.push(images[waiting] if logits is not None else images))
            logits = answer.new_empty(len(images), *answer.shape[1:]) if logits is None else logits
            last = step == self.time_steps
            leaves = torch.ones_like(waiting, dtype=torch.bool) if last else self.sure(answer) >= self.threshold
            logits[waiting[leaves]] = answer[leaves]
            steps[waiting[leaves].cpu()] = step
            if bool(leaves.all()):
                break
            if bool(leaves.any()):
                _keep(stream, ~leaves)
                waiting = waiting[~leaves]
        assert logits is not None
        return Early(logits, steps)

    def _stream(self) -> Stream:
        """The stream of one call, in which the model gets the same images at every step."""
        stream = self.stream.another()
        stream.still = {} if isinstance(self.model, Form) else None
        return stream

    def sure(self, logits: Tensor) -> Tensor:
        """How sure the answers with logits `[..., K]` are `[...]`, from 0 to 1."""
        return how_sure(logits, self.measure)

    @classmethod
    def fit(
        cls,
        model: nn.Module,
        batches: Iterable[Any],
        *,
        tolerance: float = 0.005,
        measure: str = "entropy",
        time_steps: int | None = None,
    ) -> EarlyAnswers:
        """Early answers with the lowest threshold that costs at most `tolerance` of accuracy on these samples.

        `batches` are pairs of images and classes of a validation set. Every higher threshold must keep to the tolerance
        too, so that no lucky one is chosen. The `curve` of the result holds the thresholds that were tried.

        Raises `ValueError` for a tolerance outside [0, 1), or if there is no sample.
        """
        _check_tolerance(tolerance)
        early = cls(model, threshold=math.inf, measure=measure, time_steps=time_steps)
        early.curve = early.curve_of(*early.every_step(batches))
        early.threshold = early.at(tolerance).threshold
        return early

    def at(self, tolerance: float) -> Point:
        """The point of the `curve` that `fit` chooses for a tolerance. Raises `ValueError` if none was fitted."""
        _check_tolerance(tolerance)
        if not self.curve:
            raise ValueError("no threshold has been fitted; EarlyAnswers.fit does it")
        found = self.curve[0]
        for point in self.curve:  # from the highest threshold on
            if point.accuracy < self.curve[0].accuracy - tolerance - 1e-9:
                break
            found = point
        return found

    def every_step(self, batches: Iterable[Any]) -> tuple[Tensor, Tensor]:
        """How sure each sample is after each step `[T, N]`, and whether its answer is right `[T, N]`.

        Raises `ValueError` for batches that are not pairs of images and classes, or if there is none.
        """
        sure, right = [], []
        for batch in batches:
            images, targets = _pair(batch)
            stream = self._stream()
            answers = torch.stack([_one_head(stream.push(images)) for _ in range(self.time_steps)])
            sure.append(self.sure(answers).cpu())
            right.append(answers.argmax(-1).cpu() == targets.cpu())
        if not sure:
            raise ValueError("there was no batch to fit on; check that the validation set is not empty")
        return torch.cat(sure, 1), torch.cat(right, 1)

    @staticmethod
    def curve_of(sure: Tensor, right: Tensor, thresholds: Sequence[float] = ()) -> list[Point]:
        """Accuracy and mean steps for each threshold, from the highest (never reached) down; from `every_step`.

        The thresholds are those given, or by default up to `CANDIDATES` that occur among the samples.
        """
        values = torch.as_tensor(thresholds, dtype=torch.float64) if len(thresholds) else sure[:-1].flatten().unique()
        if not len(thresholds) and len(values) > CANDIDATES:
            values = values[torch.linspace(0, len(values) - 1, CANDIDATES, dtype=torch.float64).round().long()]
        points = []
        for threshold in [math.inf, *reversed(values.double().unique().tolist())]:
            met = sure.double() >= threshold
            met[-1] = True
            step = met.long().argmax(0)
            found = right.gather(0, step[None])[0]
            points.append(Point(threshold, found.double().mean().item(), step.double().mean().item() + 1))
        return points


def _keep(stream: Stream, stay: Tensor) -> None:
    """Continues with the samples that stay."""
    stream.keep(stay)
    if stream.still:
        stream.still = {layer: membrane[:, stay.to(membrane.device)] for layer, membrane in stream.still.items()}


def how_sure(logits: Tensor, measure: str) -> Tensor:
    """How sure the answers with logits `[..., K]` are `[...]`, from 0 to 1, by a measure of `EarlyAnswers`."""
    logs = logits.float().log_softmax(-1)
    if measure == "margin":
        first, second = logs.exp().topk(2, dim=-1).values.unbind(-1)
        return first - second
    entropy = -(logs.exp() * logs.clamp(min=-1e4)).sum(-1)
    return 1 - entropy / math.log(logits.shape[-1])


def _time_steps(model: Any) -> int:
    """The number of steps for which a model shows an image, from the model itself or from its plan."""
    told = getattr(model, "time_steps", None)
    if told is None:
        nodes = getattr(getattr(model, "plan", None), "nodes", [])
        told = next((node.args[1] for node in nodes if node.op == PRESENT), None)
    if not isinstance(told, int):
        raise ValueError(f"{type(model).__name__} does not say its number of time steps; give time_steps=")
    return told


def _check_tolerance(tolerance: Any) -> None:
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be a share of the samples from 0 to 1, got {tolerance!r}")


def _check_images(images: Any) -> None:
    if not isinstance(images, Tensor) or images.ndim != 4 or 0 in images.shape:
        got = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"expected still images [B, C, H, W], got {got}; frames come through a Stream")


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) < 2 or not isinstance(batch[1], Tensor):
        raise ValueError(f"a batch must be a pair of images and their classes, got {type(batch).__name__}")
    _check_images(batch[0])
    if batch[1].shape != batch[0].shape[:1]:
        raise ValueError(f"expected a class for each of {len(batch[0])} images, got {list(batch[1].shape)}")
    return batch[0], batch[1]


def _one_head(answer: Any) -> Tensor:
    if not isinstance(answer, Tensor):
        raise TypeError(f"early answers need a model with one head, this one has {len(answer)}")
    if answer.shape[-1] < 2:
        raise TypeError("early answers need at least two classes to choose from")
    return answer
