"""A bucket's files are copied once, whole, and never mistaken for what they were before."""

import fcntl
import itertools
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest

from morer1_jax.data import local_copy as module
from morer1_jax.data.local_copy import VARIABLE, local_copy
from morer1_jax.errors import DataError

PARTS = ("facts", "photos")
_NUMBERS = itertools.count()
FILES = {
    "facts/1.0.0/info.json": b"{}",
    "facts/1.0.0/names.txt": b"a",
    "photos/1.0.0/a-00000-of-00002": bytes(range(256)) * 1000,
    "photos/1.0.0/a-00001-of-00002": b"",
    "other/not wanted": b"x",
}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_BYTES", 100_000)
    return tmp_path / "cache"


@pytest.fixture
def folder(bucket, upload, cache, tmp_path):
    for name, data in FILES.items():
        path = tmp_path / "made" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return upload(tmp_path / "made", f"copied/{next(_NUMBERS)}/more")


@pytest.fixture
def requests(monkeypatch):
    """The files that are read in the bucket; `requests.answer` may stand in for what is."""
    files = fsspec.filesystem("gs")
    read = files.cat_file

    class Requests(list):
        answer = staticmethod(lambda data, start: data)

    found = Requests()

    def cat_file(path, start, end):
        found.append(path.rpartition("/")[2])
        return found.answer(read(path, start, end), start)

    monkeypatch.setattr(files, "cat_file", cat_file)
    return found


def contents(copy):
    return {
        path.relative_to(copy).as_posix(): path.read_bytes()
        for path in sorted(copy.rglob("*"))
        if path.is_file()
    }


def copies(cache):
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def test_the_files_are_those_of_the_bucket_and_are_copied_once(folder, cache, requests):
    copy = local_copy(folder, PARTS)
    assert contents(copy) == {name: x for name, x in FILES.items() if name.split("/")[0] in PARTS}
    assert copies(cache) == [copy.name]
    assert sorted(requests) == ["a-00000-of-00002"] * 3 + ["info.json", "names.txt"]
    requests.clear()
    assert local_copy(folder, PARTS) == copy
    assert requests == []


@pytest.mark.parametrize("change", ["bytes", "same bytes", "new", "gone"])
def test_what_changes_in_the_bucket_is_copied_anew(folder, cache, change):
    before = local_copy(folder, PARTS)
    path, data = folder / "facts/1.0.0/info.json", b"[]" if change == "bytes" else b"{}"
    if change == "gone":
        path.unlink()
    else:
        (path.with_name("new") if change == "new" else path).write_bytes(data)
    after = local_copy(folder, PARTS)
    assert after != before
    assert copies(cache) == sorted([after.name, before.name])
    there = {p.name: p.read_bytes() for p in (folder / "facts/1.0.0").iterdir()}
    assert {p.name: p.read_bytes() for p in (after / "facts/1.0.0").iterdir()} == there


def test_what_another_machine_changes_is_copied_anew(folder):
    before = local_copy(folder, PARTS)
    other = fsspec.filesystem("gs", skip_instance_cache=True)
    other.pipe_file(f"{folder}/facts/1.0.0/info.json".removeprefix("gs://"), b"[]")
    assert local_copy(folder, PARTS) != before


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_a_copy_that_lost_a_file_is_copied_anew(folder, requests, spoil):
    copy = local_copy(folder, PARTS)
    good = contents(copy)
    spoil(copy / "facts/1.0.0/info.json")
    requests.clear()
    assert local_copy(folder, PARTS) == copy
    assert contents(copy) == good
    assert len(requests) == 5


def cut(data, start):
    return data[:-1] if start == 200_000 else data


def flipped(data, start):
    return bytes([data[0] ^ 1]) + data[1:]


def lost(data, start):
    if start == 200_000:
        raise ConnectionResetError(104, "Connection reset by peer")
    return data


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (cut, r"a-00000-of-00002: expected 256,000 bytes of MD5 \S+, found 255,999 of \S+; start"),
        (
            flipped,
            r"(info\.json|names\.txt|a-0+-of-0+2): expected .* bytes of MD5 \S+, found .* of",
        ),
        (
            lost,
            r"a-0+-of-00002: expected 256,000 bytes, found 200,000, then .*reset by peer; start",
        ),
    ],
    ids=["cut", "flipped", "lost"],
)
def test_a_file_that_does_not_arrive_whole_is_named_and_leaves_nothing(
    folder, cache, requests, answer, expected
):
    requests.answer = answer
    with pytest.raises(DataError, match=expected) as error:
        local_copy(folder, PARTS)
    assert str(error.value).startswith(str(folder))
    assert copies(cache) == []
    requests.answer = lambda data, start: data
    assert len(contents(local_copy(folder, PARTS))) == 4


def test_files_that_change_while_they_are_copied_are_refused(folder, cache, requests):
    def answer(data, start):
        (folder / "facts/1.0.0/new").write_bytes(b"new")
        return data

    requests.answer = answer
    with pytest.raises(DataError, match=r"more: expected files that stay as they are, found that "):
        local_copy(folder, PARTS)
    assert copies(cache) == []


def test_what_a_killed_process_left_is_no_copy(folder, cache, requests):
    copy = local_copy(folder, PARTS)
    partial = copy.rename(copy.with_name(f".{copy.name}.tmp"))
    (partial / "facts/1.0.0/info.json").unlink()
    assert len(contents(local_copy(folder, PARTS))) == 4
    assert copies(cache) == [copy.name]


def test_of_several_processes_one_copies_and_the_others_wait(folder, cache, requests, capsys):
    copy = local_copy(folder, PARTS)
    module.remove(copy)
    requests.clear()
    # Another process copies, and is slow.
    with open(cache / f".{copy.name}.lock", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        found = []
        waiting = threading.Thread(target=lambda: found.append(local_copy(folder, PARTS)))
        waiting.start()
        time.sleep(0.5)
        assert waiting.is_alive()
        assert requests == []
    waiting.join(20)
    assert found == [copy]
    assert (
        f"{folder}: waiting for another process that copies it to {copy}" in capsys.readouterr()[0]
    )


# Copies as its own process, once all have begun: prints the copy's path and the files it asked for.
OPENS = """
import sys
import fsspec
from etils import epath
from morer1_jax.data.local_copy import local_copy

fsspec.config.conf["gs"] = {"token": "anon"}
read, count = fsspec.filesystem("gs").cat_file, []
fsspec.filesystem("gs").cat_file = lambda *args: count.append(args) or read(*args)
print("begun", flush=True)
sys.stdin.readline()
print(local_copy(epath.Path(sys.argv[1]), ("facts", "photos")), len(count), sep="\\n")
"""


def test_processes_that_start_at_once_copy_once(folder, cache):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPENS, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdout.readline() == "begun\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    found = [process.communicate(timeout=60)[0].splitlines()[-2:] for process in processes]
    assert len({path for path, _ in found}) == 1
    assert sorted(int(count) > 0 for _, count in found) == [False, False, True]
    assert len(contents(cache / found[0][0])) == 4


def test_a_disk_without_locks_is_named(folder, cache, monkeypatch):
    def flock(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", flock)
    with pytest.raises(OSError, match=r"cannot be locked: No locks .* set MORER1_DATA_CACHE to"):
        local_copy(folder, PARTS)


def test_a_bucket_that_is_not_there_is_named(bucket, cache):
    from etils import epath

    for wrong in (epath.Path("gs://no-such-bucket-here/more"), epath.Path(bucket) / "nothing"):
        with pytest.raises(DataError, match=re.escape(str(wrong))):
            local_copy(wrong, PARTS)
    assert not cache.exists() or copies(cache) == []
