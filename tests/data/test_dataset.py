"""A dataset opened whole: what it holds, and what it asks for."""

import shutil

import pytest

from morer1_jax.data.dataset import open_dataset
from morer1_jax.errors import DataError
from morer1_jax.task import more
from morer1_jax.task.photos import PhotoFiles, photo_sizes


@pytest.fixture
def folder(small_world, tmp_path):
    return shutil.copytree(small_world, tmp_path / "data")


def test_it_holds_what_the_files_say(small_world):
    dataset = open_dataset(small_world)
    ontology = more.read_ontology(small_world)
    assert dataset.ontology.labels == ontology.labels
    for split in more.SPLITS:
        assert dataset.splits[split] == more.read_split(small_world, split, ontology)
    assert dataset.facts == [fact for split in more.SPLITS for fact in dataset.splits[split]]
    assert dataset.photo_sizes == photo_sizes(dataset.facts, PhotoFiles(small_world))
    path = small_world / "reasoning.jsonl"
    assert dataset.reasoning == more.read_reasoning(path, dataset.splits["train"], ontology)
    texts = list(dataset.texts())
    assert len(texts) == len(dataset.splits["train"])
    for fact, text in zip(dataset.splits["train"], texts, strict=True):
        assert text.endswith(dataset.reasoning.get(fact.id, ""))


def test_reasoning_that_is_missing_is_an_error_only_where_it_is_needed(folder):
    (folder / "reasoning.jsonl").unlink()
    with pytest.raises(DataError, match=r"reasoning\.jsonl: "):
        open_dataset(folder)
    assert open_dataset(folder, reasoning_needed=False).reasoning == {}


def test_reasoning_from_elsewhere_has_a_digest_of_its_own(folder, tmp_path):
    source = tmp_path / "other.jsonl"
    (folder / "reasoning.jsonl").rename(source)
    before = open_dataset(folder, reasoning=str(source))
    lines = source.read_text().splitlines(keepends=True)
    source.write_text("".join(lines[1:]))
    after = open_dataset(folder, reasoning=str(source))
    changed = {k for k in before.digests if before.digests[k] != after.digests[k]}
    assert changed == {str(source)}


def test_photos_may_be_left_unread(folder):
    photo = folder / "img_org" / open_dataset(folder).facts[0].photo
    photo.write_bytes(b"no photo")
    dataset = open_dataset(folder, photos=False)
    assert dataset.photos == {}
    assert not any(name.startswith("img_org") for name in dataset.digests)
    with pytest.raises(DataError, match=str(photo.name)):
        open_dataset(folder)
