"""The frame cache: keys, damage, and many processes on one cold folder."""

import hashlib
import json
import multiprocessing
import os
import zipfile

import numpy as np
import pytest
import torch

from sdt_datasets.cache import ArrayCache
from sdt_datasets.errors import DataError
from sdt_datasets.event_data import build_event_datasets
from sdt_datasets.events import EventsToFrames


def entries(folder):
    return sorted(folder.glob("??/*.npz"))


def leftovers(folder):
    return list(folder.rglob("*.tmp"))


def must_not_run():
    raise AssertionError("the entry should have been read from the cache")


@pytest.mark.parametrize(
    "array, kept_as",
    [
        (np.array([[0, 255]], dtype=np.float32), np.uint8),
        (np.array([[0, 256], [65535, 1]], dtype=np.float32), np.uint16),
        (np.array([70000], dtype=np.float32), np.float32),
        (np.array([0.25, 3], dtype=np.float32), np.float32),
        (np.array([-1, 3], dtype=np.float32), np.float32),
        (np.zeros((0, 2), dtype=np.float32), np.float32),
        (np.array([(1, 2, True)], dtype=[("t", int), ("x", np.uint16), ("p", bool)]), None),
    ],
)
def test_arrays_come_back_as_they_were(tmp_path, array, kept_as):
    cache = ArrayCache(tmp_path)
    assert {"a": 1} not in cache
    for make in (lambda: array, must_not_run):
        back = cache.get({"a": 1}, make)
        assert back.dtype == array.dtype
        np.testing.assert_array_equal(back, array)
    assert {"a": 1} in cache
    with np.load(entries(tmp_path)[0]) as entry:
        assert entry["array"].dtype == (kept_as or array.dtype)
        assert json.loads(str(entry["key"])) == {"a": 1}
    assert not leftovers(tmp_path)


def test_size(tmp_path):
    cache = ArrayCache(tmp_path / "new" / "folder")
    assert (cache.size().entries, cache.size().bytes) == (0, 0)
    for key, text in enumerate(("1 entry, 0.1 MB", "2 entries, 0.2 MB")):
        cache.get({"key": key}, lambda: np.zeros(100_000, dtype=np.float32))
        assert str(cache.size()) == text
    assert cache.size().entries == 2
    assert cache.size().bytes == sum(path.stat().st_size for path in entries(cache.folder)) > 200_000


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "garbage", "another key", "other arrays"])
def test_a_damaged_entry_is_made_again(tmp_path, damage, caplog):
    cache = ArrayCache(tmp_path)
    frames = np.arange(5000, dtype=np.float32)
    cache.get({"a": 1}, lambda: frames)
    (path,) = entries(tmp_path)
    whole = path.read_bytes()
    if damage == "another key":
        cache.get({"a": 2}, lambda: frames + 1)
        os.replace(next(entry for entry in entries(tmp_path) if entry != path), path)
    elif damage == "other arrays":
        np.savez(path, something=frames)
    else:
        middle = len(whole) // 2
        contents = {
            "empty": b"",
            "truncated": whole[:middle],
            "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "garbage": b"no archive" * 100,
        }
        path.write_bytes(contents[damage])
    np.testing.assert_array_equal(cache.get({"a": 1}, lambda: frames), frames)
    assert f"{path} is damaged" in caplog.text
    np.testing.assert_array_equal(cache.get({"a": 1}, must_not_run), frames)


@pytest.mark.parametrize("place", ["entry", "folder of entries"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "file"])
def test_whatever_stands_in_the_place_of_an_entry_does_not_stop(tmp_path, kind, place, caplog):
    cache = ArrayCache(tmp_path)
    cache.get({"a": 1}, lambda: np.ones(3))
    (path,) = entries(tmp_path)
    path.unlink()
    if place != "entry":
        path = path.parent
        path.rmdir()
    make = {
        "folder": lambda: (path / "inner").mkdir(parents=True),
        "pipe": lambda: os.mkfifo(path),
        "loop": lambda: path.symlink_to(path),
        "file": lambda: path.write_bytes(b""),
    }
    make[kind]()
    for _ in range(2):
        assert (cache.get({"a": 1}, lambda: np.ones(3)) == 1).all()
    usable = place != "entry" and kind == "folder"
    assert bool(caplog.text) != usable
    assert cache.size().entries in (0, 1)
    assert not leftovers(tmp_path)


def test_an_entry_that_announces_too_much_is_made_again(tmp_path, caplog):
    cache = ArrayCache(tmp_path)
    cache.get({"a": 1}, lambda: np.ones(3))
    (path,) = entries(tmp_path)
    with zipfile.ZipFile(path) as archive:
        key = archive.read("key.npy")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("key.npy", key)
        huge = b"{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000000, 4), }".ljust(117) + b"\n"
        archive.writestr("array.npy", b"\x93NUMPY\x01\x00v\x00" + huge)
    assert (cache.get({"a": 1}, lambda: np.ones(3)) == 1).all()
    assert "announces" in caplog.text


def test_what_killed_writers_left_is_swept(tmp_path):
    cache = ArrayCache(tmp_path)
    cache.get({"a": 1}, lambda: np.ones(3))
    old, fresh = (entries(tmp_path)[0].with_name(f".{name}.tmp") for name in ("old", "fresh"))
    for path in (old, fresh):
        path.touch()
    os.utime(old, (0, 0))
    ArrayCache(tmp_path)
    assert leftovers(tmp_path) == [fresh]


def test_events_are_framed_once(gestures, monkeypatch):
    calls = []
    original = EventsToFrames.__call__
    monkeypatch.setattr(EventsToFrames, "__call__", lambda self, events: calls.append(1) or original(self, events))
    for augment in ([], ["drop_at_random"]):
        train, _ = build_on_gestures(str(gestures / str(augment)), gestures, augment=augment)
        calls.clear()
        train[0]
        assert len(calls) == 1


def test_pickles_are_not_loaded(tmp_path):
    cache = ArrayCache(tmp_path)
    cache.get({"a": 1}, lambda: np.zeros(1))
    np.savez(entries(tmp_path)[0], array=np.array([must_not_run], dtype=object), key=np.array('{"a": 1}'))
    assert cache.get({"a": 1}, lambda: np.ones(1)) == 1


def test_an_unwritable_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write the cache folder .*events\.cache=null"):
        ArrayCache(tmp_path / "file")
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match="cannot write the cache folder"):
        build_on_gestures(tmp_path / "file" / "cache", tmp_path, empty=True)


def test_a_full_disk_is_reported_once_and_does_not_stop(tmp_path, monkeypatch, caplog):
    cache = ArrayCache(tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    for _ in range(3):
        assert cache.get({"a": 1}, lambda: np.ones(1)) == 1
    assert caplog.text.count("No space left on device") == 1
    assert not leftovers(tmp_path)


def build_on_gestures(cache, root, empty=False, **options):
    if empty:
        for split in ("ibmGestureTrain", "ibmGestureTest"):
            (root / split / "user01_led").mkdir(parents=True)
            np.save(root / split / "user01_led" / "0.npy", np.ones((5, 4), dtype=int))
    return build_event_datasets("dvs128_gesture", root, cache=cache, **{"time_steps": 4, **options})


@pytest.fixture
def gestures(tmp_path, write):
    write.gestures(tmp_path, train=["user01_led"])
    return tmp_path


def test_cached_frames_equal_fresh_ones(gestures):
    fresh, _ = build_on_gestures(False, gestures, augment=["roll"])
    cold, _ = build_on_gestures(True, gestures, augment=["roll"])
    assert not entries(gestures / ".frames_cache")
    for _ in range(2):
        for index in range(len(fresh)):
            assert torch.equal(cold[index][0], fresh[index][0])
    assert len(entries(gestures / ".frames_cache")) == len(cold) == cold.cache.size().entries


def test_cached_events_are_augmented_afresh(gestures):
    fresh, _ = build_on_gestures("none", gestures, augment="event_drop,drop_at_random")
    cold, _ = build_on_gestures("auto", gestures, augment="event_drop,drop_at_random")
    for epoch in (0, 1):
        for dataset in (fresh, cold):
            dataset.set_epoch(epoch)
        for index in range(len(fresh)):
            assert torch.equal(cold[index][0], fresh[index][0])


def test_every_setting_that_shapes_the_frames_is_in_the_key(gestures):
    cache = gestures / "cache"
    seen = []
    for options in (
        {},
        {"time_steps": 5},
        {"split_by": "time"},
        {"size": 64},
        {"augment": ["drop_by_time"]},
    ):
        train, _ = build_on_gestures(str(cache), gestures, **options)
        seen.append(train[0][0].shape)
        plain, _ = build_on_gestures(False, gestures, **options)
        assert torch.equal(train[0][0], plain[0][0])
        assert len(entries(cache)) == len(seen)
    build_on_gestures(str(cache), gestures, augment=["cutout"], seed=9)[0][0]
    assert len(entries(cache)) == len(seen)


def test_what_another_reader_makes_of_a_file_has_an_entry_of_its_own(gestures):
    options = {"cache": str(gestures / "cache"), "time_steps": 4, "augment": ["drop_by_time"]}
    gesture, _ = build_event_datasets("dvs128_gesture", gestures, **options)
    folder = gestures / "DVSGesture" / "ibmGestureTrain"
    plain, _ = build_event_datasets("event_folder", folder, sensor_size=(128, 128), **options)
    assert gesture.source.data[0] == plain.source.data[0]
    times = [dataset._read(0)["t"] for dataset in (gesture, plain)]
    np.testing.assert_array_equal(times[0], 1000 * times[1], "only the first reader knows that they are milliseconds")


def test_another_sensor_has_frames_of_its_own(gestures):
    folder, options = gestures / "DVSGesture" / "ibmGestureTrain", {"time_steps": 2, "size": 32}
    for sensor_size in ((128, 128), (128, 160)):
        cached, fresh = (
            build_event_datasets("event_folder", folder, sensor_size=sensor_size, cache=cache, **options)[0]
            for cache in (str(gestures / "cache"), False)
        )
        assert torch.equal(cached[0][0], fresh[0][0])


def test_a_changed_source_is_read_again(gestures, write):
    train, _ = build_on_gestures(True, gestures)
    before = train[0][0]
    path = type(gestures)(train.source.data[0])
    write.gesture(path, seed=77)
    os.utime(path, ns=(1, 1))
    assert not torch.equal(train[0][0], before)
    assert torch.equal(train[0][0], build_on_gestures(False, gestures)[0][0][0])


def fill(root, cache, barrier, results):
    train, _ = build_on_gestures(cache, root)
    barrier.wait(timeout=60)
    digests = [hashlib.sha256(train[i][0].numpy().tobytes()).hexdigest() for _ in range(2) for i in range(len(train))]
    results.put(digests)


def test_four_processes_fill_one_cold_cache(gestures):
    cache = gestures / "cache"
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    processes = [context.Process(target=fill, args=(gestures, str(cache), barrier, results)) for _ in range(4)]
    for process in processes:
        process.start()
    digests = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0] * 4
    fresh, _ = build_on_gestures(False, gestures)
    expected = [hashlib.sha256(fresh[i][0].numpy().tobytes()).hexdigest() for i in range(11)]
    assert digests == [expected * 2] * 4
    assert len(entries(cache)) == 11
    assert not leftovers(cache)
    full, _ = build_on_gestures(str(cache), gestures)
    assert all(torch.equal(full[index][0], fresh[index][0]) for index in range(11))
