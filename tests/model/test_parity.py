"""The model equals the reference implementation in `transformers`, and the tests would notice."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from morer1_jax.model.attention import PackedCausal
from morer1_jax.model.decoding import init_cache
from morer1_jax.model.vlm import Qwen25VL
from morer1_jax.weights import names

VALUE_BOUND = 2e-5
GRADIENT_BOUND = 1e-4
# Samples with 0, 1, 2 and 3 images: one a row, or several packed in a row.
PADDED = [[0], [1], [2], [3]]
PACKED = [[3, 0], [1, 2]]
# The same samples twice in one batch, and so in one program: those of `PADDED`, those of `PACKED`.
BOTH = [*PADDED, [7, 4], [5, 6]]


def reference_features(case):
    """Image features of all samples, image after image in the text's order."""
    inputs = case.reference.inputs(case.samples)
    with torch.no_grad():
        features = case.reference.model.model.get_image_features(
            inputs["pixel_values"], inputs["image_grid_thw"]
        )
    return torch.cat(features.pooler_output).numpy()


@functools.cache
def outputs_and_gradient(model):
    """Compiled `(params, arguments, targets, weights) -> ((features [b s d], logits), gradient)`:
    of a batch, and of a loss of its tokens."""

    def verb(params, name, *args, **options):
        return model.apply({"params": params}, *args, method=name, **options)

    def loss(params, arguments, targets, weights):
        tokens, positions, attend, images, index = arguments
        seen = verb(params, "encode_images", images)
        x = verb(params, "embed", tokens, seen, index)
        hidden = verb(params, "forward", x, positions, attend)
        logprob, _ = verb(params, "logprobs", hidden, targets, chunk=16)
        features = jnp.take_along_axis(seen, jnp.maximum(index, 0)[..., None], axis=1)
        return -jnp.sum(logprob * weights), (features, verb(params, "logits", hidden))

    return jax.jit(lambda *args: jax.grad(loss, has_aux=True)(*args)[::-1])


def run_both(reference, case, place="padded"):
    """The batch of all samples, twice in it, and what comes of it: features and logits in order,
    the gradient of the loss of those that lie in their rows as `place` says."""
    rows = reference.lay_out(case.config, case.samples * 2, BOTH)
    counted = counted_tokens(case)
    shares = np.zeros((2, counted.size))
    shares[("padded", "packed").index(place)] = counted / counted.sum()
    weights = np.zeros(rows.tokens.size)
    flat = rows.sample_ids.ravel()
    order = np.argsort(flat, kind="stable")
    weights[order[flat[order] >= 0]] = shares.ravel()
    (features, logits), gradient = outputs_and_gradient(case.model)(
        case.params,
        rows.arguments(),
        np.roll(rows.tokens, -1, 1),
        weights.reshape(rows.tokens.shape),
    )
    is_image = reference.in_sample_order(rows, rows.vision_index)[:, 0] >= 0
    features = reference.in_sample_order(rows, features)[is_image]
    return features, reference.in_sample_order(rows, logits), names.to_hf(gradient, case.config)


def test_features_and_logits(reference, case):
    """Whether samples are alone in their rows, padded, or packed."""
    features, logits, _ = run_both(reference, case)
    for ours, theirs in (
        (features, reference_features(case)),
        (logits, reference.reference_logits(case)),
    ):
        padded, packed = np.split(ours, 2)
        assert reference.relative_error(padded, theirs) < VALUE_BOUND
        assert reference.relative_error(packed, theirs) < VALUE_BOUND


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


def test_every_gradient(reference, case):
    """Of the mean cross-entropy of about half the text tokens; theirs padded."""
    theirs = reference_gradients(case)
    for place in ("padded", "packed"):
        *_, ours = run_both(reference, case, place)
        assert ours.keys() == theirs.keys()
        errors = {name: reference.relative_error(ours[name], theirs[name]) for name in ours}
        assert max(errors.values()) < GRADIENT_BOUND, (place, max(errors, key=errors.get))


def _counted(case):
    """Ids and targets of the padded batch, which places are valid, which of them count."""
    inputs = case.reference.inputs(case.samples)
    ids, valid = inputs["input_ids"].numpy(), inputs["attention_mask"].numpy() == 1
    targets = np.roll(ids, -1, axis=1)
    counted = np.roll(valid, -1, axis=1) & valid & (targets < case.config.image_token_id)
    counted &= np.random.default_rng(1).random(ids.shape) < 0.5
    counted[:, -1] = False
    return inputs, targets, valid, counted


def counted_tokens(case):
    """Which tokens count, sample after sample."""
    _, _, valid, counted = _counted(case)
    return counted[valid]


def reference_gradients(case):
    """Theirs by published tensor name."""
    inputs, targets, _, counted = _counted(case)
    model = case.reference.model
    model.zero_grad()
    losses = torch.nn.functional.cross_entropy(
        model(**inputs).logits.transpose(1, 2), torch.as_tensor(targets), reduction="none"
    )
    losses[torch.as_tensor(counted)].mean().backward()
    return {
        names.canonical_name(name): parameter.grad.numpy()
        for name, parameter in model.named_parameters()
    }


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


# Daily one key-value head for all, and one for each; heads in groups decode in the sampler's tests.
@pytest.mark.parametrize(
    ("case", "steps"),
    [(0, 24), (2, 24), *(pytest.param(n, 64, marks=pytest.mark.soak) for n in range(4))],
    indirect=["case"],
)
def test_greedy_tokens(case, steps, rows_of, suppressed):
    rows = rows_of(case.config, case.samples, PADDED)
    ours = greedy(case.model, case.params, rows, group=2, steps=steps, suppressed=suppressed)
    for sample, tokens in zip(case.samples, ours, strict=True):
        generated = case.reference.model.generate(
            **case.reference.inputs([sample]),
            max_new_tokens=steps,
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
