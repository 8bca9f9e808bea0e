"""Images in the true formats of CIFAR, MNIST, WebDataset and Hugging Face folders, whole and damaged."""

import gzip
import io
import json
import os
import pickle
import struct
import tarfile

import numpy as np
import pytest
import torch
from torchvision.transforms import functional as TF

from sdt_datasets.errors import DataError
from sdt_datasets.images import build_image_datasets
from sdt_datasets.timm_sources import load_shards

PLAIN = {"img_size": 32, "mean": (0.5,), "std": (0.25,)}


# CIFAR: the authors' Python archives


def write_cifar(photograph, root, *, hundred=False, protocol=2, rows=20):
    """The archive's files with crops of photographs; the training images `[N, 32, 32, 3]` and labels in its order."""
    folder = root / ("cifar-100-python" if hundred else "cifar-10-batches-py")
    folder.mkdir(parents=True, exist_ok=True)
    files = ["train", "test"] if hundred else [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    label_key, names_key, count = (
        (b"fine_labels", b"fine_label_names", 100) if hundred else (b"labels", b"label_names", 10)
    )
    images, labels = [], []
    for number, file in enumerate(files):
        batch = np.stack([np.asarray(photograph("china", rows * number + i, (32, 32))) for i in range(rows)])
        targets = [(3 * number + i) % count for i in range(rows)]
        content = {b"data": batch.transpose(0, 3, 1, 2).reshape(rows, 3072), label_key: targets, b"batch_label": file}
        (folder / file).write_bytes(pickle.dumps(content, protocol=protocol))
        if not file.startswith("test"):
            images.append(batch)
            labels += targets
    meta = {names_key: [f"class {i}".encode() for i in range(count)], b"num_vis": 3072}
    meta = {
        key.decode(): [name.decode() for name in value] if isinstance(value, list) else value
        for key, value in meta.items()
    }
    (folder / ("meta" if hundred else "batches.meta")).write_bytes(pickle.dumps(meta, protocol=protocol))
    return folder, np.concatenate(images), labels


@pytest.mark.parametrize("hundred", [False, True])
@pytest.mark.parametrize("protocol", [2, 5])
def test_cifar_archives_are_read(tmp_path, hundred, protocol, photograph):
    _, images, labels = write_cifar(photograph, tmp_path, hundred=hundred, protocol=protocol)
    name = "cifar100" if hundred else "cifar10"
    train, test = build_image_datasets(name, tmp_path, img_size=32, mean=(0.0,), std=(1.0,))
    assert train.classes[:2] == ["class 0", "class 1"]
    assert len(train.classes) == (100 if hundred else 10)
    assert train.targets.tolist() == labels
    assert len(test) == 20
    for i in (0, 7, len(train) - 1):
        assert torch.equal(train[i][0], TF.to_tensor(images[i]))


def test_python_2_pickles_are_read(tmp_path, photograph):
    """What Python 2's cPickle wrote: text as byte strings, arrays with the old module name."""
    folder, images, _ = write_cifar(photograph, tmp_path)
    for file in folder.iterdir():
        content = file.read_bytes().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
        file.write_bytes(content)
    train, _ = build_image_datasets("cifar10", tmp_path, img_size=32, mean=(0.0,), std=(1.0,))
    assert torch.equal(train[3][0], TF.to_tensor(images[3]))


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("file", ["data_batch_3", "batches.meta"])
def test_a_pickle_with_any_other_class_is_refused_and_runs_nothing(tmp_path, file, photograph):
    folder, _, _ = write_cifar(photograph, tmp_path)
    (folder / file).write_bytes(pickle.dumps({"data": Attack(str(tmp_path / "executed"))}))
    with pytest.raises(DataError, match=rf"{file} cannot be read as a pickle of arrays \(it wants .*mkdir"):
        build_image_datasets("cifar10", tmp_path, **PLAIN)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as a pickle"),
        (pickle.dumps([1, 2]), "expected a dictionary, found list"),
        (pickle.dumps({"data": [1], "labels": [1]}), r"expected data as uint8 \[N, 3072\], found list"),
        (pickle.dumps({"data": np.zeros((2, 9), np.uint8), "labels": [1, 1]}), r"uint8 \[N, 3072\]"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": "ab"}), "expected labels as a list"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1]}), "82 images but 81 labels"),
        (pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 10]}), "label outside its 10 classes"),
    ],
)
def test_damaged_archives_are_refused(tmp_path, content, message, photograph):
    folder, _, _ = write_cifar(photograph, tmp_path)
    (folder / "data_batch_2").write_bytes(content)
    with pytest.raises(DataError, match=message):
        build_image_datasets("cifar10", tmp_path, **PLAIN)


def test_missing_archives_say_what_to_lay_where(tmp_path, photograph):
    folder, _, _ = write_cifar(photograph, tmp_path)
    (folder / "data_batch_4").unlink()
    with pytest.raises(DataError, match=r"cifar-10-batches-py lacks data_batch_4; unpack cifar-10-python.tar.gz in"):
        build_image_datasets("cifar10", tmp_path, **PLAIN)
    with pytest.raises(DataError, match="cifar-100-python lacks train, test, meta"):
        build_image_datasets("cifar100", tmp_path, **PLAIN)


# MNIST: IDX files


def write_mnist(root, kind="MNIST", rows=30):
    folder = root / kind / "raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    written = {}
    for part in ("train", "t10k"):
        images, labels = rng.integers(0, 256, (rows, 28, 28), dtype=np.uint8), (np.arange(rows) % 10).astype(np.uint8)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, rows, 28, 28) + images.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, rows) + labels.tobytes())
        written[part] = images, labels
    return folder, written


@pytest.mark.parametrize(("name", "kind"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_idx_files_are_read(tmp_path, name, kind):
    _, written = write_mnist(tmp_path, kind)
    train, test = build_image_datasets(name, tmp_path, img_size=28, mean=(0.0,), std=(1.0,))
    for dataset, part in ((train, "train"), (test, "t10k")):
        images, labels = written[part]
        assert dataset.targets.tolist() == labels.tolist()
        torch.testing.assert_close(dataset[4][0][0], torch.from_numpy(images[4] / 255).float())
    assert len(train.classes) == 10


def test_damaged_and_missing_idx_files_are_named(tmp_path):
    folder, _ = write_mnist(tmp_path)
    images = folder / "train-images-idx3-ubyte"
    content = images.read_bytes()
    images.write_bytes(content[:-100])
    with pytest.raises(DataError, match=r"cannot read the files in .*MNIST.raw"):
        build_image_datasets("mnist", tmp_path, **PLAIN)
    (folder / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(content))
    images.unlink()
    with pytest.raises(DataError, match=r"lacks train-images-idx3-ubyte; lay the four files there \(gunzipped\)"):
        build_image_datasets("mnist", tmp_path, **PLAIN)


# timm's readers


def write_shard(photograph, path, count, *, start=0, labels=3, sidecar=False):
    with tarfile.open(path, "w") as shard:
        for number in range(start, start + count):
            file = io.BytesIO()
            photograph("flower", number).save(file, "PNG")
            label = str(number % labels).encode()
            parts = {"png": file.getvalue(), **({"json": b'{"y": %s}' % label} if sidecar else {"cls": label})}
            for suffix, content in parts.items():
                member = tarfile.TarInfo(f"folder/{number:04d}.{suffix}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))


def test_shards_are_read_at_any_position(tmp_path, photograph):
    write_shard(photograph, tmp_path / "set-train-0.tar", 5)
    write_shard(photograph, tmp_path / "set-train-1.tar", 4, start=5)
    write_shard(photograph, tmp_path / "set-val-0.tar", 3, start=20)
    train, val = build_image_datasets("wds/set", tmp_path, img_size=40, mean=(0.0,), std=(1.0,))
    assert (len(train), len(val), train.classes) == (9, 3, ["0", "1", "2"])
    assert train.targets.tolist() == [number % 3 for number in range(9)]
    for number in (8, 0, 5):
        expected = TF.to_tensor(photograph("flower", number).crop((4, 0, 44, 40)))
        torch.testing.assert_close(val.transform(train.source.load(number)), expected)
    assert train.source.describe(6) == f"folder/0006 in {tmp_path / 'set-train-1.tar'}"


def test_timms_description_of_shards_decides(tmp_path, photograph):
    pytest.importorskip("webdataset")
    for name in ("a.tar", "b.tar", "c.tar"):
        write_shard(photograph, tmp_path / name, 4, sidecar=True)
    splits = {
        split: {
            "name": split,
            "filenames": files,
            "shard_lengths": [4] * len(files),
            "num_samples": 4,
            "alt_label": "y",
        }
        for split, files in (("train", ["a.tar", "c.tar"]), ("validation", ["b.tar"]))
    }
    (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    train, val = build_image_datasets("wds/set", tmp_path, **PLAIN)
    assert (len(train), len(val)) == (8, 4)
    assert train.targets.tolist() == [0, 1, 2, 0] * 2
    (tmp_path / "b.tar").unlink()
    with pytest.raises(DataError, match=r"_info.json lists files that are not there: .*b\.tar"):
        build_image_datasets("wds/set", tmp_path, **PLAIN)
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": {}, "val": {}}}))
    with pytest.raises(DataError, match=r"_info.json does not describe its shards"):
        build_image_datasets("wds/set", tmp_path, **PLAIN)


def damage_header(content: bytes, start: int) -> bytes:
    return content[: start + 10] + bytes([content[start + 10] ^ 0xFF]) + content[start + 11 :]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_header, "its entry at byte .* is damaged"),
        (lambda content, start: content[:start] + bytes(512) + content[start + 512 :], "is damaged, or it is several"),
        (lambda content, start: content[:start], "it is cut off after its entry"),
        (lambda content, start: content[: start + 100], "its entry at byte .* is damaged"),
        (lambda content, start: content + content, "or it is several archives in one"),
    ],
    ids=["header", "zeros", "cut between", "cut in a header", "concatenated"],
)
def test_a_shard_whose_end_is_lost_is_refused(tmp_path, photograph, damage, words):
    for name in ("train.tar", "val.tar"):
        write_shard(photograph, tmp_path / name, 4)
    with tarfile.open(tmp_path / "train.tar") as shard:
        start = shard.getmembers()[4].offset
    (tmp_path / "train.tar").write_bytes(damage((tmp_path / "train.tar").read_bytes(), start))
    with pytest.raises(DataError, match=rf"train\.tar cannot be read as a WebDataset shard.*{words}"):
        load_shards("wds/x", tmp_path)


def test_unfit_shards_are_refused(tmp_path, photograph):
    with pytest.raises(DataError, match=r"needs shards named \*train\*.tar and \*val\*.tar \(found 0 and 0\)"):
        build_image_datasets("wds/set", tmp_path, **PLAIN)
    write_shard(photograph, tmp_path / "train.tar", 4)
    write_shard(photograph, tmp_path / "val.tar", 6, labels=6)
    with pytest.raises(DataError, match="the validation labels go from 0 to 5, but there are the classes 0 to 2"):
        build_image_datasets("wds/set", tmp_path, **PLAIN)
    write_shard(photograph, tmp_path / "val.tar", 4, sidecar=True)
    with pytest.raises(DataError, match=r"the image folder/0000 has no label"):
        build_image_datasets("wds/set", tmp_path, **PLAIN)
    (tmp_path / "val.tar").write_bytes(b"not a tar file" * 100)
    with pytest.raises(DataError, match=r"val.tar cannot be read as a WebDataset shard"):
        build_image_datasets("wds/set", tmp_path, **PLAIN)


def test_hugging_face_folders_are_read(tmp_path, tree, photograph):
    pytest.importorskip("datasets")
    train, val = build_image_datasets(f"hfds/{tree}", tmp_path / "cache", img_size=40, mean=(0.0,), std=(1.0,))
    assert (train.classes, len(train), len(val)) == (["china", "flower"], 12, 6)
    assert train.targets.tolist() == [0] * 6 + [1] * 6
    image, label = val[5]
    assert label == 1
    torch.testing.assert_close(image, TF.to_tensor(TF.center_crop(photograph("flower", 12), 40)))
    assert "2.png" in val.source.describe(5)


@pytest.mark.parametrize("kind", ["named", "numbers", "text", "other name"])
def test_columns_of_hugging_face_tables_are_found(tmp_path, photograph, kind):
    hub = pytest.importorskip("datasets")
    names = ["tea", "rose"]
    label = {"numbers": hub.Value("int64"), "text": hub.Value("string")}.get(kind, hub.ClassLabel(names=names))
    key = "species" if kind == "other name" else "label"
    features = hub.Features({"picture": hub.Image(), key: label})
    labels = [names[i % 2] if kind == "text" else i % 2 for i in range(4)]
    rows = {"picture": [photograph("flower", i) for i in range(4)], key: labels}
    for split in ("train", "test"):
        (tmp_path / "table").mkdir(exist_ok=True)
        hub.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "table" / f"{split}.parquet")
    arguments = (f"hfds/{tmp_path / 'table'}", tmp_path / "cache")
    if kind == "text":
        with pytest.raises(DataError, match=r"needs a column of images and one of class labels, it has picture"):
            build_image_datasets(*arguments, **PLAIN)
        return
    train, test = build_image_datasets(*arguments, **PLAIN)
    assert train.classes == (["0", "1"] if kind == "numbers" else names)
    assert train.targets.tolist() == [0, 1, 0, 1]
    assert test[1][0].shape == (3, 32, 32)
    assert np.array_equal(np.asarray(train.source.load(2)), np.asarray(photograph("flower", 2)))


def test_a_hugging_face_name_that_is_not_here_is_not_fetched(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match=r"hfds/no-such/thing cannot be loaded .* unless data\.download=true"):
        build_image_datasets("hfds/no-such/thing", tmp_path, **PLAIN)
