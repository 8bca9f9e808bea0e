"""What event data sets refuse, name or pass over; and how their samples follow from seed, epoch and index."""

import os
import shutil

import numpy as np
import pytest
import torch

from sdt_datasets.augment import Cutout, Roll
from sdt_datasets.errors import IGNORED, DataError, UnreadableError
from sdt_datasets.event_data import build_event_datasets
from sdt_datasets.events import DropAtRandom, DropByTime, EventsToFrames
from sdt_datasets.layouts import NAMES

# Skipped files are named in warnings.
pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be read")

OFF = {"cache": False}


def files(dataset):
    return [dataset.source.data[row] for row in dataset._rows]


@pytest.mark.parametrize("name", NAMES)
def test_absent_data_say_what_to_put_where(tmp_path, name):
    with pytest.raises(DataError) as caught:
        build_event_datasets(name, tmp_path, time_steps=10)
    message = str(caught.value)
    assert message.startswith(f"data.name={name}: ")
    assert f"needed as {tmp_path}/" in message
    if name in ("dvs128_gesture", "cifar10_dvs", "n_mnist"):
        assert "download" in message
        assert "https://" in message
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="is not a folder"):
        build_event_datasets(name, tmp_path / "nowhere", time_steps=10)
    with pytest.raises(DataError, match=r"needs data\.root"):
        build_event_datasets(name, None, time_steps=10)


def test_incomplete_and_ambiguous_data_are_refused(tmp_path, write):
    write.gestures(tmp_path, test=[])
    (tmp_path / "DVSGesture" / "ibmGestureTest.tar.gz").touch()
    with pytest.raises(DataError, match="ibmGestureTest is not there"):
        build_event_datasets("dvs128_gesture", tmp_path, time_steps=3)
    (tmp_path / "DVSGesture" / "ibmGestureTest").mkdir()
    with pytest.raises(DataError, match="holds no validation recordings"):
        build_event_datasets("dvs128_gesture", tmp_path, time_steps=3)
    write.npz(tmp_path / "events_np" / "train" / "0" / "a.npz")
    with pytest.raises(DataError, match="more than once"):
        build_event_datasets("dvs128_gesture", tmp_path, time_steps=3)
    archived = tmp_path / "archived"
    (archived / "CIFAR10DVS").mkdir(parents=True)
    (archived / "CIFAR10DVS" / "CIFAR10DVS.zip").touch()
    with pytest.raises(DataError, match=r"CIFAR10DVS\.zip is there, but not extracted"):
        build_event_datasets("cifar10_dvs", archived, time_steps=3)
    for label, name in enumerate(("a", "b")):
        write.npz(tmp_path / "own" / "train" / name / "1.npz")
        write.npz(tmp_path / "own" / "test" / "ac"[label] / "1.npz")
    with pytest.raises(DataError, match="same classes; only one of them has b, c"):
        build_event_datasets("event_folder", tmp_path / "own", time_steps=3)
    write.npz(tmp_path / "single" / "a" / "1.npz")
    with pytest.raises(DataError, match="class a has one recording"):
        build_event_datasets("event_folder", tmp_path / "single", time_steps=3)


def broken(path, kind):
    whole = path.read_bytes()
    contents = {
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "wrong format": b"this is no recording " * 50,
        "scrambled header": whole[:20] + b"\xff" * 200 + whole[220:],
    }
    path.write_bytes(contents[kind])


@pytest.mark.parametrize("kind", ["empty", "truncated", "wrong format", "scrambled header"])
@pytest.mark.parametrize("suffix", ["aedat4", "npy", "npz", "bin", "frames", "pt"])
def test_damaged_files_are_named_or_skipped(tmp_path, write, suffix, kind):
    write_one = {
        "aedat4": lambda split, i: write.aedat4(tmp_path / split / "a" / f"{i}.aedat4", 2000, seed=i),
        "npy": lambda split, i: write.gesture(
            tmp_path / f"ibmGesture{split.title()}" / "user01_led" / f"{i}.npy", seed=i
        ),
        "npz": lambda split, i: write.npz(tmp_path / "events_np" / split / "0" / f"{i}.npz", seed=i),
        "bin": lambda split, i: write.bin(tmp_path / split.title() / "0" / f"{i}.bin", seed=i),
        "frames": lambda split, i: write.frames(
            tmp_path / "frames_number_4_split_by_number" / split / "0" / f"{i}.npz", seed=i
        ),
        "pt": lambda split, i: write.pt(tmp_path / split / f"{i}.pt", label=0, seed=i),
    }[suffix]
    for split in ("train", "test"):
        for sample in range(3):
            write_one(split, sample)
    name = {"aedat4": "event_folder", "bin": "n_mnist", "pt": "cifar10_dvs_tet"}.get(suffix, "dvs128_gesture")
    options = {"time_steps": 4, "sensor_size": (128, 128), **OFF}
    paths = [files(dataset)[1] for dataset in build_event_datasets(name, tmp_path, **options)]
    for path in paths:
        if suffix == "bin":
            # Any bytes are N-MNIST events; what shows are pixels outside the sensor, and pieces of an event.
            whole = type(tmp_path)(path).read_bytes()
            type(tmp_path)(path).write_bytes(
                {"empty": b"", "truncated": whole[:502]}.get(kind, b"\xff\xee\xff\xff\xff" * 9)
            )
        else:
            broken(type(tmp_path)(path), kind)

    for dataset, path in zip(build_event_datasets(name, tmp_path, **options), paths, strict=True):
        with pytest.raises(UnreadableError, match=r"cannot be read \(.+\); replace or remove") as caught:
            dataset[1]
        assert path in str(caught.value)
        assert dataset[0][0].sum() > 0

    train, test = build_event_datasets(name, tmp_path, on_error="skip", **options)
    frames, label = train[1]
    assert torch.equal(frames, train[2][0])
    assert label == train[2][1]
    frames, label = test[1]
    assert (frames.sum(), label) == (0, IGNORED)
    assert frames.shape == test[0][0].shape
    assert [train.unreadable, test.unreadable] == [[path] for path in paths]


def test_recordings_without_events_are_named(tmp_path, write):
    for sample in range(3):
        write.aedat4(tmp_path / "a" / f"{sample}.aedat4", number=0 if sample == 1 else 50)
        write.npz(tmp_path / "b" / f"{sample}.npz", number=0 if sample == 1 else 50)
    train, _ = build_event_datasets("event_folder", tmp_path, time_steps=2, **OFF)
    for index in (1, 3):
        with pytest.raises(UnreadableError, match=r"1\.(aedat4|npz) cannot be read"):
            train[index]


def test_misfits_are_named(tmp_path, write):
    columns = dict(zip("txyp", write.npz(tmp_path / "a" / "0.npz"), strict=True))
    for sample, change in enumerate(
        (
            {"x": columns["x"] + 128},
            {"y": columns["y"] - 500},
            {"p": columns["p"][:7]},
            {"t": None},
        ),
        start=1,
    ):
        arrays = {name: array for name, array in {**columns, **change}.items() if array is not None}
        write.npz(tmp_path / "a" / f"{sample}.npz", **arrays)
    np.save(tmp_path / "a" / "5.npy", np.zeros((10, 3)))
    np.save(tmp_path / "a" / "6.npy", np.array([{"t": 1}], dtype=object), allow_pickle=True)
    shutil.copy(tmp_path / "a" / "0.npz", tmp_path / "a" / "7.npz")
    shutil.copy(tmp_path / "a" / "0.npz", tmp_path / "a" / "8.npz")
    train, _ = build_event_datasets("event_folder", tmp_path, time_steps=2, sensor_size=(128, 128), **OFF)
    reasons = {
        1: "outside the sensor of 128 x 128",
        2: r"y is -\d+ in row 0; expected a whole pixel",
        3: "of one length",
        4: "no array 't', only",
        5: r"columns \[N, 4\]",
        6: "allow_pickle=False",
    }
    for index, reason in reasons.items():
        with pytest.raises(UnreadableError, match=rf"{index}\.np[yz] cannot be read .*{reason}"):
            train[index]


def test_nothing_readable_stops_even_a_skipping_run(tmp_path, write):
    for sample in range(3):
        write.npz(tmp_path / "a" / f"{sample}.npz", number=0)
    train, _ = build_event_datasets("event_folder", tmp_path, time_steps=2, sensor_size=(8, 8), on_error="skip", **OFF)
    with pytest.raises(UnreadableError, match="none of the recordings can be read"):
        train[0]


def test_stray_files_are_passed_over(tmp_path, write, caplog):
    write.gestures(tmp_path, train=["user01_led", "user02_led"])
    base = tmp_path / "DVSGesture" / "ibmGestureTrain"
    for stray in (
        "readme.txt",
        "user01_led/._3.npy",
        "user01_led/.DS_Store",
        "user01_led/3.npy.bak",
        "user02_led/x.csv",
    ):
        (base / stray).write_bytes(b"stray")
    write.gesture(base / "user01_led" / "notes.npy")
    write.gesture(base / "user01_led" / "11.npy")
    write.gesture(base / "extra" / "0.npy")
    train, _ = build_event_datasets("dvs128_gesture", tmp_path, time_steps=2, **OFF)
    assert train.targets.tolist() == [0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9] * 2
    assert "3 files are not of a gesture" in caplog.text

    write.cifar10_dvs(tmp_path, per_class=2)
    base = tmp_path / "CIFAR10DVS"
    shutil.rmtree(base / "truck")
    write.aedat4(base / "unicorn" / "1.aedat4")
    (base / "cat" / "notes.txt").touch()
    caplog.clear()
    train, _ = build_event_datasets("cifar10_dvs", tmp_path, time_steps=2, **OFF)
    assert train.targets.tolist() == list(range(9))
    assert f"{tmp_path} holds no training recording of truck" in caplog.text


def test_a_class_without_a_recording_is_named(tmp_path, write, caplog):
    for split in ("Train", "Test"):
        for digit in set(range(10)) - ({3, 7} if split == "Train" else {0}):
            write.bin(tmp_path / "NMNIST" / split / str(digit) / "1.bin")
    train, _ = build_event_datasets("n_mnist", tmp_path, time_steps=2, **OFF)
    assert len(train.classes) == 10 and len(train) == 8
    assert f"{tmp_path} holds no training recording of 3 - three, 7 - seven" in caplog.text
    assert f"{tmp_path} holds no validation recording of 0 - zero" in caplog.text


@pytest.mark.parametrize("others", [("val",), ("val", "validation"), ()])
def test_of_several_parts_to_evaluate_on_one_is_named(tmp_path, write, caplog, others):
    for split in ("train", "test", *others):
        write.npz(tmp_path / split / "a" / "1.npz")
    _, test = build_event_datasets("event_folder", tmp_path, time_steps=2, sensor_size=(128, 128), **OFF)
    assert files(test) == [str(tmp_path / "test" / "a" / "1.npz")]
    told = f"{tmp_path}: evaluated on test; {' and '.join(others)} is passed over"
    assert (told in caplog.text) == bool(others) == ("passed over" in caplog.text)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"time_steps": 0}, "time_steps must be"),
        ({"split_by": "events"}, "split_by must be one of"),
        ({"size": 0}, "size must be"),
        ({"augment": ["mixup"]}, "augment must be a list of names"),
        ({"on_error": "ignore"}, "on_error must be raise or skip"),
        ({"seed": -1}, "seed must be"),
        ({"train_samples": 0}, "0 samples were asked for"),
        ({"test_samples": 99}, "99 samples were asked for, but there are 2"),
        ({"sensor_size": (0, 8)}, "sensor_size must be"),
    ],
)
def test_bad_settings_are_refused(tmp_path, write, options, message):
    for name in ("a", "b"):
        for sample in range(2):
            write.npz(tmp_path / name / f"{sample}.npz")
    with pytest.raises(ValueError, match=message):
        build_event_datasets("event_folder", tmp_path, **{"time_steps": 2, **OFF, **options})
    with pytest.raises(DataError, match="event data sets are dvs128_gesture"):
        build_event_datasets("dvs_lip", tmp_path, time_steps=2)


def test_first_samples_take_the_classes_in_turn(tmp_path, write):
    write.gestures(tmp_path)
    train, test = build_event_datasets(
        "dvs128_gesture", tmp_path, time_steps=2, train_samples=13, test_samples=4, **OFF
    )
    assert np.bincount(train.targets).tolist() == [2, 2] + [1] * 9
    assert test.targets.tolist() == [0, 1, 2, 3]
    with pytest.raises(IndexError, match="sample 13 of 13"):
        train[13]
    assert torch.equal(train[-1][0], train[12][0])


def test_hflip_on_gestures_warns(tmp_path, write, caplog):
    write.gestures(tmp_path, train=["user01_led"])
    build_event_datasets("dvs128_gesture", tmp_path, time_steps=2, augment="hflip, roll", **OFF)
    assert "left-hand gestures" in caplog.text


AUGMENT = ("event_drop", "roll", "cutout", "random_op")


def test_augmentation_follows_from_seed_epoch_and_index(tmp_path, write):
    write.gestures(tmp_path, train=["user01_led"])
    options = {"time_steps": 2, "augment": AUGMENT, **OFF}
    train, test = build_event_datasets("dvs128_gesture", tmp_path, seed=3, **options)
    plain, plain_test = build_event_datasets("dvs128_gesture", tmp_path, time_steps=2, **OFF)
    first = [frames for frames, _ in train]
    assert all(torch.equal(frames, train[index][0]) for index, frames in reversed(list(enumerate(first))))
    assert all(torch.equal(frames, plain_test[index][0]) for index, (frames, _) in enumerate(test))
    assert sum(torch.equal(frames, plain[index][0]) for index, frames in enumerate(first)) < 3
    train.set_epoch(1)
    second = [frames for frames, _ in train]
    assert sum(torch.equal(one, two) for one, two in zip(first, second, strict=True)) < 3
    train.set_epoch(0)
    assert all(torch.equal(one, two) for one, (two, _) in zip(first, train, strict=True))
    other, _ = build_event_datasets("dvs128_gesture", tmp_path, seed=4, **options)
    assert sum(torch.equal(one, two) for one, (two, _) in zip(first, other, strict=True)) < 3


def test_augmentations_come_in_the_order_of_their_names(tmp_path, write):
    write.gestures(tmp_path, train=["user01_led"])
    names = ("drop_at_random", "cutout", "drop_by_time", "roll")
    train, _ = build_event_datasets("dvs128_gesture", tmp_path, time_steps=2, seed=3, augment=names, **OFF)
    train.set_epoch(1)
    for index, (frames, _) in enumerate(train):
        rng = np.random.default_rng((3, 1, index))
        events = DropByTime()(DropAtRandom()(train.source[index][0], rng), rng)
        counted = torch.from_numpy(EventsToFrames(sensor_size=(128, 128, 2), time_steps=2)(events))
        assert torch.equal(frames, Roll()(Cutout()(counted, rng), rng))


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_set_epoch_reaches_running_workers(tmp_path, write, context):
    write.gestures(tmp_path, train=["user01_led"])
    train, _ = build_event_datasets("dvs128_gesture", tmp_path, time_steps=2, augment=AUGMENT, **OFF)
    loader = torch.utils.data.DataLoader(
        train, batch_size=3, num_workers=2, persistent_workers=True, multiprocessing_context=context
    )
    for epoch in (0, 3, 1):
        train.set_epoch(epoch)
        loaded = list(loader)
        batches = torch.cat([frames for frames, _ in loaded])
        assert batches.shape == (11, 2, 2, 128, 128)
        assert torch.equal(batches, torch.stack([frames for frames, _ in train]))
        assert torch.cat([labels for _, labels in loaded]).tolist() == train.targets.tolist()


def test_unreadable_files_met_by_workers_are_known(tmp_path, write):
    write.gestures(tmp_path, train=["user01_led"])
    (tmp_path / "DVSGesture" / "ibmGestureTest" / "user24_led" / "4.npy").write_bytes(b"")
    _, test = build_event_datasets("dvs128_gesture", tmp_path, time_steps=2, on_error="skip", **OFF)
    labels = torch.cat([labels for _, labels in torch.utils.data.DataLoader(test, batch_size=4, num_workers=2)])
    assert labels.tolist().count(IGNORED) == 1
    assert [os.path.basename(path) for path in test.unreadable] == ["4.npy"]


def test_events_that_are_kept_meet_the_settings_of_the_next_run(tmp_path, write):
    for split in ("train", "test"):
        for name in "ab":
            write.npz(
                tmp_path / split / name / "1.npz", t=np.arange(6) // 3, x=np.arange(6), y=np.arange(6), p=[0, 1] * 3
            )
    options = {"time_steps": 3, "sensor_size": (8, 6), "augment": "drop_at_random"}
    kept, _ = build_event_datasets("event_folder", tmp_path, **options)
    assert kept[0][0].sum() > 0
    later, _ = build_event_datasets("event_folder", tmp_path, split_by="time", **options)
    with pytest.raises(UnreadableError, match="too short for 3 frames of equal duration"):
        later[0]
    smaller, _ = build_event_datasets("event_folder", tmp_path, **options | {"sensor_size": (5, 6)})
    with pytest.raises(UnreadableError, match=r"x=5 lies outside the sensor of 5 x 6.*events.sensor_size=\[W,H\]"):
        smaller[0]


SIZES = [((40, 16), 8, 80), ((40, 40), 10, 75), ((41, 30), 13, 47), ((40, 16), 20, None), ((30, 20), 16, None)]


@pytest.mark.parametrize(("sensor_size", "size", "share"), SIZES)
def test_pixels_that_no_frame_is_made_of_are_said(tmp_path, write, caplog, sensor_size, size, share):
    """The share of the pixels that no new one depends on, from the resizing itself."""
    x, y = (side.flatten() for side in np.meshgrid(*map(np.arange, sensor_size)))
    for split in ("train", "test"):
        for name in "ab":
            write.npz(tmp_path / split / name / "1.npz", t=np.arange(len(x)), x=x, y=y, p=np.ones(len(x), int))
    build_event_datasets("event_folder", tmp_path, time_steps=1, sensor_size=sensor_size, size=size, **OFF)
    frame = torch.zeros(1, 1, *sensor_size[::-1], requires_grad=True)
    torch.nn.functional.interpolate(frame, size=(size, size), mode="bilinear").sum().backward()
    assert round(100 * (frame.grad == 0).double().mean().item()) == (share or 0)
    said = [record.getMessage() for record in caplog.records if "ignored, with the events" in record.getMessage()]
    assert [f": {share} % of the sensor" in text for text in said] == ([True] if share else [])


def test_an_empty_recording_is_said_to_be_empty_where_the_sensor_is_sought(tmp_path, write, caplog):
    for name in "ab":
        for number in range(2):
            write.npz(tmp_path / name / f"{number}.npz", **({"t": [], "x": [], "y": [], "p": []} if not number else {}))
    build_event_datasets("event_folder", tmp_path, time_steps=1, **OFF)
    assert any("0.npz (it holds no event)" in record.getMessage() for record in caplog.records)
