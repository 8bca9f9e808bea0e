"""The figures of an analysis as tables: layer by layer, and by number of time steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .energy import CONVENTION, EnergyReport
from .measured import Measured
from .outcome import Outcome
from .tables import Column, Row, as_files

SWEEP = (
    Column("steps", "T", ""),
    Column("accuracy", "accuracy", ".4f"),
    Column("formula_mj", "energy, formula (mJ)", ".4g"),
    Column("memory_mj", "energy, with memory (mJ)", ".4g"),
    Column("latency_ms", "latency (ms)", ".3g"),
)


def layer_tables(report: EnergyReport) -> dict[str, str]:
    """A row a layer and neuron layer, with its rate and its energy by each model: CSV, Markdown and LaTeX by ending."""
    columns = [Column("layer", "layer"), Column("type", "type"), Column("rate", "rate", ".4f")]
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for name, found in report.estimates.items():
        columns.append(Column(f"{name}_compute_mj", f"{name}, compute (mJ)", ".3g"))
        if found.cost.memory_mj:
            columns.append(Column(f"{name}_memory_mj", f"{name}, memory (mJ)", ".3g"))
        columns.append(Column(f"{name}_ann_mj", f"{name}, ANN (mJ)", ".3g"))
        columns.append(Column(f"{name}_break_even", f"{name}, break-even rate", ".3g"))
        for row in found.rows:
            cells = rows.setdefault((row.name, row.type), {"layer": row.name, "type": row.type, "rate": row.rate})
            cells[f"{name}_compute_mj"], cells[f"{name}_memory_mj"] = row.cost.compute_mj, row.cost.memory_mj
            cells[f"{name}_ann_mj"], cells[f"{name}_break_even"] = row.ann.total_mj, row.break_even
    return as_files(list(rows.values()), columns, CONVENTION)


def sweep(report: EnergyReport, outcome: Outcome | None, measured: Measured | None) -> list[dict[str, Any]]:
    """Accuracy, energy and latency with the first 1, 2, ... steps, what is not known left out."""
    accuracy = outcome.accuracy if outcome is not None else []
    latency = measured.latency_ms if measured is not None else {}
    rows = []
    for count in range(1, report.steps + 1):
        row: dict[str, Any] = {"steps": count, "latency_ms": latency.get(count)}
        if len(accuracy) == report.steps:
            row["accuracy"] = accuracy[count - 1]
        elif count == report.steps and accuracy:
            row["accuracy"] = accuracy[-1]
        for key, name in (("formula_mj", "formula"), ("memory_mj", "step")):
            if name in report.estimates:
                row[key] = sum(cost.total_mj for cost in report.estimates[name].steps[:count])
        rows.append(row)
    return rows


def sweep_table(rows: Sequence[Row]) -> dict[str, str]:
    """What `sweep` found: CSV, Markdown and LaTeX by ending."""
    known = [column for column in SWEEP if any(row.get(column.key) is not None for row in rows)]
    return as_files(rows, known, CONVENTION)


def joules(value: float) -> str:
    """An energy given in joules as text, in a suitable unit."""
    for unit, factor in (("J", 1.0), ("mJ", 1e3)):
        if abs(value) * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.3g} µJ"
