"""`best/` is the model whose accuracy the run calls its best, wherever and from wherever it goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from common.best import BEST, restore_best
from common.run_state import Position, load_checkpoint, save_checkpoint, sha256
from launching import TINY, read_summary

from sdt_blocks import create_model, load_model, save_model

WEIGHTS = "model.safetensors"


def model_of(number: int):
    torch.manual_seed(0)
    model = create_model("sdt_2_256", dim=16, depth=1, pooling="0001")
    model.head.weight.data.fill_(number)
    return model


def write_run(folder: Path, best: int, keep: int) -> list[Path]:
    """A run whose model of epoch N has N in its head; the positions know `best` from that epoch on."""
    paths, position = [], Position()
    for epoch in (1, 2, 3):
        line = {"epoch": epoch, "step": epoch, "test_top1": 10.0 * epoch, "firing_rate": 0.1}
        position.step = position.closed = epoch
        position.lines.append(line)
        if epoch <= best:
            save_model(model_of(epoch), folder / BEST)
            position.best_top1, position.best_epoch, position.best_silent = 10.0 * epoch, epoch, False
            position.best_sha256 = sha256(folder / BEST / WEIGHTS)
        state = {"optimizer_state": {}, "scaler_state": None}
        paths.append(save_checkpoint(folder, position, model=model_of(epoch), ema=model_of(-epoch), keep=keep, **state))
    return paths


def position_of(checkpoint: Path) -> Position:
    return load_checkpoint(checkpoint, model_of(0), model_of(0))["position"]


def head_of(place: Path) -> float:
    return load_model(place).head.weight[0, 0].item()


@pytest.mark.parametrize(("back_to", "best", "expected"), [(1, 3, 1), (2, 1, 1), (3, 2, 2)])
def test_a_run_that_goes_back_has_the_best_of_then(tmp_path, capsys, back_to, best, expected):
    paths = write_run(tmp_path, best=best, keep=3)
    position = position_of(paths[back_to - 1])
    restore_best(tmp_path, paths[back_to - 1], position)
    assert head_of(tmp_path / BEST) == position.best_epoch == expected
    assert position.best_sha256 == sha256(tmp_path / BEST / WEIGHTS) and "best" not in capsys.readouterr().err


def test_a_run_that_goes_on_elsewhere_takes_its_best_along(tmp_path):
    paths = write_run(tmp_path / "a", best=1, keep=1)
    restore_best(tmp_path / "b", paths[2], position := position_of(paths[2]))
    assert head_of(tmp_path / "b" / BEST) == position.best_epoch == 1


def test_averaged_weights_may_be_the_best(tmp_path):
    paths = write_run(tmp_path, best=3, keep=3)
    position = position_of(paths[1])
    position.best_sha256 = sha256(paths[0] / "ema" / WEIGHTS)
    restore_best(tmp_path, paths[1], position)
    assert head_of(tmp_path / BEST) == -1


def test_a_best_model_that_is_gone_is_said_and_replaced(tmp_path, capsys):
    paths = write_run(tmp_path / "a", best=1, keep=1)
    shutil.rmtree(tmp_path / "a" / BEST)
    position = position_of(paths[2])
    restore_best(tmp_path / "b", paths[2], position)
    assert "epoch 1, top-1 10.00 %) is no longer there" in capsys.readouterr().err
    assert head_of(tmp_path / "b" / BEST) == position.best_epoch == 3 and position.best_top1 == 30


def test_between_two_evaluations_nothing_stands_for_a_best_model_that_is_gone(tmp_path, capsys):
    paths = write_run(tmp_path / "a", best=1, keep=1)
    shutil.rmtree(tmp_path / "a" / BEST)
    position = position_of(paths[2])
    position.step += 1
    restore_best(tmp_path / "b", paths[2], position)
    assert position.best_epoch == 0 and position.best_top1 < 0 and not (tmp_path / "b" / BEST).exists()
    assert "chosen among the epochs from here on" in capsys.readouterr().err


def test_the_summary_of_a_fork_speaks_of_the_model_in_its_best(train, tmp_path):
    train(*TINY, "output_dir=whole", "train.keep_checkpoints=9")
    fork = sorted((tmp_path / "whole" / "checkpoints").iterdir())[1]
    step = int(fork.name[-8:])
    train(*TINY, "output_dir=fork", f"resume={fork}", f"train.max_steps={step}")
    summary = read_summary(tmp_path / "fork")
    known = torch.load(fork / "training.pt", weights_only=True)["position"]
    assert summary["best_epoch"] == known["best_epoch"] and summary["best_top1"] == known["best_top1"]
    assert sha256(tmp_path / "fork" / BEST / WEIGHTS) == known["best_sha256"]
