"""Nothing is lost: killed, stopped and damaged runs end like runs that were left alone."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal

import pytest
from common.config import ConfigError, RunError
from launching import TINY, kill_session, read_lines, read_summary, steps_saved, wait_for

EVERY = "train.checkpoint_steps=3"


def digest(folder) -> str:
    return read_summary(folder)["weights_sha256"]


def without_time(lines: list[dict]) -> list[dict]:
    timed = ("seconds", "images_per_second", "data_wait", "peak_memory_mib")
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def test_killed_three_times_a_run_ends_bit_for_bit_like_an_undisturbed_one(launcher, tmp_path):
    whole = launcher.train("digits", *TINY, EVERY, "output_dir=whole")
    killed = tmp_path / "killed"
    # In the midst of the first epoch, of the second, and near the end; where exactly is up to the scheduler.
    for seen in (3, 11, 18):
        process = launcher.start("digits", *TINY, EVERY, "output_dir=killed", launch=("--num_processes=1",))
        wait_for(lambda seen=seen: max(steps_saved(killed), default=0) >= seen, process)
        kill_session(process)
        assert not (killed / "summary.json").exists()
    resumed = launcher.train("digits", *TINY, EVERY, "output_dir=killed")
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    assert resumed["steps"] == whole["steps"] == 24
    for kind in ("last", "ema", "best"):
        weights = [(tmp_path / run / kind / "model.safetensors").read_bytes() for run in ("whole", "killed")]
        assert weights[0] == weights[1], kind
    assert without_time(read_lines(killed)) == without_time(read_lines(tmp_path / "whole"))


def test_a_stop_at_any_step_and_other_loaders_change_nothing(train, tmp_path):
    train(*TINY, "output_dir=whole", "train.max_steps=13")
    train(*TINY, "output_dir=parts", "train.max_steps=5")
    train(*TINY, "output_dir=parts", "train.max_steps=13", "data.workers=1")
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")


def test_a_run_that_went_back_goes_on_from_there(train, tmp_path):
    options = (*TINY, "output_dir=run", "train.keep_checkpoints=9")
    run = tmp_path / "run"
    train(*options)
    whole = digest(run)
    train(*options, "resume=run/checkpoints/step_00000008", "train.max_steps=10")
    assert steps_saved(run) == [line["step"] for line in read_lines(run)] == [8, 10]
    train(*options)
    assert steps_saved(run) == [line["step"] for line in read_lines(run)] == [8, 10, 16, 24]
    assert digest(run) == whole


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_at_the_next_step_and_end_with_the_conventional_code(launcher, tmp_path, number):
    arguments = (*TINY, EVERY, "train.epochs=400", "output_dir=run")
    process = launcher.start("digits", *arguments)
    wait_for(lambda: steps_saved(tmp_path / "run"), process)
    before = max(steps_saved(tmp_path / "run"))
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    last = max(steps_saved(tmp_path / "run"))
    assert last >= before
    assert f"stopped at step {last}" in out
    assert "Traceback" not in err


def test_the_end_of_the_launcher_counts_as_a_stop(launcher, tmp_path):
    arguments = (*TINY, EVERY, "train.epochs=400", "output_dir=run")
    process = launcher.start("digits", *arguments, launch=("--num_processes=1",))
    wait_for(lambda: steps_saved(tmp_path / "run"), process)
    (child,) = launcher.started[-1].children()
    process.terminate()
    child.wait(timeout=60)
    out, _ = process.communicate()
    assert f"stopped at step {max(steps_saved(tmp_path / 'run'))}" in out


def test_damaged_checkpoints_are_skipped_with_a_warning(train, tmp_path, capsys):
    train(*TINY, EVERY, "output_dir=whole")
    train(*TINY, EVERY, "output_dir=run", "train.max_steps=12", "train.keep_checkpoints=3")
    assert steps_saved(tmp_path / "run") == [8, 9, 12]
    newest, older = (tmp_path / "run" / "checkpoints" / f"step_{step:08d}" for step in (12, 9))
    weights = newest / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    training = older / "training.pt"
    content = bytearray(training.read_bytes())
    content[len(content) // 2] ^= 1
    training.write_bytes(bytes(content))
    capsys.readouterr()
    train(*TINY, EVERY, "output_dir=run")
    said = capsys.readouterr()
    assert "step_00000012 is damaged and skipped: model.safetensors has" in said.err
    assert "step_00000009 is damaged and skipped: training.pt has another content" in said.err
    assert "from run/checkpoints/step_00000008" in said.out
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")


def test_only_the_newest_checkpoints_are_kept(train, tmp_path):
    train(*TINY, "train.checkpoint_steps=2", "train.keep_checkpoints=3", "output_dir=run")
    assert steps_saved(tmp_path / "run") == [20, 22, 24]
    assert not list((tmp_path / "run" / "checkpoints").glob(".writing_*"))


def test_a_full_disk_ends_the_run_and_spares_the_last_good_checkpoint(launcher, train, tmp_path):
    train(*TINY, EVERY, "output_dir=run", "train.max_steps=9")
    before = digest(tmp_path / "run")

    def no_file_above_20_kb() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = launcher.run("digits", *TINY, EVERY, "output_dir=run", preexec_fn=no_file_above_20_kb)
    assert done.returncode == 1
    assert "the checkpoint of step 12 cannot be written" in done.stderr
    assert "the last good checkpoint is run/checkpoints/step_00000009" in done.stderr
    assert "Traceback" not in done.stderr
    assert steps_saved(tmp_path / "run") == [8, 9]
    train(*TINY, EVERY, "output_dir=run", "train.max_steps=9")
    assert digest(tmp_path / "run") == before


def test_a_disk_that_is_full_at_the_end_is_said_and_the_run_is_finished_later(train, tmp_path, monkeypatch):
    def full(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("common.engine.draw_curves", full)
        with pytest.raises(RunError, match=r"the run folder cannot be written.*good checkpoint is run/.*00000003"):
            train(*TINY, "output_dir=run", "train.max_steps=3")
    train(*TINY, "output_dir=run", "train.max_steps=3")
    assert (tmp_path / "run" / "curves.png").is_file()


def test_a_checkpoint_is_due_at_its_step_though_an_epoch_ends_there(train, tmp_path):
    train(*TINY, "output_dir=run", "train.checkpoint_steps=8", "train.checkpoint_every=3", "train.keep_checkpoints=9")
    assert steps_saved(tmp_path / "run") == [8, 16, 24]


def test_other_training_data_of_the_same_size_are_no_resume(train, tmp_path, photographs):
    data = tmp_path / "data"
    shutil.copytree(photographs, data)
    options = (*TINY, "data.name=folder", "data.root=data", "data.train_samples=null", "data.test_samples=4")
    options = (*options, "train.batch_size=4", "output_dir=run")
    train(*options, "train.max_steps=1")
    os.rename(data / "train" / "china" / "0.jpg", data / "train" / "flower" / "z.jpg")
    with pytest.raises(ConfigError, match="training samples are of other classes, or in another order"):
        train(*options, "train.max_steps=2")


def test_a_run_with_other_settings_is_not_mixed_into_an_old_one(train, tmp_path):
    train(*TINY, "output_dir=run", "train.max_steps=3")
    first = digest(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"seed is 7 and was 42.*resume=none"):
        train(*TINY, "output_dir=run", "train.max_steps=5", "seed=7")
    assert digest(tmp_path / "run") == first
    train(*TINY, "output_dir=run", "train.max_steps=3", "seed=7", "resume=none")
    assert digest(tmp_path / "run") != first
    assert steps_saved(tmp_path / "run") == [3]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_refused_before_training(set_up, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="no files can be written there"):
        set_up(*TINY, "output_dir=locked/run")


def test_a_folder_that_cannot_be_made_is_refused_before_training(set_up, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="output_dir=file/run: no files can be written there"):
        set_up(*TINY, "output_dir=file/run")
