"""One run for each of several seeds, one after another, and their common summary."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState

from sdt_blocks.files import write_atomically

from .command_line import run_name
from .config import Config, changed
from .engine import STILL_SILENT, train
from .progress import is_silent
from .set_up import set_up


def train_seeds(configs: list[Config]) -> None:
    """Train each in the folder `seed_N` of its output_dir; the means go into summary.json of output_dir itself.

    A run that is complete is not repeated, so the same command continues after a stop.
    """
    folder, summaries = Path(configs[0].output_dir), []
    for config in configs:
        run = folder / run_name(f"seed={config.seed}")
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        train(set_up(changed(config, {"output_dir": str(run)})))
        summaries.append(json.loads((run / "summary.json").read_text(encoding="utf-8")))
    summary = summarize(summaries)
    text = json.dumps(summary, indent=2) + "\n"
    write_atomically(folder / "summary.json", lambda name: Path(name).write_text(text, encoding="utf-8"))
    silent = [str(run["seed"]) for run in summaries if is_silent(run)]
    if silent:
        print(f"evaluation is still silent with seed {', '.join(silent)} ({STILL_SILENT})")
    else:
        print(f"test top-1 {summary['test_top1']:.2f} % +- {summary['test_top1_std']:.2f}")
    print(f"mean and standard deviation of {len(configs)} seeds: summary.json in {folder}")


def summarize(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """The values that all runs share, and the mean of each number that differs with its sample deviation, `_std`."""
    whole: dict[str, Any] = {}
    for key, first in summaries[0].items():
        values = [summary.get(key) for summary in summaries]
        if key == "seed":
            whole["seeds"] = values
        elif isinstance(first, float) and all(isinstance(value, int | float) for value in values):
            whole[key], whole[f"{key}_std"] = statistics.fmean(values), statistics.stdev(values)
        elif all(value == first for value in values):
            whole[key] = first
    return whole
