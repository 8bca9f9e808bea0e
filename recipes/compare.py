"""Compares several runs in one table and one picture.

    python recipes/compare.py RUN RUN... [output_dir=comparison]

It prints the table in Markdown, writes it as comparison.md, .csv and .tex, and the learning curves as comparison.png.
Accuracy is that of the last model, as in summary.json, next to the best; for an unfinished run the table shows its
progress. The energy is that of `analyze.py` or `analyze=true`, if it was computed for weights that the run still has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common.command_line import command
from common.config import ConfigError
from common.options import split_options
from common.results import write_results
from common.schema import option

from sdt_blocks.analysis.tables import Column, as_files


@dataclass
class Options:
    """The keys of this recipe."""

    output_dir: str = option("comparison", "the folder to write", path=True)


COLUMNS = (
    Column("run", "run"),
    Column("model", "model"),
    Column("data", "data"),
    Column("epochs", "epochs", ""),
    Column("test_top1", "top-1 (%)", ".2f"),
    Column("best_top1", "best top-1 (%)", ".2f"),
    Column("params", "parameters", ","),
    Column("energy_mj", "energy (mJ)", ".4g"),
    Column("firing_rate", "firing rate", ".4f"),
    Column("seconds", "time (s)", ".0f"),
)
"""The columns of the table: the keys are those of summary.json."""

NUMBERS = [column.key for column in COLUMNS if column.format]


def read_run(folder: Path, name: str) -> dict[str, Any]:
    """A row of the table from a run folder. Raises `ConfigError`."""
    from common.analyzed import energy_of, read_mapping
    from common.progress import read_metrics, warn

    try:
        lines = read_metrics(folder)
        summary = read_mapping(folder / "summary.json")
        energy, stale = energy_of(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: {error}") from error
    if not lines:
        raise ConfigError(f"{folder} is no run folder: it has no metrics.jsonl with an epoch in it")
    if stale:
        warn(stale)
    finished = summary.get("steps", lines[-1]["step"]) == lines[-1]["step"]
    if not finished:  # it was, and continues
        summary = {key: value for key, value in summary.items() if key in ("model", "data", "params")}
    accuracies = [line[key] for line in lines for key in ("test_top1", "ema_test_top1") if line.get(key) is not None]
    last = {"epochs": lines[-1].get("epoch"), "seconds": lines[-1].get("seconds")}
    measured = [line for line in lines if line.get("test_top1") is not None]
    last |= {key: measured[-1].get(key) if measured else None for key in ("test_top1", "firing_rate")}
    row = {"best_top1": max(accuracies, default=None), **last, **summary, "energy_mj": energy.get("total_mj")}
    for key in NUMBERS:
        if isinstance(row.get(key), bool) or not isinstance(row.get(key), int | float | None):
            raise ConfigError(f"{folder}: {key} should be a number, found {row[key]!r}")
    return row | {"run": name if summary and finished else f"{name} (not finished)", "lines": lines}


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as are needed to tell the runs apart."""
    paths = [folder.resolve() for folder in folders]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise ConfigError("a run is named twice; name each once")


def main(arguments: Sequence[str]) -> None:
    options, names = split_options(Options, arguments)
    folders = [Path(name) for name in names]
    if not folders:
        raise ConfigError("name the run folders to compare, such as runs/a runs/b")
    missing = [str(folder) for folder in folders if not folder.is_dir()]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: no such folder")
    rows = [read_run(folder, name) for folder, name in zip(folders, short_names(folders), strict=True)]
    columns = [column for column in COLUMNS if any(row.get(column.key) is not None for row in rows)]
    from common.pictures import draw_comparison

    draw = partial(draw_comparison, {row["run"]: row["lines"] for row in rows})
    write_results(as_files(rows, columns), Path(options.output_dir) / "comparison", draw)
    if all(row["energy_mj"] is None for row in rows):
        print("Energy is computed by: accelerate launch recipes/analyze.py checkpoint=RUN")


if __name__ == "__main__":
    command(main, options=Options)
