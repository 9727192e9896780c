import contextlib
import errno
import hashlib
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from morer1_jax.errors import DataError
from morer1_jax.run import checkpoint, manifest
from morer1_jax.run.checkpoint import Checkpointer
from morer1_jax.run.manifest import CheckpointError
from morer1_jax.run.mesh import make_mesh, state_shardings


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: optax.OptState
    rng: jax.Array


def make_state(seed=0, width=8):
    keys = jax.random.split(jax.random.key(seed), 3)
    params = {
        "embedding": jax.random.normal(keys[0], (16, width)),
        "layers": {
            "mlp": {"down": {"kernel": jax.random.normal(keys[1], (2, 16, width), jnp.bfloat16)}},
            "q": {"bias": jnp.zeros((2, 4, 2))},
        },
    }
    opt_state = optax.chain(optax.clip(1.0), optax.adam(1e-3)).init(params)
    rng = jax.random.key_data(keys[2])
    return State(jnp.asarray(seed, jnp.int32), params, opt_state, rng)


def like(state, mesh=None):
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    if mesh is None:
        return shapes
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        state_shardings(mesh, shapes, shapes.params),
    )


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_state_comes_back_bit_for_bit(tmp_path):
    checkpointer = Checkpointer(tmp_path / "ckpt")
    assert checkpointer.latest() is None
    state = make_state(3)
    extra = {"step": 3, "seed": 7, "loss": 0.1, "pool": [1, 2]}
    checkpointer.save(3, state, extra)
    again = Checkpointer(tmp_path / "ckpt")
    assert again.latest() == 3
    restored, remembered = again.restore(None, like(state))
    assert_equal(restored, state)
    assert remembered == extra


def test_restoring_onto_another_mesh_gives_equal_values(tmp_path):
    state = make_state(1)
    one = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    placed = jax.device_put(state, state_shardings(one, state, state.params))
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, placed)
    two = make_mesh({"data": 2, "fsdp": 1, "tensor": 4})
    small = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, devices=jax.devices()[:1])
    for mesh in (one, two, small):
        target = like(state, mesh)
        restored, _ = checkpointer.restore(1, target)
        assert_equal(restored, state)
        for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(target), strict=True):
            assert leaf.sharding == wanted.sharding
    assert placed.params["embedding"].sharding.spec == P("tensor", "fsdp")


def test_only_the_newest_are_kept(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=2)
    for step in (1, 2, 5, 9):
        checkpointer.save(step, {"x": jnp.full(3, step)})
    assert sorted(os.listdir(tmp_path)) == ["step_00000005", "step_00000009"]
    restored, _ = checkpointer.restore(5, like({"x": jnp.full(3, 0)}))
    assert restored["x"].tolist() == [5, 5, 5]


def test_old_ones_go_only_after_the_new_one_is_whole(tmp_path, monkeypatch):
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(1, {"x": jnp.ones(3)})

    def full_disk(source, target):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "rename", full_disk)
    with pytest.raises(OSError, match="no space"):
        checkpointer.save(2, {"x": jnp.ones(3)})
    monkeypatch.undo()
    assert checkpointer.latest() == 1
    assert os.listdir(tmp_path) == ["step_00000001"]


def test_a_step_is_never_overwritten(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(4, {"x": jnp.ones(3)})
    for step in (3, 4):
        with pytest.raises(CheckpointError, match=f"expected a step after 4, .* found {step};"):
            checkpointer.save(step, {"x": jnp.ones(3)})


def test_every_flipped_bit_is_found(tmp_path):
    state = make_state(0)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, state)
    generator = random.Random(0)
    arrays = files(tmp_path / "step_00000001" / "arrays")
    assert len(arrays) > 5
    for path in arrays:
        whole = path.read_bytes()
        damaged = bytearray(whole)
        if damaged:
            damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        else:
            damaged = b"x"
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError) as error:
            checkpointer.restore(1, like(state))
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
        path.write_bytes(whole)
    assert_equal(checkpointer.restore(1, like(state))[0], state)
    arrays[3].unlink()
    with pytest.raises(CheckpointError, match="expected the file that was saved, found"):
        checkpointer.restore(1, like(state))


@pytest.mark.parametrize("damage", ["absent", "empty", "torn", "flipped"])
def test_a_folder_without_a_valid_manifest_is_passed_over(tmp_path, caplog, damage):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, {"x": jnp.full(3, 1)}, {"seed": 1})
    checkpointer.save(2, {"x": jnp.full(3, 2)}, {"seed": 2})
    path = tmp_path / "step_00000002" / "manifest.json"
    text = path.read_bytes()
    if damage == "absent":
        path.unlink()
    else:
        flipped = text.replace(b'"seed": 2', b'"seed": 3')
        path.write_bytes({"empty": b"", "torn": text[:-9], "flipped": flipped}[damage])
    with caplog.at_level(logging.WARNING):
        assert checkpointer.latest() == 1
    assert "step_00000002 is not a whole checkpoint" in caplog.text
    with pytest.raises(
        CheckpointError, match="step_00000002: expected a whole checkpoint, found none"
    ):
        checkpointer.restore(2, like({"x": jnp.full(3, 0)}))
    checkpointer.save(2, {"x": jnp.full(3, 4)})
    assert checkpointer.restore(None, like({"x": jnp.full(3, 0)}))[0]["x"].tolist() == [4, 4, 4]


def test_nothing_to_restore_is_an_error(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    for restore in (lambda: checkpointer.restore(None, {}), lambda: checkpointer.restore_best({})):
        with pytest.raises(DataError, match="expected a whole checkpoint, found none; train first"):
            restore()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 4}, "params/embedding: expected float32[16, 4], found float32[16, 8] in the"),
        (
            {"dtype": jnp.bfloat16},
            "params/embedding: expected bfloat16[16, 8], found float32[16, 8]",
        ),
        ({"less": "embedding"}, "params/embedding: expected no such leaf, found float32[16, 8]"),
        ({"more": "head"}, "params/head: expected float32[16, 8], found no such leaf in the"),
    ],
)
def test_another_structure_is_named_by_its_leaf(tmp_path, change, message):
    params = make_state().params
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, {"params": params})
    wanted = like(params)
    shape, dtype = (16, change.get("width", 8)), change.get("dtype", jnp.float32)
    wanted["embedding"] = jax.ShapeDtypeStruct(shape, dtype)
    if "less" in change:
        del wanted[change["less"]]
    if "more" in change:
        wanted[change["more"]] = jax.ShapeDtypeStruct((16, 8), jnp.float32)
    with pytest.raises(CheckpointError) as error:
        checkpointer.restore(1, {"params": wanted})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_cannot_be_kept_is_refused_before_anything_is_written(tmp_path):
    checkpointer = Checkpointer(tmp_path / "ckpt")
    with pytest.raises(TypeError, match="params/x: expected a jax"):
        checkpointer.save(1, {"params": {"x": 3}})
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpointer.save(1, {"x": jnp.ones(2)}, {"loss": float("nan")})
    assert not (tmp_path / "ckpt").exists()


def test_dropping_leaves_the_newest_and_the_best(tmp_path):
    checkpoints = Checkpointer(tmp_path, keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, {"w": jnp.ones(2)})
    checkpoints.save_best(1, {"w": jnp.ones(2)}, 1.0)
    (tmp_path / ".step_00000004.tmp").mkdir()
    checkpoints.shelf.drop(keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "step_00000003"]
    # One that cannot be read just now may be the newest there is.
    path = tmp_path / "step_00000003" / "manifest.json"
    path.rename(tmp_path / "away")
    checkpoints.shelf.drop(keep=1)
    (tmp_path / "away").rename(path)
    assert checkpoints.latest() == 3
    checkpoints.shelf.drop(keep=0)
    assert checkpoints.latest() is None
    assert checkpoints.best() == (1, 1.0)


def test_a_full_disk_is_one_error_and_leaves_what_was_there(tmp_path, file_limit, caplog, capfd):
    checkpoints = Checkpointer(tmp_path)
    state = {"w": jnp.asarray(np.random.default_rng(0).normal(size=100_000), jnp.float32)}
    like = {"w": jax.ShapeDtypeStruct((100_000,), jnp.float32)}
    checkpoints.save(1, state)
    checkpoints.save_best(1, state, 1.0)
    for write, path in (
        (lambda: checkpoints.save(2, state), tmp_path / "step_00000002"),
        (lambda: checkpoints.save_best(2, state, 2.0), tmp_path / "best" / "step_00000002"),
    ):
        with file_limit(50_000), pytest.raises(OSError, match="File too large") as error:
            write()
        assert error.value.filename == str(path)
    assert not caplog.records
    assert capfd.readouterr().err == ""
    assert sorted(path.name for path in tmp_path.rglob("*step_*")) == ["step_00000001"] * 2
    np.testing.assert_array_equal(checkpoints.restore(None, like)[0]["w"], state["w"])
    checkpoints.save(2, state)
    assert checkpoints.latest() == 2


def test_the_best_is_kept_beside_the_newest(tmp_path):
    checkpointer = Checkpointer(tmp_path, keep=1)
    assert checkpointer.best() is None
    metrics = [(1, 0.5, True), (2, 0.7, True), (3, 0.7, False), (4, 0.1, False)]
    for step, metric, better in [*metrics, (5, float("nan"), False)]:
        checkpointer.save(step, {"x": jnp.full(2, step)})
        assert checkpointer.save_best(step, {"x": jnp.full(2, step)}, metric) == better
    assert checkpointer.latest() == 5
    again = Checkpointer(tmp_path)
    assert again.best() == (2, 0.7)
    params, extra = again.restore_best(like({"x": jnp.full(2, 0)}))
    assert params["x"].tolist() == [2, 2]
    assert extra == {"metric": 0.7}
    assert os.listdir(tmp_path / "best") == ["step_00000002"]


def test_the_best_is_read_beside_a_run_that_keeps_better_ones(tmp_path, monkeypatch):
    """One that goes while it is chosen, looked at, verified, or read by orbax."""
    run, reader = Checkpointer(tmp_path), Checkpointer(tmp_path)
    kept = iter(range(1, 10))

    def keep():
        step = next(kept)
        run.save_best(step, {"x": jnp.full(2, step)}, step)

    def meanwhile(module, name, matches=lambda *_: True):
        """Keeps a better one once, when the function is called next by the reader."""
        function, done = getattr(module, name), []

        def changed(*args, **kwargs):
            if not done and matches(*args):
                done.append(True)
                keep()
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, changed)
        return done

    keep()
    ways = [(checkpoint, "read_manifest"), (checkpoint, "verify"), (manifest, "_file_digests")]
    ways += [(checkpoint, "first_not_finite"), (Checkpointer, "_read"), (checkpoint, "plain_path")]
    for module, name in ways:
        with monkeypatch.context():
            before = run.best()[0]
            done = meanwhile(module, name)
            params, extra = reader.restore_best(like({"x": jnp.full(2, 0)}))
            monkeypatch.undo()
        assert done, name
        # What was read whole before it went is as good.
        newest = run.best()[0]
        assert newest == before + 1
        assert params["x"].tolist() == [extra["metric"]] * 2
        assert extra["metric"] in (before, newest)


def test_the_best_that_is_damaged_is_an_error_at_once(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save_best(1, {"x": jnp.ones(2)}, 0.5)
    files(tmp_path / "best" / "step_00000001" / "arrays")[0].write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"another SHA-256; delete .*step_00000001 to"):
        checkpointer.restore_best(like({"x": jnp.ones(2)}))


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_what_cannot_be_read_now_is_not_taken_for_damaged(tmp_path, monkeypatch, number):
    checkpointer = Checkpointer(tmp_path, keep=1)
    for step in (1, 2):
        checkpointer.save(step, {"x": jnp.full(2, step)})
        checkpointer.save_best(step, {"x": jnp.full(2, step)}, step)
    (tmp_path / "step_00000001").mkdir()  # Not whole.
    before = files(tmp_path)
    path = tmp_path / "step_00000002" / "manifest.json"

    def fail(self, read=Path.read_bytes):
        if self == path:
            raise OSError(number, os.strerror(number))  # As reading, it does not name the file.
        return read(self)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        for act in (
            checkpointer.latest,
            lambda: checkpointer.shelf.drop(keep=1),
            lambda: checkpointer.save(3, {"x": jnp.ones(2)}),
            lambda: checkpointer.restore(2, like({"x": jnp.ones(2)})),
        ):
            with pytest.raises(OSError, match=re.escape(os.strerror(number))) as error:
                act()
            assert error.value.filename == str(path)
            assert files(tmp_path) == before
    checkpointer.save(3, {"x": jnp.full(2, 3)})
    assert sorted(os.listdir(tmp_path)) == ["best", "step_00000003"]


def test_a_folder_and_arrays_that_cannot_be_read_now_are_named(tmp_path, monkeypatch):
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, {"x": jnp.ones(2)})

    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", fail)
        with pytest.raises(OSError, match="Input/output error") as error:
            checkpointer.restore(1, like({"x": jnp.ones(2)}))
        assert error.value.filename.startswith(f"{tmp_path}/step_00000001/arrays/")
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", fail)
        with pytest.raises(OSError, match="Input/output error") as error:
            checkpointer.latest()
    assert checkpointer.latest() == 1


ODD = (
    "lr=[1e-5]",
    "1234[1].pbs",
    "back\\slash",
    "a*?b",
    "gs:",
    "50% #1 ~",
    "line\n",
    "e\u0301 日本 😀",
    "\udcff",  # No UTF-8.
    "/".join(["deep" * 40] * 5),
)


@pytest.mark.parametrize("name", ODD, ids=ascii)
def test_a_folder_may_have_any_name(tmp_path, monkeypatch, name):
    # A temporary folder of a batch job's may be as odd.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))
    checkpointer = Checkpointer(tmp_path / name)
    state = make_state(1)
    checkpointer.save(1, state)
    assert checkpointer.save_best(1, state.params, 0.5)
    again = Checkpointer(tmp_path / name)
    assert_equal(again.restore(None, like(state))[0], state)
    assert_equal(again.restore_best(like(state.params))[0], state.params)
    assert sorted(os.listdir(tmp_path / name)) == ["best", "step_00000001"]


def test_two_slashes_before_a_path_are_one(tmp_path):
    checkpointer = Checkpointer(f"/{tmp_path}")
    checkpointer.save(1, {"x": jnp.ones(2)})
    assert checkpointer.restore(1, like({"x": jnp.ones(2)}))[0]["x"].tolist() == [1, 1]


def test_a_name_that_is_a_glob_matches_no_other_folder(tmp_path):
    """What another run, killed while it saved, left under a name that the glob matches."""
    killed, mine = Checkpointer(tmp_path / "lr=1"), Checkpointer(tmp_path / "lr=?")
    killed.save(1, {"x": jnp.zeros(3)})
    left = tmp_path / "lr=1" / ".step_00000001.tmp" / "arrays.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "lr=1" / "step_00000001" / "arrays", left)
    (left / "ocdbt.process_0").rename(left / "ocdbt.process_9")
    mine.save(1, {"x": jnp.ones(3)})
    assert mine.restore(1, like({"x": jnp.ones(3)}))[0]["x"].tolist() == [1, 1, 1]
    whole = sum(path.stat().st_size for path in files(tmp_path / "lr=1" / "step_00000001"))
    assert sum(path.stat().st_size for path in files(tmp_path / "lr=?")) < 1.5 * whole


def as_it_is(monkeypatch):
    """Gives orbax the path as it is, so that it merges nothing in a folder such as `[1]`."""
    monkeypatch.setattr("morer1_jax.paths._PLAIN", re.compile("(?s:.*)"), raising=False)


def test_what_cannot_be_found_again_is_no_checkpoint_and_the_older_stay(tmp_path, monkeypatch):
    folder = tmp_path / "[1]"
    checkpointer = Checkpointer(folder, keep=1)
    state = {"x": jnp.ones(3), "y": {"z": jnp.zeros(2)}}
    checkpointer.save(1, state)
    as_it_is(monkeypatch)
    with pytest.raises(
        CheckpointError, match=r"x: expected float32\[3\], found nothing after saving; older ch"
    ):
        checkpointer.save(2, state)
    assert os.listdir(folder) == ["step_00000001"]
    with pytest.raises(CheckpointError, match="found nothing after saving"):
        checkpointer.save_best(2, state, 1.0)
    assert checkpointer.best() is None


def test_a_checkpoint_that_was_never_merged_is_not_whole(tmp_path):
    """Earlier versions gave it digests and a manifest as any other."""
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, {"x": jnp.full(3, 1.0)})
    checkpointer.save(2, {"x": jnp.full(3, 2.0)})
    path = tmp_path / "step_00000002"
    (path / "arrays" / "manifest.ocdbt").unlink()
    body = json.loads((path / "manifest.json").read_bytes())["body"]
    del body["files"]["arrays/manifest.ocdbt"]
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({"sha256": digest, "body": body}))
    assert checkpointer.latest() == 1
    assert checkpointer.restore(None, like({"x": jnp.ones(3)}))[0]["x"].tolist() == [1, 1, 1]


def spoil(state, name, value):
    """The state with one value of the leaf whose path ends in `name` replaced."""

    def put(path, leaf):
        ends = jax.tree_util.keystr(path, simple=True, separator="/").endswith(name)
        return leaf.reshape(-1).at[-1].set(value).reshape(leaf.shape) if ends else leaf

    return jax.tree_util.tree_map_with_path(put, state)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name", ["params/layers/mlp/down/kernel", "opt_state/1/0/nu/layers/q/bias"]
)
def test_a_leaf_that_is_not_finite_is_not_saved(tmp_path, name, value):
    checkpointer = Checkpointer(tmp_path, keep=1)
    good = make_state(1)
    checkpointer.save(1, good)
    checkpointer.save_best(1, good, 0.5)
    before = {path: path.read_bytes() for path in files(tmp_path)}
    bad = spoil(make_state(2), name, value)
    for save in (checkpointer.save, lambda step, state: checkpointer.save_best(step, state, 0.9)):
        with pytest.raises(
            DataError, match=f"step_00000002: {name}: expected finite .* step 2 is not"
        ):
            save(2, bad)
    assert {path: path.read_bytes() for path in files(tmp_path)} == before
    assert checkpointer.best() == (1, 0.5)


def test_a_leaf_that_is_not_finite_is_not_restored(tmp_path, monkeypatch):
    """Older versions saved such; split over a mesh or not, and the best likewise."""
    checkpointer = Checkpointer(tmp_path)
    bad = spoil(make_state(2), "params/embedding", np.nan)
    with monkeypatch.context() as patch:
        patch.setattr("morer1_jax.run.checkpoint.first_not_finite", lambda leaves: None)
        checkpointer.save(2, bad)
        checkpointer.save_best(2, bad, 0.5)
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    for way, read in (
        ("delete .*step_00000002 to go on", lambda: checkpointer.restore(None, like(bad))),
        ("delete .*step_00000002 to go on", lambda: checkpointer.restore(2, like(bad, mesh))),
        ("ask a stage before this one, or train", lambda: checkpointer.restore_best(like(bad))),
    ):
        with pytest.raises(
            CheckpointError, match=f"params/embedding: expected finite .*; {way}"
        ) as e:
            read()
        assert "\n" not in str(e.value)


# Told how many to keep, it starts a process that saves, and says when that has ended. That one
# prints a step once its save has returned; the state is a function of the step alone. Its imports
# were the starter's, which has not used JAX.
SAVER = """
import os, sys
import jax, jax.numpy as jnp
from morer1_jax.run.checkpoint import Checkpointer

def save(keep):
    checkpointer = Checkpointer(sys.argv[1], keep=keep)
    step = checkpointer.latest() or 0
    while True:
        step += 1
        state = {"a": jnp.full((64, 1024), step, jnp.float32), "b": {"c": jnp.arange(7) * step}}
        checkpointer.save(step, state, {"step": step, "third": step / 3})
        print(step, flush=True)

for line in sys.stdin:
    if (process := os.fork()) == 0:
        print(os.getpid(), flush=True)
        save(int(line))
    os.waitpid(process, 0)
    print("ended", flush=True)
"""


@contextlib.contextmanager
def starter(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait(60)
        process.stdout.close()


def kill_while_saving(starter, keep, generator):
    """One process that is killed at a random moment; returns the last step it knew as saved."""
    print(keep, file=starter.stdin, flush=True)
    number = int(starter.stdout.readline())
    steps = [starter.stdout.readline() for _ in range(generator.randrange(2, 6))]
    assert "ended\n" not in steps
    time.sleep(generator.uniform(0, 0.1))
    os.kill(number, signal.SIGKILL)
    steps += iter(starter.stdout.readline, "ended\n")
    return int(steps[-1])


def check_kills(folder, times):
    generator = random.Random(times)
    with starter(folder) as process:
        for repeat in range(times):
            keep = 1 + repeat % 2
            check_killed(folder, keep, kill_while_saving(process, keep, generator))


def check_killed(folder, keep, known):
    checkpointer = Checkpointer(folder)
    step = checkpointer.latest()
    assert step is not None
    assert step >= known
    zeros = {"a": jnp.zeros((64, 1024)), "b": {"c": jnp.arange(7)}}
    state, extra = checkpointer.restore(None, like(zeros))
    assert extra == {"step": step, "third": step / 3}
    assert_equal(state, {"a": jnp.full((64, 1024), float(step)), "b": {"c": jnp.arange(7) * step}})
    assert len([name for name in os.listdir(folder) if not name.startswith(".")]) <= keep + 1


def test_a_run_killed_while_saving_loses_nothing_before(tmp_path):
    check_kills(tmp_path, 3)


@pytest.mark.soak
def test_a_run_killed_while_saving_loses_nothing_before_often(tmp_path):
    check_kills(tmp_path, 50)
