"""Event recordings on disk, read through Tonic: one reader a format, one source a layout.

A source is a Tonic data set: ``data`` are the files and ``targets`` their class indices, both in an order that does not
depend on the file system; ``source[i]`` reads one recording as ``(array, target)``, where the array is a structured
event array (`EVENT_DTYPE`) or, where ``holds == "frames"``, float32 frames ``[T, 2, H, W]``. Tonic's own classes look
for the archive a data set came in and count its files; the ones here take what lies on disk and never download.
"""

import logging
import os
import pickle
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tonic
import torch
from tonic.io import read_aedat4

from sdt_datasets.errors import IGNORED

_log = logging.getLogger(__name__)

EVENT_DTYPE = np.dtype([("t", np.int64), ("x", np.uint16), ("y", np.uint16), ("p", bool)])
"""The events a source hands out: time as the file has it (microseconds in all data sets here), pixels, polarity."""


class Source(Protocol):
    """What a layout on disk offers; see the module's text."""

    data: list[str]
    targets: list[int]
    classes: Any
    sensor_size: tuple[int, int, int]
    holds: str

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]: ...


def events_from_columns(t: np.ndarray, x: np.ndarray, y: np.ndarray, p: np.ndarray) -> np.ndarray:
    """The columns ``[N]`` of a recording as `EVENT_DTYPE`; polarity is ON where it is positive.

    Raises ValueError for columns of different lengths and for coordinates that are no pixel of any sensor.
    """
    lengths = {name: np.shape(column) for name, column in (("t", t), ("x", x), ("y", y), ("p", p))}
    if len(set(lengths.values())) != 1 or np.ndim(t) != 1:
        raise ValueError(f"the columns t, x, y, p must be of one length, got the shapes {lengths}")
    events = np.empty(len(t), dtype=EVENT_DTYPE)
    for name, column in (("x", x), ("y", y)):
        if len(column) and not 0 <= column.min() <= column.max() <= np.iinfo(np.uint16).max:
            raise ValueError(f"{name} runs from {column.min()} to {column.max()}, which is no range of pixels")
        events[name] = column
    events["t"] = t
    events["p"] = p > 0
    return events


def read_events(path: str | os.PathLike) -> np.ndarray:
    """Reads an event recording ``.aedat4``, ``.npy`` or ``.npz`` as a structured array (`EVENT_DTYPE`) ``[N]``.

    A ``.npy`` file holds the columns ``[N, 4]`` = x, y, p, t or a structured array with these fields; a ``.npz`` file
    the arrays t, x, y, p. Raises whatever the reader of the format raises, ValueError for other contents.
    """
    path = Path(path)
    if path.suffix == ".aedat4":
        events = read_aedat4(str(path))
        return events_from_columns(events["t"], events["x"], events["y"], events["on"])
    loaded = np.load(path, allow_pickle=False)
    if path.suffix == ".npz":
        with loaded:
            return events_from_columns(*(_member(loaded, name) for name in "txyp"))
    if not isinstance(loaded, np.ndarray):
        raise ValueError("it is an archive of arrays, not a .npy array")
    if loaded.dtype.names is not None and set("txyp") <= set(loaded.dtype.names):
        return events_from_columns(*(loaded[name] for name in "txyp"))
    if loaded.ndim != 2 or loaded.shape[1] != 4 or loaded.dtype.kind not in "iuf":
        raise ValueError(f"expected the columns [N, 4] = x, y, p, t, found {loaded.dtype} of shape {loaded.shape}")
    x, y, p, t = loaded.T
    return events_from_columns(t, x, y, p)


def read_frames_npz(path: str | os.PathLike) -> np.ndarray:
    """Reads SpikingJelly's frames: the array ``frames`` ``[T, 2, H, W]`` of a ``.npz`` file, as float32."""
    with np.load(path, allow_pickle=False) as archive:
        return _member(archive, "frames").astype(np.float32)


def _member(archive: Any, name: str) -> np.ndarray:
    if name not in archive:
        raise ValueError(f"it has no array {name!r}, only {', '.join(archive.files) or 'nothing'}")
    return archive[name]


def aedat4_sensor_size(path: str | os.PathLike) -> tuple[int, int, int]:
    """``(W, H, 2)`` from the header of an AEDAT4 file. Raises ValueError where it has no events stream."""
    import aedat

    for _, stream in sorted(aedat.Decoder(str(path)).id_to_stream().items()):
        if stream["type"] == "events":
            return stream["width"], stream["height"], 2
    raise ValueError("it has no stream of events")


def list_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """The files in ``folder`` that end so, sorted by name; hidden files (of macOS, say) are none."""
    found = (path for path in folder.iterdir() if path.suffix in suffixes and not path.name.startswith("."))
    return sorted(path for path in found if path.is_file())


class ClassFolders(tonic.dataset.Dataset):
    """Recordings in one folder a class, ``folder/CLASS/*``, with any sensor.

    The classes are the folders in the order of their names, as torchvision's ``DatasetFolder`` has them.

    Args:
        folder: holds the class folders.
        suffixes: of the files to take; all others are passed over.
        read: one file -> one array.
        sensor_size: ``(W, H, 2)``.
        holds: ``"events"`` or ``"frames"``.
        names: class name by folder name, where they differ.
    """

    def __init__(
        self,
        folder: Path,
        suffixes: Sequence[str],
        *,
        read: Callable[[str], np.ndarray] = read_events,
        sensor_size: tuple[int, int, int] = (128, 128, 2),
        holds: str = "events",
        names: Callable[[str], str] = str,
    ) -> None:
        super().__init__(str(folder))
        self.read, self.sensor_size, self.holds = read, sensor_size, holds
        folders = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        files = {path.name: list_files(path, suffixes) for path in folders}
        for name in [name for name, found in files.items() if not found]:
            _log.warning("%s holds no %s file: it is not taken for a class", folder / name, "/".join(suffixes))
            del files[name]
        self.classes = [names(name) for name in files]
        self.data = [str(path) for found in files.values() for path in found]
        self.targets = [label for label, found in enumerate(files.values()) for _ in found]

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.read(self.data[index]), self.targets[index]

    def __len__(self) -> int:
        return len(self.data)


class CIFAR10DVSFiles(tonic.datasets.CIFAR10DVS):
    """CIFAR10-DVS as Tonic lays it out: ``folder/CLASS/*.aedat4``, sorted by class and name."""

    holds = "events"

    def __init__(self, folder: Path) -> None:
        tonic.dataset.Dataset.__init__(self, str(folder))
        absent = []
        for name, label in self.classes.items():
            found = list_files(folder / name, [".aedat4"]) if (folder / name).is_dir() else []
            self.data += [str(path) for path in found]
            self.targets += [label] * len(found)
            absent += [] if found else [name]
        if absent:
            _log.warning("CIFAR10-DVS in %s has no recording of %s", folder, ", ".join(absent))

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        events, target = super().__getitem__(index)
        return events_from_columns(*(events[name] for name in "txyp")), target


class DVSGestureFiles(tonic.datasets.DVSGesture):
    """One split of DVS128 Gesture as Tonic lays it out: ``split/userNN_LIGHT/LABEL.npy``, sorted.

    Times are microseconds, whatever integer type the files keep their milliseconds in.
    """

    holds = "events"

    def __init__(self, split: Path) -> None:
        tonic.dataset.Dataset.__init__(self, str(split))
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
                "%d files are no gesture userNN_LIGHT/0..10.npy and are passed over: %s", len(strays), strays[0]
            )

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        events = read_events(self.data[index])
        events["t"] *= 1000
        return events, self.targets[index]


class NMNISTFiles(tonic.datasets.NMNIST):
    """One split of N-MNIST as Tonic lays it out: ``split/DIGIT/*.bin``, sorted."""

    holds = "events"

    first_saccade_only = stabilize = False

    def __init__(self, split: Path) -> None:
        tonic.dataset.Dataset.__init__(self, str(split))
        for digit in range(10):
            found = list_files(split / str(digit), [".bin"]) if (split / str(digit)).is_dir() else []
            self.data += [str(path) for path in found]
            self.targets += [digit] * len(found)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        path = self.data[index]
        if os.path.getsize(path) % 5:
            raise ValueError(f"its {os.path.getsize(path)} bytes are not a multiple of 5, the size of an event")
        events, target = super().__getitem__(index)
        return events_from_columns(*(events[name] for name in "txyp")), target


class TETFrames(tonic.dataset.Dataset):
    """CIFAR10-DVS frames in the layout of TET: ``folder/N.pt``, a tuple of frames ``[2, H, W, T]`` and a label.

    Nothing but tensors is unpickled. A file whose label cannot be read has the target `IGNORED`, and fails when it
    is read.
    """

    holds = "frames"
    sensor_size = (128, 128, 2)
    classes = tuple(tonic.datasets.CIFAR10DVS.classes)

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
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
        return np.ascontiguousarray(frames.permute(3, 0, 1, 2).to(torch.float32).numpy()), target

    def __len__(self) -> int:
        return len(self.data)

    def _load(self, path: str) -> tuple[torch.Tensor, int]:
        try:
            try:
                content = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
            except RuntimeError:  # written by torch < 1.6, which knew no format to map
                content = torch.load(path, weights_only=True, map_location="cpu")
        except pickle.UnpicklingError as error:  # torch's advice here is to unpickle the file in full
            raise ValueError("it is damaged, or holds more than tensors and numbers") from error
        if not isinstance(content, tuple | list) or len(content) != 2 or not isinstance(content[0], torch.Tensor):
            raise ValueError("it is not a tuple of frames and a label")
        frames, label = content
        label = int(torch.as_tensor(label))
        if frames.ndim != 4 or frames.shape[0] != 2 or not 0 <= label < len(self.classes):
            raise ValueError(f"expected frames [2, H, W, T] and a label 0..9, found {list(frames.shape)} and {label}")
        return frames, label
