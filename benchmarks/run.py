"""Runs benchmark suites, each in a process of its own: `python benchmarks/run.py [--device cuda] [suite ...]`.

A suite is a file beside this one with a function `run(bench)` (see harness.Bench); an `ALLOCATORS` list in it names the
allocator settings it is run under, a `DEVICES` list the devices it has something to say about. Rows go to
results/SUITE-DEVICE-ALLOCATOR.csv; `benchmarks/report.py` plots them.

On a GPU the tests of the ops come first: while one fails, no figure is taken. `--trial` runs every line at small sizes
and keeps no row: for a GPU that is lent for minutes, first on a CPU and then there. `--wheels FOLDER` installs what is
missing from files that were brought along (`pip download -d FOLDER ...`); no network is asked.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent


def find_suites() -> dict[str, str]:
    """Suite name -> first line of its docstring, for every file here that defines `run(bench)`."""
    suites = {}
    for path in sorted(HERE.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "run" for node in tree.body):
            suites[path.stem] = (ast.get_docstring(tree) or path.stem).splitlines()[0]
    return suites


def load_suite(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_suite(arguments: argparse.Namespace, name: str) -> int:
    """Runs one suite in this process; returns the number of contestants whose answers were wrong."""
    import torch
    from harness import RESULTS, Bench, write_rows

    device = torch.device(arguments.device)
    torch.manual_seed(0)
    size = "trial" if arguments.trial else ""
    bench = Bench(name, device, arguments.allocator, arguments.seconds, frozenset(arguments.with_), size)
    load_suite(name).run(bench)
    if bench.rows and not arguments.trial:
        write_rows(bench.rows, RESULTS / f"{name}-{device.type}-{arguments.allocator}.csv")
    for failure in bench.failures:
        print(f"WRONG ANSWER {failure}", file=sys.stderr)
    return len(bench.failures)


def gates() -> int:
    """The exit code of the tests that a GPU runs: parity of every kernel before any of its times."""
    folder = HERE.parent
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "cuda and not slow", str(folder / "tests")]
    return subprocess.call(command, cwd=folder)


def install(folder: Path) -> None:
    """Installs the kit and from files what it and its recipes, tests and peers miss here; what is there stays."""
    if not folder.is_dir():
        raise SystemExit(f"--wheels {folder}: no such folder; `pip download -d {folder} PACKAGES` makes one elsewhere")
    wanted = ["-e", f"{HERE.parent}[recipes]", "pytest", "hypothesis", "spikingjelly"]
    offline = ["--no-index", "--no-build-isolation", "--find-links", str(folder)]
    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", *offline, *wanted])


def main() -> int:
    suites = find_suites()
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
        help="what is left out by default: spikingjelly-compiled, minutes of compiling; a target of gpu-offline, sm_80",
    )
    parser.add_argument("--trial", action="store_true", help="small sizes, no row kept: whether everything runs")
    parser.add_argument("--no-gates", action="store_true", help="on a GPU: without the tests of the ops before")
    parser.add_argument("--wheels", metavar="FOLDER", help="install what is missing from these files")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
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
    if arguments.device == "cuda" and not arguments.no_gates and gates():
        print("the ops' tests fail on this GPU: no figure is taken", file=sys.stderr)
        return 1
    failed = []
    for name in arguments.suite or suites:
        suite = load_suite(name)
        wanted = getattr(suite, "ALLOCATORS", ["reused"])
        if arguments.device not in getattr(suite, "DEVICES", ["cpu", "cuda"]):
            print(f"{name}: not for {arguments.device}", flush=True)
            continue
        if arguments.device == "cuda" or arguments.trial:
            wanted = ["default"]
        for allocator in [arguments.allocator] if arguments.allocator else wanted:
            print(f"{name}: {suites[name]} [{arguments.device}, allocator: {allocator}]", flush=True)
            start = time.perf_counter()
            command = [sys.executable, __file__, name, "--here", "--device", arguments.device, "--allocator", allocator]
            command += ["--seconds", str(0.0 if arguments.trial else arguments.seconds)]
            command += [*(f"--with={peer}" for peer in arguments.with_), *(["--trial"] if arguments.trial else [])]
            code = subprocess.call(command, env={**os.environ, **ALLOCATORS[allocator]})
            print(f"  {time.perf_counter() - start:.0f} s", flush=True)
            if code:
                failed.append(f"{name} ({allocator})")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
