"""The journal holds every answer, whenever its writer is killed."""

import errno
import fcntl
import json
import os
import re
import resource
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from morer1_jax.errors import ConfigError, DataError
from morer1_jax.teacher.journal import Journal, RequestResult, RequestSent, RunStarted, read_journal
from morer1_jax.teacher.ledger import Size, Usage

IDENTITY = {"model": "teacher", "temperature": 1.0, "images": {"max_pixels": 100, "margin": 0.1}}
SIZE = Size(text=10, pixels=20, tiles=2, answer=30)
ENTRIES = (
    RunStarted(1),
    RequestSent(1, "train:7", SIZE),
    RequestSent(2, "train:8", SIZE),
    RequestResult(2, "train:8", "kept", None, Usage(5, 6), "Schöne\n\u2028 \ud800 \x00 text"),
    RequestSent(3, "train:7", SIZE),
    RequestResult(1, "train:7", "rejected", "format", None, "no"),
    RunStarted(2),
    RequestSent(4, "train:9", SIZE),
    RequestResult(4, "train:9", "refused", "HTTP 400", Usage()),
    RequestResult(3, "train:7", "unanswered", "time-out"),
)


def write(path, entries=ENTRIES):
    with Journal(path, IDENTITY) as journal:
        for entry in entries:
            journal.add(entry)
    return path


def test_a_journal_returns_the_entries_that_were_added(tmp_path):
    path = write(tmp_path / "new" / "journal.jsonl")
    assert read_journal(path, IDENTITY) == list(ENTRIES)
    with Journal(path, IDENTITY) as journal:
        assert journal.entries == list(ENTRIES)
        assert journal.repaired is None
        journal.add(RequestSent(5, "train:1", SIZE))
    assert len(read_journal(path, IDENTITY)) == 11
    # The header, and one JSON object a line.
    lines = [json.loads(line) for line in path.read_bytes().decode("ascii").splitlines()]
    assert lines[0] == {"journal": IDENTITY}
    assert len(lines) == 12


def test_a_missing_journal_has_no_entries(tmp_path):
    assert read_journal(tmp_path / "journal.jsonl", IDENTITY) == []
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write(tmp_path_factory.mktemp("whole") / "journal.jsonl").read_bytes()


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_journal_cut_at_any_byte_goes_on(whole, tmp_path_factory, data):
    cut = data.draw(st.integers(0, len(whole)))
    path = tmp_path_factory.mktemp("cut") / "journal.jsonl"
    path.write_bytes(whole[:cut])
    lines = whole[:cut].count(b"\n")
    left = list(ENTRIES[: max(0, lines - 1)])
    assert read_journal(path, IDENTITY) == left
    assert path.read_bytes() == whole[:cut]  # Who only reads repairs nothing.
    with Journal(path, IDENTITY) as journal:
        assert journal.entries == left
        torn = cut > 0 and whole[cut - 1 : cut] != b"\n"
        assert journal.repaired == (f"{path}:{lines + 1}" if torn else None)
        for entry in ENTRIES[len(left) :]:
            journal.add(entry)
    assert path.read_bytes() == whole


def test_a_writer_that_is_killed_leaves_what_it_added(tmp_path):
    """Neither a request's nor an answer's line waits in a buffer of the process."""
    path = tmp_path / "journal.jsonl"
    script = f"""if True:
        import os, signal
        from morer1_jax.teacher.ledger import Size
        from morer1_jax.teacher.journal import RequestResult, Journal, RequestSent
        journal = Journal({str(path)!r}, {IDENTITY!r})
        journal.add(RequestSent(1, "train:7", Size(10, 20, 2, 30)))
        journal.add(RequestResult(1, "train:7", "rejected", "format", None, "no"))
        journal.add(RequestSent(2, "train:7", Size(10, 20, 2, 30)))
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert len(read_journal(path, IDENTITY)) == 3
    write(path, [RequestSent(3, "train:7", SIZE)])  # The lock died with it.


def test_an_answer_is_on_the_disk_when_it_counts(tmp_path, monkeypatch):
    synced = []
    with Journal(tmp_path / "journal.jsonl", IDENTITY) as journal:
        real = os.fsync
        monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
        for entry in ENTRIES[:4]:
            journal.add(entry)
        monkeypatch.setattr(os, "fsync", real)
        assert synced == [journal.path.stat().st_size]


def damaged(number, change):
    lines = [{"journal": IDENTITY}, *(entry.line() for entry in ENTRIES)]
    text = [json.dumps(line) for line in lines]
    text[number - 1] = change(text[number - 1])
    return "".join(line + "\n" for line in text)


def put(**fields):
    return lambda line: json.dumps(json.loads(line) | fields)


def drop(name):
    return lambda line: json.dumps({k: v for k, v in json.loads(line).items() if k != name})


@pytest.mark.parametrize(
    ("number", "change"),
    [
        (1, lambda line: line[1:]),
        (1, lambda line: "[]"),
        (1, lambda line: '{"journal": 3}'),
        (1, lambda line: json.dumps(ENTRIES[1].line())),
        (3, lambda line: line[:-1]),
        (3, lambda line: ""),
        (3, lambda line: "\0" * 20),
        (3, lambda line: "[" * 100_000),
        (3, lambda line: "7"),
        (3, put(sent=2)),
        (3, put(sent=True)),
        (3, put(fact=3)),
        (3, put(pixels=0)),
        (3, put(tiles=2.0)),
        (3, drop("answer")),
        (5, put(answered=3)),  # Not sent yet.
        (5, put(answered=1)),  # Another's.
        (5, put(answered="2")),
        (5, put(fact="train:1")),
        (5, put(outcome="lost")),
        (5, put(outcome=["kept"])),
        (5, put(reason="format")),
        (5, put(text=None)),
        (5, put(text=5)),
        (5, put(prompt_tokens=None)),
        (5, put(prompt_tokens=-1)),
        (5, put(prompt_tokens="5")),
        (5, drop("text")),
        (7, put(reason=None)),
        (11, put(answered=2, fact="train:8")),  # RequestResult before.
        (2, put(run=2)),
        (2, put(run="1")),
        (8, lambda line: '{"run": 1}'),
    ],
)
def test_a_damaged_line_is_named(tmp_path, number, change):
    path = tmp_path / "journal.jsonl"
    path.write_text(damaged(number, change))
    before = path.read_bytes()
    for open_it in (read_journal, Journal):
        with pytest.raises(
            DataError, match=rf"journal\.jsonl:{number}: expected .*, found .*; "
        ) as error:
            open_it(path, IDENTITY)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 500
    assert path.read_bytes() == before


def test_other_settings_are_named(tmp_path):
    path = write(tmp_path / "journal.jsonl")
    other = IDENTITY | {"model": "other", "images": {"max_pixels": 100, "margin": 0.2}, "new": 1}
    for open_it in (read_journal, Journal):
        with pytest.raises(ConfigError, match="was written with other settings") as error:
            open_it(path, other)
        for part in (
            'model: expected "other", found "teacher"',
            "images.margin: expected 0.2, found 0.1",
            "new: expected 1, found absent",
        ):
            assert part in str(error.value)
        assert "max_pixels" not in str(error.value)
        assert "\n" not in str(error.value)


def test_two_do_not_write_one_journal(tmp_path):
    path = write(tmp_path / "journal.jsonl", [])
    with Journal(path, IDENTITY):
        with pytest.raises(
            ConfigError, match=rf"journal\.jsonl: expected no .* found process {os.getpid()} on "
        ):
            Journal(path, IDENTITY)
        assert read_journal(path, IDENTITY) == []
    Journal(path, IDENTITY).__exit__()
    assert os.listdir(tmp_path) == ["journal.jsonl"]
    with pytest.raises(ConfigError), Journal(path, {**IDENTITY, "model": "another"}):
        pass
    assert os.listdir(tmp_path) == ["journal.jsonl"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="--out on a local disk that can be written"):
        Journal(tmp_path / "file" / "journal.jsonl", IDENTITY)


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, capsys):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    path = tmp_path / "journal.jsonl"
    with Journal(path, IDENTITY):
        assert re.match(r".*journal\.jsonl: cannot be locked .No locks", capsys.readouterr().err)


@pytest.mark.parametrize("broken", ["fsync", "ftruncate"])
def test_a_disk_that_fails_is_one_line(tmp_path, monkeypatch, broken):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with Journal(tmp_path / "journal.jsonl", IDENTITY) as journal, monkeypatch.context() as patch:
        for entry in ENTRIES[:3]:
            journal.add(entry)
        size = journal.path.stat().st_size
        patch.setattr(os, broken, fail)
        if broken == "ftruncate":
            patch.setattr(os, "write", fail)
        with pytest.raises(DataError, match=r"journal\.jsonl: .*Input/output error; make room"):
            journal.add(ENTRIES[3])
        assert journal.path.stat().st_size == size


def test_a_full_disk_leaves_whole_lines(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path, IDENTITY) as journal:
        journal.add(ENTRIES[1])
        size = path.stat().st_size
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, limits[1]))
        try:
            with pytest.raises(DataError, match=r"journal\.jsonl: .*; make room and start again"):
                journal.add(ENTRIES[2])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert path.stat().st_size == size
        journal.add(ENTRIES[2])
    assert read_journal(path, IDENTITY) == list(ENTRIES[1:3])
