"""One run a folder: who has it, who gets it, and what is said."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time

import psutil
import pytest
from common import run_lock
from common.config import ConfigError, RunError
from common.engine import save
from common.run_lock import LOCK, RunLock
from launching import TINY


@pytest.fixture
def other(tmp_path):
    """Another process of this machine, and a lock that names it."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    owner = {**run_lock._this_process(), "pid": process.pid, "started": psutil.Process(process.pid).create_time()}
    (tmp_path / LOCK).write_text(json.dumps(owner))
    yield process
    process.kill()
    process.wait()


def test_a_living_owner_is_named_with_the_remedy(tmp_path, other):
    with pytest.raises(ConfigError) as caught:
        RunLock(tmp_path)
    message = str(caught.value)
    for part in (f"process {other.pid} on", "since 20", "choose another output_dir", f"delete {tmp_path / LOCK}"):
        assert part in message


@pytest.mark.parametrize("waited", [True, False], ids=["ended", "a zombie"])
def test_a_dead_owners_lock_is_taken_over_with_a_word(tmp_path, other, capsys, waited):
    other.kill()
    if waited:
        other.wait()
    else:
        while psutil.Process(other.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
    lock = RunLock(tmp_path)
    assert f"was left by process {other.pid}" in capsys.readouterr().err
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_number_that_another_process_has_got_since_is_no_owner(tmp_path, other):
    owner = json.loads((tmp_path / LOCK).read_text())
    (tmp_path / LOCK).write_text(json.dumps({**owner, "started": owner["started"] - 1000}))
    lock = RunLock(tmp_path)
    assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid() != owner["pid"]
    lock.release()


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE", 1.0)


@pytest.mark.parametrize("content", [b"", b"\xff", b"[]", b'{"pid": "x", "started": 1.0}', b"elsewhere"])
def test_a_lock_of_elsewhere_that_nobody_touches_is_taken_over(tmp_path, capsys, impatient, content):
    if content == b"elsewhere":
        content = json.dumps({**run_lock._this_process(), "host": "node7", "machine": "another"}).encode()
    (tmp_path / LOCK).write_bytes(content)
    RunLock(tmp_path).release()
    assert "for a sign of life" in capsys.readouterr().err


def test_a_lock_of_elsewhere_that_is_touched_is_respected(tmp_path, impatient):
    path, ended = tmp_path / LOCK, threading.Event()
    path.write_text(json.dumps({**run_lock._this_process(), "host": "node7", "machine": "another"}))

    def touch():
        while not ended.wait(0.05):
            os.utime(path)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(ConfigError, match="on node7 since"):
            RunLock(tmp_path)
    finally:
        ended.set()
        thread.join()


def test_an_owner_that_lost_its_folder_stops(tmp_path):
    lock = RunLock(tmp_path)
    lock.check()
    (tmp_path / LOCK).unlink()
    lock.check()
    assert (tmp_path / LOCK).read_bytes() == lock.content
    (tmp_path / LOCK).write_text(json.dumps({**run_lock._this_process(), "host": "node7"}))
    with pytest.raises(RunError, match=r"no longer this run's.*node7"):
        lock.check()
    lock.release()
    assert (tmp_path / LOCK).exists(), "the lock of another stays"


def test_a_run_neither_enters_nor_writes_into_the_folder_of_another(set_up, tmp_path, other):
    with pytest.raises(ConfigError, match=f"in use by process {other.pid}"):
        set_up(*TINY, f"output_dir={tmp_path}")
    run = set_up(*TINY, "output_dir=own")
    shutil.copy(tmp_path / LOCK, run.folder / LOCK)
    with pytest.raises(RunError, match="no longer this run's"):
        save(run)
    assert not (run.folder / "checkpoints").exists()


def test_a_full_disk_leaves_no_empty_lock(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(ConfigError, match=r"no files can be written there.*choose another output_dir"):
            run_lock.lock_folder(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / LOCK).exists()


def test_of_many_newcomers_one_gets_a_dead_owners_folder(tmp_path, other):
    other.kill()
    other.wait()
    dead = (tmp_path / LOCK).read_bytes()
    together = threading.Barrier(8)

    def come() -> None:
        together.wait()
        try:
            locks.append(RunLock(tmp_path))
        except ConfigError:
            refused.append(1)

    for _ in range(20):
        (tmp_path / LOCK).write_bytes(dead)
        locks, refused = [], []
        threads = [threading.Thread(target=come) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(locks) == 1 and len(refused) == 7
        locks[0].release()
        assert not list(tmp_path.iterdir())


def test_what_a_process_left_that_ended_amid_its_takeover_stops_nobody(tmp_path, other):
    other.kill()
    other.wait()
    shutil.copy(tmp_path / LOCK, tmp_path / f".{LOCK}.takeover")
    RunLock(tmp_path).release()
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_links_will_do(tmp_path, other, monkeypatch):
    def link(*_) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", link)
    other.kill()
    other.wait()
    lock = RunLock(tmp_path)
    with pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
        RunLock(tmp_path)
    lock.release()
    assert not list(tmp_path.iterdir())
