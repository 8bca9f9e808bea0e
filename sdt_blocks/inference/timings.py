"""The costs of ways to compute on this machine: measured once, then read from memory or from the machine's file."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..files import write_text
from ..ops.cpu import build

Costs = dict[str, float]
"""Seconds, or numbers that they are computed from, by name."""

_RUNS = 5
_MEASURED = ("product.py", "choice.py")
"""The files of this folder whose code is timed: when they or the kernels change, costs are measured again."""


class Timings:
    """Costs by the name of what was measured, in memory and in a file that other processes read.

    If the file cannot be read or written, each process measures for itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known = self._read()

    def of(self, name: str, measure: Callable[[], Costs]) -> Costs:
        """The costs of that name, measured and kept if they are not known yet."""
        if name not in self._known:
            found = measure()
            # Other processes may have written since.
            self._known = {**self._read(), **self._known, name: found}
            text = json.dumps(self._known, indent=1) + "\n"
            with contextlib.suppress(OSError):
                write_text(self.path, text)
        return self._known[name]

    def _read(self) -> dict[str, Costs]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            return {str(name): {key: float(cost) for key, cost in costs.items()} for name, costs in content.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}


def timings() -> Timings:
    """The timings of this machine, for its number of threads and version of PyTorch."""
    return _of_threads(torch.get_num_threads())


@functools.cache
def _of_threads(threads: int) -> Timings:
    code = [Path(__file__).with_name(name).read_text(encoding="utf-8") for name in _MEASURED]
    kernels = build.identity(Path(build.__file__).with_name("packed.cpp"))
    machine = hashlib.sha256("\n".join([kernels, torch.__version__, *code]).encode()).hexdigest()[:16]
    return Timings(build.cache_folder(written=False) / f"timings-{machine}-{threads}-threads.json")


def best_seconds(compute: Callable[[], object], runs: int = _RUNS, warmup: int = 1) -> float:
    """The time of the fastest of a few runs: a disturbance only makes a run longer."""
    best = math.inf
    for run in range(warmup + runs):
        start = time.perf_counter()
        compute()
        if run >= warmup:
            best = min(best, time.perf_counter() - start)
    return best
