"""The figures by which models are compared: size, operations, energy, firing rate, audit, and latency in two forms."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sdt_blocks import calibrate_norms, create_model
from sdt_blocks.analysis import audit, energy, firing_rates
from sdt_blocks.analysis.energy_models import STEP
from sdt_blocks.analysis.measured import DENSE, EVENTS, Form

from .config import ConfigError

CALIBRATION = 8
"""Images for calibrating the norms of an untrained model, so that it fires."""

LATENCIES = {DENSE: "dense_ms", EVENTS: "event_ms"}
"""The forms that are timed, and the columns of their latencies."""

EVENTS_A_PIXEL = 0.1


def untrained(name: str, *, seed: int, img_size: int, count: int) -> tuple[Any, Tensor]:
    """A published variant with random weights and calibrated norms, and the inputs that calibrated them.

    Raises `ConfigError` for an unknown name, or if the images do not fit.
    """
    torch.manual_seed(seed)
    try:
        model = create_model(name)
        inputs = sample_inputs(model, max(count, CALIBRATION), img_size)
        calibrate_norms(model, inputs)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{name} at img_size={img_size}: {error}") from error
    return model.eval(), inputs[:count]


def sample_inputs(model: Any, count: int, img_size: int) -> Tensor:
    """Crops of scikit-learn's two photographs, scaled to mean 0 and deviation 1, in the shape that the model takes.

    Models with two channels get event frames with events at random places, `[B, T, 2, H, W]`.
    """
    if model.in_channels == 2:
        shape = (count, model.time_steps, 2, img_size, img_size)
        return torch.poisson(torch.full(shape, EVENTS_A_PIXEL), torch.Generator().manual_seed(0))
    from sklearn.datasets import load_sample_images
    from torch.nn.functional import interpolate

    photographs = [torch.tensor(image).permute(2, 0, 1)[None] / 255 for image in load_sample_images().images]
    crops = []
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        side = min(photograph.shape[-2:]) // 2
        corner = [(space - side) * number // max(count - 1, 1) for space in photograph.shape[-2:]]
        crop = photograph[..., corner[0] : corner[0] + side, corner[1] : corner[1] + side]
        crops.append(interpolate(crop, (img_size, img_size), mode="bilinear", antialias=True))
    images = torch.cat(crops)
    images = images if model.in_channels == 3 else images.mean(1, keepdim=True).repeat(1, model.in_channels, 1, 1)
    return (images - images.mean()) / images.std()


def judge(model: Any, inputs: Tensor) -> dict[str, Any]:
    """The figures of a model that need no clock, per inference, as means over `inputs`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # silent and uncounted layers are in the row
        report, rates, found = energy(model, inputs), firing_rates(model, inputs), audit(model, inputs[:2])
    not_counted = [f"not counted: {operation}" for operation in report.not_counted]
    return {
        "family": type(model).__name__,
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "operations": report.synaptic_operations / 1e6,
        "multiplications": sum(row.synaptic_operations for row in report.layers if row.kind == "MAC") / 1e6,
        "energy_mj": report.total_mj,
        "memory_mj": report.estimates[STEP.name].cost.total_mj,
        "ann_mj": report.ann_mj,
        "firing_rate": rates.mean,
        "spike_driven": "silent" if found.dead else "yes" if found.spike_driven else "no",
        "why": [*found.reasons, *([rates.silence.partition(":")[0]] if rates.silence else []), *not_counted],
    }


def latency_row(forms: Sequence[Form]) -> dict[str, Any]:
    """Milliseconds of a model's forms, as a row has them: None for a missing form, and `missing` says why."""
    row: dict[str, Any] = {LATENCIES[form.name]: None if form.missing else form.latency_ms for form in forms}
    missing = [f"no {form.name} form: {form.missing}" for form in forms if form.missing]
    return row | ({"missing": "; ".join(missing)} if missing else {})


def mean_row(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row for several seeds: the means of non-integer numbers, with `_std` next to them; None if a seed has none.

    It has the reasons of all seeds and the worst verdict; other values that differ are left out.
    """
    merged = dict(rows[0])
    for key in dict.fromkeys(key for row in rows for key in row) if len(rows) > 1 else ():
        values = [row.get(key) for row in rows]
        if all(isinstance(value, float) for value in values):
            merged[key], merged[f"{key}_std"] = statistics.fmean(values), statistics.stdev(values)  # type: ignore
        elif any(value != values[0] for value in values):
            merged[key] = None
    verdicts = [row["spike_driven"] for row in rows]
    merged["spike_driven"] = next(verdict for verdict in ("no", "silent", "yes") if verdict in verdicts)
    merged["why"] = list(dict.fromkeys(reason for row in rows for reason in row["why"]))
    if 0 < (silent := verdicts.count("silent")) < len(rows):
        merged["why"].insert(0, f"silent with {silent} of {len(rows)} seeds")
    return merged
