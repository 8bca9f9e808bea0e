"""Exact evaluation over a data set that is divided among processes."""

from __future__ import annotations

import math
from typing import Any

import snntorch
import torch
from accelerate import Accelerator
from loading import fetch
from stop_request import StopRequest
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: DataLoader[Any], accelerator: Accelerator, *, stop: StopRequest | None = None
) -> dict[str, float] | None:
    """`loss`, `top1` and `top5` (percent), `samples` and `firing_rate` over the loaders of all processes.

    Each sample counts once, so the processes may have shares of different sizes; samples with a negative target
    (unreadable ones) count nowhere. The firing rate is that of the first batch. None where a stop was requested
    meanwhile, on any process.
    """
    model.eval()
    # samples, loss, hits at 1, hits at 5, stop requests
    totals = torch.zeros(5, dtype=torch.float32 if accelerator.device.type == "mps" else torch.float64)
    firing_rate = 0.0
    for number, (inputs, targets) in enumerate(fetch(loader)):
        if stop is not None and stop.signal:
            totals[4] = 1
            break
        inputs, targets = inputs[targets >= 0], targets[targets >= 0]
        if not len(targets):
            continue
        inputs, targets = inputs.to(accelerator.device), targets.to(accelerator.device)
        with accelerator.autocast():
            if number == 0:
                logits, firing_rate = _with_firing_rate(model, inputs)
            else:
                logits = model(inputs)
        logits = logits.float().mean(0) if logits.ndim == 3 else logits.float()
        best = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        batch = (len(targets), F.cross_entropy(logits, targets, reduction="sum"), best[:, 0].sum(), best.sum(), 0)
        totals += torch.tensor([float(value) for value in batch], dtype=totals.dtype)
    sums: Tensor = accelerator.reduce(totals.to(accelerator.device), "sum")  # type: ignore[assignment]
    samples, loss, top1, top5, stopped = sums.tolist()
    if stopped:
        return None
    if not samples:
        raise ValueError("not one sample of the evaluation set could be read")
    return {
        "loss": loss / samples if math.isfinite(loss) else math.nan,
        "top1": 100 * top1 / samples,
        "top5": 100 * top5 / samples,
        "samples": int(samples),
        "firing_rate": firing_rate,
    }


def _with_firing_rate(model: nn.Module, inputs: Tensor) -> tuple[Tensor, float]:
    """The logits, and the mean over all neurons of spikes per time step."""
    counts: list[tuple[Tensor, int]] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, spikes: counts.append((spikes.sum(), spikes.numel())))
        for module in model.modules()
        if isinstance(module, snntorch.SpikingNeuron)
    ]
    try:
        logits = model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    neurons = sum(number for _, number in counts)
    return logits, float(sum(spikes for spikes, _ in counts)) / neurons if neurons else 0.0
