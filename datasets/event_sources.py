"""Event data sets on disk: one source per layout.

A source is a Tonic data set: `data` are the files and `targets` their class indices, both in an order that does not
depend on the file system; `source[i]` reads one recording as `(array, target)`, where the array is a structured event
array (`EVENT_DTYPE`) or, if `holds == "frames"`, float32 frames `[T, 2, H, W]`. Tonic's own classes look for the
archive of a data set and count its files; the ones here use the files on disk and never download.
"""

from __future__ import annotations

import csv
import logging
import pickle
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tonic
import torch

from sdt_datasets.columns import Notes, frames_from_counts
from sdt_datasets.errors import IGNORED, DataError
from sdt_datasets.files import LARGEST_CONTENT, check_regular, class_folders, distinct_folders, list_files, walk_files
from sdt_datasets.recordings import read_events

_log = logging.getLogger(__name__)


class Source(Protocol):
    """The interface of a layout on disk; see the module's text."""

    data: list[str]
    targets: list[int]
    classes: Any
    sensor_size: tuple[int, int, int]
    holds: str
    folders: list[Path]
    """The folder with its files; other files there are ignored."""

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]: ...


class ClassFolders(tonic.dataset.Dataset):
    """Recordings in one folder per class, `folder/CLASS/**`, with any sensor.

    The classes are the folders in the order of their names, as in torchvision's `DatasetFolder`; subfolders (for
    example of sessions) belong to their class.

    Of the files in `folder`, those with one of the `suffixes` are used, in upper or lower case; all others are ignored.
    `read` makes one array of a file, with `note` as in `read_events`; None reads events. The arrays are `"events"` or
    `"frames"` (`holds`) of a sensor of the size `(W, H, 2)`. `names` gives the class for a folder's name, if they
    differ.

    Raises `DataError` if two class folders are the same folder under two names.
    """

    def __init__(
        self,
        folder: Path,
        suffixes: Sequence[str],
        *,
        read: Callable[[str], np.ndarray] | None = None,
        sensor_size: tuple[int, int, int] = (128, 128, 2),
        holds: str = "events",
        names: Callable[[str], str] = str,
    ) -> None:
        super().__init__(str(folder))
        self.read, self.sensor_size, self.holds = read, sensor_size, holds
        self.note, self.folders = Notes(), [folder]
        folders = class_folders(folder)
        seen = distinct_folders(folders)
        files = {
            path.name: sorted(
                str(path / name)
                for name, trouble in walk_files(path, seen)
                if not trouble and name.lower().endswith(tuple(suffixes))
            )
            for path in folders
        }
        for name in [name for name, found in files.items() if not found]:
            _log.warning("%s holds no %s file: it does not count as a class", folder / name, "/".join(suffixes))
            del files[name]
        self.classes = [names(name) for name in files]
        self.data = [path for found in files.values() for path in found]
        self.targets = [label for label, found in enumerate(files.values()) for _ in found]

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        path = self.data[index]
        return self.read(path) if self.read else _read_noted(path, self.note), self.targets[index]

    def __len__(self) -> int:
        return len(self.data)


def _read_noted(path: str, note: Notes) -> np.ndarray:
    note.name = path
    return read_events(path, note=note)


def read_recording_of(name: str, path: str, note: Notes) -> np.ndarray:
    """The events of a recording of the data set `name`, with times in microseconds.

    Tonic's `.npy` files of DVS128 Gesture have milliseconds, whatever their integer type.
    """
    events = _read_noted(path, note)
    if name == "dvs128_gesture" and path.lower().endswith(".npy"):
        events["t"] *= 1000
    return events


class CIFAR10DVSFiles(tonic.datasets.CIFAR10DVS):
    """CIFAR10-DVS, `folder/CLASS/*` sorted by class and name: Tonic's `.aedat4`, or the original's `.aedat`."""

    holds = "events"

    def __init__(self, folder: Path, suffix: str = ".aedat4") -> None:
        tonic.dataset.Dataset.__init__(self, str(folder))
        self.note, self.folders = Notes(), []
        for name, label in self.classes.items():
            found = list_files(folder / name, [suffix]) if (folder / name).is_dir() else []
            self.data += [str(path) for path in found]
            self.targets += [label] * len(found)
            self.folders += [folder / name] * bool(found)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return _read_noted(self.data[index], self.note), self.targets[index]


class DVSGestureFiles(tonic.datasets.DVSGesture):
    """One split of DVS128 Gesture as Tonic lays it out: `split/userNN_LIGHT/LABEL.npy`, sorted."""

    holds = "events"

    def __init__(self, split: Path) -> None:
        tonic.dataset.Dataset.__init__(self, str(split))
        self.note, self.folders = Notes(), [split]
        labels = {str(label) for label in range(len(self.classes))}
        strays = []
        for user in sorted(path for path in split.iterdir() if path.is_dir()):
            for path in list_files(user, [".npy"]):
                if re.match(r"user\d+_", user.name) and path.stem in labels:
                    self.data.append(str(path))
                    self.targets.append(int(path.stem))
                else:
                    strays.append(path)
        if strays:
            _log.warning(
                "%d files are not of a gesture, userNN_LIGHT/0..10.npy, and are ignored: %s", len(strays), strays[0]
            )

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return read_recording_of("dvs128_gesture", self.data[index], self.note), self.targets[index]


class DVSGestureRecordings(tonic.dataset.Dataset):
    """One split of DVS128 Gesture as it was published: `userNN_LIGHT.aedat`, each with many gestures.

    `trials` lists the recordings of the split; next to each is `userNN_LIGHT_labels.csv` with the rows class (1..11),
    first and last time (us, the last excluded), each of which is a sample.

    Raises `DataError` if a recording or its labels are missing, or the labels are damaged.
    """

    holds = "events"
    sensor_size = tonic.datasets.DVSGesture.sensor_size
    classes = tuple(tonic.datasets.DVSGesture.classes)

    def __init__(self, trials: Path) -> None:
        super().__init__(str(trials.parent))
        self.note, self.folders = Notes(), [trials.parent]
        self.segments: list[tuple[int, int]] = []
        """First and last time (us) of each sample in its recording."""
        for line in _text(trials).split():
            recording = trials.parent / line
            table = recording.with_name(f"{recording.stem}_labels.csv")
            for path in (recording, table):
                if not path.is_file():
                    raise DataError(f"{trials} lists {line}, but {path} is not there; extract the archive again")
            for number, row in enumerate(list(csv.reader(_text(table).splitlines()))[1:], start=2):
                try:
                    label, start, end = (int(value) for value in row[:3])
                except ValueError:
                    label = start = end = 0
                if not 1 <= label <= len(self.classes) or not 0 <= start < end:
                    raise DataError(f"{table}, line {number}: expected class 1..11, first and last time, found {row}")
                self.data.append(str(recording))
                self.targets.append(label - 1)
                self.segments.append((start, end))
        self._last: tuple[str, np.ndarray] = ("", np.zeros(0))

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        path = self.data[index]
        if self._last[0] != path:  # when a cache is filled, the samples of a recording come one after another
            self._last = path, _read_noted(path, self.note)
        events, (start, end) = self._last[1], self.segments[index]
        first, last = np.searchsorted(events["t"], (start, end))
        return events[first:last].copy(), self.targets[index]

    def __len__(self) -> int:
        return len(self.data)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); extract the archive again") from error


class NMNISTFiles(tonic.datasets.NMNIST):
    """One split of N-MNIST as Tonic lays it out: `split/DIGIT/*.bin`, sorted."""

    holds = "events"

    def __init__(self, split: Path) -> None:
        tonic.dataset.Dataset.__init__(self, str(split))
        self.note, self.folders = Notes(), [split]
        for digit in range(10):
            found = list_files(split / str(digit), [".bin"]) if (split / str(digit)).is_dir() else []
            self.data += [str(path) for path in found]
            self.targets += [digit] * len(found)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return _read_noted(self.data[index], self.note), self.targets[index]


class TETFrames(tonic.dataset.Dataset):
    """CIFAR10-DVS frames in the layout of TET: `folder/N.pt`, a tuple of frames `[2, H, W, T]` and a label.

    Only tensors are unpickled. A file whose label cannot be read has the target `IGNORED`, and fails when it is read.
    """

    holds = "frames"
    sensor_size = (128, 128, 2)
    classes = tuple(tonic.datasets.CIFAR10DVS.classes)

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folders = [folder]
        numbered = [path for path in list_files(folder, [".pt"]) if path.stem.isdecimal()]
        self.data = [str(path) for path in sorted(numbered, key=lambda path: int(path.stem))]
        for path in self.data:
            try:
                self.targets.append(self._load(path)[1])
            except Exception as error:  # a damaged file may raise nearly anything
                _log.warning("the label of %s cannot be read: %s", path, str(error) or type(error).__name__)
                self.targets.append(IGNORED)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        frames, target = self._load(self.data[index])
        return frames_from_counts(frames.permute(3, 0, 1, 2).numpy()), target

    def __len__(self) -> int:
        return len(self.data)

    def _load(self, path: str) -> tuple[torch.Tensor, int]:
        check_regular(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(member.file_size for member in archive.infolist())
            if unpacked > LARGEST_CONTENT:
                raise ValueError(f"it unpacks to {unpacked} bytes; at most {LARGEST_CONTENT} are read")
        try:
            try:
                content = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
            except RuntimeError:  # written by torch < 1.6, in a format that cannot be memory-mapped
                content = torch.load(path, weights_only=True, map_location="cpu")
        except pickle.UnpicklingError as error:  # torch's advice here is to unpickle the file in full
            raise ValueError("it is damaged, or holds more than tensors and numbers") from error
        if not isinstance(content, tuple | list) or len(content) != 2 or not isinstance(content[0], torch.Tensor):
            raise ValueError("it is not a tuple of frames and a label")
        frames, label = content
        number = float(torch.as_tensor(label))
        if frames.ndim != 4 or frames.shape[0] != 2 or number not in range(len(self.classes)):
            raise ValueError(f"expected frames [2, H, W, T] and a label 0..9, found {list(frames.shape)} and {label}")
        # A tensor may have strides over less memory than it shows, and numpy() makes sparse ones dense.
        if frames.layout != torch.strided or frames.numel() * 4 > LARGEST_CONTENT:
            raise ValueError(f"its frames {list(frames.shape)} are sparse or hold over {LARGEST_CONTENT} bytes")
        return frames.float() if frames.dtype == torch.bfloat16 else frames, int(number)
