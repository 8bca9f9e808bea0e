"""Image data sets for the recipes: every sample, augmentation included, follows from (seed, epoch, index) alone."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from sdt_datasets.errors import IGNORED, DataError
from sdt_datasets.image_sources import (
    Source,
    load_cifar,
    load_digits_images,
    load_folder,
    load_mnist,
    load_mnist_5k,
)
from sdt_datasets.image_transforms import Transform, build_transforms, seeded
from sdt_datasets.timm_sources import load_hub, load_shards

NAMES = ("digits", "folder", "cifar10", "cifar100", "mnist", "fashion_mnist", "mnist_5k", "hfds/NAME", "wds/NAME")
"""What `data.name` can be; digits and mnist_5k come out of packages, the others need `data.root`."""
LAYOUTS = {
    "folder": "train/CLASS/IMAGE.jpg and val/CLASS/IMAGE.jpg",
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "mnist": "MNIST/raw",
    "fashion_mnist": "FashionMNIST/raw",
    "wds": "the shards, *train*.tar and *val*.tar or those that _info.json lists",
}
"""What lies in `data.root`."""


class UnreadableImageError(DataError):
    """An image could not be decoded; the message names its file."""


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """`dataset[i]` is (float32 `[C, H, W]`, class index); `.classes` are the names, `.targets` all indices, `[N]`.

    Training samples are augmented with draws from (seed, epoch, i) and from nothing else, so that neither the number of
    loader processes nor a resumed run changes them; `set_epoch` reaches loader processes that are already running.

    An image that cannot be read raises `UnreadableImageError` with the name of its file, or with `on_error="skip"` is
    named in a warning and in `.unreadable`: in training the next readable image stands in for it; in evaluation, where
    a stand-in would be counted twice, the sample is blank and its label `IGNORED`.
    """

    def __init__(
        self,
        source: Source,
        transform: Transform,
        *,
        training: bool,
        seed: int = 0,
        on_error: str = "raise",
        samples: int | None = None,
    ) -> None:
        self.source, self.transform, self.training, self.seed = source, transform, training, seed
        self.skip = on_error == "skip"
        self.classes = source.classes
        self._rows = _first(source, samples)
        self.targets = source.targets[self._rows]
        # In shared memory, since persistent loader processes hold a copy of the rest of this object.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._unreadable = torch.zeros(len(self._rows), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self._rows)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the augmentation of the samples drawn from now on."""
        self._epoch.fill_(epoch)

    @property
    def unreadable(self) -> list[str]:
        """The files that could not be read so far, in the order of the data set."""
        return [self.source.describe(int(self._rows[i])) for i in self._unreadable.nonzero().flatten().tolist()]

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        index = int(index) % len(self)
        for candidate in range(index, index + len(self)):
            position = candidate % len(self)
            row = int(self._rows[position])
            try:
                image = self.source.load(row)
            except Exception as error:  # decoders raise nearly anything on a damaged file
                if not self.skip:
                    raise UnreadableImageError(
                        f"{self.source.describe(row)} cannot be read ({error}); replace or remove the file, or set "
                        f"data.on_error=skip to go on without it"
                    ) from error
                if not self._unreadable[position]:
                    warnings.warn(f"{self.source.describe(row)} cannot be read ({error}); it is left out", stacklevel=2)
                self._unreadable[position] = True
                if not self.training:
                    return torch.zeros_like(self.transform(Image.new("RGB", (8, 8)))), IGNORED
                continue
            if not self.training:
                return self.transform(image), int(self.targets[position])
            with seeded(self.seed, int(self._epoch), index):
                return self.transform(image), int(self.targets[position])
        raise UnreadableImageError(f"none of the {len(self)} images can be read, {self.source.describe(0)} for one")


def build_image_datasets(
    name: str,
    root: str | Path | None = None,
    *,
    img_size: int,
    in_channels: int | None = None,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
    crop_pct: float = 1.0,
    interpolation: str = "bicubic",
    scale: Sequence[float] = (1.0, 1.0),
    ratio: Sequence[float] = (1.0, 1.0),
    hflip: float = 0.0,
    color_jitter: float = 0.0,
    auto_augment: str | None = None,
    random_erasing: float = 0.0,
    download: bool = False,
    on_error: str = "raise",
    train_samples: int | None = None,
    test_samples: int | None = None,
    seed: int = 0,
) -> tuple[ImageDataset, ImageDataset]:
    """The training and the evaluation set of a data set by name, with the transforms of `build_transforms`.

    `in_channels=None` takes the data's own: 1 for grey arrays, else 3. `train_samples` and `test_samples` keep the
    first so many images; where the data lies class by class, the first of each class in turn.

    Raises `DataError` (a `ValueError`) for missing or unfit data, `ValueError` for a setting out of range; the message
    is one paragraph.

    >>> train, test = build_image_datasets("digits", img_size=32)
    >>> len(train), len(test), train[0][0].shape
    (1437, 360, torch.Size([1, 32, 32]))
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be raise or skip, got {on_error!r}")
    train, test = _open(name, Path(root) if root is not None else None, download)
    _check_classes(train, test)
    augment, resize = build_transforms(
        img_size=img_size,
        in_channels=in_channels or train.channels,
        mean=mean,
        std=std,
        crop_pct=crop_pct,
        interpolation=interpolation,
        scale=scale,
        ratio=ratio,
        hflip=hflip,
        color_jitter=color_jitter,
        auto_augment=auto_augment,
        random_erasing=random_erasing,
    )
    return (
        ImageDataset(train, augment, training=True, seed=seed, on_error=on_error, samples=train_samples),
        ImageDataset(test, resize, training=False, on_error=on_error, samples=test_samples),
    )


def _open(name: str, root: Path | None, download: bool) -> tuple[Source, Source]:
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
        return load_folder(root)
    load = load_mnist if kind in ("mnist", "fashion_mnist") else load_cifar
    return load(kind, root, download)


def _check_classes(train: Source, test: Source) -> None:
    for source, split in ((train, "training"), (test, "validation")):
        if not len(source.targets):
            raise DataError(f"there are no {split} images")
    if len(train.classes) < 2:
        raise DataError(f"there is only one class, {train.classes[0]!r}; a classifier needs at least two")
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


def _first(source: Source, samples: int | None) -> np.ndarray:
    """The rows of the first `samples` images; of each class in turn where the data lies class by class."""
    available = len(source.targets)
    if samples is None:
        return np.arange(available)
    if not 1 <= samples <= available:
        raise DataError(f"{samples} samples were asked for, but there are {available} images")
    if not source.by_class:
        return np.arange(samples)
    turns = np.zeros(available, dtype=np.int64)
    for label in np.unique(source.targets):
        rows = np.flatnonzero(source.targets == label)
        turns[rows] = np.arange(len(rows))
    return np.sort(np.lexsort((source.targets, turns))[:samples])
