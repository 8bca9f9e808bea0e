"""The plots of the recipes: learning curves of one or several runs, confusion matrices, comparisons of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sdt_blocks.files import write_atomically

from .progress import read_metrics

Lines = Sequence[Mapping[str, Any]]
"""The lines of a metrics.jsonl."""

PANELS: dict[str, dict[str, str]] = {
    "loss": {"train_loss": "training", "test_loss": "test", "ema_test_loss": "test, averaged weights"},
    "top-1 (%)": {"test_top1": "test", "ema_test_top1": "test, averaged weights"},
    "learning rate": {"lr": "learning rate"},
    "firing rate": {"firing_rate": "spikes of a neuron in a time step"},
}
"""The panels of a learning curve: the axis label, and the keys of metrics.jsonl with their names in the legend."""

MOST_LABELS, MOST_COUNTS = 40, 15
"""Number of classes up to which a confusion matrix shows their names on its axes, and the numbers in its fields."""


def draw_curves(folder: Path) -> None:
    """Plot loss, accuracy, learning rate and firing rate over the epochs of a run into its curves.png."""
    metrics = read_metrics(folder)
    figure, panels = _panels([metrics])
    for axes, (label, keys) in zip(panels, PANELS.items(), strict=True):
        for key, name in keys.items():
            if any(line.get(key) is not None for line in metrics):
                _plot(axes, metrics, key, label=name)
        if label in ("loss", "top-1 (%)") and axes.lines:
            axes.legend(frameon=False, fontsize=8)
    _save(figure, folder / "curves.png")


def draw_comparison(runs: Mapping[str, Lines], path: Path) -> None:
    """Plot test loss, accuracy, learning rate and firing rate of several runs by name, in one color each."""
    figure, panels = _panels(list(runs.values()))
    keys = ("test_loss", "test_top1", "lr", "firing_rate")
    for axes, key in zip(panels, keys, strict=True):
        for number, (name, lines) in enumerate(runs.items()):
            style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}
            _plot(axes, lines, key, label=name, **style)
    panels[0].set_ylabel("test loss")
    lines = panels[0].get_lines()
    # Matplotlib would leave out a name that starts with an underscore, and typeset text between two $ as a formula.
    names = [f" {line.get_label()}" for line in lines]
    legend = figure.legend(lines, names, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)
    _save(figure, path)


MODEL_PANELS = {
    "top1": "top-1 (%)",
    "energy_mj": "energy (mJ)",
    "firing_rate": "firing rate",
    "operations": "operations (M)",
    "params": "parameters (M)",
}
LATENCIES = {"dense_ms": "dense", "event_ms": "event-driven"}
VERDICT_COLORS = {"yes": "#00798c", "no": "#d1495b", "silent": "#999999"}


def draw_models(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot every figure of several models as bars, colored by whether they are spike-driven, with deviations."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    panels = [key for key in MODEL_PANELS if any(row.get(key) is not None for row in rows)]
    timed = any(row.get(key) is not None for row in rows for key in LATENCIES)
    columns = len(panels) + timed
    figure = Figure(figsize=(2.6 * columns + 1.5, 1.3 + 0.42 * len(rows)), layout="constrained")
    grid = list(figure.subplots(1, columns, sharey=True, squeeze=False)[0])
    places = np.arange(len(rows))
    colors = [VERDICT_COLORS[row["spike_driven"]] for row in rows]
    for axes, key in zip(grid, panels, strict=False):
        scale = 1e6 if key == "params" else 1.0
        values, errors = ([(row.get(name) or 0.0) / scale for row in rows] for name in (key, f"{key}_std"))
        axes.barh(places, values, xerr=errors if any(errors) else None, color=colors, height=0.65)
        axes.set_xlabel(MODEL_PANELS[key])
    if timed:
        for shift, (key, form) in zip((-0.17, 0.17), LATENCIES.items(), strict=True):
            values = [row.get(key) or 0.0 for row in rows]
            hatch = None if shift < 0 else "///"
            grid[-1].barh(places + shift, values, height=0.32, color=colors, hatch=hatch, edgecolor="white", label=form)
        grid[-1].set_xlabel("one image (ms)")
        grid[-1].legend(frameon=False, fontsize=7)
    for axes in grid:
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_yticks(places, [_shortened(str(row["name"]), 40) for row in rows], parse_math=False)
    grid[0].invert_yaxis()
    meanings = {"yes": "spike-driven", "no": "not spike-driven", "silent": "silent"}
    seen = [verdict for verdict in meanings if any(row["spike_driven"] == verdict for row in rows)]
    patches = [Patch(color=VERDICT_COLORS[verdict], label=meanings[verdict]) for verdict in seen]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    _save(figure, path)


def draw_early(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot accuracy against mean steps, and against time, for each form of a model that answers early."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for color, form in zip(("#00798c", "#d1495b"), dict.fromkeys(row["form"] for row in rows), strict=False):
        of = [row for row in rows if row["form"] == form]
        for axes, key in zip(panels, ("steps", "ms"), strict=True):
            points = [row for row in of if row[key] is not None and row["steps"] is not None]
            ends = [[row["accuracy_low"] for row in points], [row["accuracy_high"] for row in points]]
            errors = np.abs(np.array(ends) - [row["accuracy"] for row in points])
            values = [[row[name] for row in points] for name in (key, "accuracy")]
            axes.errorbar(*values, yerr=errors, color=color, marker="o", capsize=3, label=f"{form}, step by step")
            if key == "ms":
                axes.scatter(of[0]["ms"], of[0]["accuracy"], color=color, marker="*", s=130, label=f"{form}, whole")
    panels[0].set(xlabel="mean time steps of an image", ylabel="accuracy (%), 95 % interval")
    panels[1].set_xlabel("time of an image (ms)")
    panels[1].legend(frameon=False, fontsize=8)
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def draw_confusion(confusion: np.ndarray, names: Sequence[str], path: Path) -> None:
    """Plot a confusion matrix `[K, K]`, counts by true and predicted class, colored by the share of the true class."""
    from matplotlib.figure import Figure

    classes = len(names)
    side = min(max(4.0, 1.5 + 0.34 * classes), 14.0)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    image = axes.imshow(100 * share, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="% of the true class", fraction=0.046, pad=0.03)
    if classes <= MOST_LABELS:
        shown = [_shortened(name) for name in names]
        axes.set_xticks(range(classes), shown, rotation=90, fontsize=7, parse_math=False)
        axes.set_yticks(range(classes), shown, fontsize=7, parse_math=False)
    if classes <= MOST_COUNTS:
        for (row, column), count in np.ndenumerate(confusion):
            color = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(count), ha="center", va="center", fontsize=7, color=color)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    _save(figure, path)


def _panels(runs: Sequence[Lines]) -> tuple[Any, list[Any]]:
    """A figure of four panels over whole epochs."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = list(figure.subplots(2, 2).flat)
    last = max((line["epoch"] for lines in runs for line in lines), default=1)
    for axes, label in zip(panels, PANELS, strict=True):
        axes.set_ylabel(label)
        axes.set_xlabel("epoch")
        axes.set_xlim(0.5, last + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _plot(axes: Any, lines: Lines, key: str, **style: Any) -> None:
    """The values of a key over the epochs; epochs without one are left out."""
    points = [(line["epoch"], line[key]) for line in lines if line.get(key) is not None]
    axes.plot([epoch for epoch, _ in points], [value for _, value in points], marker=".", **style)


def _shortened(name: str, most: int = 24) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _save(figure: Any, path: Path) -> None:
    write_atomically(path, lambda name: figure.savefig(name, format="png", dpi=120))
