"""One run for each of several seeds, one after another, and their common summary."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState

from sdt_blocks.files import write_text

from .config import Config
from .engine import STILL_SILENT, train
from .progress import is_silent
from .set_up import set_up


def train_seeds(configs: list[Config]) -> None:
    """Train each in its folder; the means go into summary.json of the folder around them.

    A run that is complete is not repeated, so the same command continues after a stop.
    """
    folder, summaries = Path(configs[0].output_dir).parent, []
    for config in configs:
        train_anew(config)
        summaries.append(json.loads(Path(config.output_dir, "summary.json").read_text(encoding="utf-8")))
    summary = summarize(summaries)
    write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    silent = [str(run["seed"]) for run in summaries if is_silent(run)]
    if silent:
        print(f"evaluation is still silent with seed {', '.join(silent)} ({STILL_SILENT})")
    else:
        print(f"test top-1 {summary['test_top1']:.2f} % +- {summary['test_top1_std']:.2f}")
    print(f"mean and standard deviation of {len(configs)} seeds: summary.json in {folder}")


def train_anew(config: Config) -> None:
    """Train, whatever this process has trained before."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    train(set_up(config))


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
