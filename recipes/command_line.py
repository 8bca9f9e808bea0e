"""How every recipe starts and ends: arguments in, one-paragraph errors and conventional exit codes out."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from config import ConfigError, RunError, help_text, load_config
from cpu_processes import start_cpu_processes


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
