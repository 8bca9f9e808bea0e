"""Several processes on a CPU, which Accelerate does not start; and how processes share a machine's cores."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .config import ConfigError

_RANKED = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def join_processes() -> None:
    """Has the CPU processes that torchrun has started know of each other: Accelerate asks for its own word for that.

    Raises `ConfigError` where Accelerate was asked for several and has started this one alone: it leaves them to MPI
    (https://github.com/huggingface/accelerate/issues/2741).
    """
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true" and torch.accelerator.is_available():
        return
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    # Accelerate sets the port where it was asked for more than one process, and a rank where it started them itself.
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
    """Ends this process as those ended that torch's launcher started within: with a signal, or as the first failed."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        yield
    except SignalException as stop:
        sys.exit(128 + stop.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        # One that refuses the configuration has said why.
        if failure.exitcode != 2:
            print(f"error: process {rank} ended with code {failure.exitcode}", file=sys.stderr)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)


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
