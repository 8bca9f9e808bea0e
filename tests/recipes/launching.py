"""Recipes started as a user starts them, on models small enough for seconds."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

RECIPES = Path(__file__).parents[2] / "recipes"
TIMEOUT = 240

TWO = ("--num_processes", "2", "--cpu")
"""Options that ask for two processes."""
QUIET = ("threads=1", "tracker=none")
# Eight updates of 32 an epoch, with augmentation, mixup, stochastic depth and an average to lose by a wrong resume.
TINY = (
    *QUIET, "model.dim=16", "model.depth=1", "model.pooling=0001", "model.drop_path=0.2",
    "data.img_size=8", "data.train_samples=260", "data.test_samples=101", "data.mixup=0.5", "data.cutmix=0.5",
    "data.auto_augment=rand-m5-n1", "train.batch_size=32", "train.epochs=3", "train.warmup_epochs=1",
    "train.ema_decay=0.9",
)  # fmt: skip


class Launcher:
    """Starts recipes in their own sessions and leaves none of their processes behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[psutil.Process] = []

    def command(self, recipe: str, *arguments: str, launch: tuple[str, ...] | None = None) -> list[str]:
        """`python recipes/X.py ...`, or with `launch` options `accelerate launch OPTIONS recipes/X.py ...`.

        Several processes on a CPU are `recipes/launch.py`'s to start.
        """
        starter = ["-m", "accelerate.commands.launch"] if launch != TWO else [str(RECIPES / "launch.py")]
        prefix = [sys.executable, *starter, *launch] if launch is not None else [sys.executable]
        return [*prefix, str(RECIPES / f"{recipe}.py"), *arguments]

    def start(
        self,
        recipe: str,
        *arguments: str,
        launch: tuple[str, ...] | None = None,
        tty: int | None = None,
        **options: Any,
    ) -> Any:
        """The running process, its output in pipes, or on the terminal `tty`."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        process = subprocess.Popen(
            self.command(recipe, *arguments, launch=launch),
            cwd=self.folder,
            env=environment,
            stdout=tty or subprocess.PIPE,
            stderr=tty or subprocess.PIPE,
            text=True,
            start_new_session=True,
            **options,
        )
        self.started.append(psutil.Process(process.pid))
        return process

    def run(self, recipe: str, *arguments: str, launch: tuple[str, ...] | None = None, **options: Any) -> Any:
        """The finished process: `returncode`, `stdout`, `stderr`."""
        process = self.start(recipe, *arguments, launch=launch, **options)
        out, err = process.communicate(timeout=TIMEOUT)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def train(self, recipe: str, *arguments: str, launch: tuple[str, ...] | None = None) -> dict[str, Any]:
        """The summary of a run that must succeed."""
        done = self.run(recipe, *arguments, launch=launch)
        assert done.returncode == 0, done.stdout + done.stderr
        output = next(a.removeprefix("output_dir=") for a in arguments if a.startswith("output_dir="))
        return read_summary(self.folder / output)

    def clean_up(self) -> None:
        for process in self.started:
            with contextlib.suppress(psutil.NoSuchProcess):
                for one in [*process.children(recursive=True), process]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.kill()


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """The first true value of `condition`; fails where the process ends or the time is up before."""
    deadline = time.monotonic() + TIMEOUT
    while not (value := condition()):
        assert process.poll() is None, "the process ended early: " + "".join(process.communicate())
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)
    return value


def kill_session(process: subprocess.Popen[str]) -> None:
    """SIGKILL to a launcher and its children at once."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def read_summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def read_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_saved(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*"))
