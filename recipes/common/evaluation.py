"""Exact evaluation over a data set that is divided among processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassStatScores

from sdt_blocks.analysis.silence import silence
from sdt_blocks.neuron import find_neurons, spikes_of

from .loading import fetch
from .stop_request import StopRequest

TOP_K = 5
"""Reported next to top-1 if there are at least twice as many classes."""

RATED, RATED_BATCHES = 1024, 8
"""Minimum number of samples over all processes, and of batches of each process, for firing rates, if there are so many.
Neurons that are counted are not fused with the operations around them."""


@dataclass
class Evaluation:
    """The results of a model on a data set. Accuracies are in percent."""

    loss: float
    accuracies: dict[str, float]
    """`top1`, and `top5` if there are clearly more classes than five."""
    confusion: Tensor
    """Samples by true and by predicted class, int64 `[K, K]`."""
    firing_rate: float
    """Spikes of a neuron in a time step, mean over all neurons and the `rated` samples."""
    rated: int
    """The number of samples in the firing rate: all, or those of evenly spaced batches."""
    input_size: tuple[int, int]
    """Height and width of the images or frames."""
    silence: str
    """A sentence that names the neuron layers that never fired; "" if all did."""

    @property
    def samples(self) -> int:
        return int(self.confusion.sum())

    @property
    def class_accuracy(self) -> Tensor:
        """Percentage of each class's samples that are classified correctly, float64 `[K]`; NaN if there are none."""
        return 100 * self.confusion.diag().double() / self.confusion.sum(1).double()


@torch.no_grad()
def evaluate(
    model: Any, loader: DataLoader[Any], accelerator: Accelerator, *, stop: StopRequest | None = None
) -> Evaluation | None:
    """Evaluate over the loaders of all processes. None if a stop was requested meanwhile, on any process.

    Each sample counts once, so the processes may have shares of different sizes; samples with a negative target
    (unreadable ones) do not count. Raises `ValueError` if not one sample could be read.
    """
    model.eval()
    metrics = build_metrics(model.num_classes, accelerator.device)
    firing, input_size = Firing(model), (0, 0)
    distance = max(1, min(len(loader.dataset) // RATED, len(loader) // RATED_BATCHES))  # type: ignore[arg-type]
    for number, (inputs, targets) in enumerate(fetch(loader)):
        if stop is not None and stop.signal:
            break
        inputs, targets = inputs[targets >= 0], targets[targets >= 0]
        if not len(targets):
            continue
        inputs, targets = inputs.to(accelerator.device), targets.to(accelerator.device)
        with accelerator.autocast(), firing.watched(rated=0 if number % distance else len(targets)):
            logits = model(inputs)
        input_size = (inputs.shape[-2], inputs.shape[-1])
        logits = logits.float().mean(0) if logits.ndim == 3 else logits.float()
        metrics["loss"].update(F.cross_entropy(logits, targets, reduction="none"))
        for name in metrics.keys() - {"loss"}:
            metrics[name].update(logits, targets)
    requests = torch.tensor(float(stop is not None and stop.signal > 0), device=accelerator.device)
    if accelerator.reduce(requests, "sum") > 0:  # type: ignore[operator]
        return None
    # Every process takes part, with samples or without: here their counts are added up.
    found = {name: metric.compute().cpu() for name, metric in metrics.items()}
    firing.add_up(accelerator)
    confusion, loss = found.pop("confusion"), float(found.pop("loss"))
    if not confusion.sum():
        raise ValueError("not one sample of the evaluation set could be read")
    return Evaluation(
        loss=loss if math.isfinite(loss) else math.nan,
        accuracies={name: 100 * int(hits) / int(samples) for name, (hits, _, _, _, samples) in found.items()},
        confusion=confusion,
        firing_rate=firing.rate,
        rated=firing.samples,
        input_size=input_size,
        silence=silence(model, firing.fired),
    )


def describe_accuracies(accuracies: Mapping[str, float | None], between: str = " ") -> str:
    """`top-1 93.30 % top-5 99.72 %`, without those that are None."""
    return between.join(f"top-{name[3:]} {value:.2f} %" for name, value in accuracies.items() if value is not None)


def build_metrics(num_classes: int, device: torch.device) -> dict[str, Metric]:
    """`loss`, `confusion`, and the counts for the accuracies; torchmetrics adds them up over the processes."""
    options: dict[str, Any] = {"num_classes": num_classes, "validate_args": False}
    metrics: dict[str, Metric] = {
        "loss": MeanMetric(nan_strategy="disable"),
        "confusion": MulticlassConfusionMatrix(**options),
        "top1": MulticlassStatScores(average="micro", **options),
    }
    if num_classes >= 2 * TOP_K:
        metrics[f"top{TOP_K}"] = MulticlassStatScores(average="micro", top_k=TOP_K, **options)
    if device.type != "mps":
        metrics["loss"].set_dtype(torch.float64)
    return {name: metric.to(device) for name, metric in metrics.items()}


class Firing:
    """Records which neuron layers of a model fire while it is watched, and how often.

    A block that is watched runs without `torch.compile`, which does not see hooks that come and go.
    """

    def __init__(self, model: nn.Module) -> None:
        self.neurons = find_neurons(model)
        self.fired: dict[str, bool] = {}
        """For the layers that were called."""
        self.samples, self.spikes, self.chances = 0, 0.0, 0.0
        """Totals that were counted: samples, spikes, and neurons times their time steps."""

    @property
    def rate(self) -> float:
        """Spikes of a neuron in a time step, mean over all neurons and the counted samples."""
        return self.spikes / self.chances if self.chances else 0.0

    @contextmanager
    def watched(self, *, rated: int) -> Iterator[None]:
        """Watch a forward pass of `rated` samples; 0 only checks whether layers fire that have not done so yet."""
        calls: dict[str, list[tuple[Tensor, int]]] = {}

        def counter(name: str) -> Callable[..., None]:
            def count(_module: nn.Module, _inputs: Any, output: Any) -> None:
                spikes = spikes_of(output)
                # In half precision, as under autocast, a sum overflows at 65504, or has only two exact digits.
                calls.setdefault(name, []).append((spikes.sum(dtype=torch.float32), spikes.numel()))

            return count

        looked_at = {name: one for name, one in self.neurons.items() if rated or not self.fired.get(name)}
        hooks = [neuron.register_forward_hook(counter(name)) for name, neuron in looked_at.items()]
        try:
            with torch.compiler.set_stance("force_eager") if hooks else nullcontext():
                yield
        finally:
            for hook in hooks:
                hook.remove()
        if not calls:
            return
        sums = torch.stack([torch.stack([spikes for spikes, _ in of_layer]).sum() for of_layer in calls.values()])
        for name, spikes in zip(calls, sums.tolist(), strict=True):
            self.fired[name] = spikes != 0 or self.fired.get(name, False)
            self.spikes += spikes if rated else 0.0
        if rated:
            self.samples += rated
            self.chances += sum(number for of_layer in calls.values() for _, number in of_layer)

    def add_up(self, accelerator: Accelerator) -> None:
        """Combine the findings of all processes, on each of them; all have to call this."""
        seen = [[name in self.fired, self.fired.get(name, False)] for name in self.neurons]
        counts = [self.samples, self.spikes, self.chances]
        exact = torch.float32 if accelerator.device.type == "mps" else torch.float64
        numbers = [*counts, *(float(flag) for flags in seen for flag in flags)]
        total: Any = accelerator.reduce(torch.tensor(numbers, dtype=exact, device=accelerator.device), "sum")
        samples, self.spikes, self.chances, *flags = total.tolist()
        self.samples = round(samples)
        pairs = zip(self.neurons, flags[::2], flags[1::2], strict=True)
        self.fired = {name: fired > 0 for name, called, fired in pairs if called}
