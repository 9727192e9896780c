"""Training by part: what is frozen stays, the rest moves at its share, adapters add to a base."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from morer1_jax.learn.sft import make_sft_step, sft_gradients
from morer1_jax.learn.state import OptimizerConfig, new_state
from morer1_jax.learn.trainable import ADAPTER, TrainableParts, join, select, shares, split
from morer1_jax.model.config import LORA_TARGETS, LoRA, Runtime
from morer1_jax.model.layers import merged_kernel
from morer1_jax.model.scorer import ScoreConfig, sequence_logprobs
from morer1_jax.model.vlm import Qwen25VL, init_params

SCORE = ScoreConfig(chunk=192)
ADAPTERS = LoRA(rank=3, alpha=6.0)


def paths(tree):
    return {tuple(key.key for key in path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.fixture(scope="module")
def adapted(tiny):
    """The tiny model with adapters, and its parameters: the base's, and fresh adapters."""
    model = Qwen25VL(tiny.CONFIG, Runtime(), ADAPTERS)
    fresh = tiny.jit(lambda key: init_params(model, key))(jax.random.key(3))
    adapters = select(fresh, lambda path: path[-1] in ADAPTER)
    return model, join(tiny.params(), adapters)


@pytest.fixture(scope="module")
def drawn(adapted):
    """Adapters that do something."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key != "lora_b":
            return leaf
        return jnp.asarray(0.3 * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, adapted[1])


@pytest.fixture(scope="module")
def logprobs(tiny):
    """Compiled `model -> params -> log-probabilities` of the tiny batch, where they count."""

    @functools.cache
    def of(model):
        run = tiny.jit(lambda params, batch: sequence_logprobs(model, params, batch, SCORE)[0])
        batch = tiny.sequences()
        return lambda params: np.asarray(run(params, batch))[batch.weights > 0]

    return of


@pytest.mark.parametrize(
    ("parts", "trained"),
    [
        (TrainableParts(), ("embedding", "head", "language", "vision")),
        (TrainableParts(vision=0.0), ("embedding", "head", "language", "vision/merger")),
        (TrainableParts(vision=0.0, merger=0.0), ("embedding", "head", "language")),
        (TrainableParts(language=0.0, merger=0.0), ("vision/blocks",)),
        (TrainableParts(vision=0.0, merger=0.0, lora=ADAPTERS), ("lora",)),
        (TrainableParts(vision=0.0, lora=ADAPTERS), ("lora", "vision/merger")),
    ],
    ids=str,
)
def test_which_leaves_train(adapted, parts, trained):
    def kind(path):
        if path[-1] in ADAPTER:
            return "lora"
        if path[0] == "vision":
            return "vision/merger" if path[1].startswith("merger") else "vision/blocks"
        return path[0]

    _, params = adapted
    expected = {
        path
        for path in paths(params)
        if any(kind(path).startswith(name) for name in trained)
        or (kind(path) == "lora" and "language" in trained)
    }
    ours, frozen = split(params, parts)
    assert paths(ours) == expected
    assert paths(ours) | paths(frozen) == paths(params)
    assert not paths(ours) & paths(frozen)
    whole = join(ours, frozen)
    jax.tree.map(lambda a, b: None if a is b else pytest.fail("copied"), whole, params)


def test_every_target_has_an_adapter_and_nothing_else(tiny):
    for targets in (LORA_TARGETS, ("q", "down")):
        model = Qwen25VL(tiny.CONFIG, Runtime(), LoRA(2, 1.0, targets))
        shapes = jax.eval_shape(lambda key, m=model: init_params(m, key), jax.random.key(0))
        found = {path[-2] for path in paths(shapes) if path[-1] in ADAPTER}
        assert found == set(targets)
        assert all("vision" not in path for path in paths(shapes) if path[-1] in ADAPTER)


def test_at_first_an_adapted_model_is_its_base(tiny, adapted, logprobs):
    model, params = adapted
    np.testing.assert_array_equal(logprobs(model)(params), logprobs(tiny.model())(tiny.params()))


def test_a_merged_model_is_the_adapted_one(tiny, adapted, drawn, logprobs):
    model, _ = adapted

    def merge(params):
        if "lora_a" not in params:
            return {k: merge(v) if isinstance(v, dict) else v for k, v in params.items()}
        kept = {name: leaf for name, leaf in params.items() if name not in ADAPTER}
        return {**kept, "kernel": merged_kernel(params, ADAPTERS)}

    merged = merge(drawn)
    assert paths(merged) == paths(tiny.params())
    inside, base = logprobs(model)(drawn), logprobs(tiny.model())(tiny.params())
    outside = logprobs(tiny.model())(merged)
    assert np.abs(inside - base).max() > 0.1
    assert np.abs(inside - outside).max() <= 1e-5 * np.abs(inside).max()


def test_gradients_of_a_part_are_those_of_the_whole(tiny, adapted, drawn):
    model, _ = adapted
    batch = tiny.sequences()
    gradients = tiny.jit(
        lambda params, frozen, batch: sft_gradients(model, params, batch, SCORE, 1, frozen)[0]
    )
    everything = gradients(drawn, {}, batch)
    parts = TrainableParts(vision=0.0, merger=1.0, lora=ADAPTERS)
    ours, frozen = split(drawn, parts)
    tiny.assert_near(gradients(ours, frozen, batch), split(everything, parts)[0], 1e-5)


def test_optimizer_state_exists_for_what_trains_alone(adapted):
    _, params = adapted
    parts = TrainableParts(vision=0.0, merger=0.0, lora=ADAPTERS)
    ours, _ = split(params, parts)
    optimizer = OptimizerConfig(lr=1e-3).build(10, parts)
    state = jax.eval_shape(lambda ours: new_state(ours, optimizer), ours)
    for name in ("mu", "nu"):
        assert paths(optax.tree_utils.tree_get(state.opt_state, name)) == paths(ours)
    held = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    assert held <= 2 * sum(leaf.size for leaf in jax.tree.leaves(ours)) + 8  # and counters


def test_each_part_moves_at_its_share_of_the_rate_and_frozen_ones_not_at_all(tiny):
    params, batch = tiny.params(), tiny.sequences()

    def moved(parts):
        optimizer = OptimizerConfig(lr=1e-3, clip_norm=1e9).build(10, parts)
        ours, frozen = split(params, parts)
        before = jax.tree.map(np.asarray, frozen)
        step = tiny.jit(make_sft_step(tiny.model(), optimizer, SCORE))
        state = tiny.fresh_state(ours, optimizer)
        for _ in range(3):
            state, _ = step(state, frozen, batch)
        jax.tree.map(np.testing.assert_array_equal, before, frozen)
        return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), state.params, ours)

    # Whatever the gradients are, a step of Adam's is of about the rate's size.
    some = moved(TrainableParts(vision=0.0, merger=0.25, language=1.0))
    assert paths(some["vision"]) == {
        path for path in paths(params["vision"]) if path[0].startswith("merger")
    }
    assert 0 < np.abs(some["vision"]["merger_out"]["kernel"]).max() <= 0.25 * 3.1e-3
    assert np.abs(some["head"]).max() > 2e-3


def test_shares_of_every_leaf(adapted):
    _, params = adapted
    parts = TrainableParts(vision=0.5, merger=2.0, language=3.0, lora=ADAPTERS)
    tree = shares(split(params, parts)[0], parts)
    for path in paths(tree):
        value = functools.reduce(lambda branch, key: branch[key], path, tree)
        expected = 3.0 if path[-1] in ADAPTER else 2.0 if "merger" in path[1] else 0.5
        assert value == expected, path


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"vision": -1.0}, "vision: expected at least 0, found -1.0"),
        ({"vision": 0.0, "merger": 0.0, "language": 0.0}, "so that nothing trains"),
    ],
)
def test_nonsense_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        TrainableParts(**wrong)


def test_without_adapters_their_other_keys_say_nothing():
    parts = TrainableParts(language=0.0, lora=LoRA(rank=0, alpha=0.0, targets=()))
    assert parts.adapters is None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rank": -1}, "rank: expected at least 0, found -1"),
        ({"alpha": 0.0}, "alpha: expected above 0, found 0"),
        ({"targets": ()}, "targets: expected some of .* found none"),
        ({"targets": ("q", "norm")}, "targets: expected one of q, k.* found 'norm'"),
    ],
)
def test_adapters_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        LoRA(**{"rank": 2, "alpha": 1.0} | wrong)
