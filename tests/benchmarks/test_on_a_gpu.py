"""What a run on a GPU does first, and that every line of its suites runs: at small sizes, here on a CPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def run(monkeypatch):
    """run.py as a module, on a machine that says it has a GPU; the commands that it starts, none of which runs."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import run

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    commands, codes = [], {}
    start = lambda command, **_: commands.append(command) or next((c for w, c in codes.items() if w in command), 0)  # noqa: E731
    monkeypatch.setattr(run.subprocess, "call", start)
    monkeypatch.setattr(run.subprocess, "check_call", start)
    run.commands, run.codes = commands, codes
    yield run
    for name in ("run", "harness"):
        sys.modules.pop(name, None)


def started(run, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    return run.main()


def test_the_ops_are_tested_before_a_figure_is_taken(run, monkeypatch, capsys):
    assert started(run, monkeypatch, "--device", "cuda", "neuron", "events") == 0
    first, second = run.commands
    assert "pytest" in first and "cuda and not slow" in first
    assert "neuron" in second and "cuda" in second
    assert "events: not for cuda" in capsys.readouterr().out
    run.commands.clear()
    run.codes["pytest"] = 1
    assert started(run, monkeypatch, "--device", "cuda", "neuron") == 1
    assert len(run.commands) == 1 and "no figure is taken" in capsys.readouterr().err
    assert started(run, monkeypatch, "--device", "cuda", "--no-gates", "neuron") == 0


def test_what_is_missing_comes_from_files(run, monkeypatch, tmp_path):
    assert started(run, monkeypatch, "--wheels", str(tmp_path), "--trial", "neuron") == 0
    install, suite = run.commands
    assert "--no-index" in install and str(tmp_path) in install and "--trial" in suite
    with pytest.raises(SystemExit, match="no such folder"):
        started(run, monkeypatch, "--wheels", str(tmp_path / "none"), "neuron")


def test_sizes_are_those_of_the_device(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from harness import Bench

    sizes = {"cpu": 1, "cuda": 2, "trial": 3}
    assert Bench("s").pick(**sizes) == 1
    assert Bench("s", torch.device("cuda")).pick(**sizes) == 2
    assert Bench("s", torch.device("cuda"), size="trial").pick(**sizes) == 3


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["neuron", "block", "training", "inference", "two_processes"])
def test_every_line_runs(suite):
    command = [sys.executable, str(FOLDER / "run.py"), "--trial", suite]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "sdt_blocks" in done.stdout and "NOT TIMED" not in done.stdout


@pytest.mark.slow
def test_short_trainings_end_with_an_accuracy(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    from harness import Bench
    from short_trainings import run

    bench = Bench("short_trainings", size="trial")
    run(bench)
    assert not bench.failures and all(0 < float(r["median"]) <= 100 for r in bench.rows if r["unit"] == "%")
