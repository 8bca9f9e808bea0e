"""The recipes as one command, the same scripts as in `accelerate launch recipes/NAME.py`.

    sdt train NAME [key=value ...]             trains: digits, imagenet, cifar, gesture, cifar10_dvs, events_demo
    sdt train --num_processes 4 NAME ...       the same, with the options of accelerate launch, which evaluate,
                                               analyze and energy_table take too
    sdt evaluate checkpoint=PATH ...           accuracy by class
    sdt predict checkpoint=PATH IMAGE...       labels with probabilities
    sdt analyze checkpoint=PATH ...            firing rates, energy, what multiplies, on one page
    sdt export checkpoint=PATH format=onnx     for other runtimes
    sdt compare RUN...                         runs side by side; compare_models, compare_families: models
    sdt energy_table ...                       the energy column of the paper; more commands in recipes/README.md
    sdt configs [NAME]                         the configurations by name, or one of them

`sdt COMMAND --help`, and `sdt train NAME --help`, list the keys.
"""

from __future__ import annotations

import difflib
import runpy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
TRAINING = ("digits", "imagenet", "cifar", "gesture", "cifar10_dvs", "events_demo")
OTHERS = tuple(
    path.stem
    for path in sorted(FOLDER.glob("*.py"))
    if path.stem not in (*TRAINING, "sdt", "launch", "config", "run_state")
)
"""Configurations that train nothing, or more than one model."""
SHARED = ("evaluate", "analyze", "energy_table")
"""Those of the others whose samples processes share: they take the options of accelerate launch, before the keys."""
EXTRAS = {"tonic": "events", "aedat": "events", "datasets": "data", "mlxtend": "data", "webdataset": "data"}
"""The extra that installs each package; packages that are not listed come with `recipes`."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe that the command line names. Exit codes are the recipe's, and 2 for an unknown command."""
    command, *rest = [*(sys.argv[1:] if arguments is None else arguments)] or ["--help"]
    try:
        start(command, rest)
    except KeyboardInterrupt:  # during the imports of a recipe, which reports a Ctrl-C itself later
        print("stopped", file=sys.stderr)
        sys.exit(130)


def start(command: str, rest: Sequence[str]) -> None:
    """Run the recipe that `command` names, or list the commands or configurations."""
    if command in ("-h", "--help", "help"):
        print(__doc__)
    elif command == "configs":
        show_configs(rest)
    elif command == "train":
        train(rest)
    elif command in OTHERS:
        place = end_of_options(rest) if command in SHARED else 0
        run_in_processes(rest[:place], command, rest[place:])
    elif command in TRAINING:
        fail(f"{command} is what to train: sdt train {command} {' '.join(rest)}".rstrip())
    else:
        fail(f"unknown command {command!r}{near(command, ['train', 'configs', *OTHERS])}")


def train(arguments: Sequence[str]) -> None:
    """Run the recipe given by the first name among the arguments; the arguments before it are accelerate's."""
    place = next((i for i, word in enumerate(arguments) if word in TRAINING), None)
    first = arguments[0] if arguments else ""
    if place is None and {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    if first and not first.startswith("-") and first not in TRAINING:
        fail(f"name what to train: {', '.join(TRAINING)}; {first!r} is none{near(first, TRAINING)}")
    if place is None:  # a word behind an option may be the option's
        words = [word for word in arguments if difflib.get_close_matches(word, TRAINING, n=1, cutoff=0.5)]
        fail(f"name what to train: {', '.join(TRAINING)}" + "".join(f"; {word!r} is none" for word in words))
    run_in_processes(arguments[:place], arguments[place], arguments[place + 1 :])


def end_of_options(arguments: Sequence[str]) -> int:
    """How many of the arguments are options of accelerate launch, which come first; its own parser tells."""
    if not arguments or not arguments[0].startswith("-") or {"-h", "--help"} & set(arguments):
        return 0
    with named_if_missing("launch"):
        from accelerate.commands.launch import launch_command_parser
    # It takes the first word that is no option for a script, and all that follow for the script's.
    after = launch_command_parser().parse_args([*arguments, "end"]).training_script_args
    return len(arguments) - len(after)


def run_in_processes(options: Sequence[str], name: str, rest: Sequence[str]) -> None:
    """Run a script of this folder in as many processes as the options of accelerate launch ask for."""
    if options:
        run("launch", [*options, str(FOLDER / f"{name}.py"), *rest])
    else:
        run(name, rest)


def run(name: str, arguments: Sequence[str]) -> None:
    """Run a script of this folder as Python would."""
    path = str(FOLDER / f"{name}.py")
    if sys.path[0] != str(FOLDER):
        sys.path.insert(0, str(FOLDER))
    sys.argv = [path, *arguments]
    with named_if_missing(name):
        runpy.run_path(path, run_name="__main__")


@contextmanager
def named_if_missing(name: str) -> Iterator[None]:
    """A context in which a package that is not installed is named, with the extra that `sdt name` needs."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "common", "sdt_blocks", "sdt_datasets"):
            raise
        extra = EXTRAS.get(package, "recipes")
        fail(f"sdt {name} needs the package {package}, which is not installed: pip install 'sdt_blocks[{extra}]'")


def show_configs(names: Sequence[str]) -> None:
    """List the configurations, each with the command that runs it, or print the named ones."""
    if {"-h", "--help"} & set(names):
        print(__doc__)
        return
    files = {path.stem: path for path in sorted((FOLDER / "configs").glob("*.yaml"))}
    for name in names:
        if name not in files:
            fail(f"no configuration is called {name!r}{near(name, files)}")
        print(files[name].read_text(encoding="utf-8"), end="")
    if not names:
        width = max(map(len, files))
        for name, path in files.items():
            print(f"{name:{width}}  {path.read_text(encoding='utf-8').splitlines()[0].removeprefix('# ')}")


def near(word: str, known: Sequence[str] | dict[str, Path]) -> str:
    """The most similar known words, or all of them."""
    close = difflib.get_close_matches(word, list(known), n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else f"; known: {', '.join(known)}"


def fail(message: str) -> None:
    """End the process as a recipe does that cannot do what it was asked."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
