"""The plot of the suite `sparse`: time of an evaluation against the firing rate, one panel per batch size."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

Row = dict[str, str]
Points = list[tuple[float, float]]
RATE = "mean input rate"
EVERY_LAYER = re.compile(r"every layer at \d+%$")
STYLES = {
    "floor: bare convolutions, fp32": {"color": "black", "linestyle": ":"},
    "floor: bare convolutions, bf16": {"color": "tab:gray", "linestyle": ":"},
    "optimized dense, fp32": {"color": "tab:blue", "linestyle": "--"},
    "optimized dense, bf16": {"color": "tab:green", "linestyle": "--"},
    "event-driven, fp32": {"color": "tab:red"},
    'sparse="auto"': {"color": "tab:orange"},
}


def curves(rows: list[Row]) -> dict[str, dict[str, tuple[Points, Points]]]:
    """Figure -> contestant -> points (mean input rate, seconds): all layers at one rate, and other settings."""
    rates = {row["setting"]: float(row["median"]) for row in rows if row["contestant"] == RATE}
    found: dict[str, dict[str, tuple[Points, Points]]] = {}
    for row in rows:
        if row["figure"].startswith("evaluation") and row["median"] and row["contestant"] in STYLES:
            points = found.setdefault(row["figure"], {}).setdefault(row["contestant"], ([], []))
            other = EVERY_LAYER.search(row["setting"]) is None
            points[other].append((rates[row["setting"]], float(row["median"])))
    return found


def plot(rows: list[Row], path: Path) -> Path:
    """Draw the curves of one machine into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures = curves(rows)
    figure, axes = plt.subplots(1, len(figures), figsize=(5.2 * len(figures), 4.6), squeeze=False, layout="constrained")
    for axis, (title, contestants) in zip(axes[0], figures.items(), strict=True):
        for contestant, (line, others) in contestants.items():
            style: dict[str, Any] = STYLES[contestant]
            axis.plot(*zip(*sorted(line), strict=True), marker=".", label=contestant, **style)
            # Other settings are drawn as points next to the curves, without a line.
            if others and contestant in list(STYLES)[-2:]:
                axis.plot(*zip(*others, strict=True), "*", markersize=11, color=style["color"])
        axis.set(title=title, xlabel="mean firing rate of the products' inputs", ylabel="seconds", ylim=(0, None))
        axis.xaxis.set_major_formatter(lambda rate, _: f"{rate:.0%}")
        axis.grid(alpha=0.3)
    axes[0, 0].plot([], [], "*", color="gray", markersize=11, label="mixed rates, a trained network's rates")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    origin = rows[0]
    figure.suptitle(
        f"sdt_8_384, 224 x 224, T=4; {origin['machine']}, {origin['threads']} threads, torch {origin['torch']}",
        fontsize=8,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
