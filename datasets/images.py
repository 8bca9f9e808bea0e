"""Image data sets for the recipes: every sample, including its augmentation, depends only on (seed, epoch, index)."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdt_datasets.errors import DataError
from sdt_datasets.image_sources import (
    Source,
    load_cifar,
    load_digits_images,
    load_folder,
    load_mnist,
    load_mnist_5k,
)
from sdt_datasets.image_transforms import Transform, build_transforms, seeded
from sdt_datasets.samples import SampleDataset
from sdt_datasets.timm_sources import load_hub, load_shards

NAMES = ("digits", "folder", "cifar10", "cifar100", "mnist", "fashion_mnist", "mnist_5k", "hfds/NAME", "wds/NAME")
"""The values of `data.name`; digits and mnist_5k come with packages, the others need `data.root`."""
LAYOUTS = {
    "folder": "train/CLASS/IMAGE.jpg and val/CLASS/IMAGE.jpg",
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "mnist": "MNIST/raw",
    "fashion_mnist": "FashionMNIST/raw",
    "wds": "the shards, *train*.tar and *val*.tar or those that _info.json lists",
}
"""The content of `data.root`."""


class ImageDataset(SampleDataset):
    """Images of a source, transformed: see `SampleDataset`. `dataset[i]` is (float32 `[C, H, W]`, class index)."""

    kind = "images"

    def __init__(
        self,
        source: Source,
        transform: Transform,
        *,
        training: bool,
        seed: int = 0,
        on_error: str = "raise",
        rows: np.ndarray | None = None,
    ) -> None:
        rows = np.arange(len(source.targets)) if rows is None else rows
        super().__init__(
            rows=rows,
            targets=source.targets[rows],
            classes=source.classes,
            training=training,
            seed=seed,
            on_error=on_error,
        )
        self.source, self.transform, self.by_class = source, transform, source.by_class

    def _read(self, row: int) -> Image.Image:
        return self.source.load(row)

    def _sample(self, content: Image.Image, key: tuple[int, int, int]) -> Tensor:
        if not self.training:
            return self.transform(content)
        with seeded(*key):
            return self.transform(content)

    def _blank(self) -> Tensor:
        return torch.zeros_like(self.transform(Image.new("RGB", (8, 8))))

    def _name(self, row: int) -> str:
        return self.source.describe(row)


def build_image_datasets(
    name: str,
    root: str | Path | None = None,
    *,
    in_channels: int | None = None,
    download: bool = False,
    on_error: str = "raise",
    validation_samples: int | None = None,
    train_samples: int | None = None,
    test_samples: int | None = None,
    seed: int = 0,
    evaluation_only: bool = False,
    **transforms: Any,
) -> tuple[ImageDataset, ImageDataset]:
    """The training and the evaluation set of a data set by name; `transforms` are the options of `build_transforms`.

    `in_channels=None` takes the data's own: 1 for gray arrays, else 3. `train_samples` and `test_samples` keep only
    that many images, the first ones; if the data is sorted by class, the first of each class in turn. With
    `validation_samples`, this number of training images, always the same ones and in the classes' shares, becomes the
    evaluation set, and the others the training set: settings chosen by it have not used the test images. With
    `evaluation_only` a folder needs no training part; the first of the two sets must then not be used.

    Raises `DataError` (a `ValueError`) for missing or unfit data, `ValueError` for a setting out of range; the message
    is one paragraph.

    >>> train, test = build_image_datasets("digits", img_size=32, mean=[0.3], std=[0.35])
    >>> len(train), len(test), train[0][0].shape
    (1437, 360, torch.Size([1, 32, 32]))
    """
    train, test = _open(name, Path(root).expanduser() if root is not None else None, download, evaluation_only)
    _check_classes(train, test)
    augment, resize = build_transforms(in_channels=in_channels or train.channels, **transforms)
    rows: np.ndarray | None = None
    test_rows: np.ndarray | None = None
    given = ""
    if validation_samples is not None:
        test, test_rows = train, _held_out(train, validation_samples)
        rows = np.setdiff1d(np.arange(len(train.targets)), test_rows)
        given = f" with data.validation_samples={validation_samples}"
    training = ImageDataset(train, augment, training=True, seed=seed, on_error=on_error, rows=rows)
    evaluation = ImageDataset(test, resize, training=False, on_error=on_error, rows=test_rows)
    training.keep_asked(train_samples, "train_samples", given)
    evaluation.keep_asked(test_samples, "test_samples", given)
    return training, evaluation


def _open(name: str, root: Path | None, download: bool, evaluation_only: bool) -> tuple[Source, Source]:
    kind = name.partition("/")[0].lower() if "/" in name else name
    if kind == "digits":
        return load_digits_images()
    if kind == "mnist_5k":
        return load_mnist_5k()
    if kind == "hfds":
        return load_hub(name, root, download)
    if kind not in LAYOUTS:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {near[0]}? The names are" if near else "choose one of"
        raise DataError(f"data.name={name!r} is unknown; {hint} {', '.join(NAMES)}")
    if root is None:
        raise DataError(f"data.name={name} needs data.root=DIR, the folder that holds {LAYOUTS[kind]}")
    if kind == "wds":
        return load_shards(name, root)
    if kind == "folder":
        return load_folder(root, evaluation_only=evaluation_only)
    load = load_mnist if kind in ("mnist", "fashion_mnist") else load_cifar
    return load(kind, root, download)


def _check_classes(train: Source, test: Source) -> None:
    for source, split in ((train, "training"), (test, "validation")):
        if not len(source.targets):
            raise DataError(f"there are no {split} images")
    if train.classes != test.classes:
        only = [
            f"only in {split}: {', '.join(names[:5])}{' ...' * (len(names) > 5)}"
            for split, names in (
                ("train", [c for c in train.classes if c not in set(test.classes)]),
                ("validation", [c for c in test.classes if c not in set(train.classes)]),
            )
            if names
        ]
        raise DataError(
            f"train has {len(train.classes)} classes and validation {len(test.classes)}, and they are not the same "
            f"({'; '.join(only) or 'another order'}); both need the same classes"
        )


def _held_out(source: Source, samples: int) -> np.ndarray:
    """`samples` rows in the shares of the classes, the same ones in every run. Raises `DataError`."""
    available, classes = len(source.targets), len(source.classes)
    if not classes <= samples < available:
        raise DataError(
            f"validation_samples={samples}: expected at least one for each of {classes} classes, and fewer than the "
            f"{available} training images"
        )
    order = np.random.default_rng(0).permutation(available)
    place = np.empty(available)
    for label in np.unique(source.targets):
        rows = np.flatnonzero(source.targets[order] == label)
        place[rows] = (np.arange(len(rows)) + 0.5) / len(rows)  # evenly over the whole, whatever the class's size
    return np.sort(order[np.argsort(place, kind="stable")[:samples]])
