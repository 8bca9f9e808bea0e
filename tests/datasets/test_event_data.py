"""Event data sets from true files in every layout: frames, labels, order, splits."""

import logging
import os
import shutil
from collections import Counter

import numpy as np
import pytest
import tonic
import torch

from sdt_datasets.errors import IGNORED, DataError, UnreadableError
from sdt_datasets.event_data import build_event_datasets
from sdt_datasets.events import EventsToFrames

# Skipped files are named in warnings.
pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be read")

OFF = {"cache": False}


def halved(frames):
    """128 -> 64 pixels: the mean of each two by two."""
    return frames.reshape(*frames.shape[:2], 64, 2, 64, 2).mean((3, 5))


def files(dataset):
    return [dataset.source.data[row] for row in dataset._rows]


def test_gesture_frames_labels_and_official_split(tmp_path, write, count):
    written = write.gestures(tmp_path)
    train, test = build_event_datasets("dvs128_gesture", tmp_path, time_steps=7, **OFF)
    assert (len(train), len(test)) == (33, 11)
    assert train.classes == tonic.datasets.DVSGesture.classes
    assert (train.in_channels, train.frame_size) == (2, (128, 128))
    for dataset in (train, test):
        for index in range(0, len(dataset), 5):
            frames, label = dataset[index]
            path = type(tmp_path)(files(dataset)[index])
            assert frames.dtype == torch.float32
            assert isinstance(label, int)
            assert label == int(path.stem) == dataset.targets[index]
            np.testing.assert_array_equal(frames.numpy(), count(written[path], 7))


@pytest.mark.parametrize(("augment", "framed_again"), [(["hflip"], 0), (["drop_by_time"], 1)])
def test_a_cold_cache_reads_and_frames_a_recording_once(tmp_path, write, monkeypatch, augment, framed_again):
    write.gestures(tmp_path)
    train, test = build_event_datasets("dvs128_gesture", tmp_path, time_steps=3, augment=augment)
    calls = Counter()

    def counted(owner, name):
        whole = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given: (calls.update([name]), whole(*given))[1])

    counted(EventsToFrames, "__call__")
    counted(type(train.source), "__getitem__")
    first = [dataset[i][0] for dataset in (train, test) for i in range(3)]
    assert calls == {"__call__": 6, "__getitem__": 6}
    again = [dataset[i][0] for dataset in (train, test) for i in range(3)]
    # Events that are augmented are framed anew: each epoch drops others.
    assert calls == {"__call__": 6 + 3 * framed_again, "__getitem__": 6}
    assert all(torch.equal(a, b) and a.any() for a, b in zip(first, again, strict=True))


def test_cifar10_dvs_frames_are_halved_and_nine_tenths_train(tmp_path, write, count):
    written = write.cifar10_dvs(tmp_path, per_class=11, number=40)
    train, test = build_event_datasets("cifar10_dvs", tmp_path, time_steps=4, **OFF)
    assert train.classes == list(write.CIFAR10)
    assert np.bincount(train.targets).tolist() == [10] * 10
    assert np.bincount(test.targets).tolist() == [1] * 10
    # In the order of the names, 10 comes after 1, so the last of 0 .. 10 is 9.
    assert [os.path.basename(path) for path in files(test)] == [f"cifar10_{name}_9.aedat4" for name in write.CIFAR10]
    assert train.frame_size == (64, 64)
    for index in (0, 37, 99):
        frames, label = train[index]
        expected = halved(count(written[type(tmp_path)(files(train)[index])], 4))
        np.testing.assert_allclose(frames.numpy(), expected, rtol=0, atol=1e-6)
        assert label == index // 10
    full, _ = build_event_datasets("cifar10_dvs", tmp_path, time_steps=4, size=128, **OFF)
    np.testing.assert_array_equal(full[3][0].numpy(), count(written[type(tmp_path)(files(full)[3])], 4))


def test_n_mnist(tmp_path, write, count):
    columns = {}
    for split, samples in (("Train", 2), ("Test", 1)):
        for digit in range(10):
            for sample in range(samples):
                path = tmp_path / "NMNIST" / split / str(digit) / f"{sample:05d}.bin"
                columns[str(path)] = write.bin(path, seed=10 * digit + sample)
    train, test = build_event_datasets("n_mnist", tmp_path, time_steps=5, **OFF)
    assert (len(train), len(test)) == (20, 10)
    assert train.targets.tolist() == [digit for digit in range(10) for _ in range(2)]
    assert train.frame_size == (34, 34)
    np.testing.assert_array_equal(train[13][0].numpy(), count(columns[files(train)[13]], 5, 34, 34))


@pytest.mark.parametrize("name, folder", [("dvs128_gesture", "DVSGesture"), ("cifar10_dvs", "CIFAR10DVS")])
def test_the_folder_itself_can_be_the_root(tmp_path, write, name, folder):
    write.gestures(tmp_path, train=["user01_led"]) if name == "dvs128_gesture" else write.cifar10_dvs(tmp_path, 2)
    outer, _ = build_event_datasets(name, tmp_path, time_steps=3, **OFF)
    inner, _ = build_event_datasets(name, tmp_path / folder, time_steps=3, **OFF)
    assert files(outer) == files(inner)
    assert torch.equal(outer[1][0], inner[1][0])


def test_the_order_does_not_depend_on_the_file_system(tmp_path, write, monkeypatch):
    write.gestures(tmp_path)
    train, _ = build_event_datasets("dvs128_gesture", tmp_path, time_steps=3, **OFF)
    listed = type(tmp_path).iterdir
    monkeypatch.setattr(type(tmp_path), "iterdir", lambda self: iter(sorted(listed(self), reverse=True)))
    backwards, _ = build_event_datasets("dvs128_gesture", tmp_path, time_steps=3, **OFF)
    assert files(train) == files(backwards) == sorted(files(train))


def test_gesture_times_do_not_overflow_narrow_files(tmp_path, write):
    wide = write.gestures(tmp_path, test=["user24_led"])
    source = build_event_datasets("dvs128_gesture", tmp_path, time_steps=3, **OFF)[0].source
    path = source.data[0]
    np.save(path, np.load(path).astype(np.int16))
    os.rename(path, path.replace(".npy", ".NPY"))
    source = build_event_datasets("dvs128_gesture", tmp_path, time_steps=3, **OFF)[0].source
    assert source.data[0].endswith(".NPY")
    events, _ = source[0]
    assert events["t"].max() > np.iinfo(np.int16).max
    np.testing.assert_array_equal(events["t"], wide[type(tmp_path)(path)][0])


def test_tonics_own_classes_read_the_same_events(tmp_path, write, monkeypatch):
    """Tonic's data sets as they are, but for their check that the archive and all files are there."""
    write.gestures(tmp_path)
    write.cifar10_dvs(tmp_path, per_class=2)
    for cls, name in ((tonic.datasets.DVSGesture, "dvs128_gesture"), (tonic.datasets.CIFAR10DVS, "cifar10_dvs")):
        monkeypatch.setattr(cls, "_check_exists", lambda self: True)
        theirs = cls(str(tmp_path))
        ours = build_event_datasets(name, tmp_path, time_steps=3, **OFF)[0].source
        assert isinstance(ours, cls)
        assert sorted(zip(theirs.data, theirs.targets, strict=True)) == list(zip(ours.data, ours.targets, strict=True))
        for index in (0, len(theirs) - 1):
            events, _ = theirs[index]
            mine, _ = ours[ours.data.index(theirs.data[index])]
            for field in "txyp":
                np.testing.assert_array_equal(mine[field], events[field])


def test_spikingjelly_gesture_layout(tmp_path, write, count):
    base = tmp_path / "DVSGesturedataset"
    columns = {}
    for split in ("train", "test"):
        for label in range(11):
            path = base / "events_np" / split / str(label) / f"user0{label % 3}_led_{label}.npz"
            columns[str(path)] = write.npz(path, seed=label)
    (base / "download").mkdir()
    train, test = build_event_datasets("dvs128_gesture", tmp_path, time_steps=4, **OFF)
    order = [0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9]  # as torchvision's DatasetFolder, which SpikingJelly builds on
    assert [path.split(os.sep)[-2] for path in files(train)] == [str(label) for label in order]
    assert train.targets.tolist() == list(range(11))
    assert train.classes == [tonic.datasets.DVSGesture.classes[label] for label in order]
    np.testing.assert_array_equal(train[2][0].numpy(), count(columns[files(train)[2]], 4))

    frames = {}
    for path in columns:
        made = type(tmp_path)(path.replace("events_np", "frames_number_4_split_by_number"))
        frames[str(made)] = write.frames(made)
    train, test = build_event_datasets("dvs128_gesture", base, time_steps=4, **OFF)
    assert "frames_number_4_split_by_number" in files(train)[0]
    np.testing.assert_array_equal(test[5][0].numpy(), frames[files(test)[5]])
    other, _ = build_event_datasets("dvs128_gesture", base, time_steps=8, **OFF)
    assert "events_np" in files(other)[0]
    dropping, _ = build_event_datasets("dvs128_gesture", base, time_steps=4, augment=["drop_at_random"], **OFF)
    assert "events_np" in files(dropping)[0]

    shutil.rmtree(base / "events_np")
    with pytest.raises(DataError, match="holds frames_number_4_split_by_number, but neither"):
        build_event_datasets("dvs128_gesture", base, time_steps=8, **OFF)
    with pytest.raises(DataError, match=r"drops events, but .* holds frames already"):
        build_event_datasets("dvs128_gesture", base, time_steps=4, augment=["drop_at_random"], **OFF)


def test_spikingjelly_cifar10_dvs_layout(tmp_path, write):
    frames = {}
    for name in write.CIFAR10:
        for sample in range(11):
            path = tmp_path / "frames_number_4_split_by_number" / name / f"cifar10_{name}_{sample}.npz"
            frames[str(path)] = write.frames(path, seed=sample)
    train, test = build_event_datasets("cifar10_dvs", tmp_path, time_steps=4, **OFF)
    assert (len(train), len(test)) == (100, 10)
    np.testing.assert_allclose(train[42][0].numpy(), halved(frames[files(train)[42]]), atol=1e-6)
    assert train[42][1] == 4


@pytest.mark.parametrize("name", ["cifar10_dvs", "cifar10_dvs_tet"])
def test_tet_layout(tmp_path, write, name):
    counts = {}
    for split, samples in (("train", 12), ("test", 3)):
        for sample in range(samples):
            path = tmp_path / "cifar10-dvs-tet" / split / f"{sample}.pt"
            counts[str(path)] = write.pt(path, label=sample % 10, seed=sample)
    train, test = build_event_datasets(name, tmp_path, time_steps=4, **OFF)
    assert [os.path.basename(path) for path in files(train)] == [f"{sample}.pt" for sample in range(12)]
    assert train.targets.tolist() == [sample % 10 for sample in range(12)]
    frames, label = train[11]
    assert label == 1
    expected = halved(counts[files(train)[11]].transpose(3, 0, 1, 2))
    np.testing.assert_allclose(frames.numpy(), expected, atol=1e-6)
    assert test[0][0].shape == (4, 2, 64, 64)
    with pytest.raises(DataError, match=r"expected \[10, 2, H, W\]; set events.time_steps"):
        build_event_datasets(name, tmp_path, time_steps=10, **OFF)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


def test_tet_files_are_not_unpickled(tmp_path, write, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "test"):
        write.pt(tmp_path / split / "0.pt", label=3)
    torch.save((Evil(), 3), tmp_path / "train" / "1.pt")
    train, _ = build_event_datasets("cifar10_dvs_tet", tmp_path, time_steps=4, **OFF)
    assert train.targets.tolist() == [3, IGNORED]
    with pytest.raises(UnreadableError, match=r"1\.pt cannot be read"):
        train[1]
    assert not (tmp_path / "unpickled").exists()


def test_event_folder_of_one_camera(tmp_path, write, count):
    columns = {}
    for seed, name in enumerate(("left", "right")):
        for sample in range(10):
            path = tmp_path / name / f"{sample}.aedat4"
            columns[str(path)] = write.aedat4(path, width=40, height=30, seed=10 * seed + sample)
    train, test = build_event_datasets("event_folder", tmp_path, time_steps=3, **OFF)
    assert train.classes == ["left", "right"]
    assert (len(train), len(test)) == (18, 2)
    assert train.frame_size == (30, 40)
    np.testing.assert_array_equal(test[1][0].numpy(), count(columns[files(test)[1]], 3, 40, 30))
    square, _ = build_event_datasets("event_folder", tmp_path, time_steps=3, size=16, **OFF)
    assert square[0][0].shape == (3, 2, 16, 16)


def test_event_folder_reads_every_format_and_given_splits(tmp_path, write, caplog):
    for split in ("train", "val"):
        write.gesture(tmp_path / split / "a" / "1.npy", seed=1)
        write.npz(tmp_path / split / "a" / "2.npz", seed=2)
        t, x, y, p = write.npz(tmp_path / "columns.npz", seed=3)
        events = np.zeros(300, dtype=[("t", int), ("x", int), ("y", int), ("p", int)])
        events["t"], events["x"], events["y"], events["p"] = t, x, y, 2 * p - 1
        (tmp_path / split / "b").mkdir()
        np.save(tmp_path / split / "b" / "3.npy", events)
    with caplog.at_level(logging.WARNING):
        train, test = build_event_datasets("event_folder", tmp_path, time_steps=2, **OFF)
    assert "128 x 128 pixels (W x H), the smallest that holds every event" in caplog.text
    assert train.targets.tolist() == test.targets.tolist() == [0, 0, 1]
    assert [int(frames.sum()) for frames, _ in train] == [300, 300, 300]
    assert train[2][0][:, 1].sum() == p.sum()
    given, _ = build_event_datasets("event_folder", tmp_path, time_steps=2, sensor_size=(200, 150), **OFF)
    assert given[0][0].shape == (2, 2, 150, 200)


def test_real_recording(tmp_path, recording):
    for name in ("a", "b"):
        for sample in range(2):
            (tmp_path / name).mkdir(exist_ok=True)
            shutil.copy(recording, tmp_path / name / f"{sample}.npz")
    for split_by in ("number", "time"):
        train, _ = build_event_datasets(
            "event_folder", tmp_path, time_steps=10, split_by=split_by, sensor_size=(128, 128), **OFF
        )
        assert train[0][0].shape == (10, 2, 128, 128)
        assert train[0][0].sum() == 17_284
