"""The recipes started as the README says, through Accelerate's launcher."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from common.config import load_config
from launching import QUIET, RECIPES, TINY, read_lines, read_summary, steps_saved, wait_for

from sdt_blocks import load_model, load_released_checkpoint, save_model

ONE = ("--num_processes=1",)
SMALL = (*QUIET, "model.dim=32", "model.depth=1", "data.img_size=64", "train.batch_size=4")


def test_digits_reach_ninety_six_percent_with_the_default_recipe(launcher, tmp_path):
    # One thread: two of them wait for each other at every step where other tests keep the cores busy.
    summary = launcher.train("digits", "output_dir=run", "threads=1", launch=())
    assert summary["test_top1"] >= 96
    assert summary["params"] == sum(p.numel() for p in load_model(tmp_path / "run").parameters())
    assert len(read_lines(tmp_path / "run")) == summary["epochs"] == 15


def test_an_image_folder_trains_and_is_evaluated(launcher, tmp_path, photographs):
    data = f"data.root={photographs}"
    summary = launcher.train("imagenet", data, *SMALL, "train.max_steps=4", "output_dir=run", launch=ONE)
    assert summary["model"] == "sdt_8_384" and summary["steps"] == 4
    config = load_config([f"config={tmp_path / 'run' / 'config.yaml'}"], default="digits")
    assert config.data.auto_augment == "rand-m5-mstd0.5-inc1" and config.optim.name == "lamb"
    assert config.model.num_classes == 2 and not hasattr(config, "derived")
    done = launcher.run("evaluate", "checkpoint=run", "threads=1", launch=ONE)
    assert done.returncode == 0, done.stderr
    assert f"top-1 {summary['test_top1']:.2f} % | loss {summary['loss']:.4f} | 14 images at 64 x 64" in done.stdout


@pytest.fixture
def evaluate_here(capsys, monkeypatch):
    """`evaluate.py` in this process: its output, or its exit code and error."""
    import evaluate
    from accelerate.state import AcceleratorState, GradientState
    from common.command_line import short_errors

    def go(*arguments: str) -> tuple[int, str]:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        code = 0
        try:
            with short_errors():
                evaluate.main([*arguments, "threads=1"])
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return go


def test_a_released_checkpoint_is_evaluated_at_its_size_and_at_288(
    evaluate_here, released_file, tmp_path, photographs, monkeypatch
):
    ten = tmp_path / "ten"
    (ten / "val").mkdir(parents=True)  # a validation part is enough
    for number in range(10):
        shutil.copytree(photographs / "val" / ("china" if number % 2 else "flower"), ten / "val" / str(number))
    arguments = (f"checkpoint={shutil.copy(released_file, tmp_path)}", f"data.root={ten}")
    code, at_64 = evaluate_here(*arguments, "img_size=64")
    assert code == 0 and "70 images at 64 x 64" in at_64
    shape = []
    forward = type(load_released_checkpoint(released_file)).forward
    monkeypatch.setattr(
        type(load_released_checkpoint(released_file)),
        "forward",
        lambda self, x: shape.append(x.shape) or forward(self, x),
    )
    code, at_288 = evaluate_here(*arguments, "img_size=288", "data.test_samples=10", "model.time_steps=1")
    assert code == 0 and "10 images at 288 x 288" in at_288
    assert shape[0][-2:] == (288, 288)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((), "checkpoint=FOLDER of a run or a saved model, or checkpoint=FILE.pth.tar"),
        (("checkpoint=nowhere",), "nowhere: no such file"),
        (("checkpoint={released}", "data.root={photographs}"), "has 10 classes, the data has 2"),
        (("checkpoint={released}",), "needs data.root=DIR"),
        (("checkpoint={released}", "img_size=big"), "img_size: expected a whole number or null, got 'big'"),
        (("checkpoint={released}", "ema=true", "data.root={photographs}"), "has no 'state_dict_ema'"),
        (("checkpoint={saved}", "ema=true"), "holds no averaged weights, which a run keeps with train.ema_decay"),
        (("checkpoint={damaged}", "data.root={photographs}"), "truncated or not a torch file"),
    ],
)
def test_evaluation_refuses_what_cannot_work(evaluate_here, released_file, photographs, tmp_path, arguments, part):
    damaged = tmp_path / "damaged.pth.tar"
    damaged.write_bytes(released_file.read_bytes()[:1000])
    save_model(load_released_checkpoint(released_file), tmp_path / "saved")
    places = {"released": released_file, "photographs": photographs, "damaged": damaged, "saved": tmp_path / "saved"}
    code, output = evaluate_here(*(argument.format(**places) for argument in arguments))
    assert code == 2
    assert part in output and output.count("\n") == 1 and output.startswith("error: ")


@pytest.mark.parametrize(
    ("recipe", "arguments", "part"),
    [
        ("digits", ("optim.lrr=3",), "unknown key 'optim.lrr': did you mean optim.lr?"),
        ("imagenet", (), "data.root=DIR, the folder that holds train/CLASS/IMAGE.jpg and val/CLASS/IMAGE.jpg"),
        ("cifar", ("data.root=nowhere",), "nowhere"),
        ("evaluate", ("checkpoint=run", "optim.lr=3"), "optim.lr is for training, and changes nothing here"),
    ],
)
def test_a_mistake_costs_one_paragraph(launcher, recipe, arguments, part):
    done = launcher.run(recipe, *arguments)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and part in errors[0]
    assert "Traceback" not in done.stderr


DIGITS = str(RECIPES / "digits.py")


@pytest.mark.parametrize("options", [(), ("--num_processes=2", "--cpu"), ("--quiet",)], ids=lambda options: options[:1])
def test_a_mistake_costs_one_paragraph_through_the_launcher_too(launcher, options):
    done = launcher.run("launch", *options, DIGITS, "optim.lrr=3")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: unknown key 'optim.lrr'") and done.stderr.count("\n") == 1


def test_options_that_contradict_each_other_are_refused(launcher):
    done = launcher.run("launch", "--cpu", "--multi_gpu", DIGITS)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "--multi_gpu" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("options", [(), ("--num_processes=2", "--cpu")], ids=["one", "two"])
def test_a_stopped_launcher_ends_with_the_code_of_its_recipe_which_saves(launcher, tmp_path, options):
    run = tmp_path / "run"
    settings = (*TINY, "train.epochs=400", "train.checkpoint_steps=3", "output_dir=run")
    process = launcher.start("launch", *options, DIGITS, *settings)
    wait_for(lambda: max(steps_saved(run), default=0) >= 3, process)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert f"stopped at step {max(steps_saved(run))}" in out
    assert "Traceback" not in err and "default" not in err


def test_a_recipe_that_is_killed_gives_its_code_through_the_launcher(launcher, tmp_path):
    settings = (*TINY, "train.epochs=400", "train.checkpoint_steps=3", "output_dir=run")
    process = launcher.start("launch", DIGITS, *settings)
    wait_for(lambda: steps_saved(tmp_path / "run"), process)
    (recipe,) = launcher.started[-1].children()
    recipe.kill()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 137 and "Traceback" not in err
    assert err.startswith("error: the recipe was ended by SIGKILL, as where memory runs")


def test_help_says_how_to_start_and_names_the_keys(launcher):
    done = launcher.run("imagenet", "--help")
    assert done.returncode == 0
    assert "accelerate launch recipes/imagenet.py data.root=DIR" in done.stdout
    assert "optim.lr=" in done.stdout and "config=imagenet_8_384" in done.stdout


def test_a_terminal_gets_a_bar_and_a_file_gets_lines(launcher, tmp_path):
    import os
    import pty

    master, slave = pty.openpty()
    arguments = (*QUIET, "model.dim=16", "data.train_samples=64", "data.test_samples=10", "train.max_steps=1")
    process = launcher.start("digits", *arguments, "output_dir=run", tty=slave)
    wait_for(lambda: (tmp_path / "run" / "summary.json").exists(), process)
    process.wait(timeout=60)
    os.close(slave)
    shown = b""
    try:
        while block := os.read(master, 65536):
            shown += block
    except OSError:
        pass
    os.close(master)
    assert re.search(rb"epoch 1 \| loss \d\.\d+ \| \d+ images/s", shown)
    assert b"1/1" in shown and b"\x1b[" in shown
    assert read_summary(tmp_path / "run")["steps"] == 1


def test_the_configuration_is_printed_and_read_back(launcher, tmp_path):
    done = launcher.run("digits", "optim.lr=1e-4", "--print-config")
    assert done.returncode == 0, done.stderr
    (tmp_path / "printed.yaml").write_text(done.stdout)
    read = load_config([f"config={tmp_path / 'printed.yaml'}"], default="imagenet_8_384")
    assert read == load_config(["optim.lr=1e-4"], default="digits")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("name", "argument"), [("digits", "--print-config"), ("evaluate", "--help")])
def test_a_reader_that_has_gone_is_no_traceback(tmp_path, name, argument):
    recipe = [sys.executable, str(RECIPES / f"{name}.py"), argument]
    with subprocess.Popen(recipe, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 128 + signal.SIGPIPE
    assert said.splitlines() == ["stopped: the output was closed; the same command continues"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
def test_an_output_without_room_is_an_error_of_one_line(tmp_path):
    recipe = [sys.executable, str(RECIPES / "evaluate.py"), "--help"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(recipe, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["error: the output cannot be written ([Errno 28] No space left on device)"]


def test_several_seeds_give_mean_and_deviation(launcher, tmp_path):
    small = ("model.dim=16", "model.depth=1", "data.train_samples=64", "data.test_samples=20", "train.max_steps=1")
    done = launcher.run("digits", *QUIET, *small, "seeds=0,1", "output_dir=run")
    assert done.returncode == 0, done.stderr
    runs = [read_summary(tmp_path / "run" / f"seed_{seed}") for seed in (0, 1)]
    whole, losses = read_summary(tmp_path / "run"), [run["train_loss"] for run in runs]
    assert whole["seeds"] == [0, 1] and losses[0] != losses[1]
    assert whole["train_loss"] == pytest.approx(sum(losses) / 2)
    assert whole["train_loss_std"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)
    assert "mean and standard deviation of 2 seeds" in done.stdout
    assert "evaluation is silent until the norms have settled" in done.stdout


@pytest.mark.parametrize("argument", ["seeds=", "seeds=1", "seeds=1,1", "seeds=1,x", "seeds=-1,2"])
def test_seeds_that_are_none_are_refused(argument):
    from common.command_line import configs_of
    from common.config import ConfigError

    with pytest.raises(ConfigError, match="seed"):
        configs_of([argument], "digits")


def test_warnings_are_said_once_and_by_the_first_process_unless_each_has_its_own(capsys):
    from common.command_line import short_warnings

    from sdt_datasets.errors import LeftOutWarning

    for first in (True, False):
        with short_warnings(first=first):
            for _ in range(2):
                warnings.warn("no neuron fired", stacklevel=1)
            warnings.warn("no neuron fired", stacklevel=1)
            warnings.warn(f"{first} cannot be read; it is left out", LeftOutWarning, stacklevel=1)
            warnings.warn(
                "Glyph 26085 (\\N{CJK UNIFIED IDEOGRAPH-65E5}) missing from font(s) DejaVu Sans.", stacklevel=1
            )
    lines = ["no neuron fired", "True cannot be read; it is left out", "False cannot be read; it is left out"]
    assert capsys.readouterr().err.splitlines() == [f"warning: {line}" for line in lines]


@pytest.mark.parametrize(("rank", "said"), [("0", "stopped\n"), ("1", "")])
def test_a_ctrl_c_is_one_word_and_a_code(rank, said, monkeypatch, capsys):
    from common.command_line import short_errors

    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(SystemExit) as end, short_errors():
        raise KeyboardInterrupt
    assert end.value.code == 130 and capsys.readouterr().err == said


def test_help_fits_a_terminal_and_keeps_a_line_a_key_elsewhere():
    import evaluate
    from common.command_line import fitted
    from common.config import help_text
    from common.options import own_help

    for text in (evaluate.__doc__, help_text("digits", training=True), own_help(evaluate.Options)):
        assert fitted(text, 0) == text and fitted(text, 1000) == text
        narrow = fitted(text, 80)
        too_long = [line for line in narrow.splitlines() if len(line) > 79]
        assert all(" " not in line.strip() for line in too_long), "words alone are longer"
        assert narrow.split() == text.split() and max(map(len, text.splitlines())) > 80
        keys = [line for line in narrow.splitlines() if re.match(r"  \w[\w.]*=", line)]
        assert len(keys) == len(re.findall(r"^  \w[\w.]*=", text, re.MULTILINE))
