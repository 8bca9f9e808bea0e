"""Which event data are under a folder, and how they are divided into training and validation."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tonic

from sdt_datasets.aedat4 import aedat4_sensor_size
from sdt_datasets.errors import NO_EVENT, DataError
from sdt_datasets.event_sources import (
    CIFAR10DVSFiles,
    ClassFolders,
    DVSGestureFiles,
    DVSGestureRecordings,
    NMNISTFiles,
    Source,
    TETFrames,
)
from sdt_datasets.files import describe_files, evaluation_folder, list_files, walk_files
from sdt_datasets.recordings import READERS, read_frames_npz

_log = logging.getLogger(__name__)

_STRAY = 4
"""Multiple of the usual extent of a recording beyond which a pixel is a stray, if the sensor's size is not known."""

_GESTURE = tonic.datasets.DVSGesture
_CIFAR10_DVS = tonic.datasets.CIFAR10DVS
_NMNIST = tonic.datasets.NMNIST
_SPIKINGJELLY = (
    "a folder of SpikingJelly's is read as it is: point the root at the one that holds "
    "frames_number_{time_steps}_split_by_{split_by} or events_np"
)
_WANTED = {
    "dvs128_gesture": (
        f"DVS128 Gesture is needed as {{root}}/DVSGesture/ibmGestureTrain/userNN_LIGHT/LABEL.npy, and ibmGestureTest "
        f"beside it: download {_GESTURE.train_filename} from {_GESTURE.train_url} and {_GESTURE.test_filename} from "
        f"{_GESTURE.test_url}, and extract both in {{root}}/DVSGesture; the original DvsGesture/userNN_LIGHT.aedat is "
        f"read with its trials_to_train.txt, trials_to_test.txt and userNN_LIGHT_labels.csv; {_SPIKINGJELLY}"
    ),
    "cifar10_dvs": (
        f"CIFAR10-DVS is needed as {{root}}/CIFAR10DVS/CLASS/*.aedat4 (or the original .aedat): download "
        f"{_CIFAR10_DVS.filename} from {_CIFAR10_DVS.url}, and extract it and the ten archives in it in "
        f"{{root}}/CIFAR10DVS; {_SPIKINGJELLY}; and so are TET's frames, train/N.pt and test/N.pt"
    ),
    "cifar10_dvs_tet": (
        "TET's frames of CIFAR10-DVS are needed as {root}/train/N.pt and {root}/test/N.pt, each a tuple of frames "
        "[2, H, W, T] and a label"
    ),
    "n_mnist": (
        f"N-MNIST is needed as {{root}}/NMNIST/Train/DIGIT/*.bin and {{root}}/NMNIST/Test/DIGIT/*.bin: download "
        f"{_NMNIST.train_filename} from {_NMNIST.train_url} and {_NMNIST.test_filename} from {_NMNIST.test_url}, and "
        f"extract both in {{root}}/NMNIST"
    ),
    "event_folder": (
        "recordings are needed as {root}/train/CLASS/FILE and {root}/test/CLASS/FILE, or as {root}/CLASS/FILE, where "
        f"the first 90 % of each class train; a FILE is {', '.join(READERS)}, where .npy holds the columns x, y, p, t "
        f"and .npz the arrays t, x, y, p; write other formats with np.savez(FILE, t=..., x=..., y=..., p=...)"
    ),
}


@dataclass(frozen=True)
class Part:
    """The recordings of a source for training, or for validation: their positions in it, in order."""

    source: Source
    rows: list[int]


@dataclass(frozen=True)
class _Wish:
    """The caller's settings, as far as they decide which files are read."""

    name: str
    root: Path
    time_steps: int
    split_by: str
    sensor_size: Sequence[int] | None
    needs_events: bool

    def missing(self, found: str) -> DataError:
        wanted = _WANTED[self.name].format(root=self.root, time_steps=self.time_steps, split_by=self.split_by)
        return DataError(f"data.name={self.name}: {found}. {wanted[0].upper()}{wanted[1:]}")


def open_layout(
    name: str,
    root: str | Path | None,
    *,
    time_steps: int,
    split_by: str,
    sensor_size: Sequence[int] | None = None,
    needs_events: bool = False,
) -> tuple[Part, Part]:
    """The training and the validation part of a data set, in whichever of its layouts is under `root`.

    Other files next to the recordings are counted in one warning. Raises `DataError` if the data are missing,
    incomplete or present in two layouts; it says what is expected where, and what was found.
    """
    if name not in _OPENERS:
        raise DataError(f"data.name={name!r} is unknown; the event data sets are {', '.join(NAMES)}")
    if root is None:
        raise DataError(f"data.name={name} needs data.root=DIR, the folder that holds the recordings")
    wish = _Wish(name, Path(root).expanduser(), time_steps, split_by, sensor_size, needs_events)
    if not wish.root.is_dir():
        raise wish.missing(f"data.root={wish.root} is not a folder")
    train, validation = _OPENERS[name](wish)
    _say_passed_over(train.source, validation.source)
    for part, what in ((train, "training"), (validation, "validation")):
        if not part.rows:
            raise wish.missing(f"{wish.root} holds no {what} recordings")
        there = {part.source.targets[row] for row in part.rows}
        if absent := [str(one) for label, one in enumerate(part.source.classes) if label not in there]:
            _log.warning("%s holds no %s recording of %s", wish.root, what, ", ".join(absent))
    if list(train.source.classes) != list(validation.source.classes):
        differing = sorted(set(train.source.classes) ^ set(validation.source.classes))
        raise DataError(
            f"data.name={name}: training and validation in {wish.root} must hold the same classes; only one of them "
            f"has {', '.join(differing)}"
        )
    return train, validation


def _say_passed_over(*sources: Source) -> None:
    taken = {path for source in sources for path in source.data}
    folders = dict.fromkeys(folder for source in sources for folder in source.folders)
    found = ((str(folder / name), trouble) for folder in folders for name, trouble in walk_files(folder))
    if passed := describe_files((path, trouble) for path, trouble in found if trouble or path not in taken):
        _log.warning("passed over as no recordings: %s", passed)


_Found = tuple[Path, Callable[[], tuple[Part, Part]]]
"""Where a layout was found, and a function that opens it."""


def _whole(source: Source) -> Part:
    return Part(source, list(range(len(source.data))))


def _first_share(source: Source) -> tuple[Part, Part]:
    """The first 90 % of each class are for training (rounded up, as in the original), but never all of them."""
    targets = np.array(source.targets)
    train: list[int] = []
    validation: list[int] = []
    for label, name in enumerate(source.classes):
        rows = np.flatnonzero(targets == label).tolist()
        if len(rows) == 1:
            raise DataError(f"class {name} has one recording, {source.data[rows[0]]}; training and validation need two")
        count = min(-(-9 * len(rows) // 10), len(rows) - 1)
        train += rows[:count]
        validation += rows[count:]
    return Part(source, train), Part(source, validation)


def _bases(root: Path, *names: str) -> list[Path]:
    return [path for path in (root, *(root / name for name in names)) if path.is_dir()]


def _only_one(wish: _Wish, found: list[_Found], looked: Sequence[Path]) -> tuple[Part, Part]:
    """Open the only layout found; several are refused, not guessed between."""
    if not found:
        archives = [
            path for base in looked for ending in ("zip", "tar.gz") for path in sorted(base.glob(f"*.{ending}"))
        ]
        hint = f"; {archives[0]} is there, but not extracted" if archives else _what_is_in(wish.root)
        raise wish.missing(f"no recordings were found in {' or '.join(map(str, looked))}{hint}")
    if len(found) > 1:
        places = ", ".join(str(path) for path, _ in found)
        raise DataError(
            f"data.name={wish.name}: {wish.root} holds the data more than once ({places}); point data.root at the one "
            f"to use, or move the others away"
        )
    return found[0][1]()


def _what_is_in(folder: Path) -> str:
    there = describe_files(walk_files(folder))
    return f"; {folder} holds {there}" if there else ""


def _open_gesture(wish: _Wish) -> tuple[Part, Part]:
    bases = _bases(wish.root, "DVSGesture", "DVSGesturedataset", "DVS128Gesture")
    found: list[_Found] = []
    for base in bases:
        splits = base / "ibmGestureTrain", base / "ibmGestureTest"
        if any(split.is_dir() for split in splits):
            found.append((base, partial(_open_splits, wish, *splits, DVSGestureFiles)))
        if folder := _spikingjelly_folder(wish, base):
            found.append((folder, partial(_open_splits, wish, folder / "train", folder / "test", _spikingjelly)))
    # Files made from the original are often next to it, and have precedence.
    for base in [] if found else _bases(wish.root, "DvsGesture", "extract/DvsGesture", "DVSGesture/DvsGesture"):
        if list_files(base, [".aedat"]):
            found.append((base, partial(_open_trials, wish, base)))
    return _only_one(wish, found, bases)


def _open_trials(wish: _Wish, base: Path) -> tuple[Part, Part]:
    lists = base / "trials_to_train.txt", base / "trials_to_test.txt"
    for path in lists:
        if not path.is_file():
            raise wish.missing(f"{base} holds {list_files(base, ['.aedat'])[0].name}, but no {path.name}")
    return _whole(DVSGestureRecordings(lists[0])), _whole(DVSGestureRecordings(lists[1]))


def _open_cifar10_dvs(wish: _Wish) -> tuple[Part, Part]:
    bases = _bases(wish.root, "CIFAR10DVS", "cifar10-dvs", "cifar10-dvs-tet")
    found: list[_Found] = []
    for base in bases:
        folders = [base / name for name in _CIFAR10_DVS.classes if (base / name).is_dir()]
        if any(list_files(folder, [".aedat4"]) for folder in folders):
            found.append((base, partial(_open_and_divide, base, CIFAR10DVSFiles)))
        if folder := _spikingjelly_folder(wish, base):
            found.append((folder, partial(_open_and_divide, folder, _spikingjelly)))
    found += _find_tet(wish, bases)
    # Files made from the original are often next to it, and have precedence.
    for base in [] if found else _bases(wish.root, "CIFAR10DVS", "extract"):
        if any(list_files(base / name, [".aedat"]) for name in _CIFAR10_DVS.classes if (base / name).is_dir()):
            found.append((base, partial(_open_and_divide, base, partial(CIFAR10DVSFiles, suffix=".aedat"))))
    return _only_one(wish, found, bases)


def _open_tet(wish: _Wish) -> tuple[Part, Part]:
    bases = _bases(wish.root, "cifar10-dvs-tet")
    return _only_one(wish, _find_tet(wish, bases), bases)


def _find_tet(wish: _Wish, bases: Sequence[Path]) -> list[_Found]:
    splits = [(base / "train", base / "test") for base in bases]
    there = [pair for pair in splits if any(split.is_dir() and list_files(split, [".pt"]) for split in pair)]
    return [(train.parent, partial(_open_splits, wish, train, test, TETFrames)) for train, test in there]


def _open_nmnist(wish: _Wish) -> tuple[Part, Part]:
    bases = _bases(wish.root, "NMNIST")
    splits = [(base / "Train", base / "Test") for base in bases]
    there = [pair for pair in splits if any(split.is_dir() for split in pair)]
    found: list[_Found] = [(pair[0].parent, partial(_open_splits, wish, *pair, NMNISTFiles)) for pair in there]
    return _only_one(wish, found, bases)


def _open_splits(wish: _Wish, train: Path, test: Path, source: Callable[[Path], Source]) -> tuple[Part, Part]:
    for split in (train, test):
        if not split.is_dir():
            raise wish.missing(f"{split} is not there")
    return _whole(source(train)), _whole(source(test))


def _open_and_divide(folder: Path, source: Callable[[Path], Source]) -> tuple[Part, Part]:
    return _first_share(source(folder))


def _spikingjelly_folder(wish: _Wish, base: Path) -> Path | None:
    """The folder of frames that were made with these settings, else that of events; both have the same recordings."""
    frames = base / f"frames_number_{wish.time_steps}_split_by_{wish.split_by}"
    events = base / "events_np"
    for folder in (events, frames) if wish.needs_events else (frames, events):
        if folder.is_dir():
            return folder
    others = sorted(path.name for path in base.glob("frames_number_*_split_by_*"))
    if others:
        raise wish.missing(f"{base} holds {', '.join(others)}, but neither {frames.name} nor events_np")
    return None


def _spikingjelly(folder: Path) -> ClassFolders:
    """Class indices are SpikingJelly's: positions in alphabetical order, where gesture 10 comes before gesture 2."""

    def name(folder_name: str) -> str:
        return _GESTURE.classes[int(folder_name)] if folder_name in map(str, range(11)) else folder_name

    holds_frames = any(part.startswith("frames_number_") for part in folder.parts[-2:])
    if holds_frames:
        return ClassFolders(folder, [".npz"], read=read_frames_npz, holds="frames", names=name)
    return ClassFolders(folder, [".npz"], sensor_size=(128, 128, 2), names=name)


def _open_folder(wish: _Wish) -> tuple[Part, Part]:
    root, suffixes = wish.root, tuple(READERS)
    if wish.sensor_size and len(wish.sensor_size) != 2:
        raise DataError(f"sensor_size must be the sensor's width and height in pixels, got {list(wish.sensor_size)}")
    if (root / "train").is_dir():
        test = evaluation_folder(root, ("test", "val", "validation"))
        if test is None:
            raise wish.missing(f"{root} holds train, but no test")
        sources = [ClassFolders(folder, suffixes) for folder in (root / "train", test)]
        parts = _whole(sources[0]), _whole(sources[1])
    else:
        sources = [ClassFolders(root, suffixes)]
        parts = _first_share(sources[0])
    if not any(source.data for source in sources):
        raise wish.missing(f"{root} holds no recordings{_what_is_in(root)}")
    sensor_size = (wish.sensor_size[0], wish.sensor_size[1], 2) if wish.sensor_size else _find_sensor_size(sources)
    for source in sources:
        source.sensor_size, source.folders = sensor_size, [root]
    return parts


def _find_sensor_size(sources: Sequence[ClassFolders]) -> tuple[int, int, int]:
    """The size in the header of the first AEDAT4 file; if there is none, the smallest that contains every event."""
    for path in (path for source in sources for path in source.data if path.lower().endswith(".aedat4")):
        try:
            return aedat4_sensor_size(path)
        except Exception as error:  # it is reported again where it is read for use
            _log.warning("the sensor size of %s cannot be read: %s", path, error)
    sizes: dict[str, tuple[int, int]] = {}
    failed: list[str] = []
    for source in sources:
        for row, path in enumerate(source.data):
            try:
                events = source[row][0]
                if not len(events):
                    raise ValueError(NO_EVENT)
                sizes[path] = int(events["x"].max()) + 1, int(events["y"].max()) + 1
            except Exception as error:  # it is reported again where it is read for use
                failed.append(f"{path} ({error or type(error).__name__})")
    if not sizes:
        raise DataError(f"none of the recordings can be read; the first is {failed[0]}")
    if failed:
        _log.warning("%d of %d recordings cannot be read: %s", len(failed), len(failed) + len(sizes), failed[0])
    usual = [sorted(sides)[(len(sizes) - 1) // 2] for sides in zip(*sizes.values(), strict=True)]
    for path, size in list(sizes.items()):
        if any(side > _STRAY * most for side, most in zip(size, usual, strict=True)):
            _log.warning(
                "%s has events up to x=%d, y=%d, but half of the recordings end by x=%d, y=%d: it does not count for "
                "the size of the sensor",
                path,
                *(side - 1 for side in (*size, *usual)),
            )
            del sizes[path]
    width, height = (max(sides) for sides in zip(*sizes.values(), strict=True))
    _log.warning(
        "the sensor is assumed to have %d x %d pixels (W x H), the smallest that holds every event; "
        "events.sensor_size=[W,H] sets another size",
        width,
        height,
    )
    return width, height, 2


_OPENERS: dict[str, Callable[[_Wish], tuple[Part, Part]]] = {
    "dvs128_gesture": _open_gesture,
    "cifar10_dvs": _open_cifar10_dvs,
    "cifar10_dvs_tet": _open_tet,
    "n_mnist": _open_nmnist,
    "event_folder": _open_folder,
}

NAMES = tuple(_OPENERS)
"""The event data sets, as named in `build_event_datasets`."""
