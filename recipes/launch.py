"""Starts a recipe in as many processes as `accelerate launch` would, without any output besides the recipe's.

    python recipes/launch.py [options of accelerate launch] recipes/NAME.py [key=value ...]

Accelerate starts the processes, except for several on a CPU, of which it would start only one: these are started by
torchrun. Its list of defaults before the run and its traceback after an error are left out; the exit code is that of
the recipe, or of the first process that failed, and a SIGTERM is passed on.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

import psutil
import torch
import torch.distributed.run
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from common.cpu_processes import exit_as_processes, say_ended

DEFAULTS = "The following values were not passed to `accelerate launch`"


def main(arguments: Sequence[str]) -> None:
    options = launch_command_parser().parse_args(arguments)
    options.quiet = False  # otherwise the exit code is 1, whatever the recipe's
    # The first line of a run shows the resulting values.
    logging.getLogger(launch_command.__module__).addFilter(lambda record: DEFAULTS not in record.getMessage())
    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, wait)
    processes = processes_on_cpu(options)
    try:
        with exit_as_processes():
            if processes > 1:
                torchrun(processes, options)
            else:
                launch_command(options)
    except subprocess.CalledProcessError as ended:
        if ended.returncode < 0:
            say_ended("the recipe", ended.returncode)
        sys.exit(ended.returncode if ended.returncode > 0 else 128 - ended.returncode)
    except ValueError as error:  # raised by Accelerate for options that contradict each other
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def processes_on_cpu(options: argparse.Namespace) -> int:
    """How many processes the options, or their file, ask for on a CPU; 1 if Accelerate is to start them."""
    try:
        file = load_config_from_file(options.config_file)
    except (OSError, ValueError):
        file = None
    on_cpu = options.cpu or getattr(file, "use_cpu", False) or not torch.accelerator.is_available()
    machines = options.num_machines or getattr(file, "num_machines", 1)
    if not on_cpu or machines != 1 or options.multi_gpu:
        return 1
    return int(options.num_processes or getattr(file, "num_processes", 1))


def torchrun(processes: int, options: argparse.Namespace) -> None:
    """Start the recipe in this number of processes and wait for them."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if options.num_cpu_threads_per_process:
        os.environ["OMP_NUM_THREADS"] = str(options.num_cpu_threads_per_process)
    logging.disable(logging.ERROR)  # torch's messages on processes that end: the recipe has said why, or we do
    torch.distributed.run.main(
        ["--standalone", f"--nproc-per-node={processes}", options.training_script, *options.training_script_args]
    )


def pass_on(number: int, _: FrameType | None) -> None:
    """Pass the signal on: the recipe saves and ends, and then the launcher."""
    for child in psutil.Process().children():
        child.send_signal(number)


def wait(_number: int, _: FrameType | None) -> None:
    """Only wait: a terminal sends its Ctrl-C to the recipe as well."""


if __name__ == "__main__":
    main(sys.argv[1:])
