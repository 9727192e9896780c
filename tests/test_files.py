import errno
import math
import os
import tempfile

import pytest

from morer1_jax.errors import ConfigError, DataError
from morer1_jax.files import (
    allocate,
    atomic_dir,
    atomic_write,
    check_writable,
    full_disk,
    read_json,
    read_jsonl,
    read_text,
    remove,
    write_json,
    write_jsonl,
)


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
        ("één".encode("utf-16"), "", "expected UTF-8 text, found UTF-16"),
        ("een".encode("utf-16-be"), "", "expected UTF-8 text, found UTF-16"),
        ("\ufeffone\n".encode() + "één".encode("latin-1"), ":2", "expected UTF-8 text"),
        # The place is counted in the file, mark and all.
        ("\ufeff".encode() + b"\n\n\xff\n", ":3", "expected UTF-8 text, found other"),
    ],
)
def test_text_that_is_not_utf_8_is_refused_by_name(tmp_path, data, place, found):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    with pytest.raises(DataError) as error:
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
        ("folder", False, "expected a file to write, found a folder; name another"),
        ("file", True, "expected a folder to write, found a file; name another"),
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


def test_json_is_read_as_it_was_written(tmp_path):
    value = {"b": [1, None, "één\u2028"], "a": {"c": 0.1}}
    write_json(tmp_path / "new" / "a.json", value)
    assert read_json(tmp_path / "new" / "a.json", "mend it") == value
    pairs = read_json(tmp_path / "new" / "a.json", "mend it", kind=tuple)
    assert [key for key, _ in pairs] == ["b", "a"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "new" / "a.json", {"a": math.nan})
    assert os.listdir(tmp_path / "new") == ["a.json"]


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (None, "expected a score, found No such file or directory; mend it"),
        (b"", "expected a score, found Expecting value"),
        (b"[1]", "expected a score, found list; mend it"),
        (b"[" * 100_000, "expected a score, found maximum recursion"),
        (b"\xff{}", "expected UTF-8 text"),
    ],
)
def test_what_is_no_json_object_is_named(tmp_path, data, found):
    path = tmp_path / "a.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ConfigError) as error:
        read_json(path, "mend it", expected="a score", error=ConfigError)
    assert str(error.value).startswith(f"{path}:")
    assert found in str(error.value)
    assert "\n" not in str(error.value)


def lines_of(path, **options):
    """The numbers and names of a file's lines."""

    def parse(number, value):
        if value["name"] == "bad":
            raise DataError("a bad name")
        if value["name"] == "other":
            raise ConfigError("another name")
        return number, value["name"]

    return read_jsonl(path, parse, "a name", "mend it", **options)


def test_json_lines_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "a.jsonl"
    names = ["één", "two\u2028three\n"]
    for ascii_only in (True, False):
        write_jsonl(path, ({"name": name} for name in names), ascii_only=ascii_only)
        assert lines_of(path) == list(enumerate(names, start=1))
    write_jsonl(path, [])
    assert lines_of(path) == []


@pytest.mark.parametrize(
    ("line", "error", "found"),
    [
        (b"", DataError, "expected a name, found ''; mend it"),
        (b"{", DataError, "expected a name, found '{'; mend it"),
        (b"3", DataError, "expected a name, found '3'; mend it"),
        (b"{}", DataError, "expected a name, found '{}'; mend it"),
        (b'{"name": "bad"}', DataError, "a bad name"),
        (b'{"name": "other"}', ConfigError, "another name"),
        (b"\xff", DataError, "expected UTF-8 text"),
        (b"[" * 100_000, DataError, "expected a name, found '[["),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, error, found):
    path, good = tmp_path / "a.jsonl", b'{"name": "a"}\n'
    path.write_bytes(good + line + b"\n" + good)
    with pytest.raises(error) as caught:
        lines_of(path)
    assert str(caught.value).startswith(f"{path}:2: {found}")
    assert len(str(caught.value)) < 400


def test_blank_lines_and_a_partial_line_are_dropped_on_request_only(tmp_path):
    path, good = tmp_path / "a.jsonl", b'{"name": "a"}\n'
    path.write_bytes(good + b" \n" + good + b"\n\n")
    assert lines_of(path, skip_blank=True) == [(1, "a"), (3, "a")]
    path.write_bytes(good + '{"name": "é'.encode()[:-1])
    assert lines_of(path, partial=True) == [(1, "a")]
    path.write_bytes(good + good[:-1])
    assert lines_of(path, partial=True) == [(1, "a")]
    assert lines_of(path) == [(1, "a"), (2, "a")]
    with pytest.raises(DataError, match="expected a name a line, found No such file"):
        lines_of(tmp_path / "none", partial=True)
