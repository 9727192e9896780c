"""What the stages share, opened and checked before any of them runs."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from PIL import Image, ImageOps
from tokenizers import normalizers

from morer1_jax.config.binding import read_config
from morer1_jax.config.settings import settings
from morer1_jax.data.sample import View
from morer1_jax.errors import ConfigError, DataError
from morer1_jax.run import setup as setups
from morer1_jax.run.setup import open_run, open_setup
from morer1_jax.task import more

TINY = Path(__file__).parents[1] / "configs" / "tiny.py"


@pytest.fixture
def config(small_world):
    config = read_config(TINY)
    config.data.folder = str(small_world)
    config.mesh.update(data=2, fsdp=2, tensor=2)
    config.grpo.prompts = 4
    return config


def opened(config, workdir, **options):
    return open_run(open_setup(settings(config), workdir), reasoning_needed=True, **options)


@pytest.fixture
def run(config, tmp_path):
    return opened(config, tmp_path)


def test_loading_is_as_the_config_says(config, tmp_path):
    config.profile.steps = (2, 3)
    options = opened(config, tmp_path).loop_options
    assert options == {"workers": 1, "kind": "thread", "profile": (2, 3)}
    config.data.update(workers=3, worker_kind="process")
    options = opened(config, tmp_path).loop_options
    assert options == {"workers": 3, "kind": "process", "profile": (2, 3)}


def test_data_is_in_the_workdir_unless_the_config_says_where(config, tmp_path, small_world):
    assert open_setup(settings(config), tmp_path).data == small_world
    config.data.folder = None
    assert open_setup(settings(config), tmp_path).data == tmp_path / "data"


def test_the_tokenizer_is_trained_once_and_found_again(run, config, tmp_path):
    first = run.reader.tokenizer
    files = {p.name: p.read_bytes() for p in (tmp_path / "tokenizer").iterdir()}
    config.data.vocabulary = 300  # Would give another one, were it trained again.
    again = opened(config, tmp_path).reader.tokenizer
    assert again.get_vocab() == first.get_vocab()
    assert {p.name: p.read_bytes() for p in (tmp_path / "tokenizer").iterdir()} == files


def test_every_fact_is_measured_with_its_reasoning(run):
    assert run.sizes.keys() == {fact.id for fact in run.dataset.facts}
    for fact in run.dataset.splits["train"]:
        sample = run.reader.read(fact, run.dataset.reasoning.get(fact.id))
        assert run.sizes[fact.id] == run.reader.size_of(sample)


def test_greedy_answers_are_asked_for_in_planned_shapes(run):
    """Those of validation and evaluation, of which each holds its facts."""
    plan = run.greedy.plan
    for split in ("valid", "test"):
        facts = run.dataset.splits[split]
        asked = plan.batches(facts, run.greedy.batch)
        assert {place for each in asked for place in each.places} == set(range(len(facts)))
        for each in asked:
            assert each.shape in plan.shapes
            assert each.shape.length % run.settings.data.round_to == 0
            longest = max(run.sizes[facts[place].id].prompt for place in each.places)
            assert longest <= each.shape.length


def test_a_rollout_that_the_mesh_cannot_split_is_named_before_any_work(config, tmp_path):
    config.data.folder = str(tmp_path / "absent")  # Not looked at: that comes after.
    config.grpo.prompts = 3
    with pytest.raises(
        ConfigError, match=r"^config\.grpo\.prompts: expected a multiple .* = 4, found 3; use 4"
    ):
        opened(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_good_data_passes_and_a_prompt_beyond_its_bucket_does_not(config, tmp_path):
    opened(config, tmp_path)
    config.data.prompt_length = 50
    with pytest.raises(DataError, match=r"^train:1: its prompt has .*data\.prompt_length"):
        opened(config, tmp_path)


def test_a_label_that_the_tokenizer_cannot_write_is_named_before_any_work(
    config, tmp_path, monkeypatch
):
    load = setups.load_tokenizer

    def changed(folder):
        tokenizer = load(folder)
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace("/", "|")
        return tokenizer

    monkeypatch.setattr(setups, "load_tokenizer", changed)
    with pytest.raises(DataError, match=r"^label '/.*': the tokenizer '.*' writes it as '\|"):
        opened(config, tmp_path)
    assert not (tmp_path / "data.json").exists()


def test_what_was_replaced_since_the_run_began_is_named(config, tmp_path, small_world):
    """Photos of any split, of the same name and size; and the tokenizer, which is in no dataset."""
    folder, workdir = tmp_path / "data", tmp_path / "run"
    shutil.copytree(small_world, folder)
    config.data.folder = str(folder)
    splits = opened(config, workdir).dataset.splits
    before = (workdir / "data.json").read_bytes()
    for name in [f"img_org/{splits[split][-1].photo}" for split in more.SPLITS]:
        kept = (folder / name).read_bytes()
        with Image.open(folder / name) as photo:
            ImageOps.invert(photo).save(folder / name)
        with pytest.raises(DataError, match=rf"^{folder}: {name} changed since .* put what was"):
            opened(config, workdir)
        (folder / name).write_bytes(kept)
    path = workdir / "tokenizer" / "tokenizer.json"
    kept = path.read_text()
    path.write_text(kept.replace('"NFC"', '"NFKC"'))
    with pytest.raises(DataError, match=r"tokenizer/tokenizer\.json changed since"):
        opened(config, workdir)
    path.write_text(kept)
    assert (workdir / "data.json").read_bytes() == before
    opened(config, workdir)


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
    sizes = opened(config, tmp_path / "a").sizes
    config.data.prompt_length = max(size.prompt for size in sizes.values())
    opened(config, tmp_path / "b")
    opened(config, tmp_path / "b", blind_views=[View(photo=False)])
    with pytest.raises(DataError, match=r"^train:\d+: its prompt has .*data\.prompt_length"):
        opened(config, tmp_path / "b", blind_views=[View(title=False)])


def test_blind_readers_share_all_but_what_they_hide(run):
    limits = run.reader.limits
    blind = run.reader.showing(View(photo=False), completion=9)
    assert blind.limits == dataclasses.replace(limits, completion=9, slots=0)
    same = run.reader.showing(View(title=False), limits.completion)
    assert same == dataclasses.replace(run.reader, view=View(title=False))
