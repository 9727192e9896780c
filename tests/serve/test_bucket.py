"""A run in a bucket is opened where it lies, and answers as a copy of it on this machine."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from morer1_jax import stores
from morer1_jax.errors import ConfigError, WeightsError
from morer1_jax.files import write_json
from morer1_jax.run.store import CHECKPOINTS, INDEX, Store
from morer1_jax.serve.loaded import open_model
from morer1_jax.serve.predict import predict
from morer1_jax.task import more

pytestmark = pytest.mark.usefixtures("quick_compiles", "one_device")

EVALUATE, PREDICT = "morer1_jax.evaluate", "morer1_jax.predict"


@pytest.fixture(scope="module")
def local(small_run, small_world, tmp_path_factory):
    """The run with its data in its workdir, as `synthesise` leaves it."""
    workdir = shutil.copytree(small_run, tmp_path_factory.mktemp("local") / "run")
    shutil.copytree(small_world, workdir / "data")
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["folder"] = None
    write_json(workdir / "config.json", config)
    return workdir


@pytest.fixture(scope="module")
def run(local, bucket, tmp_path_factory):
    """`gs://…` of the same run, as one with `--workdir=gs://…` leaves it."""
    root = f"{bucket}/runs/tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MORER1_WORKDIR_CACHE", str(tmp_path_factory.mktemp("copies")))
        store = Store(root)
        with store.held():
            ignore = shutil.ignore_patterns(CHECKPOINTS, "img_org")
            shutil.copytree(local, store.folder, ignore=ignore, dirs_exist_ok=True)
            store.publish()
    saved = local / "sft" / CHECKPOINTS
    to = store.checkpoints("sft")
    stores.copy({to / name: saved / name for name in stores.files(saved)})
    return root


def test_it_answers_as_a_local_copy(local, run, small_world):
    facts = more.read_split(small_world, "test", more.read_ontology(small_world))[:4]
    photos = small_world / "img_org" / "test"
    facts = [dataclasses.replace(fact, image=str(photos / fact.image)) for fact in facts]
    theirs, ours = (open_model(path, completion=12) for path in (run, str(local)))
    assert theirs.digest == ours.digest
    assert theirs.ontology.labels == ours.ontology.labels
    assert {path.name for path in theirs.source.iterdir()} == {
        path.name for path in (local / "tokenizer").iterdir()
    }
    found, expected = (
        list(predict(loaded, facts, batch=4, guided=False)) for loaded in (theirs, ours)
    )
    assert found == expected
    assert len(found) == 4
    jax.tree.map(np.testing.assert_array_equal, theirs.params, ours.params)


def test_evaluate_takes_a_stage_of_it(command, local, run, small_world, tmp_path):
    args = ["--data", small_world, "--split=valid", "--length=12", "--out"]
    for place, checkpoint in (("local", local / "sft"), ("bucket", f"{run}/sft/")):
        command(EVALUATE, f"--checkpoint={checkpoint}", *args, tmp_path / place, code=0)
    for name in ("sft.json", "sft.answers.jsonl"):
        ours, theirs = (tmp_path / place / "eval" / name for place in ("local", "bucket"))
        assert ours.read_bytes() == theirs.read_bytes()
    _, error = command(EVALUATE, f"--checkpoint={run}", *args, f"{run}/scores", code=2)
    assert f"error: --out={run}/scores: expected a path of this machine, found a URL" in error


def test_only_what_its_index_lists_counts(run):
    root = stores.absolute(run)
    listed = stores.read_bytes(root / INDEX)
    names = json.loads(listed)
    try:
        stores.write_bytes(
            root / INDEX, json.dumps([*filter("config.json".__ne__, names)]).encode()
        )
        for path in (run, f"{run}/sft"):
            with pytest.raises((WeightsError, ConfigError)):
                open_model(path)
        others = [name for name in names if not name.startswith("tokenizer/")]
        stores.write_bytes(root / INDEX, json.dumps(others).encode())
        with pytest.raises(WeightsError, match=rf"^{run}/tokenizer: expected the run's tokenizer"):
            open_model(run)
    finally:
        stores.write_bytes(root / INDEX, listed)


@pytest.mark.parametrize("path", ["nothing", "runs/tiny/stf", "runs/tiny/tokenizer"])
def test_what_is_none_is_named(bucket, run, path):
    message = rf"^{bucket}/{path}: expected a run's workdir, one of its stages .*, found no "
    with pytest.raises(WeightsError, match=message):
        open_model(f"{bucket}/{path}")


def test_a_run_that_has_trained_nothing_is_named(bucket, run):
    root = stores.absolute(f"{bucket}/runs/new")
    stores.write_bytes(root / "config.json", stores.read_bytes(f"{run}/config.json"))
    stores.write_bytes(root / INDEX, b'["config.json"]')
    with pytest.raises(ConfigError, match=rf"^{root}: expected a run with a trained model"):
        open_model(f"{bucket}/runs/new")


def test_a_bucket_that_cannot_be_read_is_named(run, monkeypatch):
    def refuse(*_):
        raise RuntimeError("Anonymous caller\nmay not read")

    monkeypatch.setattr(stores, "names", refuse)
    with pytest.raises(WeightsError) as error:
        open_model(run)
    assert str(error.value) == f"{run}: cannot be read: Anonymous caller may not read; start again"
