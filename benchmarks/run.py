"""Runs benchmark suites, each in a process of its own: `python benchmarks/run.py [--device cuda] [suite ...]`.

A suite is a file in this folder with a function `run(bench)` (see harness.Bench); a list `ALLOCATORS` in it names the
allocator settings it is run under, a list `DEVICES` the devices it is for. Rows go to
results/SUITE-DEVICE-ALLOCATOR.csv; `benchmarks/report.py` plots them.

On a GPU the tests of the ops run first: if one fails, nothing is measured, or with `--despite` every row says so. For a
GPU that is rented by the minute (see CONTRIBUTING.md): `--trial` runs every line at small sizes and keeps no row;
`--wheels FOLDER` installs missing packages from files, without a network; with `--minutes` a suite gets at most half of
the remaining time, and keeps the rows it has by then; everything that is printed, tracebacks included, is also written
to `--results FOLDER` next to the rows.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.metadata
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TextIO

HERE = Path(__file__).parent
FIRST = ["neuron", "training", "inference", "block", "two_processes", "short_trainings"]
"""The tests that run first on a GPU."""
GATES = "the tests of the ops"
LEAST = 10.0
"""Remaining seconds below which no suite is started."""
WORKERS = 12
"""Processes of the tests on a GPU, which spend most of the time building some thousand kernels."""


class Log:
    """The output of this process and those it starts, and a file that gets all of it."""

    def __init__(self, file: TextIO | None) -> None:
        self.file = file

    def say(self, text: str) -> None:
        print(text, flush=True)
        if self.file is not None:
            print(text, file=self.file, flush=True)

    def call(
        self, command: Sequence[str], seconds: float, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> int:
        """The exit code of a command; negative if it took longer, and was ended with all that it had started."""
        ended = []

        def end() -> None:
            ended.append(True)
            os.killpg(process.pid, signal.SIGKILL)

        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "preexec_fn": os.setpgrp}
        with subprocess.Popen(command, env=env, cwd=cwd, bufsize=1, errors="replace", **pipes) as process:
            timer = threading.Timer(seconds, end)
            timer.daemon = True
            if seconds < threading.TIMEOUT_MAX:
                timer.start()
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    self.say(line.rstrip("\n"))
            except KeyboardInterrupt:
                end()
                raise
        timer.cancel()
        if ended:
            self.say(f"  ended after {seconds:.0f} s: there is no more time for it")
        return process.returncode


def find_suites() -> dict[str, str]:
    """Suite name -> first line of its docstring, for every file here that defines `run(bench)`."""
    suites = {}
    for path in sorted(HERE.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body):
            suites[path.stem] = (ast.get_docstring(tree) or path.stem).splitlines()[0]
    return suites


def declared(name: str, what: str, default: list[str]) -> list[str]:
    """A list in a suite's file, which is read, not imported: packages that it imports may be missing here."""
    for node in ast.parse((HERE / f"{name}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == what for to in node.targets):
            found: list[str] = ast.literal_eval(node.value)
            return found
    return default


def load_suite(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_suite(arguments: argparse.Namespace, name: str) -> int:
    """Run one suite in this process; returns the number of contestants whose answers were wrong."""
    import torch
    from harness import RESULTS, Bench

    device = torch.device(arguments.device)
    torch.manual_seed(0)
    path = Path(arguments.results or RESULTS) / f"{name}-{device.type}-{arguments.allocator}.csv"
    bench = Bench(
        name,
        device,
        arguments.allocator,
        arguments.seconds,
        frozenset(arguments.with_),
        size="trial" if arguments.trial else "",
        path=None if arguments.trial else path,
        doubt=f"{GATES} FAILED; " if arguments.doubt else "",
    )
    load_suite(name).run(bench)
    bench.finish()
    for failure in bench.failures:
        print(f"FAILED {failure}", file=sys.stderr)
    return len(bench.failures)


def gates(log: Log, seconds: float) -> int:
    """The exit code of the tests for a GPU: parity of every kernel before any of its times."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "-m", "cuda and not slow"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(WORKERS, os.cpu_count() or 1))]
    return log.call([*command, str(HERE.parent / "tests")], seconds, cwd=HERE.parent)


def install(folder: Path) -> None:
    """Install those packages of a folder that are missing here, and this package."""
    if not folder.is_dir():
        raise SystemExit(f"--wheels {folder}: no such folder; `pip download -d {folder} PACKAGES` makes one elsewhere")
    # Without dependency resolution: a package's requirements must not change what is installed, above all torch.
    missing = [str(path) for path in sorted(folder.glob("*.whl")) if not is_installed(path.name.split("-")[0])]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    if missing:
        subprocess.check_call([*pip, *missing])
    subprocess.check_call([*pip, "--no-build-isolation", "-e", str(HERE.parent)])


def is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def main() -> int:
    start, suites = time.perf_counter(), find_suites()
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="suites: " + "; ".join(f"{name} ({title})" for name, title in suites.items()),
    )
    parser.add_argument("suite", nargs="*", help="default: all of them")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seconds", type=float, default=8.0, help="time for one figure, after the warm-up")
    parser.add_argument("--allocator", help="one allocator setting (default: those that a suite asks for)")
    parser.add_argument(
        "--with",
        dest="with_",
        action="append",
        default=[],
        metavar="PEER",
        help="what takes minutes and is left out by default: compiled, spikingjelly-compiled, memopt (SpikingJelly's "
        "levels from the second on); a target of gpu-offline, as sm_80",
    )
    parser.add_argument("--trial", action="store_true", help="small sizes, no row kept: whether everything runs")
    parser.add_argument("--no-gates", action="store_true", help="on a GPU: without the tests of the ops before")
    parser.add_argument("--wheels", metavar="FOLDER", help="install what is missing from these files")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="for all of it; what comes late is left out"
    )
    parser.add_argument("--results", metavar="FOLDER", help="where rows and run.log go (default: results, and no log)")
    parser.add_argument("--despite", action="store_true", help="measure where tests of the ops fail, too")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--doubt", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.wheels and not arguments.here:
        install(Path(arguments.wheels))
    arguments.suite = [name.replace("-", "_") for name in arguments.suite]
    unknown = [name for name in arguments.suite if name not in suites]
    if unknown:
        parser.error(f"unknown suite {', '.join(unknown)}; choose from {', '.join(suites)}")
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: no CUDA device can be used here")
    if arguments.here:
        return 1 if run_suite(arguments, arguments.suite[0]) else 0

    from harness import ALLOCATORS

    if arguments.allocator is not None and arguments.allocator not in ALLOCATORS:
        parser.error(f"unknown allocator setting {arguments.allocator}; choose from {', '.join(ALLOCATORS)}")
    with contextlib.ExitStack() as stack:
        file = None
        if arguments.results:
            folder = Path(arguments.results)
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((folder / "run.log").open("a", encoding="utf-8"))
        return run_all(arguments, suites, Log(file), start)


def run_all(arguments: argparse.Namespace, suites: dict[str, str], log: Log, start: float) -> int:
    """Run the tests, then suite after suite, in the minutes since `start`; 1 if something failed."""
    from harness import ALLOCATORS

    failed = []

    def left() -> float:
        return 60 * arguments.minutes - (time.perf_counter() - start)

    if arguments.device == "cuda" and not arguments.no_gates:
        log.say(f"{GATES} [{told(left() / 2)}]")
        if gates(log, left() / 2):
            failed.append(GATES)
            if not arguments.despite:
                log.say(f"{GATES} fail on this GPU: no figure is taken")
                return 1
            log.say(f"{GATES} fail on this GPU: what follows is not to be trusted")
        log.say(f"  {time.perf_counter() - start:.0f} s")
    for name in arguments.suite or [*FIRST, *(name for name in suites if name not in FIRST)]:
        wanted = declared(name, "ALLOCATORS", ["reused"])
        if arguments.device not in declared(name, "DEVICES", ["cpu", "cuda"]):
            log.say(f"{name}: not for {arguments.device}")
            continue
        if arguments.device == "cuda" or arguments.trial:
            wanted = ["default"]
        for allocator in [arguments.allocator] if arguments.allocator else wanted:
            seconds, began = left() / 2, time.perf_counter()
            if seconds < LEAST:
                log.say(f"{name}: no time is left for it")
                failed.append(f"{name} ({allocator})")
                continue
            log.say(f"{name}: {suites[name]} [{arguments.device}, allocator: {allocator}, {told(seconds)}]")
            command = [sys.executable, "-u", __file__, name, "--here", "--device", arguments.device]
            command += ["--allocator", allocator, "--seconds", str(0.0 if arguments.trial else arguments.seconds)]
            command += [*(f"--with={peer}" for peer in arguments.with_), *(["--trial"] if arguments.trial else [])]
            command += [f"--results={arguments.results}"] if arguments.results else []
            command += ["--doubt"] if GATES in failed else []
            if log.call(command, seconds, {**os.environ, **ALLOCATORS[allocator]}):
                failed.append(f"{name} ({allocator})")
            log.say(f"  {time.perf_counter() - began:.0f} s")
    if failed:
        log.say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def told(seconds: float) -> str:
    return f"at most {seconds:.0f} s" if seconds < float("inf") else "as long as it takes"


if __name__ == "__main__":
    sys.exit(main())
