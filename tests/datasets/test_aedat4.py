"""AEDAT4: what is written is read, and no file ends the process or asks for more memory than it may."""

import struct

import dv_processing
import numpy as np
import pytest

from sdt_datasets import aedat4
from sdt_datasets.aedat4 import aedat4_sensor_size, check_aedat4, read_aedat4
from sdt_datasets.recordings import read_events

KINDS = {"none": 0, "lz4": 1, "lz4 high": 2, "zstd": 3, "zstd high": 4}


def with_first_packet_of(length, aedat4):
    at = 18 + int.from_bytes(aedat4[14:18], "little")
    return aedat4[: at + 4] + length.to_bytes(4, "little") + aedat4[at + 8 :]


def holding(whole, kind, *packets):
    """The file with the header of `whole`, for packets so compressed, and no index."""
    length = int.from_bytes(whole[14:18], "little")
    header = bytearray(whole[18 : 18 + length])
    (table,) = struct.unpack_from("<I", header)
    (distance,) = struct.unpack_from("<i", header, table)
    _, _, compression, index, _ = struct.unpack_from("<5H", header, table - distance)
    struct.pack_into("<i", header, table + compression, kind)
    struct.pack_into("<q", header, table + index, -1)
    parts = [struct.pack("<II", 0, len(packet)) + packet for packet in packets]
    return whole[:18] + bytes(header) + b"".join(parts)


def zstd(*blocks, flags=0, fields=b"\x58"):
    """A frame of blocks of one repeated byte, of so many bytes each; its window is 2 MiB."""
    frame = struct.pack("<IB", 0xFD2FB528, flags) + fields
    for i, size in enumerate(blocks):
        frame += (size << 3 | 1 << 1 | (i == len(blocks) - 1)).to_bytes(3, "little") + b"\0"
    return frame


def lz4(*blocks, size=7):
    """A frame of blocks of zeros, of so many bytes each, in blocks of at most 4 MiB."""
    frame = struct.pack("<IBBB", 0x184D2204, 0x60, size << 4, 0)
    for length in blocks:
        more = length - 1 - 4 - 15 - 5  # one literal, then a match, then five literals
        block = b"\x1f\0\x01\0" + b"\xff" * (more // 255) + bytes([more % 255]) + b"\x50" + bytes(5)
        frame += struct.pack("<I", len(block)) + block
    return frame + bytes(4)


@pytest.mark.parametrize("kind", ["NONE", "LZ4", "LZ4_HIGH", "ZSTD", "ZSTD_HIGH"])
def test_every_compression_is_read_and_bounded(tmp_path, kind, monkeypatch):
    config = dv_processing.io.MonoCameraWriter.Config("DVXplorer_sample", getattr(dv_processing.CompressionType, kind))
    config.addEventStream((64, 48))
    rng = np.random.default_rng(0)
    columns = np.sort(rng.integers(0, 10**6, 30_000)), *rng.integers(0, [64, 48, 2], (30_000, 3)).T
    writer = dv_processing.io.MonoCameraWriter(str(tmp_path / "a.aedat4"), config)
    for start in range(0, 30_000, 10_000):
        store = dv_processing.EventStore()
        for t, x, y, p in zip(*(column[start : start + 10_000].tolist() for column in columns), strict=True):
            store.push_back(t, x, y, bool(p))
        writer.writeEvents(store)
    del writer
    for one, other in zip(read_aedat4(tmp_path / "a.aedat4"), columns, strict=True):
        np.testing.assert_array_equal(one, other)
    assert aedat4_sensor_size(tmp_path / "a.aedat4") == (64, 48, 2)
    monkeypatch.setattr(aedat4, "LARGEST_CONTENT", 100_000)
    with pytest.raises(ValueError, match="its events take more than 100000 bytes"):
        read_aedat4(tmp_path / "a.aedat4")
    # An event takes 16 bytes in a packet; a bound below what the packets hold is never passed.
    monkeypatch.setattr(aedat4, "LARGEST_PACKET", 50_000)
    with pytest.raises(ValueError, match="at most 50000 are read"):
        check_aedat4(tmp_path / "a.aedat4")


@pytest.mark.parametrize(
    ("kind", "packet"),
    [
        ("lz4", lz4(*[1 << 22] * 40)),
        ("lz4", lz4(1 << 22) * 40),
        ("zstd", zstd(*[1 << 17] * 2000)),
        ("zstd", zstd(1 << 17) * 2000),
        ("zstd", zstd(1 << 17, flags=3 << 6, fields=b"\x58" + (1 << 40).to_bytes(8, "little"))),
        ("zstd high", zstd(1 << 17, fields=b"\xf8")),
        ("zstd", struct.pack("<II", 0x184D2A50, 3) + b"abc" + zstd(*[1 << 17] * 2000)),
    ],
)
def test_bombs_are_refused_before_they_are_unpacked(tmp_path, write, kind, packet):
    path = tmp_path / "a.aedat4"
    write.aedat4(path, 100)
    path.write_bytes(holding(path.read_bytes(), KINDS[kind], packet))
    assert path.stat().st_size < 1 << 20
    for read in (check_aedat4, read_events, aedat4_sensor_size):
        with pytest.raises(ValueError, match=rf"a packet of {len(packet)} bytes may unpack to \d+; at most 134217728"):
            read(path)


@pytest.mark.parametrize(
    ("kind", "packet", "message"),
    [
        (1, zstd(10), "a packet begins with 0xfd2fb528"),
        (3, lz4(100), "a packet begins with 0x184d2204"),
        (9, lz4(100), r"unknown compression \(9\)"),
        (3, zstd(10)[:4], "damaged"),
        (1, lz4(100)[:5], "damaged"),
    ],
)
def test_packets_that_are_none_are_refused(tmp_path, write, kind, packet, message):
    path = tmp_path / "a.aedat4"
    write.aedat4(path, 100)
    path.write_bytes(holding(path.read_bytes(), kind, packet))
    with pytest.raises(ValueError, match=message):
        check_aedat4(path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda whole: whole[:14] + b"\xff\xff\xff\xff" + whole[18:], "4294967295 bytes of header"),
        (lambda whole: whole.replace(b"</attr>", b"\xc9attr>", 1), "header is damaged"),
        (lambda whole: whole.replace(b"</dv>", b"</dw>", 1), "header is damaged"),
        (lambda whole: whole[:18] + b"\xff" * 40 + whole[58:], "its header"),
        (lambda whole: with_first_packet_of(2**31, whole), r"a packet announces 2147483648 bytes, which ends"),
    ],
)
def test_aedat4_that_would_end_the_process_is_refused(tmp_path, write, change, message):
    path = tmp_path / "a.aedat4"
    columns = write.aedat4(path, 2000)
    check_aedat4(path)
    for name, column in zip("txyp", columns, strict=True):
        np.testing.assert_array_equal(read_events(path)[name], column)
    path.write_bytes(change(path.read_bytes()))
    for read in (check_aedat4, read_events, aedat4_sensor_size):
        with pytest.raises(ValueError, match=message):
            read(path)


def test_a_recording_cut_between_two_packets_says_so(tmp_path, write):
    write.aedat4(tmp_path / "a.aedat4", number=2500)
    whole = (tmp_path / "a.aedat4").read_bytes()
    start = 18 + int.from_bytes(whole[14:18], "little")
    first = start + 8 + int.from_bytes(whole[start + 4 : start + 8], "little")
    for cut in (start, first, first + 5):
        (tmp_path / "a.aedat4").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=f"it is cut off: .* and it has {cut} bytes"):
            read_aedat4(tmp_path / "a.aedat4")
