"""The formats that data sets were published in, written byte by byte, against other readers of them."""

import struct

import numpy as np
import pytest
from tonic.io import get_aer_events_from_file, read_aedat_header_from_file, read_mnist_file

from sdt_datasets.event_data import build_event_datasets
from sdt_datasets.raw_formats import read_aedat, read_bin, read_dat
from sdt_datasets.recordings import read_events

HEADER2 = b"#!AER-DAT2.0\r\n# This is a raw AE data file - do not edit\r\n# Data format: int32 address\r\n"
HEADER3 = b"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: DVS128\r\n#!END-HEADER\r\n"


def draw(number, seed=0):
    rng = np.random.default_rng(seed)
    return np.sort(rng.integers(0, 10**6, number)), *rng.integers(0, 128, (2, number)), rng.integers(0, 2, number)


def aedat2(t, x, y, p):
    """As jAER writes them for a DVS128: big-endian, 1 is OFF, and turned as CIFAR10-DVS is."""
    address = (127 - x) << 8 | (127 - y) << 1 | (1 - p)
    return HEADER2 + np.stack([address, t], 1).astype(">u4").tobytes()


def packet(t, x, y, p, *, kind=1, size=8, overflow=0, valid=1, number=None, capacity=None):
    words = np.stack([x << 17 | y << 2 | p << 1 | valid, t], 1).astype("<u4").tobytes()
    capacity, number = capacity or len(t), number or len(t)
    return struct.pack("<HHIIIIII", kind, 1, size, 4, overflow, capacity, number, number) + words


def dat(t, x, y, p, version=2):
    shifts = {1: (9, 17), 2: (14, 28)}[version]
    words = np.stack([t, x | y << shifts[0] | p << shifts[1]], 1).astype("<u4").tobytes()
    return b"%% Data file containing TD events.\n%% Version %d\n%% Height 240\n" % version + b"\x00\x08" + words


def assert_same(columns, expected):
    for one, other in zip(columns, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_aedat2(tmp_path):
    path, columns = tmp_path / "a.aedat", draw(500)
    path.write_bytes(aedat2(*columns))
    assert_same(read_aedat(path), columns)
    raw = get_aer_events_from_file(str(path), *read_aedat_header_from_file(str(path))[:2])
    np.testing.assert_array_equal(raw["timeStamp"], columns[0])
    np.testing.assert_array_equal(127 - (raw["address"] >> 8), columns[1])
    trigger = np.array([[1 << 15, 77]]).astype(">u4").tobytes()
    path.write_bytes(aedat2(*columns) + trigger)
    assert_same(read_aedat(path), columns)


def test_aedat3(tmp_path):
    path, columns, more = tmp_path / "a.aedat", draw(500), draw(60, seed=1)
    path.write_bytes(HEADER3 + packet(*columns) + packet(*more, overflow=1))
    later = (more[0] + 2**31, *more[1:])
    assert_same(read_aedat(path), [np.concatenate(pair) for pair in zip(columns, later, strict=True)])
    utils = pytest.importorskip("spikingjelly.datasets.utils")
    theirs = utils.load_aedat_v3(path)
    assert_same(read_aedat(path), [theirs[name] for name in "txyp"])
    # Special events, events marked invalid, and room that a packet did not fill are no events.
    others = packet(*more, kind=0) + packet(*more, valid=0) + packet(*more, number=10)
    path.write_bytes(HEADER3 + packet(*columns) + others)
    first = [np.concatenate([column, extra[:10]]) for column, extra in zip(columns, more, strict=True)]
    assert_same(read_aedat(path), first)


def test_bin_with_an_overflowing_clock(tmp_path):
    path, (t, x, y, p) = tmp_path / "a.bin", draw(200)
    t, x, y = t % 8000, x % 34, y % 34
    y[100] = 240
    rows = np.stack([x, y, p << 7 | t >> 16, t >> 8 & 255, t & 255], 1)
    path.write_bytes(rows.astype(np.uint8).tobytes())
    theirs = read_mnist_file(str(path), dtype=np.dtype([(name, np.int64) for name in "xytp"]))
    assert_same(read_bin(path), [theirs[name] for name in "txyp"])
    assert len(theirs) == 199
    path.write_bytes(b"\0\xf0\0\0\0" * 200_000)
    with pytest.raises(ValueError, match="200000 of its events are overflows"):
        read_bin(path)


@pytest.mark.parametrize("version", [1, 2])
def test_dat(tmp_path, version):
    path, (t, x, y, p) = tmp_path / "a.dat", draw(300)
    # Of a camera of 304 x 240 pixels and of one of 1280 x 720.
    columns = (t, x * 303 // 127, y * 239 // 127, p) if version == 1 else (t, x * 1279 // 127, y * 719 // 127, p)
    path.write_bytes(dat(*columns, version=version))
    assert_same(read_dat(path), columns)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.aedat", b"", "AEDAT 2.0 or 3.1"),
        ("a.aedat", b"#!AER-DAT4.0\r\n", r"AEDAT 2.0 or 3.1, its first line is b'#!AER-DAT4.0'"),
        ("a.aedat", HEADER2 + b"1234567", "multiple of 8"),
        (
            "a.aedat",
            HEADER2 + np.array([[0x12345, 1]]).astype(">u4").tobytes(),
            "address 0x12345 in row 0 is of another",
        ),
        ("a.aedat", HEADER3 + packet(*draw(9))[:-1], "announces 9 events of 8 bytes, but 71 bytes follow"),
        ("a.aedat", HEADER3 + packet(*draw(9), capacity=2**32 - 1), "announces 4294967295 events"),
        ("a.aedat", HEADER3 + packet(*draw(9), number=10), "announces 9 events"),
        ("a.aedat", HEADER3 + b"123", "cut off after 3 bytes"),
        ("a.bin", b"1234", "multiple of 5"),
        ("a.dat", b"no header", "found version b'none'"),
        ("a.dat", dat(*draw(9))[:-1], "multiple of 8"),
        ("a.dat", dat(*draw(9)).replace(b"\x00\x08", b"\x0e\x08"), "expected CD events"),
        ("a.mat", b"MATLAB 5.0", r"read from \.aedat4, \.aedat.*files; save the columns"),
    ],
)
def test_damaged_files_and_other_formats_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_events(tmp_path / name)


def test_gestures_as_published(tmp_path, caplog):
    base = tmp_path / "DvsGesture"
    base.mkdir()
    for split, user in (("train", "user01_led"), ("test", "user24_lab")):
        t = np.arange(0, 12_000, 10)
        rng = np.random.default_rng(len(user))
        columns = t, *rng.integers(0, 128, (2, len(t))), rng.integers(0, 2, len(t))
        (base / f"{user}.aedat").write_bytes(HEADER3 + packet(*columns))
        rows = "".join(f"{label},{label * 1000},{label * 1000 + 500}\n" for label in range(1, 12))
        (base / f"{user}_labels.csv").write_text("class,startTime_usec,endTime_usec\n" + rows)
        (base / f"trials_to_{split}.txt").write_text(f"{user}.aedat\n")
    train, test = build_event_datasets("dvs128_gesture", tmp_path, time_steps=5, cache=True)
    assert (len(train), len(test)) == (11, 11)
    assert test.targets.tolist() == list(range(11))
    inside = (t >= 4000) & (t < 4500)
    for _ in range(2):  # from the recording, and from the cache
        frames, label = test[3]
        assert label == 3
        assert frames.sum() == 50
        counts = np.zeros((128, 128))
        np.add.at(counts, (columns[2][inside], columns[1][inside]), 1)
        np.testing.assert_array_equal(frames.sum((0, 1)).numpy(), counts)
    assert not np.array_equal(test[3][0], test[4][0])

    (base / "user01_led_labels.csv").write_text("class,startTime_usec,endTime_usec\n12,0,1\n")
    with pytest.raises(ValueError, match=r"user01_led_labels.csv, line 2: expected class 1\.\.11"):
        build_event_datasets("dvs128_gesture", tmp_path, time_steps=5)
    (base / "user01_led_labels.csv").unlink()
    with pytest.raises(ValueError, match=r"lists user01_led.aedat, but .*labels.csv is not there"):
        build_event_datasets("dvs128_gesture", tmp_path, time_steps=5)
    (base / "trials_to_test.txt").unlink()
    with pytest.raises(ValueError, match=r"holds user01_led.aedat, but no trials_to_test.txt"):
        build_event_datasets("dvs128_gesture", tmp_path, time_steps=5)


def test_cifar10_dvs_as_published(tmp_path, write):
    for name in write.CIFAR10:
        (tmp_path / "extract" / name).mkdir(parents=True)
        for sample in range(2):
            (tmp_path / "extract" / name / f"cifar10_{name}_{sample}.aedat").write_bytes(aedat2(*draw(80, sample)))
    train, test = build_event_datasets("cifar10_dvs", tmp_path, time_steps=4, size=128, cache=False)
    assert (len(train), len(test)) == (10, 10)
    _, x, y, p = draw(80, 1)
    counts = np.zeros((2, 128, 128))
    np.add.at(counts, (p, y, x), 1)
    np.testing.assert_array_equal(test[4][0].sum(0).numpy(), counts)


def test_a_folder_of_every_format(tmp_path):
    for label in "ab":
        (tmp_path / label / "session").mkdir(parents=True)
        for number, (suffix, content) in enumerate(
            ((".aedat", aedat2(*draw(90))), (".AEDAT", HEADER3 + packet(*draw(90))), (".dat", dat(*draw(90))))
        ):
            (tmp_path / label / "session" / f"{number}{suffix}").write_bytes(content)
    train, test = build_event_datasets("event_folder", tmp_path, time_steps=2, cache=False)
    assert (len(train), len(test)) == (4, 2)
    assert all(frames.sum() == 90 for dataset in (train, test) for frames, _ in dataset)
    assert all(frames.equal(train[0][0]) for frames, _ in train)
