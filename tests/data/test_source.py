"""The released files and the TensorFlow dataset made of them are one dataset to a run."""

import ast
import functools
import json
import random
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from unicodedata import normalize

import cloudpickle
import numpy as np
import pytest

from morer1_jax.data import more_tfds
from morer1_jax.data.curriculum import MixConfig, Mixer, Pool
from morer1_jax.data.dataset import open_dataset
from morer1_jax.data.feed import Host, PromptFeed, SequenceFeed
from morer1_jax.data.images import ImageReader
from morer1_jax.data.loader import load_ahead
from morer1_jax.data.rows import plan_rows
from morer1_jax.data.sample import Limits, SampleReader
from morer1_jax.data.shapes import plan_prompts
from morer1_jax.data.source import Released, open_source
from morer1_jax.data.tfds_source import TfdsSource
from morer1_jax.errors import DataError
from morer1_jax.model.config import ImageConfig, VisionConfig
from morer1_jax.task import more
from morer1_jax.task.photos import check_photos, read_photo

TOWER = VisionConfig(
    depth=1,
    hidden_size=16,
    intermediate_size=16,
    num_heads=2,
    out_hidden_size=16,
    fullatt_block_indexes=(0,),
    window_size=56,
)
BATCH = 5
# Decomposed, as macOS keeps names.
NAME = normalize("NFD", "Zoë.jpg")


def decompose(folder):
    """Gives a fact a photo and a title of decomposed letters, and its labels another order."""
    path = more.split_path(folder, "train")
    lines = path.read_text().splitlines()
    fact = ast.literal_eval(lines[5])
    photos = folder / "img_org" / "train"
    shutil.copy(photos / fact["img_id"], photos / NAME)
    fact |= {"img_id": normalize("NFC", NAME), "token": [*fact["token"], normalize("NFD", "é")]}
    lines[5] = repr(fact)
    path.write_text("".join(line + "\n" for line in lines))
    labels = json.loads((folder / "rel2id.json").read_text())
    (folder / "rel2id.json").write_text(
        json.dumps({x: -i % len(labels) for x, i in labels.items()})
    )


@pytest.fixture(scope="module")
def made(once, small_world):
    """A folder with the dataset `released` and, made of it, `tfds/more`."""

    def make(folder):
        shutil.copytree(small_world, folder / "released")
        decompose(folder / "released")
        more_tfds.build(folder / "released", folder / "tfds")
        shutil.copy(folder / "released" / "reasoning.jsonl", folder / "tfds" / "more")

    return once("two_forms", make)


@pytest.fixture(scope="module")
def released(made):
    return open_dataset(made / "released")


@pytest.fixture(scope="module", params=["local", "bucket"])
def built(request, made, tmp_path_factory):
    folder = made / "tfds" / "more"
    if request.param == "local":
        yield open_dataset(folder)
        return
    upload = request.getfixturevalue("upload")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MORER1_DATA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield open_dataset(upload(folder, "built/more"))


@pytest.fixture
def folder(made, tmp_path):
    """A copy of the TensorFlow dataset, to be spoilt."""
    return shutil.copytree(made / "tfds", tmp_path / "tfds") / "more"


def test_all_that_is_read_is_equal(released, built):
    assert (type(released.source), type(built.source)) == (Released, TfdsSource)
    assert built.ontology.labels == released.ontology.labels
    assert built.ontology.ids == released.ontology.ids
    assert built.ontology.labels[0] == "none" != built.ontology.labels[1]
    assert built.splits == released.splits
    assert built.reasoning == released.reasoning != {}
    assert built.photos == released.photos
    assert built.digests == released.digests
    assert {"rel2id.json", "txt/valid.txt", "reasoning.jsonl"} < built.digests.keys()
    assert list(built.texts()) == list(released.texts())
    assert released.facts[5].image == NAME
    for fact in released.facts:
        assert built.source.photo(fact) == released.source.photo(fact)
        ours, theirs = (np.asarray(read_photo(x.source, fact)) for x in (built, released))
        np.testing.assert_array_equal(ours, theirs)


def test_a_bucket_with_the_released_files_is_read_as_before(made, upload, released):
    dataset = open_dataset(upload(made / "released", "released"))
    assert type(dataset.source) is Released
    assert dataset.splits == released.splits
    assert dataset.digests == released.digests


def feeds(dataset, tokenizer):
    """The feeds of SFT and of GRPO, and the steps of an epoch of each."""
    images = ImageReader(dataset.source, ImageConfig(max_pixels=84 * 84))
    reader = SampleReader(tokenizer, dataset.ontology, images, TOWER, Limits(512, 512, 12))
    facts, texts = dataset.splits["train"], dataset.reasoning
    written = [fact for fact in facts if fact.id in texts]
    pool = Pool("training", np.arange(len(written)), (1,))
    draw = functools.partial(pool.batch, size=BATCH)
    sizes = reader.sizes(written, dataset.photo_sizes, texts)
    steps = -(-len(written) // BATCH)
    plan = plan_rows(
        [[sizes[i] for i in draw(step)] for step in range(steps)],
        lambda shape: shape.length,
        multiple=2,
        sharing=[2],
    )
    sft = SequenceFeed(reader, written, texts, draw, Host(), sizes, plan)
    epoch = -(-len(facts) // BATCH)
    half = len(facts) // 2
    mixer = Mixer(range(half), range(half, len(facts)), MixConfig(until=2), BATCH, epoch, seed=1)
    asked = reader.sizes(facts, dataset.photo_sizes, {})
    shapes = plan_prompts(
        [[asked[i] for i in mixer.batch(step)] for step in range(epoch)],
        lambda shape: shape.length,
        round_to=1,
    )
    grpo = PromptFeed(reader, facts, mixer.batch, Host(), asked, shapes)
    return [(sft, steps), (grpo, epoch)]


def check_equal(ours, theirs):
    if isinstance(ours, tuple):
        assert type(ours) is type(theirs)
        for a, b in zip(ours, theirs, strict=True):
            check_equal(a, b)
    else:
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_every_batch_of_an_epoch_is_equal(released, built, small_tokenizer):
    pairs = zip(feeds(released, small_tokenizer), feeds(built, small_tokenizer), strict=True)
    for (theirs, steps), (ours, same) in pairs:
        assert steps == same > 3
        for step in range(steps):
            check_equal(ours(step), theirs(step))
        assert ours(0).vision.patches.any()


@pytest.mark.parametrize("built", ["bucket"], indirect=True)
def test_worker_processes_make_the_same_batches(released, built, small_tokenizer):
    theirs, ours = (
        [feed for feed, _ in feeds(dataset, small_tokenizer)] for dataset in (released, built)
    )
    batches = load_ahead(lambda step: tuple(f(step) for f in ours), 0, 3, workers=1, kind="process")
    for step, batch in enumerate(batches):
        check_equal(batch, tuple(feed(step) for feed in theirs))
    assert step == 2


def test_many_threads_and_copies_read_the_same_photos(made, released):
    source = open_source(made / "tfds" / "more")
    source.facts("train")
    facts = released.facts * 8
    random.Random(0).shuffle(facts)
    expected = {fact.photo: released.source.photo(fact) for fact in released.facts}
    # One that was not read from yet, one that has open files, one that knows no fact.
    sources = [cloudpickle.loads(cloudpickle.dumps(source)), source]
    sources += [cloudpickle.loads(cloudpickle.dumps(source)), open_source(source.folder)]
    for each in sources:
        with ThreadPoolExecutor(16) as pool:
            photos = list(pool.map(each.photo, facts))
        assert all(photo == expected[fact.photo] for photo, fact in zip(photos, facts, strict=True))


def test_reasoning_is_looked_for_beside(folder, made, tmp_path):
    (folder / "reasoning.jsonl").rename(tmp_path / "other.jsonl")
    with pytest.raises(DataError, match=r"/more/reasoning\.jsonl: no such file; SFT learns"):
        open_dataset(folder)
    assert open_dataset(folder, reasoning_needed=False, photos=False).reasoning == {}
    there = open_dataset(folder, reasoning=str(tmp_path / "other.jsonl"), photos=False)
    assert there.reasoning == open_dataset(made / "released", photos=False).reasoning


def refused(match, folder, **options):
    with pytest.raises(DataError, match=match) as error:
        open_source(folder, **options)
    assert "\n" not in str(error.value)


def test_a_folder_beside_the_one_that_is_meant_is_named(folder):
    right = re.escape(f"--config.data.folder={folder}")
    forms = r"expected a dataset in MORE's released form .* or the folder `more` of its Tensor"
    refused(rf"tfds: {forms}.*, found the folder above that; give {right}$", folder.parent)
    refused(rf"give --data={folder}$", folder.parent, flag="--data")
    for part in ("facts", "facts/1.0.0", "photos", "photos/1.0.0"):
        refused(rf"{part}: {forms}.*, found a part of one; give {right}$", folder / part)


def test_a_build_that_is_not_whole_is_refused(folder):
    shutil.move(folder / "photos", folder.parent)
    refused(
        r"/more: expected facts/1\.0\.0 and photos/1\.0\.0, found no photos: the build was cut "
        r"off; run tools/build_tfds\.py again$",
        folder,
    )
    (folder / "facts" / "1.0.0").rename(folder / "facts" / "2.0.0")
    refused(r"/more/facts: expected 1\.0\.0/dataset_info\.json, found 2\.0\.0; run", folder)


def test_neither_form_is_what_it_was(tmp_path):
    with pytest.raises(DataError, match=r"/absent/rel2id\.json: expected a JSON object"):
        open_dataset(tmp_path / "absent")
    (tmp_path / "rel2id.json").write_text("{}")
    (tmp_path / "more" / "facts").mkdir(parents=True)
    assert type(open_source(tmp_path)) is Released


def test_what_reads_it_may_be_missing(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    refused(
        r"/more: reading a TensorFlow dataset takes tensorflow-datasets, found none; pip "
        r"install 'morer1-jax\[tfds\]'$",
        folder,
    )


def shard(folder, config, split):
    (path,) = (folder / config / "1.0.0").glob(f"more-{split}.array_record*")
    return path


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def other_photos(folder):
    """Photos of a build whose valid split has two photos in each other's place."""
    source = shutil.copytree(folder.parents[1] / "released", folder.parent / "other")
    lines = more.split_path(source, "valid").read_text().splitlines(keepends=True)
    more.split_path(source, "valid").write_text("".join(lines[::-1]))
    more_tfds.build(source, folder.parent / "again")
    shutil.rmtree(folder / "photos")
    shutil.copytree(folder.parent / "again" / "more" / "photos", folder / "photos")


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda f: shard(f, "facts", "valid").unlink(), r"/more/facts/1\.0\.0: .*; build the data"),
        (lambda f: cut(shard(f, "facts", "valid")), r"/more/facts/1\.0\.0: .*; build the dataset"),
        (lambda f: cut(f / "facts/1.0.0/dataset_info.json"), r"/more/facts/1\.0\.0: .*; build the"),
        (lambda f: (f / "facts/1.0.0/metadata.json").unlink(), r"digests of MORE's files, found n"),
        (
            lambda f: (f / "facts/1.0.0/label.labels.txt").write_text("a\nnone\n"),
            r"/more/facts/1\.0\.0: label 'a': expected 'none' or '/object type/entity",
        ),
        (
            lambda f: shard(f, "photos", "valid").unlink(),
            r"/more/photos/1\.0\.0: valid/\S+ \(fact valid:1\): .*; build the dataset with tools",
        ),
        (
            other_photos,
            r"photos/1\.0\.0: valid/\S+ \(fact valid:\d+\): expected this photo in place .* of two",
        ),
    ],
)
def test_what_is_damaged_is_named(made, tmp_path, spoil, expected):
    folder = shutil.copytree(made, tmp_path / "both") / "tfds" / "more"
    spoil(folder)
    with pytest.raises(DataError, match=expected) as error:
        open_dataset(folder)
    assert "\n" not in str(error.value).split(";")[0]


def test_a_photo_that_is_damaged_is_named_as_in_a_folder(made, tmp_path):
    source = shutil.copytree(made / "released", tmp_path / "released")
    facts = Released(source).facts("valid")
    path = more.photo_path(source, facts[0])
    built, good = tmp_path / "tfds", path.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(more_tfds, "check_photos", lambda *_: path.write_bytes(good[:200]))
        more_tfds.build(source, built)
    with pytest.raises(DataError, match=rf": {facts[0].photo} \(fact valid:1\): cannot be read"):
        check_photos(facts, open_source(built / "more"))
