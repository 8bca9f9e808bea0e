"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[str], Any]) -> None:
    """Calls `write(temporary name)` and renames the result to `path`, so that a reader never sees half a file.

    If `write` raises, an existing file stays as it was. The temporary name has the suffix of `path`.
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


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, as `write_atomically` does."""
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


@contextmanager
def written_together(folder: Path, *, last: str) -> Iterator[Path]:
    """A new folder for files that belong together; after the block they replace those of their names in `folder`.

    If the block raises, `folder` stays as it was. One of the files, `last`, is taken away before the others are
    replaced and comes after them: where it is, none of them is of another time. `folder` is made if it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{last}.") as name:
        drafts = Path(name)
        yield drafts
        written = sorted(drafts.rglob("*"), key=lambda path: path == drafts / last)
        for path in written:
            sync(path)
        (folder / last).unlink(missing_ok=True)
        for path in written:  # a folder comes before what is in it
            place = folder / path.relative_to(drafts)
            if path.is_dir():
                place.mkdir(exist_ok=True)
            else:
                os.replace(path, place)


def sync(path: Path) -> None:
    """Has the system write a file, or the entries of a folder, to disk before this returns."""
    if path.is_dir():
        if os.name == "nt":  # Windows cannot open folders, and writes their entries with the files
            return
        handle = os.open(path, os.O_RDONLY)
    else:
        # Windows needs a writable handle.
        handle = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0))
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
