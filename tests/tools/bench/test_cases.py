"""Inputs have exactly the sizes that are said, and are the same wherever they are made."""

import numpy as np
import pytest

from bench.cases import Inputs
from morer1_jax.serve.loaded import open_model


@pytest.fixture(scope="module")
def inputs(folder, preset):
    return Inputs(preset, open_model(str(folder)).policy.tokenizer)


def tokens(inputs, text):
    return len(inputs.tokenizer(text)["input_ids"])


def length(inputs, prompt):
    """With an image token for every 28 x 28 pixels."""
    seen = sum(image.shape[0] * image.shape[1] // 28**2 for image in prompt.images)
    return tokens(inputs, prompt.text(inputs.tokenizer)) - len(prompt.images) + seen


@pytest.mark.parametrize("asked", [64, 128, 512])
def test_prompts_have_the_length_asked_for(inputs, asked):
    prompts = inputs.prompts(asked, 3)
    assert [length(inputs, prompt) for prompt in prompts] == [asked] * 3
    assert len({prompt.words for prompt in prompts}) == 3
    seen = sum(image.shape[0] * image.shape[1] for image in prompts[0].images) / 28**2
    assert 0.3 < seen / asked < 0.5
    again = inputs.prompts(asked, 3)
    assert all(a.words == b.words for a, b in zip(prompts, again, strict=True))
    np.testing.assert_array_equal(prompts[2].images[0], again[2].images[0])


def test_a_prompt_without_room_for_text_is_refused(inputs):
    with pytest.raises(ValueError, match=r"expected more than the \d+ tokens .* found 16"):
        inputs.prompts(16, 1)


def test_examples_have_one_length(inputs, preset):
    made = inputs.examples()
    assert len(made) == preset.batch
    for example in made:
        assert length(inputs, example.prompt) == preset.prompt
        assert tokens(inputs, example.target) + 1 == preset.target


def test_mixed_lengths_are_spread_four_to_one(inputs, preset):
    totals = sorted(length(inputs, e.prompt) + tokens(inputs, e.target) + 1 for e in inputs.mixed())
    assert len(totals) == preset.mixed
    assert (totals[0], totals[-1]) == (64, 256)
    # Evenly in their logarithms, so that half of them are below the geometric mean.
    assert totals[len(totals) // 2 - 1] < 128 < totals[len(totals) // 2]
