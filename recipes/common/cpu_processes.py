"""Several processes on a CPU, which Accelerate does not start; and how processes share a machine's cores."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .config import ConfigError

_RANKED = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")

GOES_ON = "the same command goes on, in training from the last checkpoint"


def join_processes() -> None:
    """Make the CPU processes that torchrun has started known to each other, in the way that Accelerate expects.

    Raises `ConfigError` if Accelerate was asked for several and has started only this one: it leaves them to MPI
    (https://github.com/huggingface/accelerate/issues/2741).
    """
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true" and torch.accelerator.is_available():
        return
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    # Accelerate sets the port if it was asked for more than one process, and a rank if it started them itself.
    launched = "MASTER_PORT" in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ
    if launched and not any(name in os.environ for name in _RANKED):
        script = sys.argv[0]
        raise ConfigError(
            f"accelerate launch starts one process on a CPU, whatever --num_processes says; for N of them: torchrun "
            f"--nproc-per-node N {script} ..., or python {os.path.join(os.path.dirname(script), 'launch.py')} "
            f"--num_processes N {script} ... (for one, leave MASTER_PORT out of the environment)"
        )


@contextmanager
def exit_as_processes() -> Iterator[None]:
    """End this process as the processes ended that torch's launcher started: by the signal, or as the first failed."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        yield
    except SignalException as stop:
        sys.exit(128 + stop.sigval)
    except ChildFailedError as error:
        # If a process is killed, those that lose it fail as well, or are ended by the launcher's SIGTERM.
        by_rank = sorted((rank, failure.exitcode) for rank, failure in error.failures.items())
        killed = [(rank, code) for rank, code in by_rank if code < 0 and code != -signal.SIGTERM]
        first, failure = error.get_first_failure()
        rank, code = killed[0] if killed else (first, failure.exitcode)
        say_ended(f"process {rank}", code)
        sys.exit(code if code > 0 else 128 - code)


def say_ended(what: str, code: int) -> None:
    """Print how a process ended, by its exit code, negative for a signal; one with code 2 has said why itself."""
    if code < 0:
        memory = ", as where memory runs out" if -code == getattr(signal, "SIGKILL", 9) else ""
        print(f"error: {what} was ended by {signal.Signals(-code).name}{memory}; {GOES_ON}", file=sys.stderr)
    elif code != 2:
        print(f"error: {what} ended with code {code}", file=sys.stderr)


def has_lost_another(error: RuntimeError) -> bool:
    """Whether an operation over several processes failed because one of them has ended or is out of reach."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def use_cores(*, processes: int, on_cpu: bool, loaders: int, threads: int | None) -> int:
    """Share the cores of a machine among its training processes, and on a CPU between arithmetic and loading.

    Sets the threads of this process and returns how many loader processes it may have, at most `loaders`. If given,
    `threads` decides, or else an OMP_NUM_THREADS above 1 (1 is what the launcher sets by itself).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // processes)
    loaders = min(loaders, share // 2 if on_cpu else share)
    given = int(os.environ.get("OMP_NUM_THREADS") or 1)
    if on_cpu:
        torch.set_num_threads(threads or (given if given > 1 else max(1, share - loaders)))
    return loaders
