"""Samples to arrays of fixed shapes: what stands where, and what a row has no room for."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from morer1_jax.data.collate import Collator
from morer1_jax.data.images import ImageReader
from morer1_jax.data.positions import mrope_positions
from morer1_jax.data.sample import Limits, View
from morer1_jax.data.shapes import Shape
from morer1_jax.errors import DataError
from morer1_jax.model import vision_layout
from morer1_jax.model.config import ImageConfig
from morer1_jax.model.vision import VisionInputs

IMAGES = ImageConfig(max_pixels=112 * 112)
WINDOW = 56
SIZES = {"patch_size": 14, "merge_size": 2, "window_size": WINDOW}
LIMITS = Limits(prompt=320, completion=256, slots=12)


def prompts(reader, facts, noise_ids):
    """Prompts in rows of the limits' shape."""
    samples = [reader.read(fact) for fact in facts]
    shape = Shape(reader.limits.prompt, reader.limits.slots)
    return Collator.of(reader).prompts(samples, noise_ids, shape)


def sequences(reader, rows):
    """Samples in rows of the limits' shape."""
    limits = reader.limits
    shape = Shape(limits.prompt + limits.completion, limits.slots)
    return Collator.of(reader).sequences(rows, shape)


def expected_positions(tokens, grids, special):
    return mrope_positions(
        tokens, grids, merge_size=2, image_token_id=special.image, video_token_id=special.video
    )


def test_padded_rows_hold_prompt_then_target(reader, facts, reasoning, special):
    ids = list(reasoning)[:3]
    chosen = [fact for fact in facts if fact.id in ids]
    samples = [reader.read(fact, reasoning[fact.id]) for fact in chosen]
    batch = sequences(reader, [[sample] for sample in samples])
    s = LIMITS.prompt + LIMITS.completion
    assert batch.tokens.shape == batch.targets.shape == batch.weights.shape == (3, s)
    assert batch.segment_ids.shape == batch.vision_index.shape == (3, s)
    assert batch.positions.shape == (3, 3, s)
    patches = (WINDOW // 14) ** 2
    assert batch.vision.patches.shape == (3, LIMITS.slots, patches, 3 * 14 * 14)
    assert batch.vision.positions.shape == (3, LIMITS.slots, patches, 2)
    assert batch.vision.image_ids.shape == (3, LIMITS.slots, patches)
    assert {a.dtype.name for a in (batch.tokens, batch.targets, batch.segment_ids)} == {"int32"}
    assert batch.positions.dtype == batch.vision_index.dtype == np.int32
    assert batch.weights.dtype == batch.vision.mean.dtype == np.float32
    assert batch.vision.patches.dtype == np.uint8
    assert batch.vision.mean.shape == batch.vision.inverse_std.shape == (3, 3)
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
        placed = vision_layout.vision_layout(
            sample.images.grids, **SIZES, pad_to_windows=LIMITS.slots
        )
        is_image = batch.tokens[row] == special.image
        np.testing.assert_array_equal(batch.vision_index[row][is_image], placed.token_slots)
        assert (batch.vision_index[row][~is_image] == -1).all()
        np.testing.assert_array_equal(batch.vision.patches[row], placed.place(sample.images.values))


def test_the_tower_reads_the_processors_own_numbers(make, facts, pixels):
    reader = make()
    images = dataclasses.replace(
        IMAGES, image_mean=(0.48145466, 0.1, 0.7), image_std=(0.26862954, 0.9, 0.3)
    )
    photos = ImageReader(reader.photos.photos, images)
    reader = dataclasses.replace(reader, photos=photos)
    batch = prompts(reader, facts[:3], range(3))
    inputs = jax.jit(VisionInputs.of, static_argnames="frames")(batch.vision, frames=2)
    processor = Qwen2VLImageProcessorPil(
        max_pixels=images.max_pixels,
        image_mean=list(images.image_mean),
        image_std=list(images.image_std),
    )
    for row, fact in enumerate(facts[:3]):
        expected = processor(images=list(photos.pair(fact)), return_tensors="np")
        grids = [tuple(grid) for grid in expected["image_grid_thw"].tolist()]
        layout = vision_layout.vision_layout(grids, **SIZES, pad_to_windows=LIMITS.slots)
        filled = batch.vision.image_ids[row] >= 0
        expected = layout.place(expected["pixel_values"])[filled]
        found = np.asarray(inputs.patches)[row][filled]
        pixels.assert_same(found, expected, fact.id)
    assert np.isfinite(inputs.patches).all()


def test_the_loss_counts_the_target_and_its_end_of_turn_alone(
    reader, facts, reasoning, small_tokenizer, special
):
    (fact,) = [fact for fact in facts if fact.id == next(iter(reasoning))]
    batch = sequences(reader, [[reader.read(fact, reasoning[fact.id])]])
    counted = batch.targets[0][batch.weights[0] == 1]
    assert set(batch.weights[0]) == {0.0, 1.0}
    assert counted[-1] == special.end_of_turn
    assert small_tokenizer.decode(counted[:-1]) == reasoning[fact.id]
    # The first counted place is the prompt's last token.
    assert np.flatnonzero(batch.weights[0])[0] == len(reader.read(fact).prompt) - 1


def test_packed_rows_keep_their_samples_apart(reader, facts, reasoning, special, make):
    ids = list(reasoning)[:3]
    chosen = [fact for fact in facts if fact.id in ids]
    packer = make(Limits(prompt=1000, completion=1000, slots=40))
    samples = [reader.read(fact, reasoning[fact.id]) for fact in chosen]
    packed = sequences(packer, [samples])
    padded = sequences(packer, [[sample] for sample in samples])
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
        slots += vision_layout.count_windows(sample.images.grids, **SIZES) * (WINDOW // 28) ** 2
    assert (packed.segment_ids[0, start:] == 0).all()
    assert not packed.weights[0, start:].any()
    # Images are numbered on through the row, so that none attends to another sample's.
    images = packed.vision.image_ids[0]
    assert sorted(set(images[images >= 0].tolist())) == list(range(2 * len(samples)))


def test_prompts_to_sample_from(reader, facts, ontology, special):
    chosen = facts[3:6]
    batch = prompts(reader, chosen, [3, 4, 5])
    assert batch.tokens.shape == batch.mask.shape == (3, LIMITS.prompt)
    assert batch.fact.tolist() == [3, 4, 5]
    assert [ontology.labels[i] for i in batch.gold] == [fact.label for fact in chosen]
    for row, fact in enumerate(chosen):
        sample = reader.read(fact)
        n = len(sample.prompt)
        np.testing.assert_array_equal(batch.mask[row], np.arange(LIMITS.prompt) < n)
        np.testing.assert_array_equal(batch.tokens[row, :n], sample.prompt)
        assert (batch.tokens[row, n:] == special.pad).all()
        # The first sampled token stands where the layout would put one more text token.
        longer = np.r_[sample.prompt, special.end_of_turn]
        positions = expected_positions(longer, sample.images.grids, special)
        np.testing.assert_array_equal(batch.positions[row, :, :n], positions[:, :-1])
        assert positions[:, -1].tolist() == [batch.next_position[row]] * 3


def test_a_row_is_the_same_in_any_batch(reader, facts):
    whole = prompts(reader, facts[:4], range(4))
    alone = prompts(reader, [facts[2]], [2])
    for name, field in zip(whole._fields, whole, strict=True):
        if name != "vision":
            np.testing.assert_array_equal(field[2], getattr(alone, name)[0], name)
    for all_rows, one in zip(whole.vision, alone.vision, strict=True):
        np.testing.assert_array_equal(all_rows[2], one[0])


def test_blind_encoders_leave_out_what_they_hide(make, facts, special, small_tokenizer):
    blind = make(dataclasses.replace(LIMITS, slots=0), view=View(photo=False))
    batch = prompts(blind, facts[:2], [0, 1])
    assert batch.vision.patches.shape[:2] == (2, 0)
    assert not (batch.tokens == special.image).any()
    assert (batch.vision_index == -1).all()
    assert facts[0].title in small_tokenizer.decode(batch.tokens[0][batch.mask[0]])
    deaf = prompts(make(view=View(title=False)), facts[:2], [0, 1])
    assert (deaf.tokens == special.image).any()
    text = small_tokenizer.decode(deaf.tokens[0][deaf.mask[0]])
    assert facts[0].title not in text
    assert facts[0].entity_text in text


@pytest.mark.parametrize("kind", ["prompts", "sequences"])
def test_rows_that_share_a_row_of_images_find_their_own_in_it(make, facts, reasoning, kind):
    reader = make(dataclasses.replace(LIMITS, slots=40))
    chosen = [fact for fact in facts if fact.id in reasoning][:4]
    if kind == "prompts":
        samples = [reader.read(fact) for fact in chosen]
        lay = functools.partial(Collator.of(reader).prompts, samples, range(4))
    else:
        samples = [[reader.read(fact, reasoning[fact.id])] for fact in chosen]
        lay = functools.partial(Collator.of(reader).sequences, samples)
    length = LIMITS.prompt + LIMITS.completion
    alone, shared = lay(Shape(length, 20)), lay(Shape(length, 40, 2))
    for name, ours, theirs in zip(alone._fields, shared, alone, strict=True):
        if not name.startswith("vision"):
            np.testing.assert_array_equal(ours, theirs, name)
    assert shared.vision.patches.shape[:2] == (2, 40)
    assert len(shared.vision.mean) == 2
    for row in range(4):
        is_image = alone.vision_index[row] >= 0
        np.testing.assert_array_equal(shared.vision_index[row] >= 0, is_image)
        for name in ("patches", "positions"):
            tokens_of = [
                getattr(batch.vision, name)[place].reshape(-1, 4, size)[batch.vision_index[row]]
                for batch, place in ((alone, row), (shared, row // 2))
                for size in [getattr(batch.vision, name).shape[-1]]
            ]
            np.testing.assert_array_equal(tokens_of[0][is_image], tokens_of[1][is_image])
    # Each row's photo and crop have numbers of their own.
    assert set(np.unique(shared.vision.image_ids)) == {-1, 0, 1, 2, 3}


def test_images_that_together_overfill_their_row_are_named(make, facts):
    reader = make(dataclasses.replace(LIMITS, slots=40))
    samples = [reader.read(fact) for fact in facts[:2]]
    slots = sum(reader.size_of(sample).slots for sample in samples)
    Collator.of(reader).prompts(samples, range(2), Shape(LIMITS.prompt, slots, 2))
    with pytest.raises(DataError, match=rf"^{facts[0].id}, {facts[1].id}: .*data\.windows"):
        Collator.of(reader).prompts(samples, range(2), Shape(LIMITS.prompt, slots - 1, 2))


def test_samples_that_together_overfill_a_row_are_named(reader, facts, reasoning):
    ids = list(reasoning)[:2]
    samples = [reader.read(fact, reasoning[fact.id]) for fact in facts if fact.id in ids]
    with pytest.raises(DataError, match=rf"^{ids[0]}, {ids[1]}: .*data\.prompt_length"):
        sequences(reader, [samples])
