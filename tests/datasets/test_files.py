"""What lies under a folder, and arrays out of files that announce more than they hold or may ask for."""

import os
import zipfile

import numpy as np
import pytest

from sdt_datasets import files
from sdt_datasets.errors import DataError
from sdt_datasets.files import (
    Archive,
    check_regular,
    describe_files,
    distinct_folders,
    list_files,
    read_npy,
    walk_files,
)


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def header(shape, descr="<f8", version=1):
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    size = {1: 2, 2: 4, 3: 4}[version]
    text = text.ljust(-(len(text) + 9 + size) % 64 + len(text)) + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(size, "little") + text


def test_walking_meets_each_file_once(tmp_path):
    touch(tmp_path, "a/1.npy", "a/session/2.NPY", "a/.hidden/3.npy", "a/._4.npy", "b/5.npy")
    (tmp_path / "a" / "itself").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "above").symlink_to(tmp_path)
    (tmp_path / "a" / "session" / "again").symlink_to(tmp_path / "a" / "session")
    (tmp_path / "a" / "broken").symlink_to(tmp_path / "nowhere")
    touch(tmp_path, "elsewhere/6.npy")
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "elsewhere")
    found = dict(walk_files(tmp_path / "a"))
    assert [name for name, trouble in found.items() if not trouble] == ["1.npy", "linked/6.npy", "session/2.NPY"]
    again = "link to a folder met before"
    assert {name: trouble for name, trouble in found.items() if trouble} == {
        "itself": again,
        "above": again,
        "session/again": again,
        "broken": "no regular file",
    }


def test_a_folder_of_another_class_is_not_entered(tmp_path):
    touch(tmp_path, "a/1.npy", "b/2.npy")
    (tmp_path / "a" / "more").symlink_to(tmp_path / "b")
    seen = distinct_folders([tmp_path / "a", tmp_path / "b"])
    assert [name for name, trouble in walk_files(tmp_path / "a", seen) if not trouble] == ["1.npy"]
    assert [name for name, trouble in walk_files(tmp_path / "b", seen) if not trouble] == ["2.npy"]
    (tmp_path / "c").symlink_to(tmp_path / "a")
    with pytest.raises(DataError, match="one folder by two names"):
        distinct_folders([tmp_path / "a", tmp_path / "c"])


def test_pipes_are_no_files(tmp_path):
    touch(tmp_path, "1.npy")
    os.mkfifo(tmp_path / "2.npy")
    assert list_files(tmp_path, [".npy"]) == [tmp_path / "1.npy"]
    assert dict(walk_files(tmp_path))["2.npy"] == "no regular file"
    for path in (tmp_path / "2.npy", tmp_path, "/dev/zero"):
        with pytest.raises(ValueError, match="no regular file"):
            check_regular(path)
    with pytest.raises(ValueError, match="no regular file"):
        read_npy(tmp_path / "2.npy")
    with pytest.raises(ValueError, match="no regular file"):
        Archive(tmp_path / "2.npy")


def test_names_of_any_kind(tmp_path):
    names = ["$HOME.NPY", "[a-c]*?.npy", "%s{0}.npy", "x" * 250 + ".npy", os.fsdecode(b"\xff.npy"), "größe.npy"]
    touch(tmp_path / "[train]", *names)
    assert sorted(path.name for path in list_files(tmp_path / "[train]", [".npy"])) == sorted(names)
    assert sorted(name for name, _ in walk_files(tmp_path / "[train]")) == sorted(names)


def test_files_are_counted_by_ending():
    assert describe_files([]) == ""
    found = [(path, "") for path in ("a/1.mat", "notes.TXT", "b/2.MAT", "README")] + [("a/loop", "no regular file")]
    assert describe_files(found) == (
        "5 files: 2 .mat (a/1.mat), 1 .txt (notes.TXT), 1 without ending (README), 1 no regular file (a/loop)"
    )


ARRAYS = [np.arange(12).reshape(3, 4), np.zeros(0), np.zeros(3, [("größe", "<u2"), ("t", int)])]


@pytest.mark.parametrize("array", ARRAYS)
def test_whole_arrays_are_read(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "plain.npz", array=array, other=array)
    np.savez_compressed(tmp_path / "packed.npz", array=array)
    np.testing.assert_array_equal(read_npy(tmp_path / "a.npy"), array)
    for name in ("plain", "packed"):
        with Archive(tmp_path / f"{name}.npz") as archive:
            np.testing.assert_array_equal(archive["array"], array)
            with pytest.raises(ValueError, match="no array 'x', only array"):
                archive["x"]


HUGE = [((10**13, 4), "<f8"), ((10**10,), "|V0"), ((2**40,), "|u1"), ((-1, 4), "<f8"), ((2**31, 2**31, 2**31), "<f8")]


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("shape, descr", [*HUGE, ((1000,), "<f8")])
def test_headers_that_announce_too_much_are_refused_before_memory_is_asked_for(tmp_path, shape, descr, version):
    content = header(shape, descr, version) + b"\0" * 100
    (tmp_path / "a.npy").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("t.npy", content)
    with pytest.raises(ValueError, match="announces"):
        read_npy(tmp_path / "a.npy")
    with Archive(tmp_path / "a.npz") as archive, pytest.raises(ValueError, match="announces"):
        archive["t"]


def test_what_an_archive_gives_is_bounded_in_all(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST_CONTENT", 10_000)
    np.savez_compressed(tmp_path / "bomb.npz", **{name: np.zeros(4000, np.uint8) for name in "txyp"})
    with Archive(tmp_path / "bomb.npz") as archive:
        assert [archive[name].size for name in "tx"] == [4000, 4000]
        with pytest.raises(ValueError, match=r"'y' announces 4000 bytes, of \d+ held and 2000 allowed"):
            archive["y"]


def test_objects_are_not_loaded(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", t=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        read_npy(tmp_path / "a.npy")
    with Archive(tmp_path / "a.npz") as archive, pytest.raises(ValueError, match="allow_pickle=False"):
        archive["t"]
