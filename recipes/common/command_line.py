"""How every recipe starts and ends: arguments in, one-paragraph errors and conventional exit codes out."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields

from .config import ConfigError, RunError, check_meant, check_of_use, help_text, load_config, to_yaml
from .cpu_processes import join_processes
from .options import own_help


def main(default: str) -> None:
    """Trains with the configuration of the command line, on top of the named one.

    Exit codes: 0 done, 1 the run failed, 2 the configuration or the data is unfit, 128 + N stopped by signal N.
    """
    arguments = sys.argv[1:]
    with short_errors():
        if print_help(arguments, default, training=True):
            print(
                "Beside the keys: seeds=0,1,2 trains once with each; --print-config prints the configuration and ends."
            )
            return
        shown = "--print-config" in arguments
        seeds, arguments = take_seeds([argument for argument in arguments if argument != "--print-config"])
        configs = [load_config([*arguments, *seed], default=default) for seed in seeds]
        check_meant(configs[0], arguments)
        if shown:
            print(to_yaml(configs[0]), end="")
            return
        join_processes()
        # Imported late: what is wrong with the arguments is said within a moment.
        from .engine import train
        from .set_up import set_up

        if seeds == [()]:
            train(set_up(configs[0]))
        else:
            from .seeds import train_seeds

            train_seeds(configs)


def take_seeds(arguments: list[str]) -> tuple[list[tuple[str, ...]], list[str]]:
    """What `seeds=0,1,2` adds to the arguments of each run, and the other arguments; one empty addition without it."""
    asked = [argument.partition("=")[2] for argument in arguments if argument.startswith("seeds=")]
    rest = [argument for argument in arguments if not argument.startswith("seeds=")]
    if not asked:
        return [()], rest
    texts = [text.strip() for text in asked[-1].split(",")]
    if len(set(texts)) < max(2, len(texts)) or any(argument.startswith("seed=") for argument in rest):
        raise ConfigError(f"seeds={asked[-1]}: expected two or more different seeds, as in 0,1,2, and no seed= beside")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("seeds runs in one process; with several, start the runs one by one with seed=0, seed=1, ...")
    return [(f"seed={text}",) for text in texts], rest


def run_name(seed: str) -> str:
    """The folder, in `output_dir`, of the run with what `take_seeds` has added: `seed_0` of `seed=0`."""
    return seed.replace("=", "_")


def command(script: Callable[[list[str]], None], *, default: str | None = None, options: type | None = None) -> None:
    """Any recipe but training: calls it with the arguments, or for `--help` prints what it says of itself.

    `default` names the configuration whose keys it takes, but for those of training alone, `options` the dataclass of
    its own keys. Exit codes as above.
    """
    arguments = sys.argv[1:]
    with short_errors():
        if print_help(arguments, default, options):
            return
        if default is not None:
            check_of_use(arguments, [item.name for item in fields(options)] if options else ())
        script(arguments)


def print_help(
    arguments: list[str], default: str | None, options: type | None = None, *, training: bool = False
) -> bool:
    """Prints what the recipe says of itself and every key with its meaning, where `--help` is asked for."""
    wanted = bool({"-h", "--help"} & set(arguments))
    if wanted:
        print_anything()
        print(sys.modules["__main__"].__doc__)
        if default is not None:
            print(help_text(default, training=training))
        if options is not None:
            print(own_help(options))
    return wanted


def print_anything() -> None:
    """Lets the output show what its encoding lacks as `\\u...`: a file's is not UTF-8 on Windows."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def short_errors() -> Iterator[None]:
    """Ends the process with the message and the exit code of a `ConfigError` (2) or a `RunError` (1).

    A reader of the output that has gone is no traceback either, nor is a character that the output cannot show.
    """
    print_anything()
    tell = logging.StreamHandler(sys.stderr)  # what is printed may be JSON
    log = logging.getLogger("sdt_blocks")
    if os.environ.get("LOCAL_RANK", "0") == "0":
        log.setLevel(logging.INFO)
        log.addHandler(tell)
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("stopped before training began", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read the output has gone, as `| head` does; Python would write the rest of it once more at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("stopped: nobody reads the output any more; the same command goes on", file=sys.stderr, flush=True)
        sys.exit(128 + getattr(signal, "SIGPIPE", 13))  # which Windows does not name
    except (ConfigError, RunError) as error:
        # All processes refuse a configuration alike; one of them says so. A run may fail on any.
        if isinstance(error, RunError) or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    finally:
        log.removeHandler(tell)
