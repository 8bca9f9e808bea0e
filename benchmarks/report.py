"""Plots and tables: `python benchmarks/report.py` rewrites the text between markers in README and docs."""

from __future__ import annotations

import argparse
import sys
from itertools import groupby
from pathlib import Path

import curves
from harness import RESULTS, read_rows

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
AMX = "<!-- benchmarks, amx: begin -->", "<!-- benchmarks, amx: end -->"
PREDICTED = "<!-- gpu-offline: begin -->", "<!-- gpu-offline: end -->"
ROOT = Path(__file__).parents[1]
SHOWN = ("neuron", "inference", "training", "v2", "v2_training", "families")
"""The suites of the tables in the docs; results/ has all of them, and results/amx some of a second machine."""
HEADLINES = (
    ("training", "training step", "", "default", "sdt_blocks", "SpikingJelly, eager"),
    ("training", "training step, peak memory", "", "default", "sdt_blocks", "SpikingJelly, eager"),
    ("inference", "evaluation, batch 8", "", "reused", "sdt_blocks, optimized", "SpikingJelly sdt_8_384, eager"),
    ("sparse", "evaluation, batch 8", "every layer at 10%", "reused", "event-driven, fp32", "optimized dense, fp32"),
)
"""The README's four rows: suite, figure, end of the setting, allocator, and which of our contestants is compared with
which other."""
Row = dict[str, str]
ORIGIN = ("machine", "torch", "snntorch", "spikingjelly", "threads")


def load(folder: Path = RESULTS) -> list[Row]:
    return [row for path in sorted(folder.glob("*.csv")) for row in read_rows(path)]


def tables(rows: list[Row]) -> str:
    """`table` for each machine: figures of two machines are never in one."""
    machines = sorted({row["machine"] for row in rows})
    return "\n\n".join(table([row for row in rows if row["machine"] == machine]) for machine in machines)


def table(rows: list[Row]) -> str:
    """Markdown: a table for each race, with a column for each allocator, one without races, and the origin."""
    lines = []
    for (device, figure, setting), group in groupby(sorted(raced(rows), key=_title), key=_title):
        found = list(group)
        allocators = sorted({row["allocator"] for row in found})
        baseline = next(row["baseline"] for row in found if row["baseline"])
        lines += [f"**{figure}**, {setting} ({device}), in brackets as a multiple of *{baseline}*", ""]
        lines += [f"| | {' | '.join(f'{name} allocator' for name in allocators)} | answers |"]
        lines += ["|" + "---|" * (len(allocators) + 2)]
        by_contestant: dict[str, dict[str, Row]] = {}
        for row in found:
            by_contestant.setdefault(row["contestant"], {})[row["allocator"]] = row
        for contestant, measured in by_contestant.items():
            cells = [value(measured[name]) if name in measured else "" for name in allocators]
            parity = "; ".join(dict.fromkeys(row["parity"] for row in measured.values()))
            lines.append(f"| {contestant} | {' | '.join(cells)} | {'' if parity == 'not checked' else parity} |")
        lines.append("")
    alone = sorted((row for row in rows if row not in raced(rows)), key=_title)
    if alone:
        lines += ["| | | |", "|---|---|---|"]
        for row in alone:
            lines.append(
                f"| {row['figure']}, {row['setting']} ({row['device']}) | {row['contestant']} | {value(row)} |"
            )
        lines.append("")
    lines += origins(rows)
    return "\n".join(lines).rstrip()


def headlines(rows: list[Row]) -> str:
    """Markdown: the rows of HEADLINES, and where they were measured."""
    lines = ["| | | compared with | ratio |", "|---|---|---|---|"]
    shown = []
    for suite, figure, ending, allocator, ours, peer in HEADLINES:
        found = {
            row["contestant"]: row
            for row in rows
            if (row["suite"], row["figure"], row["device"], row["allocator"]) == (suite, figure, "cpu", allocator)
            and row["setting"].endswith(ending)
        }
        mine, other = found[ours], found[peer]
        shown += [mine, other]
        ratio = float(mine["median"]) / float(other["median"])
        times = [f"{name}: {value({**row, 'ratio': ''})}" for name, row in ((ours, mine), (peer, other))]
        lines.append(f"| {figure}, {mine['setting']} | {times[0]} | {times[1]} | {ratio:.2f} |")
    return "\n".join([*lines, "", *origins(shown)]).rstrip()


def predicted(rows: list[Row], model: str = "sdt_8_384", run: str = "training step") -> str:
    """Markdown: for each kernel of a step, the share of a copy's bandwidth that the suite gpu_offline predicts."""
    found = [row for row in rows if (row["model"], row["run"]) == (model, run)]
    peers = [row for row in rows if row["model"].startswith("SpikingJelly")]
    columns = sorted({(row["dtype"], row["order"]) for row in found}, reverse=True)
    gpu, batch = found[0]["gpu"], found[0]["batch"]
    lines = [
        f"**Predicted, not measured on a GPU**: {run} of {model}, 224 x 224, T=4, batch {batch}, on an {gpu}. Share of "
        "the speed of a copy that the kernel's own bytes would reach, and instructions for each element and step.",
        "",
        f"| | {' | '.join(f'{dtype}, {order}' for dtype, order in columns)} |",
        "|" + "---|" * (len(columns) + 1),
    ]
    for kernel in dict.fromkeys(row["kernel"] for row in found):
        cells = []
        for column in columns:
            own = [row for row in found if (row["kernel"], row["dtype"], row["order"]) == (kernel, *column)]
            cells.append(f"{_share(own):.0%}, {float(own[0]['instructions']):.0f}" if own else "")
        lines.append(f"| {kernel} | {' | '.join(cells)} |")
    totals = [[row for row in found if (row["dtype"], row["order"]) == column] for column in columns]
    times = (f"{_microseconds(own) / 1e3:.1f} ms ({1 / _share(own):.2f} of the bytes)" for own in totals)
    lines += [f"| all {sum(int(row['launches']) for row in totals[0])} launches | {' | '.join(times)} |", ""]
    if peers:
        lines += ["SpikingJelly's neurons by the same arithmetic, for a layer of the same size as ours:", ""]
        lines += ["| | bytes an element and step | predicted | ours |", "|---|---|---|---|"]
    for peer in peers:
        which = "backward" if "backward" in peer["kernel"] else "forward"
        alike = [row for row in found if (row["kernel"], row["dtype"]) == (which, peer["dtype"])]
        own = max(alike, key=lambda row: float(row["microseconds"]))
        ours = f"{float(own['bytes']):.1f} bytes, {float(own['microseconds']):.0f} us"
        lines.append(
            f"| {which}, {peer['dtype']} | {float(peer['bytes']):.1f} | {float(peer['microseconds']):.0f} us | {ours} |"
        )
    return "\n".join(lines)


def launched(rows: list[Row]) -> str:
    """Markdown: the number of kernels that a block launches in training, by the suite gpu_offline."""
    lines = ["Launches of a training block, convolutions aside:", "", "| | forward | backward |", "|---|---|---|"]
    for column in dict.fromkeys((row["dtype"], row["order"]) for row in rows):
        own = [row for row in rows if (row["dtype"], row["order"]) == column]
        counts = [
            sum(int(row["launches"]) for row in own if row["direction"] == direction)
            for direction in ("forward", "backward")
        ]
        lines.append(f"| {', '.join(column)} | {counts[0]} | {counts[1]} |")
    return "\n".join(lines)


def _microseconds(rows: list[Row]) -> float:
    return sum(float(row["microseconds"]) * int(row["launches"]) for row in rows)


def _share(rows: list[Row]) -> float:
    """The share of several rows together."""
    ideal = sum(float(row["microseconds"]) * float(row["share"]) * int(row["launches"]) for row in rows)
    return ideal / _microseconds(rows)


def origins(rows: list[Row]) -> list[str]:
    """A paragraph for each machine and set of versions, with the days of its measurements."""
    days: dict[tuple[str, ...], set[str]] = {}
    for row in rows:
        days.setdefault(tuple(row[name] for name in ORIGIN), set()).add(row["date"])
    lines = []
    for (machine, torch, snntorch, spikingjelly, threads), dates in sorted(days.items()):
        versions = f"torch {torch}, snnTorch {snntorch}, SpikingJelly {spikingjelly}"
        lines += [f"{machine}; {threads} threads; {versions}; {', '.join(sorted(dates))}; medians.", ""]
    if not any(row["device"] == "cuda" for row in rows):
        lines += ["Not measured on a GPU yet."]
    return lines


def raced(rows: list[Row]) -> list[Row]:
    """The rows of figures that have a baseline."""
    figures = {_title(row) for row in rows if row["baseline"]}
    return [row for row in rows if _title(row) in figures]


def _title(row: Row) -> tuple[str, str, str]:
    return row["device"], row["figure"], row["setting"]


def value(row: Row) -> str:
    """A median in a suitable unit, and its ratio."""
    if not row["median"]:
        return "not timed"
    median, unit = float(row["median"]), row["unit"]
    if unit == "s" and median < 1:
        median, unit = median * 1e3, "ms"
    disturbed = row.get("elsewhere") and float(row["elsewhere"]) > 0.1
    relative = f" ({float(row['ratio']):.3g})" if row["ratio"] else ""
    return f"{median:.3g} {unit}{relative}" + (", disturbed" if disturbed else "")


def rewrite(page: Path, content: str, markers: tuple[str, str] = (BEGIN, END)) -> None:
    """Replace the text between the markers. Raises `ValueError` unless both are there once, in order."""
    begin, end = markers
    text = page.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{page}: needs the markers {begin} and {end}, once each and in this order")
    before, after = text.split(begin)[0], text.split(end)[1]
    page.write_text(f"{before}{begin}\n{content}\n{end}{after}", encoding="utf-8")


def plot(rows: list[Row], folder: Path = RESULTS) -> list[Path]:
    """One PNG for each suite, device and allocator: bars of the ratios, or of the medians if there are none.

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
    parser.parse_args()
    rows = load()
    if not rows:
        parser.error(f"no results in {RESULTS}; run benchmarks/run.py first")
    of_amx = load(RESULTS / "amx")
    for path in [*plot(rows), *plot(of_amx, RESULTS / "amx")]:
        print(path)
    try:
        rewrite(ROOT / "README.md", headlines(rows))
        for found, markers in ((rows, (BEGIN, END)), (of_amx, AMX)):
            shown = tables([row for row in found if row["suite"] in SHOWN])
            rewrite(ROOT / "docs/performance.md", shown, markers)
        offline = [read_rows(RESULTS / "gpu_offline" / name) for name in ("sm_90.csv", "launches.csv")]
        rewrite(ROOT / "docs/performance.md", f"{predicted(offline[0])}\n\n{launched(offline[1])}", PREDICTED)
    except (KeyError, OSError, ValueError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
