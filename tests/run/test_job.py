"""What the stages share: rows of a host, copies of parameters, and checks beforehand."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image, ImageOps
from tokenizers import normalizers

from morer1_jax.config.binding import read_config
from morer1_jax.config.settings import settings
from morer1_jax.errors import ConfigError, DataError
from morer1_jax.run.job import Job
from morer1_jax.run.mesh import shardings_of
from morer1_jax.task import more

TINY = Path(__file__).parents[1] / "configs" / "tiny.py"


@pytest.fixture
def config(small_world):
    config = read_config(TINY)
    config.data.folder = str(small_world)
    config.mesh.update(data=2, fsdp=1, tensor=4)
    return config


@pytest.fixture
def job(config, tmp_path):
    return Job(settings(config), tmp_path)


def test_loading_is_as_the_config_says(config, tmp_path):
    assert Job(settings(config), tmp_path).loading == {"workers": 1, "kind": "thread"}
    config.data.update(workers=3, worker_kind="process")
    assert Job(settings(config), tmp_path).loading == {"workers": 3, "kind": "process"}


def test_data_is_in_the_workdir_unless_the_config_says_where(config, tmp_path, small_world):
    assert Job(settings(config), tmp_path).data == small_world
    config.data.folder = None
    assert Job(settings(config), tmp_path).data == tmp_path / "data"


def test_facts_are_numbered_within_their_split(job):
    for split in ("train", "valid", "test"):
        assert [job.index[fact.id] for fact in job.facts[split]] == list(
            range(len(job.facts[split]))
        )


def test_the_tokenizer_is_trained_once_and_found_again(job, config, tmp_path):
    first = job.tokenizer
    files = {p.name: p.read_bytes() for p in (tmp_path / "tokenizer").iterdir()}
    config.data.vocabulary = 300  # Would give another one, were it trained again.
    again = Job(settings(config), tmp_path).tokenizer
    assert again.get_vocab() == first.get_vocab()
    assert {p.name: p.read_bytes() for p in (tmp_path / "tokenizer").iterdir()} == files


def test_embedding_rows_cover_the_tokenizer_and_divide_over_a_mesh(job):
    policy = job.policy
    rows, special = policy.model.config.text.vocab_size, policy.special
    assert rows % 64 == 0
    assert 0 <= rows - len(job.tokenizer) < 64
    assert np.flatnonzero(np.asarray(policy.allowed)).max() < len(job.tokenizer)
    banned = [special.pad, special.image, special.video, special.vision_start]
    assert not np.asarray(policy.allowed)[banned].any()


def random(leaf):
    return np.random.default_rng(0).normal(size=leaf.shape).astype(leaf.dtype)


def test_a_new_state_outlives_the_parameters_it_was_made_from_and_they_it(job):
    params = jax.tree.map(lambda leaf: jax.device_put(random(leaf), leaf.sharding), job.like[0])
    optimizer = job.settings.sft.optimizer.build(3)
    state, like = job.new_state(params, optimizer), job.like_state(optimizer)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings_of(like)
    before = jax.tree.map(np.asarray, params)
    # As the train step does with the state it is given.
    jax.tree.map(lambda leaf: leaf.delete(), state)
    jax.tree.map(np.testing.assert_array_equal, params, before)


def test_sft_scores_plainly_and_grpo_at_its_temperature(config, tmp_path):
    config.grpo.temperature = 0.5
    assert Job(settings(config), tmp_path).score.temperature == 0.5


KEYS = ("rate.batch", "grpo.prompts", "evaluate.batch")


@pytest.mark.parametrize("key", KEYS)
def test_a_batch_that_the_mesh_cannot_split_is_named_before_any_work(config, tmp_path, key):
    config.data.folder = str(tmp_path / "absent")  # Not looked at: that comes after.
    branch, leaf = key.split(".")
    config[branch][leaf] = 3
    job = Job(settings(config), tmp_path / "run")
    with pytest.raises(ConfigError, match=rf"^config\.{key}: 3 found, a multiple of .* = 2 "):
        job.check()
    assert not (tmp_path / "run").exists()


def test_good_data_passes_and_a_prompt_beyond_its_bucket_does_not(config, tmp_path):
    Job(settings(config), tmp_path).check()
    config.data.prompt_length = 50
    with pytest.raises(DataError, match=r"^train:1: its prompt has .*data\.prompt_length"):
        Job(settings(config), tmp_path).check()


def test_a_label_that_the_tokenizer_cannot_write_is_named_before_any_work(job):
    job.tokenizer.backend_tokenizer.normalizer = normalizers.Replace("/", "|")
    with pytest.raises(DataError, match=r"^label '/.*': the tokenizer '.*' writes it as '\|"):
        job.check()
    assert not (job.workdir / "data.json").exists()


def test_what_was_replaced_since_the_run_began_is_named(config, tmp_path, small_world):
    """Photos of any split, of the same name and size; and the tokenizer, which is in no dataset."""
    folder, workdir = tmp_path / "data", tmp_path / "run"
    shutil.copytree(small_world, folder)
    config.data.folder = str(folder)

    def check():
        Job(settings(config), workdir).check()

    check()
    before = (workdir / "data.json").read_bytes()
    job = Job(settings(config), workdir)
    photos = [f"img_org/{job.facts[split][-1].photo}" for split in more.SPLITS]
    for name in photos:
        kept = (folder / name).read_bytes()
        with Image.open(folder / name) as photo:
            ImageOps.invert(photo).save(folder / name)
        with pytest.raises(DataError, match=rf"^{folder}: {name} changed since .* put what was"):
            check()
        (folder / name).write_bytes(kept)
    path = workdir / "tokenizer" / "tokenizer.json"
    kept = path.read_text()
    path.write_text(kept.replace('"NFC"', '"NFKC"'))
    with pytest.raises(DataError, match=r"tokenizer/tokenizer\.json changed since"):
        check()
    path.write_text(kept)
    assert (workdir / "data.json").read_bytes() == before
    check()


def test_a_hidden_title_beyond_its_bucket_is_found_before_any_stage(config, tmp_path, small_world):
    folder = tmp_path / "data"
    shutil.copytree(small_world, folder)
    # One word, of a single byte and so a single token: shorter than the word for a hidden one.
    ontology = more.read_ontology(folder)
    for split in more.SPLITS:
        facts = more.read_split(folder, split, ontology)
        short = {"tokens": ("x",), "entity_name": "x", "entity_span": (0, 1)}
        more.write_split(folder, split, [dataclasses.replace(fact, **short) for fact in facts])
    config.data.folder = str(folder)
    longest = max(need.prompt for need in Job(settings(config), tmp_path / "a").needs.values())
    config.data.prompt_length = longest
    config.stages = "sft,grpo"
    Job(settings(config), tmp_path / "b").check()
    config.stages = "sft,baselines,grpo"
    with pytest.raises(DataError, match=r"^train:\d+: its prompt has .*data\.prompt_length"):
        Job(settings(config), tmp_path / "b").check()


def test_blind_encoders_share_all_but_what_they_hide(job):
    blind = job.new_encoder(completion=9, show_photo=False)
    assert blind.limits == dataclasses.replace(job.encoder.limits, completion=9, windows=0)
    assert job.new_encoder(show_title=False).limits == job.encoder.limits
