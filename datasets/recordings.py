"""Event recordings on disk: one reader per format; their content is checked in `columns`, its size in `files`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sdt_datasets.aedat4 import read_aedat4
from sdt_datasets.columns import (
    Note,
    Notes,
    columns_of_table,
    events_from_columns,
    frames_from_counts,
    named_columns,
)
from sdt_datasets.files import Archive, read_npy
from sdt_datasets.raw_formats import Columns, read_aedat, read_bin, read_dat


def read_events(path: str | os.PathLike, *, note: Note | None = None) -> np.ndarray:
    """Reads an event recording as structured events `[N]` of `EVENT_DTYPE`, in order of time.

    The format follows from the suffix, in upper or lower case: `.aedat4`, `.aedat` (2.0 of a DVS128, or 3.1), `.bin`
    (N-MNIST, N-Caltech101), `.dat` (Prophesee), `.npy` (the columns `[N, 4]` = x, y, p, t, or a structured array) or
    `.npz` (arrays t, x, y, p, or one array as in a `.npy`). Conversions are reported to `note`; see
    `events_from_columns`.

    Raises whatever the reader of a format raises, and `ValueError` for contents that are not events, for a path that is
    not a regular file and for a file that asks for more memory than allowed.

    >>> events = read_events("recording.npz")
    >>> events["t"], events["x"], events["y"], events["p"]
    """
    read = READERS.get(Path(path).suffix.lower())
    if read is None:
        raise ValueError(f"recordings are read from {', '.join(READERS)} files; save the columns as t, x, y, p in .npz")
    if note is None:
        note = Notes()
        note.name = str(path)
    return events_from_columns(*read(path), note=note)


def _columns_of_array(array: np.ndarray) -> list[np.ndarray]:
    if array.dtype.names is not None:
        return named_columns(array, array.dtype.names)
    return columns_of_table(array)


def _read_npy(path: str | os.PathLike) -> list[np.ndarray]:
    return _columns_of_array(read_npy(path))


def _read_npz(path: str | os.PathLike) -> list[np.ndarray]:
    with Archive(path) as archive:
        if len(archive.names) == 1:
            return _columns_of_array(archive[archive.names[0]])
        return named_columns(archive, archive.names)


READERS: dict[str, Callable[[str | os.PathLike], Columns | list[np.ndarray]]] = {
    ".aedat4": read_aedat4,
    ".aedat": read_aedat,
    ".bin": read_bin,
    ".dat": read_dat,
    ".npy": _read_npy,
    ".npz": _read_npz,
}
"""The readers of the columns t, x, y, p `[N]` of a recording, by the suffix of its name."""


def read_frames_npz(path: str | os.PathLike) -> np.ndarray:
    """Reads SpikingJelly's frames, the array `frames` of a `.npz` file, as float32 `[T, 2, H, W]`.

    Raises `ValueError` if there is none, or if it is not an array of finite counts.
    """
    with Archive(path) as archive:
        return frames_from_counts(archive["frames"])
