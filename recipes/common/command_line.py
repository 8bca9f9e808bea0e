"""How every recipe starts and ends: it reads arguments, and reports errors in a paragraph with usual exit codes."""

from __future__ import annotations

import errno
import io
import logging
import os
import shutil
import signal
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from sdt_datasets.errors import LeftOutWarning

from .config import (
    Config,
    ConfigError,
    RunError,
    changed,
    check_meant,
    check_of_use,
    help_text,
    load_config,
    one_paragraph,
    to_yaml,
)
from .cpu_processes import GOES_ON, has_lost_another, join_processes
from .options import own_help
from .values import expand_home

INTERRUPTED = "stopped: the same command goes on from the last checkpoint, or begins where there is none"
"""The message for a Ctrl-C before training begins and after it has ended; in between, the run reports its progress."""

LOST = f"another process has ended or is out of reach; {GOES_ON}"

OF_PICTURES = ("Glyph .* missing from font", "Creating legend")
"""Warnings of matplotlib that nobody can act on: the names that its font lacks stand in the tables beside."""


def main(default: str) -> None:
    """Train with the configuration of the command line, on top of the default one.

    Exit codes: 0 done, 1 the run failed, 2 the configuration or the data is unfit, 128 + N stopped by signal N.
    """
    arguments = sys.argv[1:]
    with short_errors(INTERRUPTED):
        if print_help(arguments, default, training=True):
            print(
                "Beside the keys: seeds=0,1,2 trains once with each; --print-config prints the configuration and ends."
            )
            return
        settings = [argument for argument in arguments if argument != "--print-config"]
        configs = configs_of(settings, default)
        check_meant(configs[0], settings)
        if len(settings) < len(arguments):
            print(to_yaml(configs[0]), end="")
            return
        join_processes()
        # Imported late, so that errors in the arguments are reported at once.
        from .engine import train
        from .set_up import set_up

        if len(configs) == 1:
            train(set_up(configs[0]))
        else:
            from .seeds import train_seeds

            train_seeds(configs)


def configs_of(arguments: list[str], default: str) -> list[Config]:
    """The configuration of a run, or with `seeds=0,1,2` of one for each, in `seed_0`, ... of output_dir."""
    asked = [argument.partition("=")[2] for argument in arguments if argument.startswith("seeds=")]
    rest = [argument for argument in arguments if not argument.startswith("seeds=")]
    if not asked:
        return [load_config(rest, default=default)]
    texts = [text.strip() for text in asked[-1].split(",")]
    if len(set(texts)) < max(2, len(texts)) or any(argument.startswith("seed=") for argument in rest):
        raise ConfigError(f"seeds={asked[-1]}: expected two or more different seeds, as in 0,1,2, and no seed= beside")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("seeds runs in one process; with several, start the runs one by one with seed=0, seed=1, ...")
    configs = [load_config([*rest, f"seed={text}"], default=default) for text in texts]
    return [changed(config, {"output_dir": str(Path(config.output_dir, f"seed_{config.seed}"))}) for config in configs]


def command(script: Callable[[list[str]], None], *, default: str | None = None, options: type | None = None) -> None:
    """Run any recipe except training: call it with the arguments, or print its description for `--help`.

    `default` names the configuration whose keys it takes, except those that only concern training; `options` is the
    dataclass of its own keys. Exit codes as in `main`.
    """
    arguments = [argument if "=" in argument else expand_home(argument) for argument in sys.argv[1:]]
    with short_errors():
        if print_help(arguments, default, options):
            return
        if default is not None:
            check_of_use(arguments, [item.name for item in fields(options)] if options else ())
        script(arguments)


def print_help(
    arguments: list[str], default: str | None, options: type | None = None, *, training: bool = False
) -> bool:
    """If `--help` is among the arguments, print the recipe's description and every key with its meaning."""
    wanted = bool({"-h", "--help"} & set(arguments))
    if wanted:
        print_anything()
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
        print(fitted(sys.modules["__main__"].__doc__ or "", width))
        if default is not None:
            print(fitted(help_text(default, training=training), width))
        if options is not None:
            print(fitted(own_help(options), width))
    return wanted


def fitted(text: str, width: int) -> str:
    """A text wrapped to the width of a terminal, paragraph by paragraph, indented lines separately; 0 wraps nothing.

    A file, or a reader such as grep, then has a key and its whole description in one line.
    """
    if width < 20 or max(map(len, text.splitlines()), default=0) <= width:
        return text
    parts: list[str] = []
    for line in text.splitlines():
        if parts and line and parts[-1] and not line.startswith(" ") and not parts[-1].startswith(" "):
            parts[-1] += f" {line}"
        else:
            parts.append(line)
    wrap: dict[str, Any] = {"width": width - 1, "break_long_words": False, "break_on_hyphens": False}
    return "\n".join(
        textwrap.fill(part, subsequent_indent="      " if part.startswith(" ") else "", **wrap) for part in parts
    )


def print_anything() -> None:
    """Let the output show characters that its encoding lacks as `\\u...`: files are not UTF-8 on Windows."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def short_errors(interrupted: str = "stopped") -> Iterator[None]:
    """End the process with the message and the exit code of a `ConfigError` (2) or a `RunError` (1).

    `interrupted` is the message for a Ctrl-C that nothing else handles. There is no traceback either if the output is
    closed by its reader or cannot show a character. Messages that all processes share are printed by the first one.
    """
    print_anything()
    tell = logging.StreamHandler(sys.stderr)  # what is printed may be JSON
    log = logging.getLogger("sdt_blocks")
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if first:
        log.setLevel(logging.INFO)
        log.addHandler(tell)
    try:
        with short_warnings(first=first):
            yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        if first:
            print(interrupted, file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of the output has closed it, as `| head` does.
        give_up_output()
        print("stopped: the output was closed; the same command continues", file=sys.stderr, flush=True)
        sys.exit(128 + getattr(signal, "SIGPIPE", 13))  # which Windows does not name
    except OSError as error:
        if error.errno != errno.ENOSPC or error.filename is not None:
            raise
        give_up_output()
        print(f"error: the output cannot be written ({error})", file=sys.stderr, flush=True)
        sys.exit(1)
    except (ConfigError, RunError) as error:
        # All processes refuse a configuration in the same way; one of them reports it. A run may fail on any.
        if isinstance(error, RunError) or first:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except RuntimeError as error:
        if not has_lost_another(error):
            raise
        # The first two report it: one of them may be the lost one.
        if os.environ.get("LOCAL_RANK", "0") in ("0", "1"):
            print(f"error: {LOST} ({one_paragraph(error)[-120:]})", file=sys.stderr, flush=True)
        sys.exit(1)
    finally:
        log.removeHandler(tell)


def give_up_output() -> None:
    """Let nothing more go to the standard output, where Python would write the rest again at the end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def short_warnings(*, first: bool) -> Iterator[None]:
    """Print Python's user warnings as `warning: ...`, once each, without the line of code that they come from.

    Processes other than the `first` print only warnings that differ between processes.
    """
    said, as_python = set(), warnings.showwarning

    def show(message: Any, category: type[Warning], *place: Any, **options: Any) -> None:
        if not first and not issubclass(category, LeftOutWarning):
            return
        if not issubclass(category, UserWarning):
            as_python(message, category, *place, **options)
        elif str(message) not in said:
            said.add(str(message))
            print(f"warning: {message}", file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        for of_pictures in OF_PICTURES:
            warnings.filterwarnings("ignore", of_pictures)
        warnings.showwarning = show
        yield
