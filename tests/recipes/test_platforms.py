"""What Windows and macOS do otherwise than Linux, as far as it can be had here: handles, processes, encodings."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import stop_request
from common.command_line import short_errors
from common.config import load_config
from common.loading import EpochBatches, build_datasets, build_loader, fetch, stop_loaders
from common.run_state import MANIFEST, Position, damage, save_checkpoint
from common.set_up import dry_run

from sdt_blocks import create_model, files


class Windows:
    """The module os of a system that opens no folders and writes nothing to disk through a handle that only reads."""

    name = "nt"

    def __init__(self):
        self.synced = []

    def __getattr__(self, name):
        return getattr(os, name)

    def open(self, path, flags):
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return os.open(path, flags)

    def fsync(self, handle):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        self.synced.append(os.readlink(f"/proc/self/fd/{handle}"))


def test_checkpoints_are_written_through_handles_that_may_write(tmp_path, monkeypatch):
    windows = Windows()
    monkeypatch.setattr(files, "os", windows)
    model = create_model("sdt_2_256", dim=16, depth=1, pooling="0001")
    state = {"optimizer_state": {"state": {}}, "scaler_state": None, "keep": 1}
    written = save_checkpoint(tmp_path, Position(step=3), model=model, ema=model, **state)
    assert damage(written) == ""
    names = {Path(path).name for path in windows.synced}
    assert {"training.pt", MANIFEST, "model.safetensors"} <= names
    assert "ema/model.safetensors" in json.loads((written / MANIFEST).read_text())


def test_a_launcher_that_has_ended_is_missed_where_its_number_stays(monkeypatch):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as launcher:
        windows = Windows()
        windows.getppid = lambda: launcher.pid
        monkeypatch.setattr(stop_request, "os", windows)
        monkeypatch.setenv("LOCAL_RANK", "0")
        request = stop_request.StopRequest()
        assert not request.signal
        launcher.communicate(b"\n")
    assert request.signal == stop_request.signal.SIGTERM


def test_output_that_lacks_a_character_is_no_traceback(monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", output)
    with pytest.raises(UnicodeEncodeError):
        print("数字")
    with short_errors():
        print("top-1 of 数字")
    assert output.buffer.getvalue() == rb"top-1 of \u6570\u5b57" + os.linesep.encode()


def test_loaders_that_are_spawned_give_the_samples_of_forked_ones():
    """macOS and Windows start a loader's process anew: it gets the data set, the epoch and the signals all the same."""
    settings = ["data.train_samples=64", "data.test_samples=8", "data.img_size=16", "train.batch_size=16"]
    settings += ["data.random_erasing=1.0"]  # keyed by the epoch
    config = load_config(settings, default="digits")
    found = {}
    for context in ("fork", "spawn"):
        data, _ = build_datasets(config)
        batches = EpochBatches(len(data), batch_size=16, seed=3)
        loader = build_loader(data, batches, workers=1, pin=False)
        loader.multiprocessing_context = context
        found[context] = []
        for epoch in range(2):
            loader.dataset.set_epoch(epoch)
            batches.seek(epoch, 0)
            found[context].append([inputs for inputs, _ in fetch(loader)])
        stop_loaders(loader)
    first, second = found["fork"]
    assert len(first) == 4 and not torch.equal(first[0], second[0])
    for one, other in zip(found["fork"], found["spawn"], strict=True):
        assert all(map(torch.equal, one, other))


def test_for_a_gpu_the_first_sample_is_tried_by_the_equations(monkeypatch):
    """On the CPU, of which no kernel may be there; one that is forced is for the GPU."""
    monkeypatch.setenv("SDT_BLOCKS_BACKEND", "triton")
    seen = []

    class Net(torch.nn.Module):
        def forward(self, x):
            seen.append(os.environ["SDT_BLOCKS_BACKEND"])
            return x

    dry_run(Net(), torch.rand(3), torch.device("cuda"))
    dry_run(Net(), torch.rand(3), torch.device("cpu"))
    assert seen == ["reference", "triton"] and os.environ["SDT_BLOCKS_BACKEND"] == "triton"
