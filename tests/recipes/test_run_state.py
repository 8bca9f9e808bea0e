"""Checkpoints: whole or absent, verified, pruned, and refused where they belong elsewhere."""

from __future__ import annotations

import errno
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from common import run_state
from common.config import ConfigError, RunError
from common.progress import DAMAGED, METRICS, read_metrics, restore_metrics
from common.run_state import (
    Position,
    check_settings,
    damage,
    find_checkpoint,
    load_checkpoint,
    open_folder,
    save_checkpoint,
    set_aside_newer,
    tell_changes,
)

from sdt_blocks import create_model


@pytest.fixture
def model():
    return create_model("sdt_2_256", dim=16, depth=1, pooling="0001")


def write(folder, model, step, keep=10, **options):
    given = {"ema": None, "optimizer_state": {"state": {}}, "scaler_state": None, **options}
    return save_checkpoint(folder, Position(step=step), model=model, keep=keep, **given)


def test_what_is_saved_comes_back(tmp_path, model):
    state = {"state": {0: {"exp_avg": torch.rand(3)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]}
    position = Position(step=5, closed=4, loss_sum=1.5, settings={"seed": 3, "data.mean": [0.5]})
    average = create_model("sdt_2_256", dim=16, depth=1, pooling="0001")
    checkpoint = save_checkpoint(
        tmp_path, position, model=model, ema=average, optimizer_state=state, scaler_state={"scale": 2.0}, keep=1
    )
    ours, theirs = (create_model("sdt_2_256", dim=16, depth=1, pooling="0001") for _ in range(2))
    training = load_checkpoint(checkpoint, ours, theirs)
    assert training["position"] == position and training["scaler"] == {"scale": 2.0}
    assert torch.equal(training["optimizer"]["state"][0]["exp_avg"], state["state"][0]["exp_avg"])
    for saved, loaded in ((model, ours), (average, theirs)):
        assert all(
            torch.equal(a, b) for a, b in zip(saved.state_dict().values(), loaded.state_dict().values(), strict=True)
        )


def test_the_newest_good_one_is_found_and_the_damaged_are_named(tmp_path, model, capsys):
    paths = [write(tmp_path, model, step) for step in (10, 20, 30)]
    assert find_checkpoint(tmp_path, "auto") == paths[2]
    (paths[2] / "manifest.json").write_text("{")
    (paths[1] / "config.json").unlink()
    assert find_checkpoint(tmp_path, "auto") == paths[0]
    warnings = capsys.readouterr().err
    assert "step_00000030 is damaged and skipped: manifest.json cannot be read" in warnings
    assert "step_00000020 is damaged and skipped: config.json is missing" in warnings
    assert find_checkpoint(tmp_path, "none") is None
    assert find_checkpoint(tmp_path, str(paths[0])) == paths[0]
    with pytest.raises(ConfigError, match=r"not a good checkpoint of a run: config\.json is missing"):
        find_checkpoint(tmp_path, str(paths[1]))
    (paths[0] / "training.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"every checkpoint in .* is damaged; set resume=none"):
        find_checkpoint(tmp_path, "auto")


def test_an_abandoned_checkpoint_never_counts_as_the_newest(tmp_path, model):
    for step in (10, 20, 30):
        write(tmp_path, model, step)
    set_aside_newer(tmp_path, 10)
    write(tmp_path, model, 15, keep=1)
    assert find_checkpoint(tmp_path, "auto").name == "step_00000015"
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"step_00000015", "set_aside_step_00000020", "set_aside_step_00000030"}
    write(tmp_path, model, 20)
    set_aside_newer(tmp_path, 15)
    assert (tmp_path / "checkpoints" / "set_aside_step_00000020_2").is_dir(), "nothing set aside is overwritten"


@pytest.mark.parametrize("failing", ["save_model", "torch.save", "_write_manifest"])
def test_a_write_that_fails_leaves_everything_as_it_was(tmp_path, model, monkeypatch, failing):
    write(tmp_path, model, 10)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    owner, name = (torch, "save") if failing == "torch.save" else (run_state, failing)
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(
        RunError, match=r"step 20 cannot be written .*No space left.*last good checkpoint is .*00000010"
    ):
        write(tmp_path, model, 20)
    (left,) = (tmp_path / "checkpoints").iterdir()
    assert left.name == "step_00000010" and damage(left) == ""


def test_the_same_step_is_replaced_whole(tmp_path, model):
    write(tmp_path, model, 10)
    with torch.no_grad():
        model.head.bias.fill_(3.0)
    checkpoint = write(tmp_path, model, 10)
    assert damage(checkpoint) == "" and [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]
    other = create_model("sdt_2_256", dim=16, depth=1, pooling="0001")
    load_checkpoint(checkpoint, other, None)
    assert other.head.bias.eq(3.0).all()


def test_a_pickle_in_a_checkpoint_runs_nothing(tmp_path, model):
    class Trap:
        def __reduce__(self):
            return (shutil.rmtree, (str(tmp_path / "precious"),))

    (tmp_path / "precious").mkdir()
    checkpoint = write(tmp_path, model, 10)
    (checkpoint / "training.pt").write_bytes(pickle.dumps(Trap(), protocol=2))
    with pytest.raises(ConfigError, match="cannot resume from"):
        load_checkpoint(checkpoint, model, None)
    assert (tmp_path / "precious").is_dir()


def test_what_a_run_may_change_and_what_not(tmp_path):
    position = Position(total_batch=32, samples=100, settings={"seed": 1, "optim.lr": 0.1})
    same = {"total_batch": 32, "samples": 100, "source": tmp_path}
    assert check_settings(position, {"seed": 1, "optim.lr": 0.1}, **same) is None
    with pytest.raises(ConfigError) as caught:
        check_settings(position, {"seed": 2, "optim.lr": 0.1}, **{**same, "total_batch": 64, "samples": 99})
    for part in ("seed is 2 and was 1", "is 64 and was 32", "has 99 samples and had 100", "resume=none"):
        assert part in str(caught.value)
    labeled = Position(total_batch=32, samples=100, labels="a")
    check_settings(labeled, {}, **same, labels="a")
    with pytest.raises(ConfigError, match="of other classes, or in another order"):
        check_settings(labeled, {}, **same, labels="b")


def test_a_finished_run_is_not_overwritten_unasked(tmp_path, model):
    write(tmp_path, model, 10)
    (tmp_path / "summary.json").write_text("{}")
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ConfigError, match="holds a finished run without checkpoints"):
        open_folder(tmp_path, "auto", needed=0)
    assert (tmp_path / "summary.json").exists()
    assert open_folder(tmp_path, "none", needed=0) is None
    assert not (tmp_path / "summary.json").exists()


def test_leftovers_of_an_interrupted_write_go(tmp_path, model):
    write(tmp_path, model, 10)
    (tmp_path / "checkpoints" / ".writing_x").mkdir()
    (tmp_path / "checkpoints" / ".writing_x" / "model.safetensors").write_bytes(b"half")
    assert open_folder(tmp_path, "auto", needed=0).name == "step_00000010"
    assert not (tmp_path / "checkpoints" / ".writing_x").exists()


@pytest.mark.parametrize("prefix", [".writing_", ".replaced_"])
def test_killed_between_writing_and_renaming_a_checkpoint_is_found(tmp_path, model, prefix):
    write(tmp_path, model, 10)
    newest = write(tmp_path, model, 20)
    newest.rename(newest.with_name(f"{prefix}{newest.name}_abcd1234"))
    assert open_folder(tmp_path, "auto", needed=0) == newest and damage(newest) == ""
    half = newest.rename(newest.with_name(f"{prefix}{newest.name}_abcd1234"))
    (half / "training.pt").write_bytes(b"half")
    assert open_folder(tmp_path, "auto", needed=0).name == "step_00000010"
    assert not half.exists()


@pytest.mark.parametrize("prefix", [".writing_", ".replaced_"])
def test_another_runs_newest_checkpoint_counts_though_half_renamed(tmp_path, model, prefix):
    other, own = tmp_path / "other", tmp_path / "own"
    first, newest = write(other, model, 10), write(other, model, 20)
    half = newest.rename(newest.with_name(f"{prefix}{newest.name}_abcd1234"))
    assert open_folder(own, str(other), needed=0) == half, "nothing is renamed in somebody else's folder"
    load_checkpoint(half, model, None)
    shutil.rmtree(first)
    assert open_folder(own, str(other), needed=0) == half
    (half / "training.pt").write_bytes(b"half")
    with pytest.raises(ConfigError, match="not a good checkpoint of a run"):
        open_folder(own, str(other), needed=0)
    write(other, model, 10)
    assert open_folder(own, str(other), needed=0) == first and half.exists()


def test_between_the_two_renames_of_a_replaced_checkpoint_the_new_one_counts(tmp_path, model, monkeypatch):
    write(tmp_path, model, 10)
    with torch.no_grad():
        model.head.bias.fill_(3.0)
    replace, calls = run_state.os.replace, []

    def killed(source, target):
        if Path(source).is_dir():
            calls.append(target)
            if len(calls) == 2:
                raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(run_state.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, model, 10)
    monkeypatch.undo()
    assert not (tmp_path / "checkpoints" / "step_00000010").exists()
    checkpoint = open_folder(tmp_path, "auto", needed=0)
    other = create_model("sdt_2_256", dim=16, depth=1, pooling="0001")
    load_checkpoint(checkpoint, other, None)
    assert other.head.bias.eq(3.0).all()
    assert [path.name for path in checkpoint.parent.iterdir()] == ["step_00000010"]


def test_temporaries_of_the_kit_go_and_a_users_files_stay(tmp_path, model):
    write(tmp_path, model, 10)
    (tmp_path / "best").mkdir()
    ours = [tmp_path / "best" / ".model.safetensors.abcd_123", tmp_path / ".summary.json.abcd1234"]
    theirs = [tmp_path / ".notes.json.abcd1234", tmp_path / ".summary.json.backup", tmp_path / "best" / ".hidden"]
    for path in (*ours, *theirs):
        path.write_bytes(b"x")
    open_folder(tmp_path, "auto", needed=0)
    assert not any(path.exists() for path in ours) and all(path.exists() for path in theirs)


def test_only_the_runs_own_step_folders_are_removed(tmp_path, model):
    parent = tmp_path / "checkpoints"
    write(tmp_path, model, 5)
    stay = ["step_00000005_backup", "step_00000001", "step_00000002", "step_00000003"]
    for name in stay[:2]:
        shutil.copytree(parent / "step_00000005", parent / name)
    (parent / "step_00000002").mkdir()
    save_checkpoint(tmp_path / "other", Position(step=3, run="other"), model=model, ema=None, optimizer_state={},
                    scaler_state=None, keep=9)  # fmt: skip
    shutil.copytree(tmp_path / "other" / "checkpoints" / "step_00000003", parent / "step_00000003")
    for step in (6, 7, 8):
        save_checkpoint(tmp_path, Position(step=step, run="this"), model=model, ema=None, optimizer_state={},
                        scaler_state=None, keep=2)  # fmt: skip
    names = {path.name for path in parent.iterdir()}
    assert {*stay, "step_00000007", "step_00000008"} <= names and "step_00000006" not in names
    assert open_folder(tmp_path, "none", needed=0) is None
    names = {path.name for path in parent.iterdir()}
    assert {"step_00000005_backup", "step_00000001", "step_00000002"} <= names
    assert not {"step_00000007", "step_00000008"} & names


def test_a_users_folder_where_a_checkpoint_belongs_is_set_aside(tmp_path, model, capsys):
    mine = tmp_path / "checkpoints" / "step_00000010"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("mine")
    assert damage(write(tmp_path, model, 10)) == ""
    assert (mine.with_name("set_aside_step_00000010") / "notes.txt").read_text() == "mine"
    assert "set aside" in capsys.readouterr().err


def test_longer_training_and_another_division_are_said(tmp_path, capsys):
    position = Position(settings={"train.epochs": 5}, division={"processes": 1, "train.batch_size": 32})
    same = {"total_batch": 0, "samples": 0, "source": tmp_path}
    longer, shorter = {"train.epochs": 7}, {"train.epochs": 4}
    check_settings(position, longer, **same)
    with pytest.raises(ConfigError, match=r"train\.epochs is 4 and was 5"):
        check_settings(position, shorter, **same)
    tell_changes(position, position.settings, position.division)
    assert capsys.readouterr().err == ""
    tell_changes(position, longer, {"processes": 2, "train.batch_size": 16})
    said = capsys.readouterr().err
    assert "train.epochs is 7 and was 5" in said
    assert "processes is 2 and was 1, train.batch_size is 16 and was 32" in said and "weights will differ" in said


def test_another_evaluation_is_said(tmp_path, capsys):
    position = Position(settings={}, evaluation={"data.test_samples": None, "data.crop_pct": 1.0})
    tell_changes(position, {}, {}, dict(position.evaluation))
    assert capsys.readouterr().err == ""
    tell_changes(position, {}, {}, {"data.test_samples": 50, "data.crop_pct": 1.0})
    assert "measured otherwise than before (data.test_samples is 50 and was None)" in capsys.readouterr().err


def line(epoch, **values):
    return {"epoch": epoch, "step": 4 * epoch, "train_loss": 1.0 / epoch, "test_top1": 10.0 * epoch, **values}


DAMAGE = [
    b"[1]", b"3", b"null", b"true", b'"text"', b"{}", b"\xff\xfe\x00", b'{"epoch": 1, "st', b"[" * 100000, b"1" * 5000,
    b'{"epoch": 1, "stap": 4}', b'{"epoch": 1, "step": true}', b'{"epoch": 1, "step": "4"}',
    b'{"epoch": 1, "step": 4, "train_loss": NaN}', b'{"epoch": 1, "step": 4, "train_loss": "low"}',
]  # fmt: skip


@pytest.mark.parametrize("damaged", DAMAGE, ids=lambda raw: raw[:20].decode("latin-1"))
@pytest.mark.parametrize("instead", [True, False])
def test_a_damaged_line_of_metrics_is_set_aside_and_restored(tmp_path, capsys, damaged, instead):
    lines = [line(1), line(2)]
    raw = [json.dumps(one).encode() for one in [*lines, line(3)]]
    (tmp_path / METRICS).write_bytes(b"\n".join([damaged, *raw[instead:]]))
    restore_metrics(tmp_path, lines, 8)
    said = capsys.readouterr().err
    assert read_metrics(tmp_path) == lines
    assert damaged in (tmp_path / DAMAGED).read_bytes() and "1 damaged line(s)" in said
    assert ("epoch 1 are restored" in said) == instead


def test_lines_that_stand_twice_or_were_changed_are_set_aside(tmp_path, capsys):
    lines = [line(1), line(2)]
    written = [line(1), line(1), line(2, test_top1=99.0)]
    (tmp_path / METRICS).write_text("".join(json.dumps(one) + "\n" for one in written))
    restore_metrics(tmp_path, lines, 8)
    assert read_metrics(tmp_path) == lines
    assert [json.loads(raw) for raw in (tmp_path / DAMAGED).read_text().splitlines()] == written[1:]
    assert "2 damaged line(s)" in capsys.readouterr().err
    (tmp_path / METRICS).unlink()
    restore_metrics(tmp_path, lines, 8)
    assert read_metrics(tmp_path) == lines


def test_another_runs_checkpoint_does_not_go_on_in_this_ones_folder(tmp_path, model):
    write(tmp_path / "this", model, 10)
    other = write(tmp_path / "other", model, 10)
    with pytest.raises(ConfigError, match="is of another run than the one in output_dir"):
        open_folder(tmp_path / "this", str(other), needed=0)
    assert open_folder(tmp_path / "new", str(other), needed=0) == other
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished" / "summary.json").write_text("{}")
    with pytest.raises(ConfigError, match="is of another run than the one in output_dir"):
        open_folder(tmp_path / "finished", str(other), needed=0)
