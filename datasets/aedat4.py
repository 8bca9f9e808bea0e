"""AEDAT4: the sizes that a file announces are checked before the decoder, which trusts them, sees the file."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from typing import IO, Any
from xml.etree import ElementTree

import numpy as np

from sdt_datasets.columns import LARGEST_SIDE
from sdt_datasets.files import LARGEST_CONTENT, check_regular
from sdt_datasets.raw_formats import Columns

LARGEST_PACKET = 1 << 27
"""Bytes that a packet may unpack to; cameras write some thousand events of 16 bytes at a time."""

_NONE, _LZ4, _ZSTD = {0}, {1, 2}, {3, 4}
_LZ4_MAGIC, _ZSTD_MAGIC, _SKIPPABLE = 0x184D2204, 0xFD2FB528, range(0x184D2A50, 0x184D2A60)
_LZ4_MOST = 255
"""Bytes that one byte of LZ4 can stand for."""
_ZSTD_BLOCK = 1 << 17


def read_aedat4(path: str | os.PathLike) -> Columns:
    """The first event stream of an AEDAT4 file: columns `[N]` t (us), x, y, p.

    Raises `ValueError` for a damaged file, and for one that asks for more memory than allowed.
    """
    check_aedat4(path)
    with _no_panic():
        decoder = _decoder(path)
        wanted = _events_stream(decoder)[0]
        parts, size = [], 0
        for packet in decoder:
            if packet["stream_id"] != wanted:
                continue
            parts.append(packet["events"])
            size += parts[-1].nbytes
            if size > LARGEST_CONTENT:
                raise ValueError(f"its events take more than {LARGEST_CONTENT} bytes, the largest size that is read")
    events = np.concatenate(parts) if parts else np.zeros(0, dtype=[(name, np.int64) for name in ("t", "x", "y", "on")])
    return events["t"], events["x"], events["y"], events["on"]


def aedat4_sensor_size(path: str | os.PathLike) -> tuple[int, int, int]:
    """`(W, H, 2)` from the header of an AEDAT4 file.

    Raises `ValueError` if it has no event stream of such a size.
    """
    check_aedat4(path)
    with _no_panic():
        _, stream = _events_stream(_decoder(path))
    width, height = stream["width"], stream["height"]
    if not 0 < width <= LARGEST_SIDE or not 0 < height <= LARGEST_SIDE:
        raise ValueError(f"its sensor of {width} x {height} pixels is not that of an event camera")
    return width, height, 2


def _decoder(path: str | os.PathLike) -> Any:
    import aedat

    return aedat.Decoder(str(path))


def _events_stream(decoder: Any) -> tuple[int, dict[str, Any]]:
    streams = sorted(decoder.id_to_stream().items())
    found = next(((number, stream) for number, stream in streams if stream["type"] == "events"), None)
    if found is None:
        raise ValueError("it has no stream of events")
    return found


@contextlib.contextmanager
def _no_panic() -> Iterator[None]:
    """The decoder panics on some damaged files, which is not an `Exception`: raise `ValueError` instead."""
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise ValueError(f"the decoder of AEDAT4 gave up on it ({error})") from error


def check_aedat4(path: str | os.PathLike) -> None:
    """Raise `ValueError` if an AEDAT4 file's header is damaged, or a packet is too large, compressed or not.

    The decoder ends the process on some such headers, and allocates as much memory as a packet announces.
    """
    check_regular(path)
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        try:
            version, length = struct.unpack("<14sI", file.read(18))
            if version != b"#!AER-DAT4.0\r\n" or length > size - 18:
                raise ValueError(f"it begins with {version!r} and {length} bytes of header, of {size} in all")
            compression, end = _header(file.read(length))
        except (struct.error, UnicodeDecodeError, ElementTree.ParseError) as error:
            raise ValueError(f"its header is damaged ({error})") from error
        at = 18 + length
        while at != end and at + 8 <= size:
            file.seek(at + 4)
            (length,) = struct.unpack("<I", file.read(4))
            at += 8 + length
            if at > size:
                raise ValueError(f"a packet announces {length} bytes, which ends {at - size} bytes behind the file")
            try:
                unpacked = _most(file, at, compression)
            except struct.error as error:
                raise ValueError(f"the packet that ends at byte {at} is damaged ({error})") from error
            if unpacked > LARGEST_PACKET:
                raise ValueError(
                    f"a packet of {length} bytes may unpack to {unpacked}; at most {LARGEST_PACKET} are read"
                )
        if at != end and end >= 0:
            raise ValueError(f"it is cut off: its packets should end at byte {end}, and it has {size} bytes")


def _header(header: bytes) -> tuple[int, int]:
    """The compression of the packets, and where the index behind the last of them begins, or -1 if there is none.

    The header is a FlatBuffers table: compression, this position, and an XML text that describes the streams.
    """
    (table,) = struct.unpack_from("<I", header)
    (distance,) = struct.unpack_from("<i", header, table)
    if not 0 <= table - distance <= len(header) - 10:
        raise ValueError(f"its header has a table at {table - distance} of {len(header)} bytes")
    _, _, compression, index, text = struct.unpack_from("<5H", header, table - distance)
    start = table + text
    start += struct.unpack_from("<I", header, start)[0]
    (length,) = struct.unpack_from("<I", header, start)
    ElementTree.fromstring(header[start + 4 : start + 4 + length].decode())
    kind: int = struct.unpack_from("<i", header, table + compression)[0] if compression else 0
    place: int = struct.unpack_from("<q", header, table + index)[0] if index else -1
    return kind, place


def _most(file: IO[bytes], end: int, compression: int) -> int:
    """The most bytes that the file's content from its position to `end` can unpack to, from its blocks' headers."""
    if compression in _NONE:
        return end - file.tell()
    if compression not in _LZ4 | _ZSTD:
        raise ValueError(f"its packets have an unknown compression ({compression})")
    total = 0
    while file.tell() + 4 <= end and total <= LARGEST_PACKET:
        (magic,) = _take("<I", file)
        if magic in _SKIPPABLE:
            file.seek(_take("<I", file)[0], os.SEEK_CUR)
        elif magic == _LZ4_MAGIC and compression in _LZ4:
            total += _lz4_most(file, end)
        elif magic == _ZSTD_MAGIC and compression in _ZSTD:
            total += _zstd_most(file, end)
        else:
            raise ValueError(f"a packet begins with {magic:#010x}; its compression begins otherwise")
    return total


def _lz4_most(file: IO[bytes], end: int) -> int:
    """`_most` for an LZ4 frame: a block unpacks to at most 255 times its bytes, and to the frame's block size."""
    flags, sizes = _take("<BB", file)
    file.seek((8 if flags & 8 else 0) + (4 if flags & 1 else 0) + 1, os.SEEK_CUR)
    largest, total = 1 << 8 + 2 * max(sizes >> 4 & 7, 4), 0
    while file.tell() < end and total <= LARGEST_PACKET:
        (length,) = _take("<I", file)
        if not length:
            file.seek(4 if flags & 4 else 0, os.SEEK_CUR)
            break
        plain, length = length >> 31, length & 0x7FFFFFFF
        total += length if plain else min(largest, _LZ4_MOST * length)
        file.seek(length + (4 if flags & 16 else 0), os.SEEK_CUR)
    return total


def _zstd_most(file: IO[bytes], end: int) -> int:
    """`_most` for a Zstandard frame (RFC 8878): 128 KiB for a compressed block, for others the size in its header.

    The window, which the decoder allocates, counts if it is larger.
    """
    (flags,) = _take("<B", file)
    single = flags >> 5 & 1
    window = 0
    if not single:
        (value,) = _take("<B", file)
        window = (1 << 10 + (value >> 3)) // 8 * (8 + (value & 7))
    file.seek((0, 1, 2, 4)[flags & 3], os.SEEK_CUR)
    content = file.read((single, 2, 4, 8)[flags >> 6])
    announced, total, last = int.from_bytes(content, "little"), 0, False
    while not last and file.tell() < end and total <= LARGEST_PACKET:
        header = int.from_bytes(file.read(3), "little")
        last, kind, length = bool(header & 1), header >> 1 & 3, header >> 3
        total += _ZSTD_BLOCK if kind == 2 else length
        file.seek(1 if kind == 1 else length, os.SEEK_CUR)
    file.seek(4 if flags & 4 else 0, os.SEEK_CUR)
    return max(total, window, announced)


def _take(layout: str, file: IO[bytes]) -> tuple[int, ...]:
    return struct.unpack(layout, file.read(struct.calcsize(layout)))
