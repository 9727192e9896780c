"""Facts to arrays of fixed shapes: what stands where, and what does not fit."""

import dataclasses
import itertools
import json
from unicodedata import normalize

import numpy as np
import pytest

from morer1_jax.data import layout
from morer1_jax.data.encoder import Encoder, Limits
from morer1_jax.data.grammar import token_bytes
from morer1_jax.data.images import ImageReader
from morer1_jax.errors import DataError
from morer1_jax.model.config import ImageConfig
from morer1_jax.model.special import SpecialIds
from morer1_jax.task import more
from morer1_jax.task.answer import Special, format_answer, read
from morer1_jax.task.fact import Fact
from morer1_jax.task.prompt import student_prompt

IMAGES = ImageConfig(max_pixels=112 * 112)
WINDOW = 56
SIZES = {"patch_size": 14, "merge_size": 2, "window_size": WINDOW}
LIMITS = Limits(prompt=320, completion=256, windows=12)


@pytest.fixture(scope="module")
def ontology(small_world):
    return more.read_ontology(small_world)


@pytest.fixture(scope="module")
def facts(small_world, ontology):
    return more.read_split(small_world, "train", ontology)


@pytest.fixture(scope="module")
def sizes(small_world, facts):
    return more.photo_sizes(facts, small_world)


@pytest.fixture(scope="module")
def reasoning(small_world, facts):
    ontology = more.read_ontology(small_world)
    return more.read_reasoning(small_world / "reasoning.jsonl", facts, ontology)


@pytest.fixture(scope="module")
def make(small_world, small_tokenizer, ontology):
    def make(limits=LIMITS, **blind):
        return Encoder(small_world, small_tokenizer, ontology, IMAGES, WINDOW, limits, **blind)

    return make


@pytest.fixture(scope="module")
def encoder(make):
    return make()


@pytest.fixture(scope="module")
def special(small_tokenizer):
    return SpecialIds.of(small_tokenizer)


def expected_positions(tokens, grids, special):
    return layout.mrope_positions(
        tokens, grids, merge_size=2, image_token_id=special.image, video_token_id=special.video
    )


def test_a_prompt_is_the_whole_text_with_its_images_expanded(
    encoder, facts, ontology, small_world, small_tokenizer, special
):
    sample = encoder.sample(facts[0])
    counts = [layout.count_image_tokens(grid, merge_size=2) for grid in sample.images.grids]
    assert len(counts) == 2
    ids = sample.prompt
    runs = np.flatnonzero(np.diff(np.r_[False, ids == special.image, False]))
    assert (runs[1::2] - runs[::2]).tolist() == counts
    # With each run folded back into one mark, the ids are those of the text in one piece.
    follows = np.r_[False, ids[:-1] == special.image]
    folded = ids[~((ids == special.image) & follows)]
    text = student_prompt(facts[0], ontology)
    assert folded.tolist() == small_tokenizer(text, add_special_tokens=False)["input_ids"]
    reader = ImageReader(small_world, IMAGES)
    np.testing.assert_array_equal(sample.images.values, reader.patches(facts[0]).values)


def test_padded_rows_hold_prompt_then_target(encoder, facts, reasoning, special):
    ids = list(reasoning)[:3]
    chosen = [fact for fact in facts if fact.id in ids]
    samples = [encoder.sample(fact, reasoning[fact.id]) for fact in chosen]
    batch = encoder.sequences([[sample] for sample in samples])
    s = LIMITS.prompt + LIMITS.completion
    assert batch.tokens.shape == batch.targets.shape == batch.weights.shape == (3, s)
    assert batch.segment_ids.shape == batch.vision_index.shape == (3, s)
    assert batch.positions.shape == (3, 3, s)
    patches = (WINDOW // 14) ** 2
    assert batch.vision.patches.shape == (3, LIMITS.windows, patches, 3 * 2 * 14 * 14)
    assert batch.vision.positions.shape == (3, LIMITS.windows, patches, 2)
    assert batch.vision.image_ids.shape == (3, LIMITS.windows, patches)
    assert {a.dtype.name for a in (batch.tokens, batch.targets, batch.segment_ids)} == {"int32"}
    assert batch.positions.dtype == batch.vision_index.dtype == np.int32
    assert batch.weights.dtype == batch.vision.patches.dtype == np.float32
    for row, sample in enumerate(samples):
        p, n = len(sample.prompt), len(sample.prompt) + len(sample.target)
        np.testing.assert_array_equal(batch.tokens[row, :p], sample.prompt)
        np.testing.assert_array_equal(batch.tokens[row, p:n], sample.target)
        assert (batch.tokens[row, n:] == special.pad).all()
        np.testing.assert_array_equal(batch.segment_ids[row], np.arange(s) < n)
        np.testing.assert_array_equal(
            batch.positions[row, :, :n],
            expected_positions(batch.tokens[row, :n], sample.images.grids, special),
        )
        np.testing.assert_array_equal(batch.targets[row, : n - 1], batch.tokens[row, 1:n])
        placed = layout.vision_layout(sample.images.grids, **SIZES, pad_to_windows=LIMITS.windows)
        is_image = batch.tokens[row] == special.image
        np.testing.assert_array_equal(batch.vision_index[row][is_image], placed.token_slots)
        assert (batch.vision_index[row][~is_image] == -1).all()
        np.testing.assert_array_equal(
            batch.vision.patches[row], layout.place_patches(placed, sample.images.values)
        )


def test_the_loss_counts_the_target_and_its_end_of_turn_alone(
    encoder, facts, reasoning, small_tokenizer, special
):
    (fact,) = [fact for fact in facts if fact.id == next(iter(reasoning))]
    batch = encoder.sequences([[encoder.sample(fact, reasoning[fact.id])]])
    counted = batch.targets[0][batch.weights[0] == 1]
    assert set(batch.weights[0]) == {0.0, 1.0}
    assert counted[-1] == special.end_of_turn
    assert small_tokenizer.decode(counted[:-1]) == reasoning[fact.id]
    # The first counted place is the prompt's last token.
    assert np.flatnonzero(batch.weights[0])[0] == len(encoder.sample(fact).prompt) - 1


def test_packed_rows_keep_their_samples_apart(encoder, facts, reasoning, special, make):
    ids = list(reasoning)[:3]
    chosen = [fact for fact in facts if fact.id in ids]
    packer = make(Limits(prompt=1000, completion=1000, windows=40))
    samples = [encoder.sample(fact, reasoning[fact.id]) for fact in chosen]
    packed = packer.sequences([samples])
    padded = packer.sequences([[sample] for sample in samples])
    start = slots = 0
    for i, sample in enumerate(samples):
        n = len(sample.prompt) + len(sample.target)
        here = slice(start, start + n)
        assert (packed.segment_ids[0, here] == i + 1).all()
        for name in ("tokens", "weights", "positions"):
            np.testing.assert_array_equal(
                getattr(packed, name)[0][..., here], getattr(padded, name)[i][..., :n], name
            )
        # Of the last token the loss counts nothing, whatever follows it.
        np.testing.assert_array_equal(packed.targets[0, here][:-1], padded.targets[i, : n - 1])
        assert packed.weights[0, here][-1] == 0
        assert packed.positions[0, :, start].tolist() == [0, 0, 0]
        index = packed.vision_index[0, here]
        alone = padded.vision_index[i, :n]
        np.testing.assert_array_equal(np.where(index < 0, -1, index - slots), alone)
        start += n
        slots += layout.count_windows(sample.images.grids, **SIZES) * (WINDOW // 28) ** 2
    assert (packed.segment_ids[0, start:] == 0).all()
    assert not packed.weights[0, start:].any()
    # Images are numbered on through the row, so that none attends to another sample's.
    images = packed.vision.image_ids[0]
    assert sorted(set(images[images >= 0].tolist())) == list(range(2 * len(samples)))


def test_prompts_to_sample_from(encoder, facts, ontology, special):
    chosen = facts[3:6]
    batch = encoder.prompts(chosen, [3, 4, 5])
    assert batch.tokens.shape == batch.mask.shape == (3, LIMITS.prompt)
    assert batch.fact.tolist() == [3, 4, 5]
    assert [ontology.labels[i] for i in batch.gold] == [fact.label for fact in chosen]
    for row, fact in enumerate(chosen):
        sample = encoder.sample(fact)
        n = len(sample.prompt)
        np.testing.assert_array_equal(batch.mask[row], np.arange(LIMITS.prompt) < n)
        np.testing.assert_array_equal(batch.tokens[row, :n], sample.prompt)
        assert (batch.tokens[row, n:] == special.pad).all()
        # The first sampled token stands where the layout would put one more text token.
        longer = np.r_[sample.prompt, special.end_of_turn]
        positions = expected_positions(longer, sample.images.grids, special)
        np.testing.assert_array_equal(batch.positions[row, :, :n], positions[:, :-1])
        assert positions[:, -1].tolist() == [batch.next_position[row]] * 3


def test_a_row_is_the_same_in_any_batch(encoder, facts):
    whole = encoder.prompts(facts[:4], range(4))
    alone = encoder.prompts([facts[2]], [2])
    for name, field in zip(whole._fields, whole, strict=True):
        if name != "vision":
            np.testing.assert_array_equal(field[2], getattr(alone, name)[0], name)
    for all_rows, one in zip(whole.vision, alone.vision, strict=True):
        np.testing.assert_array_equal(all_rows[2], one[0])


def test_blind_encoders_leave_out_what_they_hide(make, facts, special, small_tokenizer):
    blind = make(dataclasses.replace(LIMITS, windows=0), show_photo=False)
    batch = blind.prompts(facts[:2], [0, 1])
    assert batch.vision.patches.shape[:2] == (2, 0)
    assert not (batch.tokens == special.image).any()
    assert (batch.vision_index == -1).all()
    assert facts[0].title in small_tokenizer.decode(batch.tokens[0][batch.mask[0]])
    deaf = make(show_title=False).prompts(facts[:2], [0, 1])
    assert (deaf.tokens == special.image).any()
    text = small_tokenizer.decode(deaf.tokens[0][deaf.mask[0]])
    assert facts[0].title not in text
    assert facts[0].entity_text in text


# What is too long, and the key that the message must name.
TOO_SMALL = [
    (dataclasses.replace(LIMITS, prompt=100), "prompt has", "data.prompt_length"),
    (dataclasses.replace(LIMITS, completion=20), "target has", "data.completion_length"),
    (dataclasses.replace(LIMITS, windows=2), "attention windows", "data.windows"),
]


@pytest.mark.parametrize(("limits", "what", "key"), TOO_SMALL)
def test_what_does_not_fit_is_found_beforehand(make, facts, sizes, reasoning, limits, what, key):
    make().needs(facts, sizes, reasoning)
    with pytest.raises(DataError, match=rf"^train:\d+: .*{what}.*{key}") as error:
        make(limits).needs(facts, sizes, reasoning)
    assert "\n" not in str(error.value)


def test_all_shapes_that_are_refused_are_named_at_once(make, facts, sizes, reasoning):
    first = {}
    for fact in facts:
        first.setdefault(fact.photo, fact)
    thin = sizes | dict.fromkeys(list(first)[:3], (900, 3))
    # A photo that several facts are about is one fault.
    assert sum(thin[fact.photo] == (900, 3) for fact in facts) > 3
    with pytest.raises(DataError, match=r"^3 faults: \(1\) ") as error:
        make().needs(facts, thin, reasoning)
    for fact in list(first.values())[:3]:
        assert f"(fact {fact.id}): the photo has 900 × 3 pixels" in str(error.value)
    with pytest.raises(DataError, match=r"^20 faults or more: ") as error:
        make().needs(facts, dict.fromkeys(sizes, (900, 3)), reasoning)
    for photo in list(first)[:20]:
        assert str(error.value).count(photo) == 1


@pytest.mark.parametrize(("limits", "what", "key"), TOO_SMALL)
def test_what_does_not_fit_is_never_cut(make, facts, reasoning, limits, what, key):
    (fact,) = [fact for fact in facts if fact.id == next(iter(reasoning))]
    encoder = make(limits)
    sample = encoder.sample(fact, reasoning[fact.id])
    with pytest.raises(DataError, match=rf"^{fact.id}: .*{what}.*{key}") as error:
        encoder.sequences([[sample]])
    assert "\n" not in str(error.value)
    if "completion" not in key:
        with pytest.raises(DataError, match=rf"^{fact.id}: .*{what}.*{key}"):
            encoder.prompts([fact], [0])


def test_samples_that_together_overfill_a_row_are_named(encoder, facts, reasoning):
    ids = list(reasoning)[:2]
    samples = [encoder.sample(fact, reasoning[fact.id]) for fact in facts if fact.id in ids]
    with pytest.raises(DataError, match=rf"^{ids[0]}, {ids[1]}: .*data\.prompt_length"):
        encoder.sequences([samples])


def test_the_check_counts_what_batching_counts(make, facts, sizes, reasoning):
    """A bucket of exactly the longest passes both; one token fewer fails both."""
    samples = [make().sample(fact) for fact in facts]
    longest = max(len(sample.prompt) for sample in samples)
    fact = facts[int(np.argmax([len(sample.prompt) for sample in samples]))]
    tight = make(dataclasses.replace(LIMITS, prompt=longest))
    tight.needs(facts, sizes, reasoning)
    assert tight.prompts([fact], [0]).mask.all()
    small = make(dataclasses.replace(LIMITS, prompt=longest - 1))
    with pytest.raises(DataError, match=r"data\.prompt_length"):
        small.needs(facts, sizes, reasoning)
    with pytest.raises(DataError, match=r"data\.prompt_length"):
        small.prompts([fact], [0])


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
