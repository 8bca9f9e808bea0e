"""Starts a recipe in as many processes as `accelerate launch` would, and adds nothing to what the recipe says.

    python recipes/launch.py [options of accelerate launch] recipes/NAME.py [key=value ...]

Accelerate does the starting. Its list of defaults before and its traceback after an error are left out; the exit code
is that of the recipe, or of the first process that failed, and a SIGTERM is passed on.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

import psutil
from accelerate.commands.launch import launch_command, launch_command_parser
from common.cpu_processes import exit_as_processes

DEFAULTS = "The following values were not passed to `accelerate launch`"


def main(arguments: Sequence[str]) -> None:
    options = launch_command_parser().parse_args(arguments)
    options.quiet = False  # it means an exit code of 1, whatever the recipe's
    # The first line of a run says what the values have come to.
    logging.getLogger(launch_command.__module__).addFilter(lambda record: DEFAULTS not in record.getMessage())
    signal.signal(signal.SIGTERM, pass_on)
    signal.signal(signal.SIGINT, wait)
    try:
        with exit_as_processes():
            launch_command(options)
    except subprocess.CalledProcessError as ended:
        sys.exit(ended.returncode if ended.returncode > 0 else 128 - ended.returncode)
    except ValueError as error:  # Accelerate's word for options that contradict each other
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def pass_on(number: int, _: FrameType | None) -> None:
    """The recipe saves and ends, and the launcher with it."""
    for child in psutil.Process().children():
        child.send_signal(number)


def wait(_number: int, _: FrameType | None) -> None:
    """A terminal sends its Ctrl-C to the recipe as well."""


if __name__ == "__main__":
    main(sys.argv[1:])
