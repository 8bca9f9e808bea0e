"""Files under a folder, and arrays from files: none can block, be found twice, or ask for more memory than allowed."""

from __future__ import annotations

import itertools
import logging
import math
import os
import stat
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from sdt_datasets.errors import DataError

LARGEST_CONTENT = 1 << 30
"""Bytes that one file may ask for; read from its headers before anything is allocated."""

_LISTED = 100_000

_log = logging.getLogger(__name__)


def check_regular(path: str | os.PathLike) -> None:
    """Raise `ValueError` for a folder, and for pipes, sockets and devices, whose opening or reading could block."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is no regular file")


def list_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """The files in `folder` with these suffixes, in upper or lower case, sorted by name, without hidden files."""
    found = (path for path in folder.iterdir() if path.name.lower().endswith(tuple(suffixes)))
    return sorted(path for path in found if not path.name.startswith(".") and path.is_file())


def walk_files(folder: Path, seen: set[tuple[int, int]] | None = None) -> Iterator[tuple[str, str]]:
    """The files under `folder` and its subfolders, as relative paths, each with "" or the reason why it is unusable.

    Hidden names are left out. A linked folder is entered unless it is a parent, or in `seen`, the (device, inode) pairs
    of the folders entered so far, to which this call adds: no file is met twice, and no loop is followed. Pipes,
    devices and broken links are not regular files.
    """
    seen = set() if seen is None else seen
    seen |= {folder_id(path) for path in (folder.resolve(), *folder.resolve().parents)}
    waiting = [""]
    while waiting:
        inner = waiting.pop()
        try:
            with os.scandir(folder / inner) as scan:
                entries = sorted((entry for entry in scan if entry.name[0] != "."), key=lambda entry: entry.name)
        except OSError:
            yield inner, "unreadable folder"
            continue
        below = []
        for entry in entries:
            name = os.path.join(inner, entry.name)
            try:
                regular, is_folder = entry.is_file(), entry.is_dir()  # a system call only for links
                identity = folder_id(entry.path) if is_folder else None
            except OSError:  # a circular link
                regular, identity = False, None
            if identity is None:
                yield name, "" if regular else "no regular file"
            elif identity in seen:
                yield name, "link to a folder met before"
            else:
                seen.add(identity)
                below.append(name)
        waiting += reversed(below)


def folder_id(path: str | os.PathLike) -> tuple[int, int]:
    """(device, inode): equal for two paths to the same folder."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def class_folders(folder: Path) -> list[Path]:
    """The folders in `folder`, one per class, in the order of their names, without hidden ones."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def evaluation_folder(root: Path, names: Sequence[str]) -> Path | None:
    """The first of these folders that is in `root`, for evaluation; a warning names others that are passed over."""
    found = [root / name for name in names if (root / name).is_dir()]
    if found[1:]:
        others = " and ".join(path.name for path in found[1:])
        _log.warning("%s: evaluated on %s; %s is passed over", root, found[0].name, others)
    return found[0] if found else None


def distinct_folders(folders: Sequence[Path]) -> set[tuple[int, int]]:
    """The (device, inode) pairs of class folders; `DataError` if a link makes two classes of one folder."""
    by_id: dict[tuple[int, int], Path] = {}
    for path in folders:
        other = by_id.setdefault(folder_id(path), path)
        if other is not path:
            raise DataError(f"the class folders {other} and {path} are one folder by two names; remove the link")
    return set(by_id)


def describe_files(found: Iterable[tuple[str, str]]) -> str:
    """The result of `walk_files` counted by suffix: `3 files: 2 .mat (a/1.mat), 1 .txt (notes.txt)`; "" if empty.

    At most 100,000 files are counted.
    """
    examples: dict[str, list[str]] = {}
    for path, kind in itertools.islice(found, _LISTED):
        ending = kind or os.path.splitext(path)[1].lower() or "without ending"
        examples.setdefault(ending, []).append(path)
    total = sum(map(len, examples.values()))
    if not total:
        return ""
    most = sorted(examples.items(), key=lambda item: -len(item[1]))
    kinds = [f"{len(paths)} {ending} ({paths[0]})" for ending, paths in most[:6]]
    return f"{total} file{'s' * (total > 1)}: {', '.join(kinds)}{', ...' * (len(most) > 6)}"


def read_npy(path: str | os.PathLike) -> np.ndarray:
    """The array of a `.npy` file; never unpickled.

    Raises `ValueError` if the file is not one, or announces more than it has or than `LARGEST_CONTENT`.
    """
    check_regular(path)
    with open(path, "rb") as file:
        announced = _announced_bytes(file)
        held = os.fstat(file.fileno()).st_size - file.tell()
        if announced > held:
            raise ValueError(f"its header announces {announced} bytes, but {held} follow")
        file.seek(0)
        return npy.read_array(file, allow_pickle=False)


class Archive:
    """The arrays of a `.npz` file by name, for use in `with`: `archive[name]`; never unpickled.

    All arrays read from it together have at most `LARGEST_CONTENT` bytes. Raises `ValueError` if one is missing,
    announces more than that, or than its member has.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        check_regular(path)
        self._zip = zipfile.ZipFile(path)
        self._left = LARGEST_CONTENT
        self.names = tuple(name.removesuffix(".npy") for name in self._zip.namelist())

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *error: object) -> None:
        self._zip.close()

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.names:
            raise ValueError(f"it has no array {name!r}, only {', '.join(self.names) or 'nothing'}")
        member = self._zip.namelist()[self.names.index(name)]
        with self._zip.open(member) as file:
            announced, held = _announced_bytes(file), self._zip.getinfo(member).file_size
        if announced > min(held, self._left):
            raise ValueError(f"its array {name!r} announces {announced} bytes, of {held} held and {self._left} allowed")
        self._left -= announced
        with self._zip.open(member) as file:
            return npy.read_array(file, allow_pickle=False)


def _announced_bytes(file: IO[bytes]) -> int:
    """The size of the array whose header is next in `file`, which is left after that header."""
    version = npy.read_magic(file)
    # Version 3 differs from 2 only in the encoding of field names.
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which are not loaded (allow_pickle=False)")
    if min(shape, default=0) < 0 or max(math.prod(shape) * dtype.itemsize, math.prod(shape)) > LARGEST_CONTENT:
        raise ValueError(f"it announces an array {dtype} of shape {shape}; at most {LARGEST_CONTENT} bytes are read")
    return math.prod(shape) * dtype.itemsize
