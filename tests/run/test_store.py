"""A run's files in a folder, and in a bucket of which it has a local copy."""

import json
import os
import threading
import time
import urllib.request

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from morer1_jax import stores
from morer1_jax.errors import AbsentError, ConfigError
from morer1_jax.run import owner as module
from morer1_jax.run.checkpoint import Checkpointer
from morer1_jax.run.manifest import CheckpointError
from morer1_jax.run.owner import OWNER
from morer1_jax.run.store import INDEX, Store
from morer1_jax.run.trial import check_saves


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """The folder of local copies; locks are quick."""
    monkeypatch.setenv("MORER1_WORKDIR_CACHE", str(tmp_path / "copies"))
    monkeypatch.setattr(module, "_DEAD", 4.0)
    monkeypatch.setattr(module, "_GIVEN", 600.0)  # Else a busy machine ends the tests.
    monkeypatch.setattr(module, "_RENEWED", 0.5)
    return tmp_path / "copies"


def text(root, name):
    return stores.read_bytes(root / name).decode()


def test_a_folder_is_where_the_run_works(tmp_path):
    store = Store(tmp_path / "run")
    assert store.folder == store.root == tmp_path / "run"
    with store.held():
        (store.folder / "a.txt").write_text("a")
        store.publish()
        store.share("a.txt")
    assert store.checkpoints("sft") == tmp_path / "run" / "sft" / "checkpoints"
    assert [path.name for path in store.folder.iterdir()] == ["a.txt"]


@pytest.mark.usefixtures("copies")
def test_a_bucket_has_what_was_published_and_another_host_goes_on_from_it(bucket, monkeypatch):
    store = Store(f"{bucket}/goes-on")
    with store.held():
        (store.folder / "deep" / "er").mkdir(parents=True)
        (store.folder / "deep" / "er" / "log").write_text("1\n")
        (store.folder / ".hidden.tmp").write_text("half")
        (store.folder / "gone").write_text("soon")
        store.publish()
        assert stores.files(store.root) == [INDEX, OWNER, "deep/er/log", "gone"]
        (store.folder / "deep" / "er" / "log").write_text("1\n2\n")
        (store.folder / "gone").unlink()
        store.publish(every=100)
        assert text(store.root, "deep/er/log") == "1\n"
        store.publish()
        assert text(store.root, "deep/er/log") == "1\n2\n"
        (store.folder / "late").write_text("not published")
    assert stores.files(store.root) == [INDEX, "deep/er/log"]
    # What a run that was killed while it published has not listed does not count.
    stores.write_bytes(store.root / "data" / "half", b"of a dataset")
    # On another host, and on this one, whose copy has what was never published.
    checkpoint = store.checkpoints("sft") / "step_00000001" / "manifest.json"
    stores.write_bytes(checkpoint, b"{}")
    for cache in (None, "other"):
        if cache:
            monkeypatch.setenv("MORER1_WORKDIR_CACHE", str(store.folder.parent / cache))
        again = Store(f"{bucket}/goes-on")
        with again.held():
            assert [name for name in stores.files(again.folder) if name != ".lock"] == [
                "deep/er/log"
            ]
            assert (again.folder / "deep" / "er" / "log").read_text() == "1\n2\n"
    assert (again.folder == store.folder) == (cache is None)
    assert stores.read_bytes(checkpoint) == b"{}"


@pytest.mark.usefixtures("copies")
def test_a_large_log_that_grows_while_it_is_sent_is_sent_as_it_was(bucket, monkeypatch):
    """The server is told how many bytes will come."""
    monkeypatch.setattr(stores, "_BYTES", 1 << 20)
    store, ended = Store(f"{bucket}/grows"), threading.Event()
    with store.held():
        path = store.folder / "log.jsonl"
        path.write_bytes(b"x" * (8 << 20))

        def grow():
            with open(path, "ab", buffering=0) as file:
                while not ended.wait(0.001):
                    file.write(b"y" * 4096)

        thread = threading.Thread(target=grow)
        thread.start()
        try:
            for _ in range(3):
                store.publish()
        finally:
            ended.set()
            thread.join()
        assert stores.files(store.root) == [INDEX, OWNER, "log.jsonl"]
        sent = stores.read_bytes(store.root / "log.jsonl")
        assert len(sent) > 8 << 20
        assert path.read_bytes().startswith(sent)
        store.publish()
        assert stores.read_bytes(store.root / "log.jsonl") == path.read_bytes()


@pytest.mark.usefixtures("copies")
def test_only_what_has_changed_is_copied(bucket, monkeypatch):
    copied = []
    real = stores.copy
    monkeypatch.setattr(stores, "copy", lambda pairs: (copied.extend(pairs), real(pairs)))
    store = Store(f"{bucket}/changes")
    with store.held():
        for name in ("a", "b"):
            (store.folder / name).write_text(name)
        store.publish()
        (store.folder / "b").write_text("more")
        store.publish()
        store.publish()
    assert [str(path).rsplit("/", 1)[1] for path in copied] == ["a", "b", "b"]


def test_a_run_that_writes_there_is_named_and_one_that_was_killed_is_not_waited_for(
    bucket, copies, monkeypatch
):
    store = Store(f"{bucket}/owned")
    with store.held():
        message = rf"^{bucket}/owned: expected no other process to write into it, found process \d"
        with pytest.raises(ConfigError, match=message), Store(f"{bucket}/owned").held():
            raise AssertionError("two runs on a host")
        monkeypatch.setenv("MORER1_WORKDIR_CACHE", str(copies / "another host"))
        with (
            pytest.raises(ConfigError, match=r"owned: expected no other run .*process \d+ on"),
            Store(f"{bucket}/owned").held(),
        ):
            raise AssertionError("two runs")
        (store.folder / "mine").write_text("yes")
        store.publish()
    # What a killed run leaves is not renewed.
    stores.write_bytes(store.root / OWNER, json.dumps({"run": "x", "pid": 1, "host": "h"}).encode())
    with Store(f"{bucket}/owned").held():
        assert json.loads(stores.read_bytes(store.root / OWNER))["run"] != "x"
    assert stores.files(store.root) == [INDEX, "mine"]


@pytest.mark.usefixtures("copies")
def test_of_two_runs_that_begin_at_once_one_is_refused(bucket, monkeypatch, tmp_path):
    results, refused = [], threading.Event()

    def begin(number):
        store = Store(f"{bucket}/at-once")
        store.folder = tmp_path / f"host-{number}"
        try:
            with store.held():
                # On a busy machine the other one begins later, and first waits.
                refused.wait(40)
            results.append("ran")
        except ConfigError:
            results.append("refused")
            refused.set()

    threads = [threading.Thread(target=begin, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["ran", "refused"]


def test_checkpoints_in_a_bucket_are_whole_verified_or_absent(bucket, caplog):
    folder = Store(f"{bucket}/checkpoints").checkpoints("sft")
    state = {"w": jnp.arange(100_000.0), "b": {"x": jnp.ones((3, 4), jnp.bfloat16)}}
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    checkpoints = Checkpointer(folder, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, jax.tree.map(lambda x, step=step: x + step, state), {"step": step})
        checkpoints.save_best(step, state, -float(step))
    assert checkpoints.shelf.whole() == [3, 2]
    assert checkpoints.best() == (1, -1.0)
    assert not [name for name in stores.files(folder) if name.startswith("step_00000001")]
    step, restored, extra = Checkpointer(folder).restore_newest(like)
    assert (step, extra) == (3, {"step": 3})
    np.testing.assert_array_equal(restored["w"], state["w"] + 3)
    # A changed byte, and a file that is shorter, are found; what is before it is used.
    path = folder / "step_00000003"
    name = max(name for name in stores.files(path) if "/d/" in name)
    whole = stores.read_bytes(path / name)
    for damaged in (bytes([whole[0] ^ 1]) + whole[1:], whole[:-1]):
        stores.write_bytes(path / name, damaged)
        with pytest.raises(CheckpointError, match=r"step_00000003/arrays/.* another SHA-256"):
            Checkpointer(folder).restore(3, like)
    step, restored, _ = Checkpointer(folder).restore_newest(like)
    assert step == 2
    np.testing.assert_array_equal(restored["w"], state["w"] + 2)
    assert "training goes on from step 2" in caplog.text
    # Without its manifest, which is written last, a checkpoint is none, and its step is saved anew.
    again = Checkpointer(folder)
    assert again.shelf.whole() == [2]
    again.save(3, state)
    np.testing.assert_array_equal(again.restore(3, like)[0]["w"], state["w"])


@pytest.mark.usefixtures("bucket", "copies")
def test_a_bucket_that_cannot_be_written_is_found_at_once():
    message = r"^gs://no-such-bucket/run: expected a bucket that can be written, found .*; name"
    with pytest.raises(ConfigError, match=message), Store("gs://no-such-bucket/run").held():
        raise AssertionError("it goes on")


@pytest.mark.usefixtures("copies")
def test_a_bucket_that_does_not_answer_at_first_is_found(bucket, monkeypatch):
    monkeypatch.setattr(module, "_ANSWERS", 0.3)
    monkeypatch.setattr(stores, "read_bytes", lambda path: time.sleep(100))
    message = r"silent: expected a bucket that can be written, found no answer in 0 s; name another"
    with pytest.raises(AbsentError, match=message), Store(f"{bucket}/silent").held():
        raise AssertionError("it goes on")


def test_a_checkpoint_is_tried_out_in_a_bucket(bucket):
    check_saves(stores.absolute(f"{bucket}/tried"))
    assert stores.files(stores.absolute(f"{bucket}/tried")) == []


@pytest.mark.parametrize(
    "asked", [lambda *_: 1 / 0, lambda *_: time.sleep(100)], ids=["refuses", "silent"]
)
@pytest.mark.usefixtures("copies")
def test_a_run_that_no_longer_reaches_its_bucket_ends(bucket, monkeypatch, capsys, asked):
    """The bucket refuses, or does not answer at all."""
    ended = threading.Event()

    def end(code):
        assert code == 3
        ended.set()
        raise SystemExit

    monkeypatch.setattr(module.os, "_exit", end)
    with Store(f"{bucket}/unreached").held(), monkeypatch.context() as patch:
        patch.setattr(stores, "write_bytes", asked)
        patch.setattr(module, "_GIVEN", 1.0)
        assert ended.wait(20)
    assert "unreached: no answer of the bucket for " in capsys.readouterr().err


@pytest.mark.usefixtures("copies")
def test_a_workdir_that_another_has_taken_is_left_to_it(bucket, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(module.os, "_exit", lambda code: ended.set())
    store = Store(f"{bucket}/taken")
    other = json.dumps({"run": "other", "pid": 1, "host": "h"}).encode()
    with store.held():
        monkeypatch.setattr(stores, "write_bytes", lambda *_: None)
        stores._client().pipe_file(f"{bucket}/taken/{OWNER}", other)
        assert ended.wait(20)
    assert stores.read_bytes(store.root / OWNER) == other


def test_the_server_remembers_an_upload_whose_answer_was_lost(served):
    """As the real one does; clients ask again."""
    with served() as root:
        bucket = root.removeprefix("gs://")
        place = f"{os.environ['STORAGE_EMULATOR_HOST']}/upload/storage/v1/b/{bucket}/o"
        begin = urllib.request.Request(f"{place}?uploadType=resumable&name=a", b"", method="POST")
        with urllib.request.urlopen(begin) as answer:
            upload = answer.headers["Location"]
        for content, part in ((b"abc", "bytes 0-2/3"), (b"abc", "bytes 0-2/3"), (b"", "bytes */3")):
            headers = {"Content-Range": part}
            with urllib.request.urlopen(
                urllib.request.Request(upload, content, headers, method="PUT")
            ) as answer:
                assert (answer.status, json.load(answer)["name"]) == (200, "a")
        assert stores.read_bytes(stores.absolute(f"{root}/a")) == b"abc"


@pytest.mark.soak  # It mostly waits.
def test_a_bucket_that_often_fails_loses_nothing(copies, served):
    """A fifth of the requests is late, lost before or after it is served, or refused."""
    state = {"w": jnp.arange(1000.0)}
    with served(faults=0.2) as root:
        store = Store(f"{root}/faults")
        with store.held():
            for number in range(4):
                (store.folder / "log").write_text("line\n" * (number + 1))
                store.publish()
            checkpoints = Checkpointer(store.checkpoints("sft"), before_whole=store.publish)
            for step in range(1, 4):
                checkpoints.save(step, jax.tree.map(lambda x, step=step: x + step, state))
            assert text(store.root, "log") == "line\n" * 4
        step, restored, _ = Checkpointer(store.checkpoints("sft")).restore_newest(
            jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
        )
        assert step == 3
        np.testing.assert_array_equal(restored["w"], state["w"] + 3)
        assert stores.names(store.checkpoints("sft")) != []
