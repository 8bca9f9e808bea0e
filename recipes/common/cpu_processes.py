"""`accelerate launch --cpu --num_processes N` as it reads: N processes; and how processes share a machine's cores.

Accelerate starts several processes on GPUs; on CPUs it leaves that to MPI, and without a host file it starts one
process whatever N says (https://github.com/huggingface/accelerate/issues/2741). So the one process that it starts here
becomes torch's launcher of N, as Accelerate uses it for GPUs.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch

from .stop_request import has_ended

_RANKED = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_LAUNCHERS = ("launch", "accelerate.commands.launch", "accelerate-launch", "launch.py")
_BY_SDT = (["sdt", "train"], ["sdt.py", "train"])


def start_cpu_processes() -> None:
    """Returns where this process trains; does not where several CPU processes were asked for and it launched them."""
    # Accelerate sets the port where it was asked for more than one process, and a rank where it started them itself.
    if "MASTER_PORT" not in os.environ or any(name in os.environ for name in _RANKED):
        return
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true" or not torch.accelerator.is_available()
    processes = asked_processes() if on_cpu else 1
    if processes > 1:
        launch(processes)


def launch(processes: int) -> NoReturn:
    """Starts this command in so many processes, waits, and ends with the exit code of the first that failed."""
    from torch.distributed.run import main

    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    with exit_as_processes():
        main(["--standalone", f"--nproc-per-node={processes}", *sys.argv])
    sys.exit(0)


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


def _end_with(parent: int) -> None:
    while not has_ended(parent):
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)  # passed on to the processes, which save and end


def asked_processes() -> int:
    """N of the `accelerate launch`, or `sdt train`, that started this process, from its arguments or its file."""
    import psutil
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    words = psutil.Process(os.getppid()).cmdline()
    names = [os.path.basename(word) for word in words]
    start = next((i for i, name in enumerate(names) if name in _LAUNCHERS or names[i - 1 : i + 1] in _BY_SDT), None)
    if start is None:
        return 1
    arguments, _ = launch_command_parser().parse_known_args(words[start + 1 :])
    if arguments.num_machines not in (None, 1):
        return 1
    if arguments.num_processes is not None:
        return int(arguments.num_processes)
    try:
        return int(load_config_from_file(arguments.config_file).num_processes)
    except (OSError, ValueError, AttributeError):
        return 1


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
