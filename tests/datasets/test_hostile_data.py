"""Files that ask for too much, hang, multiply, or are passed over: named, left out or refused, and nothing dies."""

import io
import os
import tarfile
import zipfile
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from sdt_datasets.errors import IGNORED, DataError, UnreadableError
from sdt_datasets.event_data import build_event_datasets
from sdt_datasets.images import build_image_datasets
from sdt_datasets.timm_sources import ShardImages

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot be (read|used)")

OFF = {"cache": False}
PLAIN = {"img_size": 32, "mean": (0.5,), "std": (0.25,)}
ANNOUNCED = b"{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000000, 4), }".ljust(117) + b"\n"
HUGE = b"\x93NUMPY\x01\x00v\x00" + ANNOUNCED


def table(number=200, seed=0, side=16, **values):
    rng = np.random.default_rng(seed)
    columns = {"x": rng.integers(0, side, number), "y": rng.integers(0, side, number)}
    columns |= {"p": rng.integers(0, 2, number), "t": np.sort(rng.integers(0, 10**6, number))}
    for name, value in values.items():
        columns[name] = columns[name].astype(np.result_type(columns[name], np.asarray(value)))
        columns[name][3] = value
    return np.stack([columns[name] for name in "xypt"], 1)


def folder_of(root, splits=("train", "test"), samples=3, **options):
    for split in splits:
        for label in "ab":
            (root / split / label).mkdir(parents=True)
            for sample in range(samples):
                np.save(root / split / label / f"{sample}.npy", table(seed=sample, **options))
    return root


def zipped(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


HOSTILE = {
    "huge header": lambda path: path.write_bytes(HUGE),
    "huge member": lambda path: zipped(path.with_suffix(".npz"), t=HUGE, x=HUGE, y=HUGE, p=HUGE),
    "stray pixel": lambda path: np.save(path, table(x=60000, y=60000)),
    "stray pixel within what cameras have": lambda path: np.save(path, table(x=6000, y=6000)),
    "negative pixel": lambda path: np.save(path, table(x=-1)),
    "stray time": lambda path: np.save(path, table(t=2**61)),
    "nan": lambda path: np.save(path, table(p=np.nan)),
    "no events": lambda path: np.save(path, np.zeros((0, 4))),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_skipping_survives_recordings_that_ask_for_too_much(tmp_path, kind):
    root = folder_of(tmp_path)
    for split in ("train", "test"):
        path = root / split / "a" / "1.npy"
        path.unlink()
        HOSTILE[kind](path)
    train, test = build_event_datasets("event_folder", root, time_steps=4, on_error="skip", **OFF)
    assert train.sensor_size == (16, 16, 2)
    assert [label for _, label in train] == [0, 0, 0, 1, 1, 1]
    assert [label for _, label in test] == [0, IGNORED, 0, 1, 1, 1]
    assert [os.path.splitext(path)[0] for path in train.unreadable] == [str(root / "train" / "a" / "1")]
    strict, _ = build_event_datasets("event_folder", root, time_steps=4, **OFF)
    with pytest.raises(UnreadableError, match=r"a.1\.np[yz] cannot be read"):
        strict[1]


def test_running_out_of_memory_is_survived_and_named(tmp_path, monkeypatch):
    train, test = build_event_datasets("event_folder", folder_of(tmp_path), time_steps=4, on_error="skip", **OFF)

    def short_of_memory(path, **options):
        raise MemoryError(f"Unable to allocate for {path}")

    monkeypatch.setattr("sdt_datasets.event_sources.read_events", short_of_memory)
    with pytest.raises(UnreadableError, match="none of the recordings can be read"):
        train[0]
    with pytest.warns(UserWarning, match="needs more memory than there is"):
        assert test[0][1] == IGNORED


@pytest.mark.parametrize("options", [{"sensor_size": (60_000, 60_000)}, {"size": 20_000}, {"time_steps": 10**6}])
def test_settings_that_ask_for_too_much_are_refused(tmp_path, options):
    with pytest.raises(DataError, match=r"frames of \d+ x \d+ pixels would take \d+ bytes"):
        build_event_datasets("event_folder", folder_of(tmp_path), **{"time_steps": 4, **OFF, **options})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_frames_that_are_not_finite_are_named(tmp_path, write, value):
    base = tmp_path / "frames_number_4_split_by_number"
    for split in ("train", "test"):
        for sample in range(2):
            frames = write.frames(base / split / "0" / f"{sample}.npz")
            frames[1, 1, 5, 7] = value
        np.savez(base / split / "0" / "1.npz", frames=frames)
        for sample in range(2):
            write.pt(tmp_path / "tet" / split / f"{sample}.pt", label=sample)
        content = torch.load(tmp_path / "tet" / split / "1.pt")
        content[0][1, 5, 7, 1] = value
        torch.save(content, tmp_path / "tet" / split / "1.pt")
    for name, root in (("dvs128_gesture", tmp_path), ("cifar10_dvs_tet", tmp_path / "tet")):
        train, test = build_event_datasets(name, root, time_steps=4, on_error="skip", **OFF)
        with pytest.warns(UserWarning, match=rf"frame 1 holds {value} at channel 1, row 5, column 7"):
            assert test[1][1] == IGNORED
        assert torch.equal(train[1][0], train[0][0])


@pytest.mark.parametrize(
    "content",
    [
        (torch.zeros(2, 8, 8, 4), 3.5),
        (torch.zeros(2, 8, 8, 4), float("nan")),
        (torch.zeros(2, 8, 8, 4), 10),
        (torch.zeros(1).expand(2, 40_000, 40_000, 4), 3),
        (torch.zeros(2, 8, 8, 4).to_sparse(), 3),
    ],
    ids=["fraction", "nan", "label", "strided over nothing", "sparse"],
)
def test_tensors_that_are_no_labeled_frames_are_refused(tmp_path, write, content):
    for split in ("train", "test"):
        write.pt(tmp_path / split / "0.pt", label=3)
        torch.save(content, tmp_path / split / "1.pt")
    _, test = build_event_datasets("cifar10_dvs_tet", tmp_path, time_steps=4, on_error="skip", **OFF)
    assert test.targets.tolist() == [3, IGNORED]
    assert [label for _, label in test] == [3, IGNORED]


def test_what_is_passed_over_is_counted_at_the_start(tmp_path, caplog):
    root = folder_of(tmp_path)
    for name in ("train/a/x.mat", "train/a/session/y.MAT", "test/b/z.h5", "notes.txt", "train/0.npy", "val/a/0.npy"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"?")
    (root / "train" / "a" / "itself").symlink_to(root / "train" / "a")
    os.mkfifo(root / "train" / "a" / "9.npy")
    (root / "train" / "a" / "0.npy").rename(root / "train" / "a" / "0.NPY")
    (root / "train" / "b" / "session 2").mkdir()
    (root / "train" / "b" / "0.npy").rename(root / "train" / "b" / "session 2" / "0.npy")
    train, test = build_event_datasets("event_folder", root, time_steps=2, sensor_size=(16, 16), **OFF)
    assert (len(train), len(test)) == (6, 6)
    assert all(frames.sum() == 200 for frames, _ in train)
    messages = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    (other,) = [message for message in messages if "evaluated on" in message]
    assert f"{root}: evaluated on test; val is passed over" == other
    (line,) = [message for message in messages if message != other]
    for found in ("8 files: 2 .npy", f"2 .mat ({root}/train/a/x.mat", "1 .h5", "1 .txt", "1 link", "1 no regular file"):
        assert found in line


@pytest.mark.parametrize("suffix", ["mat", "h5", "raw", "es", "csv"])
def test_a_format_that_is_not_read_is_named_with_the_way_out(tmp_path, suffix):
    for label in "ab":
        (tmp_path / label).mkdir()
        (tmp_path / label / f"0.{suffix}").write_bytes(b"?")
    named = rf"holds 2 files: 2 \.{suffix} \(a.0\.{suffix}\).*np\.savez"
    with pytest.raises(DataError, match=f"holds no recordings; .* {named}"):
        build_event_datasets("event_folder", tmp_path, time_steps=2)
    with pytest.raises(DataError, match=rf"no recordings were found .*2 \.{suffix}"):
        build_event_datasets("cifar10_dvs", tmp_path, time_steps=2)


def test_seconds_are_said_once_and_divided_by_time(tmp_path, caplog):
    for label in "ab":
        (tmp_path / label).mkdir()
        for sample in range(3):
            events = table(1000, seed=sample)
            columns = dict(zip("xypt", events.T, strict=True))
            np.savez(tmp_path / label / f"{sample}.npz", **{**columns, "t": columns["t"] / 1e6})
    train, _ = build_event_datasets(
        "event_folder", tmp_path, time_steps=4, split_by="time", sensor_size=(16, 16), **OFF
    )
    for frames, _ in train:
        assert frames.sum((1, 2, 3)).min() > 150
    assert caplog.text.count("taken as seconds") == 1
    assert f"{tmp_path}/a/0.npz: times have fractions" in caplog.text


@pytest.mark.parametrize(("unit", "last"), [(400_000, 2), (240_000, 4)])
def test_times_too_coarse_for_the_frames_are_refused(tmp_path, unit, last):
    events = table(100)
    events[:, 3] //= unit
    for label in "ab":
        (tmp_path / label).mkdir()
        for sample in range(2):
            np.save(tmp_path / label / f"{sample}.npy", events)
    train, _ = build_event_datasets("event_folder", tmp_path, time_steps=4, split_by="time", **OFF)
    if last < 4:
        with pytest.raises(UnreadableError, match=f"times run from 0 to {last}, too short for 4 frames of equal dura"):
            train[0]
    else:
        assert train[0][0].sum((1, 2, 3)).tolist() == np.bincount(np.minimum(events[:, 3], 3)).tolist()


def test_a_sensor_of_one_pixel(tmp_path):
    root = folder_of(tmp_path / "$HOME [v2]{0}", side=1)
    augment = ["event_drop", "hflip", "roll", "cutout", "random_op"]
    for size in (None, 1, 7):
        train, _ = build_event_datasets("event_folder", root, time_steps=3, size=size, augment=augment, cache=True)
        assert train[0][0].shape == (3, 2, size or 1, size or 1)
        assert train.sensor_size == (1, 1, 2)


# Images


def test_only_pictures_are_opened_behind_the_ending(tree, monkeypatch):
    Image.init()
    opened = []
    for kind in {"EPS", "PDF", "PSD", "ICNS"} & set(Image.OPEN):
        watched = partial(lambda kind, *args: opened.append(kind), kind)
        monkeypatch.setitem(Image.OPEN, kind, (watched, Image.OPEN[kind][1]))
    path = tree / "val" / "china" / "1.png"
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n"
    for content in (postscript, b"8BPS\0\1" + b"\0" * 99):
        path.write_bytes(content)
        _, val = build_image_datasets("folder", tree, **PLAIN)
        with pytest.raises(UnreadableError, match=r"1\.png cannot be read \(it is none of JPEG, PNG"):
            val[1]
    assert opened == []


@pytest.mark.parametrize("size, split", [((20_000, 2), "val"), ((2, 20_000), "val"), ((30_000, 6_000), "train")])
def test_images_that_ask_for_too_much_are_left_out(tree, size, split):
    Image.new("1", size).save(tree / split / "china" / "1.png")
    train, val = build_image_datasets("folder", tree, on_error="skip", **{**PLAIN, "img_size": 224})
    dataset = {"train": train, "val": val}[split]
    with pytest.warns(UserWarning, match=r"china.1\.png cannot be (read|used) \((resized, it would have|Image size)"):
        frames, label = dataset[1]
    assert frames.shape == (3, 224, 224)
    assert label == (IGNORED if split == "val" else 0)


def test_more_pixels_than_the_bound_are_refused_before_decoding(tree, monkeypatch):
    monkeypatch.setattr("sdt_datasets.image_transforms.LARGEST_IMAGE", 1000)
    _, val = build_image_datasets("folder", tree, **PLAIN)
    with pytest.raises(UnreadableError, match=r"its size is 48 x 40 pixels; at most 1000 are read"):
        val[0]


def test_links_do_not_multiply_images_and_pipes_do_not_hang(tree, caplog):
    plain, _ = build_image_datasets("folder", tree, **PLAIN)
    assert "passed over" not in caplog.text
    china = tree / "train" / "china"
    (china / "itself").symlink_to(china)
    (china / "above").symlink_to(tree / "train")
    (china / "other").symlink_to(tree / "train" / "flower")
    (china / "loop.png").symlink_to(china / "loop.png")
    (china / "zeros.jpg").symlink_to("/dev/zero")
    (china / "notes.txt").touch()
    os.mkfifo(china / "pipe.png")
    train, _ = build_image_datasets("folder", tree, **PLAIN)
    assert len(train) == len(plain) == 12
    assert "passed over as no images: 7 files: 3 link to a folder met before" in caplog.text
    (tree / "train" / "flower2").symlink_to(tree / "train" / "flower")
    with pytest.raises(DataError, match=r"flower and .*flower2 are one folder by two names"):
        build_image_datasets("folder", tree, **PLAIN)


def test_a_file_that_becomes_a_pipe_is_named(tree):
    train, _ = build_image_datasets("folder", tree, **PLAIN)
    path = tree / "train" / "china" / "0.png"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UnreadableError, match=r"0\.png cannot be read \(it is no regular file"):
        train[0]


def test_images_of_one_pixel_and_odd_names(tree):
    name = "$x[b] {0} %s"
    for split in ("train", "val"):
        (tree / split / name).mkdir()
        Image.new("RGB", (1, 1), (255, 0, 0)).save(tree / split / name / f"{'long' * 50}[1].png")
    train, val = build_image_datasets("folder", tree, **PLAIN)
    assert train.classes[0] == name
    for dataset in (train, val):
        image, label = dataset[0]
        assert label == 0
        torch.testing.assert_close(image, torch.tensor([2.0, -2, -2]).view(3, 1, 1).expand(3, 32, 32))


@pytest.mark.parametrize("label", ["3.7", "true", "1180591620717411303424", "null", '"3"', "[" * 100_000])
def test_labels_of_shards_are_whole_numbers(tmp_path, label, photograph):
    with tarfile.open(tmp_path / "train.tar", "w") as shard:
        for name, content in (("0.png", None), ("0.json", f'{{"label": {label}}}'.encode())):
            if content is None:
                photograph("china", 0).save(tmp_path / name)
                shard.add(tmp_path / name, name)
            else:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
    with pytest.raises(DataError, match=r"train\.tar cannot be read as a WebDataset shard"):
        ShardImages([tmp_path / "train.tar"], "label")


def test_a_pipe_is_no_shard(tmp_path):
    for name in ("train.tar", "val.tar"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=r"needs shards named .* \(found 0 and 0\)"):
        build_image_datasets("wds/own", tmp_path, **PLAIN)
