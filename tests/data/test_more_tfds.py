"""The TensorFlow dataset: the same facts in the same order, and the same photos, byte for byte."""

import dataclasses
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from morer1_jax.data import more_tfds
from morer1_jax.data.source import open_source
from morer1_jax.errors import DataError
from morer1_jax.task import more
from morer1_jax.task.fact import Fact
from morer1_jax.task.ontology import Ontology
from morer1_jax.task.photo import open_photo
from morer1_jax.task.photos import PhotoFiles, read_photo

LABELS = ("/per/org/opposed_to", "none", "/per/misc/party")
FACT = Fact(
    id="train:1",
    tokens=("Heat", "and", "Celtics"),
    entity_name="Heat",
    entity_span=(0, 1),
    object_name="[OBJ0]",
    box=(0.1 + 0.2, 1 / 3, 0.25, 0.5),
    image="1.jpg",
    label="none",
)
UNUSUAL = (
    {"tokens": ("Win",), "entity_span": (0, 1), "image": "3.png"},
    {"tokens": ("Zoë", "\u2028", "a\\n'b\"", "東京"), "entity_name": "Zoë", "image": "2 ü.jpg"},
    {"label": "/per/misc/party", "entity_span": (2, 3), "object_name": "[OBJ1]", "image": "1.jpg"},
)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "MORE"
    more.write_ontology(folder, Ontology(LABELS))
    for split in more.SPLITS:
        photos = folder / "img_org" / split
        photos.mkdir(parents=True)
        facts = [FACT, *(dataclasses.replace(FACT, **changes) for changes in UNUSUAL), FACT]
        facts = [dataclasses.replace(f, id=f"{split}:{n}") for n, f in enumerate(facts, start=1)]
        more.write_split(folder, split, facts)
        for number, image in enumerate({fact.image: None for fact in facts}):
            exif = Image.Exif()
            exif[0x0112] = 6
            pixels = np.random.default_rng(number).integers(0, 256, (9, 20 + number, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(photos / image, exif=exif)
        (photos / "unused.jpg").write_bytes(b"")
    return folder


def direct(folder):
    ontology = more.read_ontology(folder)
    return {split: more.read_split(folder, split, ontology) for split in more.SPLITS}


def test_facts_are_those_of_the_direct_reader_in_their_order(folder, tmp_path):
    more_tfds.build(folder, tmp_path / "tfds")
    assert "tensorflow" not in sys.modules
    for split, facts in direct(folder).items():
        assert len(facts) == 5
        assert more_tfds.read_facts(tmp_path / "tfds", split) == facts
    for found in more_tfds.read_facts(tmp_path / "tfds", "train"):
        assert [type(x) for x in (*found.entity_span, *found.box)] == [int] * 2 + [float] * 4


def test_photos_are_their_files_bytes_each_once(folder, tmp_path):
    more_tfds.build(folder, tmp_path / "tfds")
    for split, facts in direct(folder).items():
        examples, photos = (
            tfds.data_source(f"more/{config}", split=split, data_dir=tmp_path / "tfds", **options)
            for config, options in (
                ("facts", {}),
                ("photos", {"decoders": {"photo": tfds.decode.SkipDecoding()}}),
            )
        )
        assert len(photos) == 3
        for example, fact in zip(examples, facts, strict=True):
            photo = photos[int(example["photo"])]
            assert photo["image"].decode() == example["image"].decode() == fact.image
            assert photo["photo"] == more.photo_path(folder, fact).read_bytes()
            seen = np.asarray(open_photo(photo["photo"]))
            np.testing.assert_array_equal(seen, np.asarray(read_photo(PhotoFiles(folder), fact)))


def test_a_dataset_is_not_mixed_with_another(folder, tmp_path):
    more_tfds.build(folder, tmp_path / "tfds")
    with pytest.raises(DataError, match=r"^\S*/more/facts/1\.0\.0: there is .*; delete it, or use"):
        more_tfds.build(folder, tmp_path / "tfds")


def test_a_build_that_was_cut_off_between_the_two_goes_on(folder, tmp_path):
    data_dir = tmp_path / "tfds"
    more_tfds.build(folder, data_dir)
    photos = data_dir / "more" / more_tfds.PHOTOS
    whole = sorted(path.name for path in (photos / "1.0.0").iterdir())
    shutil.rmtree(photos)
    assert more_tfds.build(folder, data_dir)[1] == str(photos / "1.0.0")
    assert sorted(path.name for path in (photos / "1.0.0").iterdir()) == whole
    shutil.rmtree(photos)
    path = more.split_path(folder, "test")
    path.write_text(path.read_text().replace("Celtics", "Lakers"))
    with pytest.raises(
        DataError, match=r"facts/1\.0\.0: there is a dataset of other facts already"
    ):
        more_tfds.build(folder, data_dir)


def cut_photo(folder):
    path = folder / "img_org" / "valid" / "1.jpg"
    path.write_bytes(path.read_bytes()[:200])


def cut_line(folder):
    path = more.split_path(folder, "test")
    path.write_text(path.read_text()[:-20])


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (cut_photo, r"img_org/valid/1\.jpg \(fact valid:1\): "),
        (cut_line, r"txt/test\.txt:5: expected one Python dict"),
        (lambda folder: (folder / "rel2id.json").unlink(), r"rel2id\.json: .*No such file"),
    ],
)
def test_bad_data_is_named_before_anything_is_built(folder, tmp_path, spoil, named):
    spoil(folder)
    with pytest.raises(DataError, match=named) as error:
        more_tfds.build(folder, tmp_path / "tfds")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "tfds").rglob("*.array_record*"))


def test_a_dataset_or_split_that_is_not_there_is_named(folder, tmp_path):
    with pytest.raises(DataError, match=r"/more/facts/1\.0\.0: .*build the dataset") as error:
        more_tfds.read_facts(tmp_path / "tfds", "train")
    assert "\n" not in str(error.value)
    more_tfds.build(folder, tmp_path / "tfds")
    with pytest.raises(DataError, match=r"/more/facts/1\.0\.0: .*'dev'") as error:
        more_tfds.read_facts(tmp_path / "tfds", "dev")
    assert "\n" not in str(error.value)


def test_the_command_builds_or_says_why_not_in_one_line(command, folder, tmp_path):
    tool = Path(__file__).parents[2] / "tools" / "build_tfds.py"
    cut_line(folder)
    _, error = command(str(tool), f"--folder={folder}", f"--data_dir={tmp_path / 'tfds'}", code=2)
    assert error.splitlines()[-1].startswith(
        f"error: {folder}/txt/test.txt:5: expected one Python dict"
    )


def test_a_bucket_is_built_from(upload, bucket, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MORER1_DATA_CACHE", str(tmp_path / "cache"))
    source = open_source(upload(folder, "to-build/released"))
    more_tfds.build(source.folder, tmp_path / "tfds")
    built = open_source(upload(tmp_path / "tfds", "to-build/tfds") / "more")
    for split, facts in direct(folder).items():
        assert source.facts(split) == built.facts(split) == facts
        assert [*map(built.photo, facts)] == [*map(source.photo, facts)]
