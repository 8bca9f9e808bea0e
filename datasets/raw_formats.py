"""Recordings in the binary formats in which the data sets were published, as columns t, x, y, p.

AEDAT 2.0 and 3.1 are parsed here: Tonic 1.7's own readers of them cannot be called (they unpack two values of three),
and the functions below them take every packet for polarity events and allocate as much memory as a packet announces.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np

from sdt_datasets.files import LARGEST_CONTENT, check_regular

Columns = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

_PACKET = struct.Struct("<HHIIIIII")  # type, source, event size, offset of the time, overflow, capacity, number, valid
_POLARITY_PACKET = 1


def _content(path: str | os.PathLike) -> bytes:
    check_regular(path)
    if (size := os.path.getsize(path)) > LARGEST_CONTENT:
        raise ValueError(f"it has {size} bytes; at most {LARGEST_CONTENT} are read")
    return Path(path).read_bytes()


def _header(content: bytes, mark: bytes, last: bytes = b"") -> tuple[list[bytes], int]:
    """The lines at the beginning that start with `mark`, up to `last` if there is one, and where they end."""
    lines: list[bytes] = []
    start = 0
    while content[start : start + 1] == mark and (not last or not lines or lines[-1] != last):
        end = content.find(b"\n", start) + 1 or len(content)
        lines.append(content[start:end].strip())
        start = end
    return lines, start


def read_aedat(path: str | os.PathLike) -> Columns:
    """AEDAT 2.0 of a DVS128 (such as CIFAR10-DVS) or AEDAT 3.1 (such as DVS128 Gesture): columns `[N]` t (us), x, y, p.

    Pixels of a DVS128 are flipped as in the data set's own readers. Raises `ValueError` for another version or camera,
    and for packets that are cut off.
    """
    content = _content(path)
    lines, start = _header(content, b"#", last=b"#!END-HEADER")
    version = lines[0] if lines else content[:20]
    if version.startswith(b"#!AER-DAT2"):
        return _aedat2(content[start:])
    if version.startswith(b"#!AER-DAT3"):
        return _aedat3(content[start:])
    raise ValueError(f"expected AEDAT 2.0 or 3.1, its first line is {version[:20]!r}")


def _aedat2(body: bytes) -> Columns:
    if len(body) % 8:
        raise ValueError(f"the {len(body)} bytes after its header are not a multiple of 8, the size of an event")
    address, t = np.frombuffer(body, dtype=">u4").astype(np.int64).reshape(-1, 2).T
    # The highest of 16 bits marks triggers; the bits above are set by other cameras.
    if len(address) and address.max() >= 1 << 16:
        row = int(np.argmax(address >= 1 << 16))
        raise ValueError(
            f"the address {address[row]:#x} in row {row} is of another camera than a DVS128; save the recording as "
            f"AEDAT4, or its columns with np.savez(FILE, t=..., x=..., y=..., p=...)"
        )
    pixel = address < 1 << 15
    address, t = address[pixel], t[pixel]
    return t, 127 - (address >> 8 & 0x7F), 127 - (address >> 1 & 0x7F), 1 - (address & 1)


def _aedat3(body: bytes) -> Columns:
    words, times, at = [], [], 0
    while at < len(body):
        if len(body) - at < _PACKET.size:
            raise ValueError(f"the header of its last packet is cut off after {len(body) - at} bytes")
        kind, _, size, _, overflow, capacity, number, _ = _PACKET.unpack_from(body, at)
        at += _PACKET.size
        if size * capacity > len(body) - at or number > capacity:
            raise ValueError(f"a packet announces {capacity} events of {size} bytes, but {len(body) - at} bytes follow")
        if kind == _POLARITY_PACKET:
            if size != 8:
                raise ValueError(f"a packet has polarity events of {size} bytes, expected 8")
            word, t = np.frombuffer(body, dtype="<u4", count=2 * number, offset=at).reshape(-1, 2).T.astype(np.int64)
            valid = (word & 1).astype(bool)
            words.append(word[valid])
            times.append(t[valid] + (overflow << 31))
        at += size * capacity
    word, t = (np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64) for parts in (words, times))
    return t, word >> 17 & 0x7FFF, word >> 2 & 0x7FFF, word >> 1 & 1


def read_bin(path: str | os.PathLike) -> Columns:
    """N-MNIST and N-Caltech101, five bytes per event, through Tonic's reader: columns `[N]` t (us), x, y, p."""
    from tonic.io import read_mnist_file

    content = np.frombuffer(_content(path), dtype=np.uint8)
    if len(content) % 5:
        raise ValueError(f"its {len(content)} bytes are not a multiple of 5, the size of an event")
    # Tonic's reader scans the rest of the file at each of these, which mark 8 ms.
    overflows = np.count_nonzero(content[1::5] == 240)
    if overflows * len(content) > 10**10:
        raise ValueError(f"{overflows} of its events are overflows of the clock, so it is not such a recording")
    events = read_mnist_file(str(path), dtype=np.dtype([(name, np.int64) for name in "xytp"]))
    return events["t"], events["x"], events["y"], events["p"]


def read_dat(path: str | os.PathLike) -> Columns:
    """Prophesee's DAT, version 1 or 2, with CD events (such as N-Cars): columns `[N]` t (us), x, y, p.

    Raises `ValueError` for another version or kind of events.
    """
    content = _content(path)
    header, start = _header(content, b"%")
    version = next((line.split()[-1] for line in header if line.lower().startswith(b"% version")), b"none")
    if version not in (b"1", b"2"):
        raise ValueError(
            f"expected a DAT file of version 1 or 2, found version {version!r}; it begins {content[:20]!r}"
        )
    if len(content) - start < 2 or content[start] not in (0, 12) or content[start + 1] != 8:
        raise ValueError(f"expected CD events of 8 bytes, found {content[start : start + 2]!r} after its header")
    body = content[start + 2 :]
    if len(body) % 8:
        raise ValueError(f"the {len(body)} bytes after its header are not a multiple of 8, the size of an event")
    t, word = np.frombuffer(body, dtype="<u4").astype(np.int64).reshape(-1, 2).T
    if version == b"1":
        return t, word & 0x1FF, word >> 9 & 0xFF, word >> 17 & 1
    return t, word & 0x3FFF, word >> 14 & 0x3FFF, word >> 28 & 1
