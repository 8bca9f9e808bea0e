"""What a run shows and records: a progress bar on a terminal, plain lines elsewhere, metrics.jsonl."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sdt_blocks.files import write_text

from .config import ConfigError, one_paragraph

SECONDS_BETWEEN_LINES = 30
METRICS, DAMAGED, CURVES = "metrics.jsonl", "metrics_damaged.jsonl", "curves.png"
SILENT = 1e-4
"""Spikes per neuron and time step below which a network's answers depend on its biases only."""


class Display:
    """Progress through the updates of a run; silent if `active` is false, as on all processes except the first.

    Use it as a context manager: `with display: display.advance(...)`.
    """

    def __init__(self, total: int, done: int, *, active: bool) -> None:
        self.total, self.first, self.active = total, done, active
        self.started = self.last_line = time.monotonic()
        console = Console()
        self.live = active and console.is_terminal
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not self.live,
        )
        self.task = self.bar.add_task("starting", total=total, completed=done)
        self.text, self.step, self.advanced = "the first step is under way", done, self.started
        self.ended = threading.Event()

    def __enter__(self) -> Display:
        self.bar.start()
        if self.active and not self.live:
            threading.Thread(target=self._report, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.bar.stop()

    def _report(self) -> None:
        """Write a line at regular intervals, however long a step, an evaluation or a compilation takes."""
        while not self.ended.wait(max(0.0, self.last_line + SECONDS_BETWEEN_LINES - time.monotonic())):
            self.last_line = time.monotonic()
            done = self.step - self.first
            # Only training steps count: an evaluation does not make the remaining ones slower.
            seconds = (self.advanced - self.started) / max(done, 1) * (self.total - self.step)
            left = f" | {_duration(seconds)} left" if done else ""
            self.say(f"{self.text} | step {self.step}/{self.total}{left}")

    def advance(self, step: int, *, epoch: int, loss: float, rate: float) -> None:
        """Count one update as done: `rate` is in images per second."""
        text = f"epoch {epoch + 1} | loss {loss:.4f} | {rate:.0f} images/s"
        self.text, self.step, self.advanced = text, step, time.monotonic()
        if self.live:
            self.bar.update(self.task, completed=step, description=text)

    def say(self, text: str) -> None:
        """Write a line that stays, above the bar if there is one."""
        if self.live:
            self.bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        elif self.active:
            print(text, flush=True)


def warn(text: str) -> None:
    """Write a line to standard error, from the first process of each machine."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"warning: {text}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours:d}:{rest // 60:02d}:{rest % 60:02d}"


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has held so far, in MiB: of the GPU if it uses one, else resident."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    try:
        import resource
    except ImportError:  # on Windows
        return round(psutil.Process().memory_info().peak_wset / 2**20, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 2**20 if sys.platform == "darwin" else peak / 2**10, 1)


def append_metrics(folder: Path, line: dict[str, Any]) -> None:
    """Write one line of metrics.jsonl, which is on disk when this returns."""
    with (folder / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The complete lines of metrics.jsonl; a damaged one is left out, see `restore_metrics`."""
    parsed = [_parse_line(raw) for raw in _raw_lines(folder)]
    return [line for line in parsed if line is not None]


def _raw_lines(folder: Path) -> list[bytes]:
    path = folder / METRICS
    return [raw for raw in path.read_bytes().split(b"\n") if raw.strip()] if path.is_file() else []


def _parse_line(raw: bytes) -> dict[str, Any] | None:
    """The line of an epoch, or None if it is not one: no object, no step or epoch, text instead of a number."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        line = json.loads(raw.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(line, dict) and all(type(line.get(key)) is int for key in ("step", "epoch"))
    return line if whole and not any(isinstance(value, str | bool | dict) for value in line.values()) else None


def is_silent(measured: dict[str, Any], prefix: str = "") -> bool:
    """Whether the answers in a line of metrics, or in a summary, depend on the biases only."""
    rate = measured.get(f"{prefix}firing_rate")
    return rate is not None and rate < SILENT


def restore_metrics(folder: Path, lines: list[dict[str, Any]], step: int) -> None:
    """Write metrics.jsonl with the lines that a checkpoint at `step` knows, or else the file's own up to there.

    Lines of later epochs are removed, since a resumed run writes them again. Damaged or repeated lines are kept in
    metrics_damaged.jsonl, with a warning.
    """
    path = folder / METRICS
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is no file; move it away, the run writes its metrics there")
    good: list[dict[str, Any]] = []
    damaged = []
    for raw in _raw_lines(folder):
        line = _parse_line(raw)
        if line is None or line in good or (lines and line["step"] <= step and line not in lines):
            damaged.append(raw)
        else:
            good.append(line)
    kept = lines or [line for line in good if line["step"] <= step]
    restored = [line["epoch"] for line in kept if line not in good]
    if damaged:
        with (folder / DAMAGED).open("ab") as file:
            file.writelines(raw + b"\n" for raw in damaged)
        warn(f"{path}: {len(damaged)} damaged line(s), kept in {DAMAGED}")
    if restored:
        warn(f"{path}: the line(s) of epoch {', '.join(map(str, restored))} are restored from the checkpoint")
    if kept or path.is_file():
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def choose_tracker(name: str) -> str | list[str] | None:
    """The trackers for Accelerate's `log_with`. Raises `ConfigError` if one is missing, and if `all` finds none."""
    from accelerate import tracking

    if name == "none":
        return None
    if name not in ("auto", "all"):
        if name not in tracking.LOGGER_TYPE_TO_CLASS:
            raise ConfigError(
                f"tracker={name} needs a newer Accelerate: pip install -U accelerate, or take tracker=none"
            )
        _import_tracker(name, asked=name)
        return name
    installed = sorted(map(str, tracking.get_available_trackers()))
    working = []
    for one in installed if name == "all" else ["tensorboard"] if find_spec("tensorboard") else []:
        try:
            _import_tracker(one, asked=name)
            working.append(one)
        except ConfigError as error:
            warn(f"{error}; the run continues without it")
    if name == "all" and not working:
        raise ConfigError("tracker=all finds no tracker: pip install tensorboard, or tracker=none")
    return working or None


def _import_tracker(wanted: str, *, asked: str) -> None:
    """Raise `ConfigError` if the package of a tracker is missing or cannot be imported."""
    remedy = f"pip install {wanted}, or tracker=none"
    try:
        # A folder of that name, such as wandb creates, is found as well, but is no package.
        found = getattr(import_module(wanted), "__file__", None)
        if wanted == "tensorboard":
            import_module("torch.utils.tensorboard")
    except Exception as error:  # an import runs any code of the package
        raise ConfigError(
            f"tracker={asked} needs the package {wanted}, which cannot be imported ({one_paragraph(error)}): {remedy}"
        ) from error
    if not found:
        raise ConfigError(f"tracker={asked} needs the package {wanted}: {remedy}")
