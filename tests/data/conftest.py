"""What the tests of samples and of their batches share: a small world's facts, and a reader."""

import pytest
from etils import epath

from morer1_jax.data.images import ImageReader
from morer1_jax.data.sample import Limits, SampleReader, View
from morer1_jax.model.config import ImageConfig, VisionConfig
from morer1_jax.model.special import SpecialIds
from morer1_jax.task import more
from morer1_jax.task.photos import PhotoFiles, photo_sizes

TOWER = VisionConfig(
    depth=1,
    hidden_size=16,
    intermediate_size=16,
    num_heads=2,
    out_hidden_size=16,
    fullatt_block_indexes=(0,),
    window_size=56,
)
LIMITS = Limits(prompt=320, completion=256, slots=12)


@pytest.fixture(scope="module")
def ontology(small_world):
    return more.read_ontology(small_world)


@pytest.fixture(scope="module")
def facts(small_world, ontology):
    return more.read_split(small_world, "train", ontology)


@pytest.fixture(scope="module")
def sizes(small_world, facts):
    return photo_sizes(facts, PhotoFiles(small_world))


@pytest.fixture(scope="module")
def reasoning(small_world, facts):
    ontology = more.read_ontology(small_world)
    return more.read_reasoning(small_world / "reasoning.jsonl", facts, ontology)


@pytest.fixture(scope="module")
def make(small_world, small_tokenizer, ontology):
    """`make(limits, view)`: a reader of the facts."""
    photos = ImageReader(PhotoFiles(small_world), ImageConfig(max_pixels=112 * 112))

    def make(limits=LIMITS, view=View()):
        return SampleReader(small_tokenizer, ontology, photos, TOWER, limits, view)

    return make


@pytest.fixture(scope="module")
def reader(make):
    return make()


@pytest.fixture(scope="module")
def special(small_tokenizer):
    return SpecialIds.of(small_tokenizer)


@pytest.fixture(scope="module")
def upload(bucket):
    """`upload(folder, name)`: the path in the bucket that a copy of the folder then has."""

    def copy(folder, name):
        there = epath.Path(bucket) / name
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                (there / path.relative_to(folder).as_posix()).write_bytes(path.read_bytes())
        return there

    return copy
