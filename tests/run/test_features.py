"""Kept features: the same numbers as pixels give, where they may be kept at all."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from morer1_jax.batch import VisionBatch
from morer1_jax.config.binding import read_config
from morer1_jax.config.settings import settings
from morer1_jax.data.collate import Collator
from morer1_jax.data.shapes import Shape
from morer1_jax.errors import ConfigError, DataError
from morer1_jax.model.scorer import ScoreConfig, sequence_logprobs
from morer1_jax.run import features
from morer1_jax.run.setup import open_run, open_setup, with_features
from morer1_jax.run.store import Store

pytestmark = pytest.mark.usefixtures("quick_compiles")

TINY = Path(__file__).parents[1] / "configs" / "tiny.py"


@pytest.fixture(scope="module")
def config(small_world):
    config = read_config(TINY)
    config.data.folder = str(small_world)
    config.data.keep_features = True
    config.tune.update(vision=0.0, merger=0.0)
    config.mesh.update(data=2, fsdp=2, tensor=2)
    config.grpo.prompts = 4
    return config


def opened(config, workdir):
    return open_run(open_setup(settings(config), workdir), reasoning_needed=True)


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    return with_features(opened(config, tmp_path_factory.mktemp("features")))


def encode(run, workdir):
    """Kept features of a run's images, in another workdir."""
    return with_features(dataclasses.replace(run, store=Store(workdir))).reader.features


def test_log_probabilities_are_those_of_the_pixels(tiny, run):
    reasoning, trainee = run.dataset.reasoning, run.trainee
    facts = [fact for fact in run.dataset.splits["train"] if fact.id in reasoning][:8]
    params = trainee.whole(trainee.init_params(0))
    model, limits = trainee.policy.model, run.reader.limits
    shape = Shape(limits.prompt + limits.completion, limits.slots)
    logprobs = tiny.jit(
        lambda params, batch: sequence_logprobs(model, params, batch, ScoreConfig())[0]
    )

    def scored(reader):
        samples = [reader.read(fact, reasoning[fact.id]) for fact in facts]
        batch = Collator.of(reader).sequences([[sample] for sample in samples], shape)
        return np.asarray(logprobs(params, batch))[batch.weights > 0], batch

    ours, kept = scored(run.reader)
    theirs, seen = scored(dataclasses.replace(run.reader, features=None))
    assert kept.vision._fields == ("features",)
    assert isinstance(seen.vision, VisionBatch)
    np.testing.assert_array_equal(kept.tokens, seen.tokens)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    # Whose features they are matters.
    swapped = kept._replace(
        vision=kept.vision._replace(features=np.roll(kept.vision.features, 1, axis=0))
    )
    assert np.abs(np.asarray(logprobs(params, swapped))[kept.weights > 0] - theirs).max() > 1e-3


def test_each_image_is_encoded_once(run):
    index = json.loads((run.workdir / "features" / "index.json").read_text())
    facts = run.dataset.facts
    assert index["facts"].keys() == {fact.id for fact in facts}
    photos = {index["facts"][fact.id][0][0] for fact in facts}
    assert len(photos) == len({fact.photo for fact in facts}) < len(facts)


def test_a_fact_without_features_is_named(run):
    fact = run.dataset.splits["test"][0]
    other = type(fact)(**{**vars(fact), "id": "test:999"})
    with pytest.raises(
        DataError, match=r"features: expected features of fact test:999, found none"
    ):
        run.reader.read(other)


@pytest.mark.parametrize("part", ["vision", "merger"])
def test_features_of_what_trains_are_refused_before_any_work(config, tmp_path, part):
    changed = config.copy_and_resolve_references()
    changed.tune[part] = 0.5
    with pytest.raises(
        ConfigError, match=rf"data\.keep_features: .* tune\.{part} = 0, .* found 0\.5"
    ):
        opened(changed, tmp_path)
    assert not (tmp_path / "features").exists()


def test_a_full_disk_is_found_before_an_image_is_encoded(run, tmp_path, file_limit, monkeypatch):
    """Later it would end the process without a word: features are written to mapped memory."""
    monkeypatch.setattr(features, "load_ahead", None)
    with file_limit(5000), pytest.raises(OSError, match="File too large") as error:
        encode(run, tmp_path)
    assert error.value.filename.endswith("features.bin")
    assert not list(tmp_path.iterdir())


def test_what_a_crash_leaves_is_not_taken_for_features(run, tmp_path, monkeypatch):
    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(features, "write_index", crash)
    with pytest.raises(KeyboardInterrupt):
        encode(run, tmp_path)
    assert not (tmp_path / "features").exists()


def test_features_that_are_not_finite_are_not_kept(run, tmp_path, monkeypatch):
    patches = run.trainee.frozen["vision"]["patch_embed"]
    monkeypatch.setitem(patches, "kernel", patches["kernel"] * 1e38)
    with pytest.raises(DataError, match=r"^fact train:1: expected finite features of its photo, "):
        encode(run, tmp_path)
    assert not (tmp_path / "features").exists()


def test_a_damaged_index_is_named(config, tmp_path):
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "index.json").write_text('{"facts": {')
    with pytest.raises(DataError, match=r"features: expected an index and features, .* delete the"):
        opened(config, tmp_path)


def test_features_of_other_photos_or_pixel_limits_are_named(run, config, tmp_path, small_world):
    """A run keeps them beside its digests; a folder copied from another run has none of those."""
    folder = tmp_path / "data"
    shutil.copytree(small_world, folder)
    shutil.copytree(run.reader.features.folder, tmp_path / "features")
    changed = config.copy_and_resolve_references()
    changed.data.folder = str(folder)
    opened(changed, tmp_path)  # The same photos in another place.
    # Digests of the run itself would name them first.
    (tmp_path / "data.json").unlink()
    photo = run.dataset.splits["valid"][0].photo
    with Image.open(folder / "img_org" / photo) as before:
        ImageOps.invert(before).save(folder / "img_org" / photo)
    stale = rf"^{tmp_path}/features: .* found others \(img_org/{photo} changed\); delete"
    with pytest.raises(DataError, match=stale):
        opened(changed, tmp_path)
    (tmp_path / "data.json").unlink()
    changed.data.update(folder=str(small_world), crop_margin=0.3)
    with pytest.raises(DataError, match=r"found others \(pixel limits or crop changed\); "):
        opened(changed, tmp_path)


def test_features_that_do_not_say_what_they_were_made_of_are_refused_at_the_start(
    run, config, tmp_path
):
    shutil.copytree(run.reader.features.folder, tmp_path / "features")
    path = tmp_path / "features" / "index.json"
    described = json.loads(path.read_text())
    del described["made_of"]
    path.write_text(json.dumps(described))
    with pytest.raises(
        DataError, match=r"features: .* found no digests of what they were made of; d"
    ):
        opened(config, tmp_path)
