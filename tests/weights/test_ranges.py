"""Byte ranges of safetensors files: what a header says, what is read, and what is refused."""

import contextlib
import json
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from morer1_jax import stores
from morer1_jax.errors import WeightsError
from morer1_jax.weights import ranges
from morer1_jax.weights.ranges import Part, read_beginnings, read_header, read_parts


@pytest.fixture
def file(tmp_path):
    draw = np.random.default_rng(0)
    tensors = {
        "a": draw.normal(size=(7, 30)).astype(np.float32),
        "b": draw.normal(size=1001).astype(jnp.bfloat16),
        "c": draw.normal(size=(3, 2, 5)).astype(np.float16),
        "empty": np.zeros((0, 4), np.float32),
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def read_all(parts, count=lambda read: None):
    with contextlib.closing(read_parts(parts, count)) as found:
        return [[run.copy() for run in runs] for runs in found]


def test_a_header_says_what_the_file_holds(file):
    header, tensors = read_header(file)
    assert json.loads(header)["__metadata__"] == {"format": "pt"}
    expected = load_file(file)
    assert tensors.keys() == expected.keys()
    for name, stored in tensors.items():
        assert (stored.shape, stored.dtype) == (expected[name].shape, expected[name].dtype)
        data = file.read_bytes()[stored.start : stored.end]
        assert data == expected[name].tobytes()
    assert read_beginnings(tensors.values(), 50) == [
        expected[name].tobytes()[:50] for name in tensors
    ]


@pytest.mark.parametrize("piece", [64, 16 << 20])
def test_runs_are_the_tensors_values_however_they_are_read(file, monkeypatch, piece):
    monkeypatch.setattr(ranges, "_PIECE", piece)
    tensors, expected = read_header(file)[1], load_file(file)
    runs = {"a": ((0, 31), (60, 210)), "b": ((1000, 1001),), "c": ((0, 30),), "empty": ((0, 0),)}
    parts = [Part(tensors[name], runs[name]) for name in runs]
    counted = []
    for name, found in zip(runs, read_all(parts, counted.append), strict=True):
        flat = expected[name].reshape(-1)
        assert [run.tobytes() for run in found] == [
            flat[start:stop].tobytes() for start, stop in runs[name]
        ]
        assert {run.dtype for run in found} == {flat.dtype}
    assert sum(counted) == sum(part.nbytes for part in parts) == 181 * 4 + 2 + 60
    assert (len(counted) > 10) == (piece == 64)


def test_a_header_longer_than_the_first_request(file, monkeypatch):
    whole = read_header(file)
    monkeypatch.setattr(ranges, "_FIRST", 20)
    assert read_header(file) == whole


def test_not_more_is_held_than_may_be(tmp_path, monkeypatch):
    """Of tensors of 400 bytes, where 1,000 may be read ahead, two wait beside the one in use."""
    tensors = {f"t{number:02d}": np.full(100, number, np.float32) for number in range(20)}
    save_file(tensors, tmp_path / "m.safetensors")
    monkeypatch.setattr(ranges, "_AHEAD", 1000)
    parts = [Part.whole(stored) for stored in read_header(tmp_path / "m.safetensors")[1].values()]
    asked, lock, read = set(), threading.Lock(), stores.read_range

    def counted(path, start, end):
        with lock:
            asked.add(start)
        return read(path, start, end)

    monkeypatch.setattr(stores, "read_range", counted)
    most = 0
    for number, _ in enumerate(read_parts(parts, lambda read: None)):
        most = max(most, len(asked) - number)
    assert len(asked) == 20
    assert most <= 3


def header_of(entries, padding=0):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(padding)


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "0 bytes, whose first eight name a header of 0"),
        (b"\x10\0\0\0\0\0\0\0{}", "10 bytes, whose first eight name a header of 16"),
        (b"version https://git-lfs.github.com/spec/v1\n", "43 bytes, whose first eight"),
        (header_of(b"{,}"), "a header that is none: "),
        (header_of(b"[1]"), "a header that is none: "),
        (header_of({"a": {}}), "a header that is none: 'dtype'"),
        (header_of({"a": entry(0, 8, shape=[3])}, 8), "a, F32 of shape .* has 8 bytes"),
        (header_of({"a": entry(0, 8, shape=[-2])}, 8), "a has shape "),
        (header_of({"a": entry(8, 0)}, 8), "a has shape "),
        (header_of({"a": entry(0, 8), "b": entry(12, 20)}, 20), "b at byte .*, though "),
        (header_of({"a": entry(0, 8), "b": entry(4, 12)}, 12), "b at byte .*, though "),
        (
            header_of(b'{"a": %(e)s, "a": %(e)s}' % {b"e": json.dumps(entry(0, 8)).encode()}, 8),
            "a is there twice",
        ),
        (header_of({"a": entry(0, 8)}, 7), "of 77 bytes by its header, found 76;"),
        (header_of({"a": entry(0, 8)}, 9), "of 77 bytes by its header, found 78;"),
    ],
)
def test_a_file_that_is_not_whole(tmp_path, data, found):
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=found) as error:
        read_header(path)
    message = str(error.value)
    assert message.startswith(f"{path}: expected a whole safetensors file, ")
    assert message.endswith("; copy it anew")
    assert "\n" not in message


def test_a_file_that_was_cut_off_meanwhile(file):
    tensors = read_header(file)[1]
    file.write_bytes(file.read_bytes()[:-10])
    last = max(tensors.values(), key=lambda stored: stored.end)
    message = rf"{last.name}: expected bytes [\d,]+ to {last.end:,}, found [\d,]+ of them; copy"
    with pytest.raises(WeightsError, match=message):
        read_all([Part.whole(last)])
    file.unlink()
    with pytest.raises(WeightsError, match=rf"{last.name}: expected bytes .* No such file"):
        read_all([Part.whole(last)])


def test_values_that_are_not_finite_count_where_they_are_read(file, monkeypatch):
    monkeypatch.setattr(ranges, "_PIECE", 64)
    tensors = load_file(file)
    tensors["a"].reshape(-1)[[3, 4, 100]] = np.inf
    save_file(tensors, file)
    stored = read_header(file)[1]["a"]
    for runs, bad, size in ((((0, 210),), 3, 210), (((4, 40), (50, 150)), 2, 136)):
        with pytest.raises(WeightsError, match=rf"a: expected finite .* found {bad} of {size} "):
            read_all([Part(stored, runs)])
    read_all([Part(stored, ((5, 100), (101, 210)))])


def test_a_bucket_gives_the_same_ranges_and_what_it_lacks_is_named(file, bucket, monkeypatch):
    there = stores.absolute(f"{bucket}/ranges/model.safetensors")
    stores.copy({there: file})
    for start, end in ((0, 10), (5, 5), (700, 1 << 20)):
        assert stores.read_range(there, start, end) == file.read_bytes()[start:end]
        assert stores.read_range(file, start, end) == file.read_bytes()[start:end]
    (header, tensors), (same, ours) = read_header(there), read_header(file)
    assert header == same
    found, expected = (
        read_all([Part.whole(stored) for stored in of.values()]) for of in (tensors, ours)
    )
    for theirs, mine in zip(found, expected, strict=True):
        np.testing.assert_array_equal(theirs, mine)
    stores.delete(there)
    with pytest.raises(WeightsError, match=rf"^{there}: a: expected bytes .*, found .*; start"):
        read_all([Part.whole(tensors["a"])])
    with pytest.raises(WeightsError, match=rf"^{there}: expected a whole safetensors file, found"):
        read_header(there)
