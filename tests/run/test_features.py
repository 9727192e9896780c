"""Kept features: the same numbers as pixels give, where they may be kept at all."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from morer1_jax.config.binding import read_config
from morer1_jax.config.settings import settings
from morer1_jax.errors import ConfigError, DataError
from morer1_jax.model.scorer import ScoreConfig, sequence_logprobs
from morer1_jax.run import features
from morer1_jax.run.job import Job

pytestmark = pytest.mark.usefixtures("quick_compiles")

TINY = Path(__file__).parents[1] / "configs" / "tiny.py"


@pytest.fixture(scope="module")
def config(small_world):
    config = read_config(TINY)
    config.data.folder = str(small_world)
    config.data.keep_features = True
    config.tune.update(vision=0.0, merger=0.0)
    config.mesh.update(data=2, fsdp=1, tensor=4)
    return config


@pytest.fixture(scope="module")
def job(config, tmp_path_factory):
    return Job(settings(config), tmp_path_factory.mktemp("features"))


def test_log_probabilities_are_those_of_the_pixels(tiny, job):
    facts = [fact for fact in job.facts["train"] if fact.id in job.reasoning][:6]
    params = job.whole(job.init_params(0))
    run = tiny.jit(
        lambda params, batch: sequence_logprobs(job.policy.model, params, batch, ScoreConfig())[0]
    )

    def scored(encoder):
        samples = [encoder.sample(fact, job.reasoning[fact.id]) for fact in facts]
        batch = encoder.sequences([[sample] for sample in samples])
        return np.asarray(run(params, batch))[batch.weights > 0], batch

    ours, kept = scored(job.encoder)
    theirs, seen = scored(job.new_encoder(pixels=True))
    assert kept.vision._fields == ("features",)
    assert seen.vision._fields == ("patches", "positions", "image_ids", "part_ids")
    np.testing.assert_array_equal(kept.tokens, seen.tokens)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    # Whose features they are matters.
    swapped = kept._replace(
        vision=kept.vision._replace(features=np.roll(kept.vision.features, 1, axis=0))
    )
    assert np.abs(np.asarray(run(params, swapped))[kept.weights > 0] - theirs).max() > 1e-3


def test_each_image_is_encoded_once(job):
    index = json.loads((job.workdir / "features" / "index.json").read_text())
    facts = [fact for split in job.facts.values() for fact in split]
    assert index["facts"].keys() == {fact.id for fact in facts}
    photos = {index["facts"][fact.id][0][0] for fact in facts}
    assert len(photos) == len({fact.photo for fact in facts}) < len(facts)


def test_a_fact_without_features_is_named(job):
    fact = job.facts["test"][0]
    other = type(fact)(**{**vars(fact), "id": "test:999"})
    with pytest.raises(DataError, match=r"test:999: not among the facts of .*features"):
        job.encoder.sample(other)


@pytest.mark.parametrize("part", ["vision", "merger"])
def test_features_of_what_trains_are_refused_before_any_work(config, tmp_path, part):
    changed = config.copy_and_resolve_references()
    changed.tune[part] = 0.5
    with pytest.raises(ConfigError, match=rf"config\.data\.keep_features: .* tune\.{part} is 0\.5"):
        Job(settings(changed), tmp_path).check()
    assert not (tmp_path / "features").exists()


def test_a_full_disk_is_found_before_an_image_is_encoded(job, tmp_path, file_limit, monkeypatch):
    """Later it would end the process without a word: features are written to mapped memory."""
    monkeypatch.setattr(job, "workdir", tmp_path)
    monkeypatch.setattr(features, "load_ahead", None)
    with file_limit(5000), pytest.raises(OSError, match="File too large") as error:
        features.feature_store(job)
    assert error.value.filename.endswith("features.bin")
    assert not list(tmp_path.iterdir())


def test_what_a_crash_leaves_is_not_taken_for_features(job, tmp_path, monkeypatch):
    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "workdir", tmp_path)
    monkeypatch.setattr(features, "write_index", crash)
    with pytest.raises(KeyboardInterrupt):
        features.feature_store(job)
    assert not (tmp_path / "features").exists()


def test_features_that_are_not_finite_are_not_kept(job, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "workdir", tmp_path)
    patches = job.frozen["vision"]["patch_embed"]
    monkeypatch.setitem(patches, "kernel", patches["kernel"] * 1e38)
    with pytest.raises(DataError, match=r"^fact train:1: the features of its photo are not fin"):
        features.feature_store(job)
    assert not (tmp_path / "features").exists()


def test_a_damaged_index_is_named(config, tmp_path):
    again = Job(settings(config), tmp_path)
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "index.json").write_text('{"facts": {')
    with pytest.raises(DataError, match=r"features: features cannot be read .* delete the folder"):
        again.encoder.sample(again.facts["train"][0])


def test_features_of_other_photos_or_pixel_limits_are_named(job, config, tmp_path, small_world):
    """A run keeps them beside its digests; a folder copied from another run has none of those."""
    folder = tmp_path / "data"
    shutil.copytree(small_world, folder)
    shutil.copytree(job.features.folder, tmp_path / "features")
    changed = config.copy_and_resolve_references()
    changed.data.folder = str(folder)
    features.feature_store(Job(settings(changed), tmp_path))  # The same photos in another place.
    photo = job.facts["valid"][0].photo
    with Image.open(folder / "img_org" / photo) as before:
        ImageOps.invert(before).save(folder / "img_org" / photo)
    stale = rf"^{tmp_path}/features: the features are of others: img_org/{photo} changed; .*delete"
    with pytest.raises(DataError, match=stale):
        features.feature_store(Job(settings(changed), tmp_path))
    changed.data.update(folder=str(small_world), crop_margin=0.3)
    with pytest.raises(DataError, match="are of others: pixel limits or crop changed; "):
        features.feature_store(Job(settings(changed), tmp_path))


def test_features_that_do_not_say_what_they_were_made_of_are_refused_at_the_start(
    job, config, tmp_path
):
    shutil.copytree(job.features.folder, tmp_path / "features")
    path = tmp_path / "features" / "index.json"
    described = json.loads(path.read_text())
    del described["made_of"]
    path.write_text(json.dumps(described))
    with pytest.raises(DataError, match=r"features do not say what they are of; .*delete"):
        Job(settings(config), tmp_path).check()
