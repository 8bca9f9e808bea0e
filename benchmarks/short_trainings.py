"""Short trainings of the recipes: a run on this device ends with the accuracy of one on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import Bench, ParityError

ALLOCATORS = ["default"]
DEVICES = ["cuda"]
RECIPES = Path(__file__).parents[1] / "recipes"
RUNS = {"digits": "a Spike-Driven Transformer on scikit-learn's digits", "events_demo": "moving shapes as events"}
POINTS = 2.0
"""By how much accuracies may differ: sums, and therefore spikes, are not the same."""


def run(bench: Bench) -> None:
    epochs = bench.pick(cpu=15, cuda=15, trial=1)
    for recipe, setting in RUNS.items():
        with bench.spared("accuracy", f"{setting}, {epochs} epochs", "sdt_blocks"):
            compare(bench, recipe, setting, epochs)


def compare(bench: Bench, recipe: str, setting: str, epochs: int) -> None:
    accuracies = {}
    for device in dict.fromkeys((bench.device.type, "cpu")):
        start = time.perf_counter()
        accuracies[device] = accuracy(recipe, device, epochs)
        seconds = time.perf_counter() - start
        bench.record("training and evaluation", f"{setting}, {epochs} epochs", f"sdt_blocks on {device}", seconds)
    expected, found = accuracies["cpu"], accuracies[bench.device.type]
    parity = f"{found - expected:+.1f} points of the CPU's"
    if bench.size != "trial" and abs(found - expected) > POINTS:
        raise ParityError(f"{found:.1f} %, on the CPU {expected:.1f} %")
    bench.record("accuracy", f"{setting}, {epochs} epochs", "sdt_blocks", found, unit="%", parity=parity)


def accuracy(recipe: str, device: str, epochs: int) -> float:
    """Top-1 in percent of a recipe that is run in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(RECIPES / f"{recipe}.py"), f"output_dir={folder}/run", f"train.epochs={epochs}"]
        command += [f"train.warmup_epochs={int(epochs > 1)}", "tracker=none"]
        environment = {**os.environ, "ACCELERATE_USE_CPU": str(device == "cpu").lower()}
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{recipe} on {device}: {done.stderr[-2000:]}")
        summary = json.loads((Path(folder) / "run" / "summary.json").read_text())
    return float(summary["test_top1"])
