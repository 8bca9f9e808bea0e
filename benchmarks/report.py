"""Plots, and the README's table: `python benchmarks/report.py [README]` rewrites what stands between two markers."""

from __future__ import annotations

import argparse
import sys
from itertools import groupby
from pathlib import Path

import curves
from harness import RESULTS, read_rows

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
SHOWN = ("neuron", "inference", "training")
"""The suites of the README's table; results/ has all of them."""
Row = dict[str, str]
KEYS = ("device", "allocator", "suite", "figure", "setting")
ORIGIN = ("machine", "torch", "snntorch", "spikingjelly", "threads", "date")


def load(folder: Path = RESULTS) -> list[Row]:
    return [row for path in sorted(folder.glob("*.csv")) for row in read_rows(path)]


def table(rows: list[Row]) -> str:
    """Markdown: one line a contestant, and below it where the figures come from."""
    lines = ["| figure | contestant | median (p20 to p80) | ratio to the baseline | parity |", "|---|---|---|---|---|"]
    for key, group in groupby(rows, key=lambda row: tuple(row[name] for name in KEYS)):
        device, allocator, _, figure, setting = key
        for row in group:
            title = f"{figure}, {setting} ({device}, {allocator} allocator)"
            lines.append(f"| {title} | {row['contestant']} | {spread(row)} | {ratio(row)} | {row['parity']} |")
    origins = sorted({tuple(row[name] for name in ORIGIN) for row in rows})
    for machine, torch, snntorch, spikingjelly, threads, date in origins:
        versions = f"torch {torch}, snnTorch {snntorch}, SpikingJelly {spikingjelly}"
        lines += ["", f"{machine}; {threads} threads; {versions}; {date}."]
    if not any(row["device"] == "cuda" for row in rows):
        lines += ["", "Not measured on a GPU yet."]
    return "\n".join(lines)


def spread(row: Row) -> str:
    if not row["median"]:
        return "not timed"
    disturbed = row.get("elsewhere") and float(row["elsewhere"]) > 0.1
    return f"{row['median']} ({row['p20']} to {row['p80']}) {row['unit']}" + (" (disturbed)" if disturbed else "")


def ratio(row: Row) -> str:
    return f"{row['ratio']} x {row['baseline']}" if row["ratio"] else ""


def rewrite(readme: Path, content: str) -> None:
    """Replaces what stands between the markers. Raises `ValueError` unless both are there once, in order."""
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{readme}: needs the markers {BEGIN} and {END}, once each and in this order")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{content}\n{END}{after}", encoding="utf-8")


def plot(rows: list[Row], folder: Path = RESULTS) -> list[Path]:
    """One PNG for each suite, device and allocator: bars of the ratios, or of the medians where there are none.

    The suite `sparse` has curves instead.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    paths = []
    timed = [row for row in rows if row["median"]]
    for key, found in groupby(timed, key=lambda row: (row["suite"], row["device"], row["allocator"])):
        if key[0] == "sparse":
            paths.append(curves.plot(list(found), folder / f"{'-'.join(key)}.png"))
            continue
        panels = [
            list(group) for _, group in groupby(found, key=lambda row: (row["figure"], row["setting"], row["unit"]))
        ]
        heights = [1.2 + 0.3 * len(panel) for panel in panels]
        figure, axes = plt.subplots(
            len(panels), figsize=(9, sum(heights)), squeeze=False, height_ratios=heights, layout="constrained"
        )
        for axis, panel in zip(axes[:, 0], panels, strict=True):
            relative = all(row["ratio"] for row in panel)
            values = [float(row["ratio" if relative else "median"]) for row in panel]
            bars = axis.barh([row["contestant"] for row in panel], values)
            axis.bar_label(bars, fmt="%.3g", padding=3)
            axis.invert_yaxis()
            axis.margins(x=0.12)
            axis.set_title(f"{panel[0]['figure']}, {panel[0]['setting']}", fontsize=9)
            axis.set_xlabel(f"x {panel[0]['baseline']}" if relative else panel[0]["unit"], fontsize=8)
        paths.append(folder / f"{'-'.join(key)}.png")
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)
    return paths


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("readme", nargs="?", type=Path, default=Path(__file__).parents[1] / "README.md")
    arguments = parser.parse_args()
    rows = load()
    if not rows:
        parser.error(f"no results in {RESULTS}; run benchmarks/run.py first")
    for path in plot(rows):
        print(path)
    try:
        rewrite(arguments.readme, table([row for row in rows if row["suite"] in SHOWN]))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
