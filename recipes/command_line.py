"""How every recipe starts and ends: arguments in, one-paragraph errors and conventional exit codes out."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from config import ConfigError, RunError, help_text, load_config
from cpu_processes import start_cpu_processes


class StopRequest:
    """Turns SIGTERM and SIGINT into a request that the loop answers at its next step boundary.

    `request.signal` is the number received, or 0. A launcher that has ended counts as SIGTERM: it would not pass one
    on. A second signal ends the process at once. On exit the handlers are as they were.
    """

    def __init__(self) -> None:
        self._received = 0
        launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "LOCAL_RANK" in os.environ
        self._launcher = os.getppid() if launched else None

    @property
    def signal(self) -> int:
        if not self._received and self._launcher not in (None, os.getppid()):
            self._received = signal.SIGTERM
        return self._received

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        signal.signal(number, signal.SIG_DFL)


def main(default: str) -> None:
    """Trains with the configuration of the command line, on top of the named one.

    Exit codes: 0 done, 1 the run failed, 2 the configuration or the data is unfit, 128 + N stopped by signal N.
    """
    arguments = sys.argv[1:]
    if print_help(arguments, default):
        return
    with short_errors():
        config = load_config(arguments, default=default)
        start_cpu_processes()
        # Imported late: what is wrong with the arguments is said within a moment.
        from engine import train
        from set_up import set_up

        train(set_up(config))


def print_help(arguments: list[str], default: str) -> bool:
    """Prints what the recipe says of itself and every key with its meaning, where `--help` is asked for."""
    wanted = bool({"-h", "--help"} & set(arguments))
    if wanted:
        print(f"{sys.modules['__main__'].__doc__}\n{help_text(default)}")
    return wanted


@contextmanager
def short_errors() -> Iterator[None]:
    """Ends the process with the message and the exit code of a `ConfigError` (2) or a `RunError` (1)."""
    try:
        yield
    except (ConfigError, RunError) as error:
        # All processes refuse a configuration alike; one of them says so. A run may fail on any.
        if isinstance(error, RunError) or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)


def use_cores(*, processes: int, on_cpu: bool, loaders: int, threads: int | None) -> int:
    """Shares the cores of a machine among its training processes, and on a CPU between arithmetic and loading.

    Sets the threads of this process and returns how many loader processes it may have, at most `loaders`. `threads`,
    or else an OMP_NUM_THREADS above 1 (1 is what the launcher sets by itself), decides where given.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // processes)
    loaders = min(loaders, share // 2 if on_cpu else share)
    given = int(os.environ.get("OMP_NUM_THREADS") or 1)
    if on_cpu:
        torch.set_num_threads(threads or (given if given > 1 else max(1, share - loaders)))
    return loaders
