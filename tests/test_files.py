import errno
import os
import tempfile
from pathlib import Path

import pytest

from morer1_jax.errors import TextError
from morer1_jax.files import (
    allocate,
    any_path,
    atomic_dir,
    atomic_write,
    check_writable,
    full_disk,
    is_hub_name,
    local_path,
    nearby,
    plain_path,
    read_text,
    remove,
)


def test_a_path_is_as_a_shell_has_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for way in (local_path, any_path):
        assert os.fspath(way("~", "--out")) == f"{tmp_path}"
        assert os.fspath(way("~/a [1] é", "--out")) == f"{tmp_path}/a [1] é"
        assert os.fspath(way("~root/a", "--out")) == f"{os.path.expanduser('~root')}/a"
        for same in ("a~", "a b", "no:url", "/x/gs:/y", "*?[1]\\ "):
            assert os.fspath(way(same, "--out")) == os.fspath(Path(same))
        for own in ("./~", "./~/a", "~nobody-of-this-name/a", ".//~b"):
            once = way(own, "--out")
            assert os.fspath(once) == os.path.join(os.getcwd(), Path(own))
            assert way(once, "--out") == once
    assert os.fspath(any_path("gs://b/~ [1]", "--data")) == "gs://b/~ [1]"


@pytest.mark.parametrize("ways", [(local_path,), (any_path,)])
@pytest.mark.parametrize(
    ("path", "shown", "problem"),
    [
        ("", "--out=", "no path; name one"),
        (" ", "--out= ", "no path; name one"),
        ("a\0b", "--out='a\\x00b'", "no path; name one"),
        ("a\udce9", "--out='a\\udce9'", "not UTF-8, or not in this locale; name another, or set"),
        ("foo://b/x", "--out=foo://b/x", " expected; name one"),
    ],
)
def test_what_is_no_path_is_named(ways, path, shown, problem):
    for way in ways:
        with pytest.raises(OSError, match="name") as error:
            way(path, "--out")
        assert error.value.filename == shown
        assert problem in error.value.strerror


@pytest.mark.parametrize("url", ["gs://b/x", "s3://b", "file:///tmp/x", Path("gs://b/x")])
def test_a_url_is_no_path_of_this_machine(url):
    with pytest.raises(OSError, match="a URL found, a path of this machine expected; name one"):
        local_path(url, "--out")


def test_a_plain_path_leads_to_the_same_and_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "[1]"))
    odd = tmp_path / "[1]" / "a.b [c].jsonl.gz"
    odd.parent.mkdir()
    odd.write_text("x")
    with plain_path(odd) as path:
        assert path.read_text() == "x"
        assert path.suffixes == [".jsonl", ".gz"]
        assert not set("[] ") & set(str(path))
    assert not path.parent.exists()
    assert odd.read_text() == "x"
    with plain_path(tmp_path) as path:
        assert path == tmp_path


def test_what_is_removed_is_gone(tmp_path):
    (tmp_path / "folder" / "a").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name in ("link", "none", "file"):
        remove(tmp_path / name)
    assert os.listdir(tmp_path) == ["folder"]
    # What one who was killed meanwhile left is in nobody's way.
    (tmp_path / ".folder.tmp" / "b").mkdir(parents=True)
    remove(tmp_path / "folder")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_byte_order_mark_is_no_text(tmp_path, mark):
    (tmp_path / "a.txt").write_bytes(mark + "één\r\n\ufefftwo\n".encode())
    assert read_text(tmp_path / "a.txt") == "één\r\n\ufefftwo\n"
    (tmp_path / "b.txt").write_bytes(mark)
    assert read_text(tmp_path / "b.txt") == ""


@pytest.mark.parametrize(
    ("data", "place", "found"),
    [
        ("één".encode("utf-16"), "", "UTF-16"),
        ("een".encode("utf-16-be"), "", "UTF-16"),
        ("\ufeffone\n".encode() + "één".encode("latin-1"), ":2", "not UTF-8"),
        # The place is counted in the file, mark and all.
        ("\ufeff".encode() + b"\n\n\xff\n", ":3", "not UTF-8"),
    ],
)
def test_text_that_is_not_utf_8_is_refused_by_name(tmp_path, data, place, found):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(TextError) as error:
        read_text(path)
    assert str(error.value).startswith(f"{path}{place}: {found}")
    assert "UTF-8" in str(error.value)
    assert "\n" not in str(error.value)


def test_atomic_write_makes_parents_and_replaces(tmp_path):
    path = tmp_path / "a" / "b.txt"
    atomic_write(path, "één\n")
    assert path.read_bytes() == "één\n".encode()
    atomic_write(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(path.parent) == ["b.txt"]


def test_atomic_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "b.txt"
    atomic_write(path, "old")

    def full_disk(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["b.txt"]


def test_atomic_dir_appears_only_when_whole(tmp_path):
    path = tmp_path / "world" / "data"
    with atomic_dir(path) as folder:
        (folder / "txt").mkdir()
        (folder / "txt" / "train.txt").write_text("x")
        assert not path.exists()
    assert (path / "txt" / "train.txt").read_text() == "x"
    assert os.listdir(path.parent) == ["data"]


def test_atomic_dir_leaves_nothing_after_an_error(tmp_path):
    def fill():
        with atomic_dir(tmp_path / "data") as folder:
            (folder / "half").write_text("x")
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        fill()
    assert os.listdir(tmp_path) == []


def test_atomic_dir_starts_afresh_after_a_killed_attempt(tmp_path):
    (tmp_path / ".data.tmp").mkdir()
    (tmp_path / ".data.tmp" / "old").write_text("x")
    with atomic_dir(tmp_path / "data") as folder:
        (folder / "new").write_text("y")
    assert os.listdir(tmp_path / "data") == ["new"]


def test_atomic_dir_refuses_a_folder_with_content(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").write_text("x")
    with pytest.raises(FileExistsError, match="data exists already"), atomic_dir(tmp_path / "data"):
        pass
    assert os.listdir(tmp_path / "data") == ["mine"]


def test_what_can_be_written_is_said_to_be_and_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("file", "new", "folder/new", "folder/more/new"):
        check_writable(name)
    for name in ("folder", "new", "folder/more/new"):
        check_writable(name, folder=True)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize(
    ("name", "folder", "problem"),
    [
        ("folder", False, "a folder found, a file to write expected; name another"),
        ("file", True, "a file found, a folder to write expected; name another"),
        ("file/new", False, "cannot be written: {}/file: Not a directory; name another"),
        ("file/new/deep", True, "cannot be written: {}/file: Not a directory; name another"),
    ],
)
def test_what_is_in_the_way_is_named(tmp_path, name, folder, problem):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="name another") as error:
        check_writable(tmp_path / name, folder=folder)
    assert error.value.filename == str(tmp_path / name)
    assert error.value.strerror == problem.format(tmp_path)


def test_a_folder_that_takes_no_file_is_named(tmp_path, monkeypatch):
    def full(dir):
        raise OSError(30, "Read-only file system", f"{dir}/tmp0")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(OSError, match="Read-only") as error:
        check_writable(tmp_path / "a" / "b", folder=True)
    assert error.value.filename == str(tmp_path / "a" / "b")
    assert error.value.strerror == (
        f"cannot be written: {tmp_path}: Read-only file system; name another"
    )


def test_names_of_the_hub_and_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    for name in ("Qwen/Qwen2.5-VL-3B-Instruct", "team/a_b-c.d", "run/dem"):
        assert is_hub_name(name)
    for name in (
        *("runs/demo", "runs/absent", "run/demo", "./a", "../a", "a", "a/b/c", "/a/b", "~/a"),
        *("a/b.jsonl", "a/model.safetensors", "a/b.parquet", "a/run.py", "gs://a/b", "a b/c"),
    ):
        assert not is_hub_name(name)
    assert nearby("rnus/demo") == nearby("runs/dmeo") == "; is it runs/demo?"
    assert nearby("/nowhere/at/all") == nearby("elsewhere") == ""


def test_a_file_that_finds_no_room_is_named(tmp_path, file_limit):
    atomic_write(tmp_path / "a", "old")
    for write in (
        lambda: atomic_write(tmp_path / "a", bytes(2000)),
        lambda: allocate(tmp_path / "b", 2000),
    ):
        with file_limit(1000), pytest.raises(OSError, match="File too large") as error:
            write()
        assert error.value.errno == errno.EFBIG
        assert error.value.filename in (str(tmp_path / "a"), str(tmp_path / "b"))
    assert (tmp_path / "a").read_text() == "old"
    allocate(tmp_path / "b", 2000)
    assert (tmp_path / "b").read_bytes() == bytes(2000)


def library(message):
    """As a library that is not written in Python puts it."""
    return ValueError(f"RESOURCE_EXHAUSTED: Failed to write: {message} [os_error_code='28']")


def after(error, cause):
    error.__context__ = cause
    return error


NO_ROOM = os.strerror(errno.ENOSPC)


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (OSError(errno.ENOSPC, NO_ROOM, "x"), ("x", NO_ROOM)),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), (None, "Disk quota exceeded")),
        (library(NO_ROOM), (None, NO_ROOM)),
        (after(RuntimeError("closed"), OSError(errno.ENOSPC, NO_ROOM, "y")), ("y", NO_ROOM)),
        (after(library(NO_ROOM), OSError(errno.ENOSPC, NO_ROOM, "y")), ("y", NO_ROOM)),
        (ExceptionGroup("two", [KeyError(1), library(NO_ROOM)]), (None, NO_ROOM)),
        (OSError(errno.ENOENT, "No such file", "x"), None),
        (MemoryError("RESOURCE_EXHAUSTED: out of memory"), None),
    ],
)
def test_a_full_disk_is_known_however_it_is_put(error, found):
    assert full_disk(error) == found
