"""The figures of an analysis as tables: layer by layer, and by number of time steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .energy import CONVENTION, EnergyReport
from .measured import Measured
from .moments import level, share_interval
from .outcome import Outcome
from .tables import HIGH, LOW, Column, Row, as_files

SWEEP = (
    Column("steps", "T", ""),
    Column("accuracy", "accuracy", ".4f"),
    Column("formula_mj", "energy, formula (mJ)", ".4g"),
    Column("memory_mj", "energy, with memory (mJ)", ".4g"),
    Column("latency_ms", "latency (ms)", ".3g"),
)


NO_LATENCY = "Latency by number of steps is not given in full:"


def note(confidence: float) -> str:
    """The explanation below a table."""
    return f"{CONVENTION} In brackets: the {level(confidence)} confidence interval of the mean over samples."


def layer_tables(report: EnergyReport, confidence: float = 0.95) -> dict[str, str]:
    """A row for each layer and neuron layer, with its rate and its energy by each model; CSV, Markdown and LaTeX."""
    columns = [Column("layer", "layer"), Column("type", "type"), Column("rate", "rate", ".4f")]
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for name, found in report.estimates.items():
        columns.append(Column(f"{name}_mj", f"{name} (mJ)", ".3g"))
        if found.cost.memory_mj:
            columns.append(Column(f"{name}_compute_mj", f"{name}, compute (mJ)", ".3g"))
            columns.append(Column(f"{name}_memory_mj", f"{name}, memory (mJ)", ".3g"))
        columns.append(Column(f"{name}_ann_mj", f"{name}, ANN (mJ)", ".3g"))
        columns.append(Column(f"{name}_break_even", f"{name}, break-even rate", ".3g"))
        for row in found.rows:
            cells = rows.setdefault((row.name, row.type), {"layer": row.name, "type": row.type, "rate": row.rate})
            cells |= _with_interval(f"{name}_mj", row.cost.total_mj, row.interval(confidence))
            cells[f"{name}_compute_mj"], cells[f"{name}_memory_mj"] = row.cost.compute_mj, row.cost.memory_mj
            cells[f"{name}_ann_mj"], cells[f"{name}_break_even"] = row.ann.total_mj, row.break_even
    return as_files(list(rows.values()), columns, note(confidence))


def _with_interval(key: str, value: float, ends: tuple[float, float] | None) -> dict[str, float]:
    return {key: value} | ({f"{key}{LOW}": ends[0], f"{key}{HIGH}": ends[1]} if ends else {})


def sweep(
    report: EnergyReport, outcome: Outcome | None, measured: Measured | None, confidence: float = 0.95
) -> list[dict[str, Any]]:
    """Accuracy, energy and latency with the first 1, 2, ... steps, without what is unknown.

    If there are enough samples, accuracy and energy come with the ends of their intervals.
    """
    accuracy = outcome.accuracy if outcome else []
    latency = measured.latency_ms if measured is not None else {}
    rows = []
    for count in range(1, report.steps + 1):
        row: dict[str, Any] = {"steps": count, "latency_ms": latency.get(count)}
        if outcome is not None and accuracy and (len(accuracy) == report.steps or count == report.steps):
            share = accuracy[count - 1] if len(accuracy) == report.steps else accuracy[-1]
            row |= _with_interval("accuracy", share, share_interval(share, outcome.samples, confidence))
        for key, name in (("formula_mj", "formula"), ("memory_mj", "step")):
            if name in report.estimates:
                found = report.estimates[name]
                total = sum(cost.total_mj for cost in found.steps[:count])
                row |= _with_interval(key, total, found.interval(confidence, steps=count))
        rows.append(row)
    return rows


def sweep_table(rows: Sequence[Row], measured: Measured | None = None, confidence: float = 0.95) -> dict[str, str]:
    """The rows of `sweep` as CSV, Markdown and LaTeX, by ending."""
    known = [column for column in SWEEP if any(row.get(column.key) is not None for row in rows)]
    missing = f" {NO_LATENCY} {measured.latency_missing}." if measured is not None and measured.latency_missing else ""
    return as_files(rows, known, note(confidence) + missing)


def joules(value: float) -> str:
    """An energy given in joules as text, in a suitable unit."""
    for unit, factor in (("J", 1.0), ("mJ", 1e3)):
        if abs(value) * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.3g} µJ"
