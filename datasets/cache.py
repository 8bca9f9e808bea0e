"""Arrays kept on disk under a key that contains everything they were made from."""

import contextlib
import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdt_datasets.files import Archive

_log = logging.getLogger(__name__)
_ABANDONED = 24 * 3600  # seconds after which a temporary file counts as left by a writer that was killed


@dataclass(frozen=True)
class CacheSize:
    """The number of entries in a cache folder, and their total size."""

    entries: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.entries} entr{'y' if self.entries == 1 else 'ies'}, {self.bytes / 1e6:.1f} MB"


class ArrayCache:
    """A folder of arrays, one file per key.

    An entry is written under a temporary name and moved into place, so that any number of processes may fill an empty
    cache at once. It contains its key and a checksum: an entry that is damaged, not a file, or belongs to another key
    is made again, with a warning. A folder may be deleted at any time; nothing in it is ever unpickled.

    `folder` is created if it is missing. Raises `OSError`, whose message says what to do, if it cannot be created or
    written.

    >>> cache = ArrayCache("frames_cache")
    >>> frames = cache.get({"file": "a.aedat4", "time_steps": 10}, make_frames)
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder).expanduser().resolve()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self._temporary(self.folder / "probe")
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise type(error)(
                error.errno,
                f"cannot write the cache folder {self.folder} ({error.strerror}); "
                "name another one with events.cache=FOLDER, or turn the cache off with events.cache=null",
            ) from error
        self._full = False
        for path in self.folder.glob("??/.*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _ABANDONED:
                    path.unlink()

    def get(self, key: Mapping[str, object], make: Callable[[], np.ndarray]) -> np.ndarray:
        """The array of `key`: read from disk, or made by `make` and kept.

        Float32 counts are returned as float32, even if they were kept in a narrower type.
        """
        text = json.dumps(key, sort_keys=True)
        path = self._path(text)
        try:
            with Archive(path) as entry:
                if str(entry["key"]) == text:
                    array = entry["array"]
                    return array.astype(np.float32) if array.dtype.kind == "u" else array
                raise ValueError("it belongs to another key")
        except FileNotFoundError:
            pass
        except Exception as error:  # a damaged archive raises nearly anything
            _log.warning("cache entry %s is damaged (%s): it is made again", path, error)
        array = make()
        self._write(path, array, text)
        return array

    def __contains__(self, key: Mapping[str, object]) -> bool:
        return self._path(json.dumps(key, sort_keys=True)).exists()

    def size(self) -> CacheSize:
        """The number and total size of the entries, counted on disk."""
        sizes = [path.stat().st_size for path in self.folder.glob("??/*.npz") if path.is_file()]
        return CacheSize(entries=len(sizes), bytes=sum(sizes))

    def _path(self, text: str) -> Path:
        name = hashlib.sha256(text.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.npz"

    def _write(self, path: Path, array: np.ndarray, text: str) -> None:
        temporary = self._temporary(path)
        try:
            path.parent.mkdir(exist_ok=True)
            with open(temporary, "wb") as file:
                np.savez(file, array=_narrowed(array), key=np.array(text))
            os.replace(temporary, path)
        except OSError as error:
            if not self._full:
                _log.warning("cannot write %s to the cache (%s): continuing without it", path, error.strerror)
            self._full = True
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    @staticmethod
    def _temporary(path: Path) -> Path:
        return path.with_name(f".{path.stem[:16]}-{uuid.uuid4().hex}.tmp")


def _narrowed(array: np.ndarray) -> np.ndarray:
    """Float32 counts in the narrowest unsigned type that holds them exactly; any other array as it is."""
    if array.dtype == np.float32 and array.size and array.min() >= 0:
        for dtype in (np.uint8, np.uint16):
            if array.max() <= np.iinfo(dtype).max and np.array_equal(narrow := array.astype(dtype), array):
                return narrow
    return array
