"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[str], Any]) -> None:
    """Calls `write(temporary name)` and renames the result to `path`, so that a reader never sees half a file.

    Where `write` raises, the file that was there stays. The temporary name ends as `path` does.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    try:
        write(temporary)
        sync(Path(temporary))
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Has the system write a file, or the names in a folder, to its disk before this returns."""
    if path.is_dir():
        if os.name == "nt":  # which opens no folders, and writes their names with the files
            return
        handle = os.open(path, os.O_RDONLY)
    else:
        # Windows refuses a handle that cannot write.
        handle = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
