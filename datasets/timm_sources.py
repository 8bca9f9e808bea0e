"""Images read through timm: Hugging Face data sets (`hfds/NAME`) and WebDataset shards (`wds/NAME`)."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from sdt_datasets.errors import DataError
from sdt_datasets.image_sources import Source
from sdt_datasets.image_transforms import open_image

VALIDATION = ("validation", "val", "valid", "test")
"""Names of the evaluation split; the first that exists is used."""

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")

_LARGEST_LABEL = 1 << 20  # bytes of a .cls or .json member


class HubImages:
    """A split of a Hugging Face data set, through timm's `ReaderHfds`."""

    channels, by_class = 3, True

    def __init__(self, reader: Any, name: str) -> None:
        self.reader, self.name = reader, name
        self.targets = np.asarray(reader.dataset[reader.label_key], dtype=np.int64)
        self.classes = sorted(reader.class_to_idx, key=reader.class_to_idx.get)

    def load(self, index: int) -> Image.Image:
        file, _ = self.reader[index]
        with file:
            return open_image(file)

    def describe(self, index: int) -> str:
        path = self.reader.filename(index, absolute=True)
        return f"{path or f'image {index}'} of {self.name}"


def load_hub(name: str, root: Path | None, download: bool) -> tuple[Source, Source]:
    """`hfds/NAME`: a name on the Hub, or a local folder of images; `root` is the cache folder.

    Without `download` only local files are used. Raises `DataError`.
    """
    try:
        hub: Any = importlib.import_module("datasets")
    except ImportError:
        hub = None
    if not hasattr(hub, "load_dataset"):  # in a clone of this repository the name may refer to the folder
        raise DataError(f"data.name={name} needs the package datasets: pip install datasets")
    from timm.data import create_dataset

    path, cache = name.partition("/")[2], None if root is None else str(root)
    try:
        with contextlib.nullcontext() if download else _offline():
            splits = hub.load_dataset(path, cache_dir=cache)
            train_split, test_split = _splits(name, splits)
            image_key, label_key = _columns(name, splits[train_split].features, hub)
            keys: dict[str, Any] = {"input_key": image_key, "target_key": label_key}
            readers = [
                create_dataset(name, root=cache, split=split, **keys).reader for split in (train_split, test_split)
            ]
            train, test = HubImages(readers[0], f"{name} (train)"), HubImages(readers[1], f"{name} ({test_split})")
    except DataError:
        raise
    except Exception as error:  # these libraries raise their own kinds for missing, damaged and unreachable data
        hint = "" if download else "; only what is on this machine is used unless data.download=true"
        raise DataError(f"data.name={name} cannot be loaded ({' '.join(str(error).split())}){hint}") from error
    _check_labels(name, train, test)
    return train, test


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    # Both libraries read HF_HUB_OFFLINE once, when they are imported.
    with (
        mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True),
        mock.patch("datasets.config.HF_HUB_OFFLINE", True),
        mock.patch("datasets.config.HF_DATASETS_OFFLINE", True),
    ):
        yield


def _splits(name: str, available: Any) -> tuple[str, str]:
    test = next((split for split in VALIDATION if split in available), None)
    if "train" not in available or test is None:
        raise DataError(
            f"data.name={name} has the splits {', '.join(available) or 'none'}; needed are train and one of "
            f"{', '.join(VALIDATION)}"
        )
    return "train", test


def _columns(name: str, features: Any, hub: Any) -> tuple[str, str]:
    image = next((key for key, kind in features.items() if isinstance(kind, hub.Image)), None)
    named = [key for key, kind in features.items() if isinstance(kind, hub.ClassLabel)]
    whole = [key for key, kind in features.items() if str(getattr(kind, "dtype", "")).startswith(("int", "uint"))]
    label = "label" if "label" in whole else next(iter(named), None)
    if image is None or label is None:
        columns = ", ".join(f"{key} ({kind})" for key, kind in features.items())
        raise DataError(f"data.name={name} needs a column of images and one of class labels, it has {columns}")
    return image, label


def _check_labels(name: str, train: HubImages | ShardImages, test: HubImages | ShardImages) -> None:
    """Give classes without names their numbers as names. Raises `DataError` for a label outside the classes."""
    if not train.classes:
        train.classes = test.classes = [str(label) for label in range(int(train.targets.max(initial=-1)) + 1)]
    for split, source in (("training", train), ("validation", test)):
        least, most = source.targets.min(initial=0), source.targets.max(initial=0)
        if least < 0 or most >= len(train.classes):
            raise DataError(
                f"data.name={name}: the {split} labels go from {least} to {most}, but there are the classes 0 to "
                f"{len(train.classes) - 1} (is the split unlabeled?)"
            )


class ShardImages:
    """The images of WebDataset shards, local tar files, by position.

    timm reads shards as a stream; this class reads the positions of the images in the files once, and can do what a
    stream cannot: every sample exactly once in evaluation, and a resumed run that continues where it stopped.
    """

    channels, by_class = 3, True

    def __init__(self, files: list[Path], label_key: str = "") -> None:
        self.files = files
        entries = [(shard, *entry) for shard, file in enumerate(files) for entry in _index_shard(file, label_key)]
        self.keys = np.array([entry[1].encode() for entry in entries])
        self.places = np.array([(shard, *place) for shard, _, place, _ in entries], dtype=np.int64).reshape(-1, 3)
        self.targets = np.array([entry[3] for entry in entries], dtype=np.int64)
        self.classes: list[str] = []

    def load(self, index: int) -> Image.Image:
        shard, offset, size = self.places[index].tolist()
        with self.files[shard].open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        return open_image(io.BytesIO(content))

    def describe(self, index: int) -> str:
        return f"{self.keys[index].decode()} in {self.files[self.places[index, 0]]}"


def _index_shard(file: Path, label_key: str) -> Iterator[tuple[str, tuple[int, int], int]]:
    """(key, (offset, bytes) of the image, label) of each sample of a shard, in its order."""
    places: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(file, "r:") as shard:
            for member in shard:
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key, suffix = f"{folder}/{stem}" if folder else stem, suffix.lower()
                if not member.isfile():
                    continue
                if suffix in IMAGE_SUFFIXES:
                    places[key] = member.offset_data, member.size
                elif suffix == ("json" if label_key else "cls"):
                    if member.size > _LARGEST_LABEL:
                        raise ValueError(f"{member.name} has {member.size} bytes, too many for a label")
                    text = shard.extractfile(member).read()  # type: ignore[union-attr]
                    labels[key] = _class_index(json.loads(text)[label_key] if label_key else int(text))
            _check_end(file, shard.offset)
    except (OSError, tarfile.TarError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{file} cannot be read as a WebDataset shard ({error})") from error
    unlabeled = next((key for key in places if key not in labels), None)
    if unlabeled is not None:
        wanted = f"a .json with {label_key!r}" if label_key else "a .cls file with its class index"
        raise DataError(
            f"{file}: the image {unlabeled} has no label; a sample is an image and {wanted} of the same name"
        )
    if not places:
        raise DataError(f"{file} holds no image; a sample is KEY.{' or KEY.'.join(IMAGE_SUFFIXES)} with KEY.cls")
    for key, place in places.items():
        yield key, place, labels[key]


def _check_end(file: Path, offset: int) -> None:
    """Raise `ValueError` unless an archive ends with zeros here, after its last entry.

    An archive that is cut off between two entries, or damaged in an entry's header, otherwise looks as if it ended.
    """
    with file.open("rb") as content:
        content.seek(offset)
        block = content.read(tarfile.BLOCKSIZE)
        if len(block) == tarfile.BLOCKSIZE:
            while block and not any(block):
                block = content.read(1 << 20)
        elif not block:
            raise ValueError(f"it is cut off after its entry that ends at byte {offset}; copy it again")
    if block:
        raise ValueError(f"its entry at byte {offset} is damaged, or it is several archives in one; copy it again")


def _class_index(label: Any) -> int:
    if isinstance(label, bool) or not isinstance(label, int) or not -1 <= label < 2**31:
        raise ValueError(f"{label!r} is no class index")
    return label


def load_shards(name: str, root: Path) -> tuple[Source, Source]:
    """`wds/NAME`: the shards in the folder `root`.

    timm's `_info.json` there lists the files of a split; without it they are `*train*.tar` and `*val*.tar`. Raises
    `DataError`.
    """
    sources = [ShardImages(files, label_key) for files, label_key in _shard_files(name, root)]
    _check_labels(name, *sources)
    return sources[0], sources[1]


def _shard_files(name: str, root: Path) -> list[tuple[list[Path], str]]:
    """The shards of the two splits, and the key of the label in a sample's .json ("" if it is its .cls)."""
    info = root / "_info.json"
    if not info.is_file():
        found = [
            sorted(path for path in root.glob(pattern) if path.is_file()) for pattern in ("*train*.tar", "*val*.tar")
        ]
        if all(found):
            return [(files, "") for files in found]
        raise DataError(
            f"data.name={name}: {root} needs shards named *train*.tar and *val*.tar (found {len(found[0])} and "
            f"{len(found[1])}), or timm's _info.json that lists them"
        )
    if importlib.util.find_spec("webdataset") is None:
        raise DataError(f"{info} is read by timm with the package webdataset: pip install webdataset")
    from timm.data import create_dataset

    splits: list[tuple[list[Path], str]] = []
    try:
        for split in _splits(name, json.loads(info.read_text(encoding="utf-8"))["splits"]):
            described = create_dataset("wds/", root=str(root), split=split).reader.split_info
            splits.append(([root / file for file in described.filenames], described.alt_label))
    except DataError:
        raise
    except Exception as error:  # a file with any content, which timm reads without checks
        raise DataError(f"{info} does not describe its shards as timm expects ({error!r})") from error
    missing = [str(file) for files, _ in splits for file in files if not file.is_file()]
    if missing:
        raise DataError(f"{info} lists files that are not there: {', '.join(missing[:5])}")
    return splits
