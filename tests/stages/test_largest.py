"""The largest batches of a config: of the same form as real ones, and as large."""

import dataclasses

import jax
import numpy as np
import pytest

from morer1_jax.config.settings import DataSettings
from morer1_jax.data.grammar import build_tables, token_bytes
from morer1_jax.model.flops import batch_vision_flops
from morer1_jax.run.throughput import Passes, sequence_work
from morer1_jax.stages import largest
from morer1_jax.task.more import read_ontology

DATA = DataSettings(prompt_length=30, completion_length=17, windows=6, round_to=16)


def form(batch):
    return jax.tree.map(lambda x: (x.shape[1:], x.dtype), batch)


@pytest.mark.parametrize("kind", ["prompts", "sequences"])
def test_they_have_the_form_of_real_batches(tiny, kind):
    data = dataclasses.replace(DATA, prompt_length=32, completion_length=16, windows=5)
    ours = getattr(largest, kind)(data, tiny.model(), rows=8)
    theirs = tiny.prompts() if kind == "prompts" else tiny.sequences()
    assert form(ours) == form(theirs)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(ours)} == {8}


def test_every_place_is_filled(tiny):
    batch = largest.sequences(DATA, tiny.model(), rows=3)
    assert batch.tokens.shape == (3, 48)  # 30 + 17, rounded up
    np.testing.assert_array_equal(batch.weights.sum(1), 17)
    assert largest.prompts(DATA, tiny.model(), rows=3).mask.all()
    # Two images of three windows of 16 patches each.
    vision = tiny.CONFIG.vision
    patches, pairs = 6 * 16, {"window": 6 * 16**2, "image": 2 * (3 * 16) ** 2}
    per_patch = batch_vision_flops(vision, batch.vision) / 3
    d = vision.hidden_size
    merged = 4 * d
    expected = patches * (
        2 * (vision.patch_dim * d + 2 * (4 * d * d + 3 * d * vision.intermediate_size))
        + 2 * merged * (merged + vision.out_hidden_size) / 4
    ) + 4 * d * (pairs["window"] + pairs["image"])
    assert per_patch == expected
    assert sequence_work(tiny.CONFIG, Passes(3, 3), batch).tokens == 3 * 48


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kept_features_take_the_place_of_patches(tiny, dtype):
    data = dataclasses.replace(DATA, keep_features=True)
    features = largest.prompts(data, tiny.model(dtype), rows=2).vision.features
    assert (features.shape, features.dtype) == ((2, 6 * 16 // 4, 32), dtype)


@pytest.mark.soak
def test_the_answers_tables_have_room(qwen_tokenizer, small_world):
    """For Qwen's vocabulary and the labels of a dataset in MORE's form."""
    pieces = token_bytes(qwen_tokenizer, 151_936)
    tables = build_tables(pieces, read_ontology(small_world).labels)
    bounds = largest.grammar(151_936)
    for table, bound in zip(tables, bounds, strict=True):
        assert all(size <= most for size, most in zip(table.shape, bound.shape, strict=True))
