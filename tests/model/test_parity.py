"""The model equals the reference implementation in `transformers`, and the tests would notice."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from morer1_jax.model import names
from morer1_jax.model.attention import PackedCausal
from morer1_jax.model.decoding import init_cache
from morer1_jax.model.vlm import Qwen25VL

VALUE_BOUND = 2e-5
GRADIENT_BOUND = 1e-4
# Samples with 0, 1, 2 and 3 images: one a row, or several packed in a row.
PADDED = [[0], [1], [2], [3]]
PACKED = [[3, 0], [1, 2]]


def reference_features(case):
    """Image features of all samples, image after image in the text's order."""
    inputs = case.reference.inputs(case.samples)
    with torch.no_grad():
        features = case.reference.model.model.get_image_features(
            inputs["pixel_values"], inputs["image_grid_thw"]
        )
    return torch.cat(features.pooler_output).numpy()


@pytest.mark.parametrize("rows", [PADDED, PACKED], ids=["padded", "packed"])
def test_features_and_logits(reference, case, rows_of, rows):
    rows = rows_of(case.config, case.samples, rows)
    features, logits = reference.evaluate(case.model, case.params, rows)
    assert reference.relative_error(features, reference_features(case)) < VALUE_BOUND
    assert reference.relative_error(logits, reference.reference_logits(case)) < VALUE_BOUND


@pytest.mark.parametrize("rows", [PADDED, PACKED], ids=["padded", "packed"])
def test_positions_are_equal(reference, case, rows_of, rows):
    rows = rows_of(case.config, case.samples, rows)
    inputs = case.reference.inputs(case.samples)
    theirs, _ = case.reference.model.model.get_rope_index(
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    theirs = theirs.numpy()[:, inputs["attention_mask"].numpy() == 1]
    ours = reference.in_sample_order(rows, np.moveaxis(rows.positions, 0, -1)).T
    np.testing.assert_array_equal(ours, theirs)


def test_every_gradient(reference, case, rows_of):
    """Of the mean cross-entropy of about half the text tokens; ours packed, theirs padded."""
    ours, theirs = gradients(case, rows_of(case.config, case.samples, PACKED))
    assert_gradients_equal(reference, ours, theirs)


def test_every_gradient_of_padded_rows(reference, small_case, rows_of):
    rows = rows_of(small_case.config, small_case.samples, PADDED)
    assert_gradients_equal(reference, *gradients(small_case, rows))


def assert_gradients_equal(reference, ours, theirs):
    assert ours.keys() == theirs.keys()
    errors = {name: reference.relative_error(ours[name], theirs[name]) for name in ours}
    assert max(errors.values()) < GRADIENT_BOUND, max(errors, key=errors.get)


def gradients(case, rows):
    """Ours and theirs by published tensor name."""
    inputs = case.reference.inputs(case.samples)
    ids, valid = inputs["input_ids"].numpy(), inputs["attention_mask"].numpy() == 1
    targets = np.roll(ids, -1, axis=1)
    counted = np.roll(valid, -1, axis=1) & valid & (targets < case.config.image_token_id)
    counted &= np.random.default_rng(1).random(ids.shape) < 0.5
    counted[:, -1] = False

    model = case.reference.model
    model.zero_grad()
    losses = torch.nn.functional.cross_entropy(
        model(**inputs).logits.transpose(1, 2), torch.as_tensor(targets), reduction="none"
    )
    losses[torch.as_tensor(counted)].mean().backward()
    theirs = {
        names.canonical_name(name): parameter.grad.numpy()
        for name, parameter in model.named_parameters()
    }

    weights = np.zeros(rows.tokens.size)
    flat = rows.sample_ids.ravel()
    order = np.argsort(flat, kind="stable")
    weights[order[flat[order] >= 0]] = counted[valid] / counted.sum()
    weights = weights.reshape(rows.tokens.shape)

    def loss(params):
        hidden = case.model.apply({"params": params}, *rows.arguments())
        logprob, _ = case.model.apply(
            {"params": params}, hidden, np.roll(rows.tokens, -1, 1), chunk=16, method="logprobs"
        )
        return -jnp.sum(logprob * weights)

    ours = jax.jit(jax.grad(loss))(case.params)
    return names.to_hf(ours, case.config), theirs


def greedy(model, params, rows, *, group, steps, suppressed):
    """Token ids [b, group, steps] of `group` equal samples a prompt, by prefill and decode."""
    allowed = jnp.ones(model.config.text.vocab_size, bool).at[jnp.array(suppressed)].set(False)
    mask = jnp.asarray(rows.segment_ids == 1)
    last = jnp.asarray(mask.sum(1) - 1)
    following = jnp.where(mask, rows.positions.max(0), -1).max(1)[:, None] + 1

    @jax.jit
    def run(params):
        def verb(name, *args, **kwargs):
            return model.apply({"params": params}, *args, **kwargs, method=name)

        def best(hidden):
            return jnp.argmax(jnp.where(allowed, verb("logits", hidden), -jnp.inf), axis=-1)

        x = verb("embed", rows.tokens, verb("encode_images", rows.images), rows.vision_index)
        attend = PackedCausal(jnp.asarray(rows.segment_ids))
        hidden, kv = verb("forward", x, rows.positions, attend, keep_kv=True)
        cache = init_cache(kv, mask, group=group, length=steps)
        first = best(jnp.take_along_axis(hidden, last[:, None, None], axis=1))

        def step(carry, t):
            token, cache = carry
            positions = jnp.broadcast_to(following + t, token.shape)
            hidden, cache = verb("decode", verb("embed", token), positions, cache)
            return (best(hidden), cache), token

        token = jnp.repeat(first, group, axis=1)
        _, tokens = jax.lax.scan(step, (token, cache), jnp.arange(steps))
        return jnp.moveaxis(tokens, 0, -1)

    return np.asarray(run(params))


def test_greedy_tokens(case, rows_of, suppressed):
    rows = rows_of(case.config, case.samples, PADDED)
    ours = greedy(case.model, case.params, rows, group=2, steps=64, suppressed=suppressed)
    for sample, tokens in zip(case.samples, ours, strict=True):
        generated = case.reference.model.generate(
            **case.reference.inputs([sample]),
            max_new_tokens=64,
            do_sample=False,
            suppress_tokens=list(suppressed),
        )
        theirs = generated[0, len(sample.tokens) :].numpy()
        np.testing.assert_array_equal(tokens, np.stack([theirs, theirs]))


class TestTheTestsCanFail:
    """Each fault moves features or logits past ten times the bound."""

    @pytest.fixture
    def error(self, reference, small_case, rows_of):
        """The larger error of features and logits under other params, rows or config."""
        case = small_case
        original = rows_of(case.config, case.samples, PACKED)
        features, logits = reference_features(case), reference.reference_logits(case)

        def measure(tensors=None, rows=original, config=case.config):
            params = names.from_hf(tensors, config) if tensors else case.params
            ours = reference.evaluate(Qwen25VL(config), params, rows)
            return max(
                reference.relative_error(ours[0], features),
                reference.relative_error(ours[1], logits),
            )

        return measure

    def test_no_fault(self, error, small_case):
        assert error(small_case.reference.tensors()) < VALUE_BOUND

    def test_dropped_bias_or_norm(self, error, small_case):
        tensors = small_case.reference.tensors()
        errors = {}
        for name, tensor in tensors.items():
            if tensor.ndim == 1:
                neutral = np.zeros if name.endswith("bias") else np.ones
                errors[name] = error(tensors | {name: neutral(tensor.shape, np.float32)})
        assert len(errors) > 40
        assert min(errors.values()) > 10 * VALUE_BOUND, min(errors, key=errors.get)

    def test_swapped_sections(self, error, small_case, rows_of):
        text = dataclasses.replace(small_case.config.text, mrope_section=(2, 1, 1))
        assert error(config=dataclasses.replace(small_case.config, text=text)) > 10 * VALUE_BOUND
        rows = rows_of(small_case.config, small_case.samples, PACKED)
        transposed = dataclasses.replace(rows, positions=rows.positions[[0, 2, 1]])
        assert error(rows=transposed) > 10 * VALUE_BOUND

    def test_every_block_full(self, error, small_case):
        config = small_case.config
        vision = dataclasses.replace(config.vision, fullatt_block_indexes=(0, 1, 2, 3))
        tensors = small_case.reference.tensors()
        config = dataclasses.replace(config, vision=vision)
        assert error(tensors, config=config) > 10 * VALUE_BOUND

    def test_no_vision_rotary(self, error, small_case, rows_of):
        rows = rows_of(small_case.config, small_case.samples, PACKED)
        images = rows.images.replace(positions=np.zeros_like(rows.images.positions))
        assert error(rows=dataclasses.replace(rows, images=images)) > 10 * VALUE_BOUND
