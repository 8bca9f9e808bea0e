"""The command `sdt`: each command is the recipe of that name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def sdt(monkeypatch, capsys):
    """`sdt` in this process, with the scripts that it would run noted instead."""
    import sdt as command

    ran = []
    monkeypatch.setattr(command.runpy, "run_path", lambda path, run_name: ran.append([Path(path).stem, *sys.argv[1:]]))
    monkeypatch.setattr(sys, "argv", ["sdt"])
    monkeypatch.setattr(sys, "path", [*sys.path])

    def go(*arguments):
        ran.clear()
        try:
            command.main(arguments)
        except SystemExit as ended:
            return ended.code, capsys.readouterr().err
        return [*ran], capsys.readouterr().out

    return go


def test_commands_are_recipes(sdt):
    assert sdt("train", "digits", "seed=1")[0] == [["digits", "seed=1"]]
    assert sdt("predict", "checkpoint=x", "a.png")[0] == [["predict", "checkpoint=x", "a.png"]]
    ((name, *arguments),) = sdt("train", "--num_processes", "2", "imagenet", "data.root=D")[0]
    assert name == "launch" and arguments == ["--num_processes", "2", str(RECIPES / "imagenet.py"), "data.root=D"]
    script = str(RECIPES / "evaluate.py")
    assert sdt("evaluate", "--num_processes", "2", "checkpoint=x", "ema=true")[0] == [
        ["launch", "--num_processes", "2", script, "checkpoint=x", "ema=true"]
    ]
    launched = ["launch", "--num_processes=2", "--cpu", str(RECIPES / "energy_table.py")]
    for rest in ([], ["8_512.pth.tar", "data.root=D"]):
        assert sdt("energy_table", "--num_processes=2", "--cpu", *rest)[0] == [[*launched, *rest]]
    assert sdt("energy_table", "8_512.pth.tar", "data.root=D")[0] == [["energy_table", "8_512.pth.tar", "data.root=D"]]
    assert sdt("evaluate", "--cpu", "--help")[0] == [["evaluate", "--cpu", "--help"]]
    import sdt as command

    scripts = {path.stem for path in RECIPES.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    assert {*command.TRAINING, *command.OTHERS} == scripts - {"sdt", "launch"}


def test_configurations_are_listed_and_shown(sdt):
    listed = sdt("configs")[1]
    assert "digits " in listed and "accelerate launch recipes/imagenet.py" in listed
    assert len(listed.splitlines()) == len([*(RECIPES / "configs").glob("*.yaml")])
    assert sdt("configs", "digits")[1] == (RECIPES / "configs/digits.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evalate"], "unknown command 'evalate'; did you mean evaluate"),
        (["train"], "name what to train: digits, imagenet"),
        (["train", "digit"], "'digit' is none; did you mean digits?"),
        (["train", "foo", "digits"], "'foo' is none; known: digits, imagenet"),
        (["train", "--cpu", "digitz"], "events_demo; 'digitz' is none"),
        (["train", "--num_processes", "2"], "cifar10_dvs, events_demo\n"),
        (["configs", "imagenet_8_38"], "no configuration is called 'imagenet_8_38'; did you mean imagenet_8_38"),
    ],
)
def test_what_is_unknown_is_refused(sdt, arguments, words):
    code, said = sdt(*arguments)
    assert code == 2 and words in said


def test_a_missing_package_names_its_extra(sdt, monkeypatch):
    import sdt as command

    for package, extra in {"tonic": "events", "accelerate": "recipes"}.items():

        def missing(*_, package=package, **__):
            raise ModuleNotFoundError(f"No module named {package!r}", name=f"{package}.utils")

        monkeypatch.setattr(command.runpy, "run_path", missing)
        code, said = sdt("train", "digits")
        assert code == 2 and f"needs the package {package}" in said and f"sdt_blocks[{extra}]" in said


def test_a_recipe_runs_by_it():
    command = [sys.executable, str(RECIPES / "sdt.py"), "train", "digits", "--print-config", "seed=7"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "seed: 7" in done.stdout, done.stderr


def test_a_ctrl_c_amid_the_imports_of_a_recipe_is_no_traceback(sdt, monkeypatch):
    import sdt as command

    def interrupted(path, run_name):
        raise KeyboardInterrupt

    monkeypatch.setattr(command.runpy, "run_path", interrupted)
    assert sdt("train", "digits") == sdt("evaluate", "checkpoint=x") == (130, "stopped\n")


def test_what_to_train_is_no_command(sdt):
    assert sdt("digits", "seed=1") == (2, "error: digits is what to train: sdt train digits seed=1\n")


def test_every_command_has_help(sdt):
    for command in ("configs", "train", "help"):
        arguments = [command] if command == "help" else [command, "--help"]
        assert "sdt COMMAND --help" in sdt(*arguments)[1]
