"""What a run on a GPU does first, and that every line of its suites runs: at small sizes, here on a CPU."""

import re
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
    start = lambda command: commands.append(command) or next((c for w, c in codes.items() if w in command), 0)  # noqa: E731
    monkeypatch.setattr(run.Log, "call", lambda self, command, seconds, env=None, cwd=None: start(command))
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
    assert len(run.commands) == 1 and "no figure is taken" in capsys.readouterr().out
    assert started(run, monkeypatch, "--device", "cuda", "--no-gates", "neuron") == 0
    assert started(run, monkeypatch, "--device", "cuda", "--despite", "neuron") == 1
    assert "--doubt" in run.commands[-1] and "--doubt" not in run.commands[-3]


def test_what_weighs_most_comes_first_and_what_fails_stops_no_other(run, monkeypatch, capsys):
    run.codes["training"] = 1
    assert started(run, monkeypatch, "--device", "cuda", "--no-gates") == 1
    asked = [command[3] for command in run.commands]
    assert asked[: len(run.FIRST)] == run.FIRST and len(asked) > len(run.FIRST)
    assert "failed: training (default)" in capsys.readouterr().out


def test_what_a_suite_imports_may_be_missing(run, monkeypatch):
    monkeypatch.setattr(run, "load_suite", None)
    assert run.declared("events", "DEVICES", []) == ["cpu"] and run.declared("v2", "DEVICES", ["x"]) == ["x"]
    assert started(run, monkeypatch, "--device", "cuda", "--no-gates", "events", "block") == 0
    assert len(run.commands) == 1


def test_time_is_shared_out(run, monkeypatch, capsys, tmp_path):
    options = ("--results", str(tmp_path), "--minutes", "1", "neuron", "block")
    assert started(run, monkeypatch, "--device", "cuda", "--no-gates", *options) == 0
    printed = capsys.readouterr().out
    half = int(re.search(r"allocator: default, at most (\d+) s", printed)[1])
    assert 0 < half <= 30 and (tmp_path / "run.log").read_text() == printed
    assert all(f"--results={tmp_path}" in command for command in run.commands)
    assert started(run, monkeypatch, "--minutes", "0.1", "neuron") == 1
    assert len(run.commands) == 2 and "neuron: no time is left for it" in capsys.readouterr().out


def test_a_command_is_ended_with_all_that_it_started(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    import run

    with (tmp_path / "log").open("w") as file:
        log = run.Log(file)
        assert log.call([sys.executable, "-c", "print(1 / 0)"], 60.0) == 1
        assert log.call(["sh", "-c", "echo begun; sleep 50 & sleep 50"], 0.5) < 0
    printed = capsys.readouterr().out
    assert "ZeroDivisionError" in printed and "begun" in printed and "ended after" in printed
    assert (tmp_path / "log").read_text() == printed
    sys.modules.pop("run")


def test_what_a_cut_suite_has_found_is_kept(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    from harness import Bench, read_rows

    def broken():
        raise RuntimeError("no kernel image")

    bench = Bench("s", path=tmp_path / "s.csv", seconds=0.0, doubt="no gate; ")
    calls = {"theirs": broken, "ours": lambda: None, "wrong": lambda: None}
    bench.race("f", "x", calls, baseline="theirs", parity={"wrong": broken}, rounds=3)
    rows = {row["contestant"]: row for row in read_rows(tmp_path / "s.part.csv")}
    assert rows["ours"]["median"] and not rows["ours"]["ratio"] and rows["ours"]["parity"] == "no gate; not checked"
    assert "no kernel image" in rows["theirs"]["parity"] and not rows["wrong"]["median"]
    assert len(bench.failures) == 2 and "Traceback" in capsys.readouterr().out
    bench.finish()
    assert len(read_rows(tmp_path / "s.csv")) == 3 and not (tmp_path / "s.part.csv").exists()
    with pytest.raises(ValueError, match="is not among the contestants"):
        bench.race("f", "x", calls, baseline="other")


def test_what_is_missing_comes_from_files(run, monkeypatch, tmp_path):
    for name in ("pytest-8.0-py3-none-any.whl", "of_another_machine-1.0-py3-none-any.whl"):
        (tmp_path / name).touch()
    assert started(run, monkeypatch, "--wheels", str(tmp_path), "--trial", "neuron") == 0
    files, kit, suite = run.commands
    assert "--no-index" in files and files[-1].endswith("of_another_machine-1.0-py3-none-any.whl")
    assert not any("pytest-8" in part for part in files) and kit[-2:] == ["-e", str(FOLDER.parent)]
    assert "--trial" in suite
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
