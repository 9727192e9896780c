"""Facts to samples: what a prompt holds, what a fact takes, and what does not fit."""

import dataclasses
import itertools
import json
from unicodedata import normalize

import numpy as np
import pytest

from morer1_jax.data.grammar import token_bytes
from morer1_jax.data.images import ImageReader
from morer1_jax.data.sample import Limits
from morer1_jax.errors import DataError
from morer1_jax.model import vision_layout
from morer1_jax.model.config import ImageConfig
from morer1_jax.task import more
from morer1_jax.task.answer import Special, format_answer, read
from morer1_jax.task.fact import Fact
from morer1_jax.task.photos import PhotoFiles
from morer1_jax.task.prompt import student_prompt

IMAGES = ImageConfig(max_pixels=112 * 112)
LIMITS = Limits(prompt=320, completion=256, slots=12)


def test_a_prompt_is_the_whole_text_with_its_images_expanded(
    reader, facts, ontology, small_world, small_tokenizer, special
):
    sample = reader.read(facts[0])
    counts = [vision_layout.count_image_tokens(grid, merge_size=2) for grid in sample.images.grids]
    assert len(counts) == 2
    ids = sample.prompt
    runs = np.flatnonzero(np.diff(np.r_[False, ids == special.image, False]))
    assert (runs[1::2] - runs[::2]).tolist() == counts
    # With each run folded back into one mark, the ids are those of the text in one piece.
    follows = np.r_[False, ids[:-1] == special.image]
    folded = ids[~((ids == special.image) & follows)]
    text = student_prompt(facts[0], ontology)
    assert folded.tolist() == small_tokenizer(text, add_special_tokens=False)["input_ids"]
    reader = ImageReader(PhotoFiles(small_world), IMAGES)
    np.testing.assert_array_equal(sample.images.values, reader.patches(facts[0]).values)


# What is too long, and the key that the message must name.
TOO_SMALL = [
    (dataclasses.replace(LIMITS, prompt=100), "prompt has", "data.prompt_length"),
    (dataclasses.replace(LIMITS, completion=20), "target has", "data.completion_length"),
    (dataclasses.replace(LIMITS, slots=2), "attention windows", "data.windows"),
]


@pytest.mark.parametrize(("limits", "what", "key"), TOO_SMALL)
def test_what_does_not_fit_is_found_beforehand(make, facts, sizes, reasoning, limits, what, key):
    make().sizes(facts, sizes, reasoning)
    with pytest.raises(DataError, match=rf"^train:\d+: .*{what}.*{key}") as error:
        make(limits).sizes(facts, sizes, reasoning)
    assert "\n" not in str(error.value)


def test_all_shapes_that_are_refused_are_named_at_once(make, facts, sizes, reasoning):
    first = {}
    for fact in facts:
        first.setdefault(fact.photo, fact)
    thin = sizes | dict.fromkeys(list(first)[:3], (900, 3))
    # A photo that several facts are about is one fault.
    assert sum(thin[fact.photo] == (900, 3) for fact in facts) > 3
    with pytest.raises(DataError, match=r"^3 faults: \(1\) ") as error:
        make().sizes(facts, thin, reasoning)
    for fact in list(first.values())[:3]:
        place = f"(fact {fact.id}): expected a photo whose shape the processor takes"
        assert f"{place}, found 900 × 3 pixels" in str(error.value)
    with pytest.raises(DataError, match=r"^20 faults or more: ") as error:
        make().sizes(facts, dict.fromkeys(sizes, (900, 3)), reasoning)
    for photo in list(first)[:20]:
        assert str(error.value).count(photo) == 1


@pytest.mark.parametrize(("limits", "what", "key"), TOO_SMALL)
def test_what_does_not_fit_is_never_cut(make, facts, reasoning, limits, what, key):
    (fact,) = [fact for fact in facts if fact.id == next(iter(reasoning))]
    with pytest.raises(DataError, match=rf"^{fact.id}: .*{what}.*{key}") as error:
        make(limits).read(fact, reasoning[fact.id])
    assert "\n" not in str(error.value)
    if "completion" not in key:
        with pytest.raises(DataError, match=rf"^{fact.id}: .*{what}.*{key}"):
            make(limits).read(fact)


def test_the_check_counts_what_batching_counts(make, facts, sizes, reasoning):
    """A bucket of exactly the longest passes both; one token fewer fails both."""
    samples = [make().read(fact) for fact in facts]
    longest = max(len(sample.prompt) for sample in samples)
    fact = facts[int(np.argmax([len(sample.prompt) for sample in samples]))]
    tight = make(dataclasses.replace(LIMITS, prompt=longest))
    tight.sizes(facts, sizes, reasoning)
    assert len(tight.read(fact).prompt) == longest
    small = make(dataclasses.replace(LIMITS, prompt=longest - 1))
    with pytest.raises(DataError, match=r"data\.prompt_length"):
        small.sizes(facts, sizes, reasoning)
    with pytest.raises(DataError, match=r"data\.prompt_length"):
        small.read(fact)


@pytest.mark.parametrize("forms", [*itertools.product(("NFC", "NFD"), repeat=3)])
def test_a_label_can_be_read_off_its_own_target_whatever_its_form_of_unicode(
    small_tokenizer, tmp_path, forms
):
    """Of `rel2id.json`, of the facts, and of what was written about them."""
    labels = [normalize(form, "/per/org/membre_d'\xe9quipe") for form in forms]
    (tmp_path / "img_org" / "train").mkdir(parents=True)
    (tmp_path / "img_org" / "train" / "1.jpg").touch()
    (tmp_path / "rel2id.json").write_text(json.dumps({"none": 0, labels[0]: 1}))
    fact = Fact("train:1", ("A",), "A", (0, 1), "[OBJ0]", (0.5, 0.5, 1.0, 1.0), "1.jpg", labels[1])
    more.write_split(tmp_path, "train", [fact])
    text = format_answer(["On."] * 6, labels[2])
    more.write_reasoning(tmp_path / "reasoning.jsonl", {"train:1": text})
    ontology = more.read_ontology(tmp_path)
    facts = more.read_split(tmp_path, "train", ontology)
    texts = more.read_reasoning(tmp_path / "reasoning.jsonl", facts, ontology)
    target = small_tokenizer(texts["train:1"], add_special_tokens=False)["input_ids"]
    pieces = token_bytes(small_tokenizer, len(small_tokenizer))
    outcome = read([*(pieces[token] for token in target), Special.END], ontology.labels)
    assert outcome.format
    assert outcome.answer == ontology.ids[facts[0].label] == 1
