"""The optimizer's schedule, clip and decay, and the train state around it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from morer1_jax.learn.state import (
    OptimizerConfig,
    abstract_params,
    apply_gradients,
    init_sharded,
    new_state,
)
from morer1_jax.model.vlm import init_params
from morer1_jax.run import mesh as meshes


@pytest.mark.parametrize("warmup", [0, 1, 4])
def test_constant_rate(warmup):
    rates = [OptimizerConfig(lr=0.1, warmup=warmup).learning_rate(12)(i) for i in range(12)]
    rising = [0.1 * (i + 1) / (warmup + 1) for i in range(warmup)]
    np.testing.assert_allclose(rates, rising + [0.1] * (12 - warmup), rtol=1e-6)


@pytest.mark.parametrize("warmup", [0, 4])
def test_cosine_rate(warmup):
    config = OptimizerConfig(lr=0.1, schedule="cosine", warmup=warmup, final=0.2)
    rates = [config.learning_rate(21)(i) for i in range(21)]
    after = np.arange(21 - warmup) / (20 - warmup)
    expected = 0.1 * (0.2 + 0.8 * (1 + np.cos(np.pi * after)) / 2)
    np.testing.assert_allclose(rates[warmup:], expected, rtol=1e-5)
    # From the peak, first reached when the warm-up is over, to the last update.
    assert np.argmax(rates) == warmup
    np.testing.assert_allclose(rates[-1], 0.02, rtol=1e-5)


@pytest.mark.parametrize("updates", [1, 2, 4])
def test_a_run_no_longer_than_its_warmup(updates):
    config = OptimizerConfig(lr=0.1, schedule="cosine", warmup=4)
    rates = [config.learning_rate(updates)(i) for i in range(updates + 2)]
    assert np.isfinite(rates).all()
    assert (np.diff(rates[:updates]) > 0).all()


def test_decay_is_of_matrices_alone(tiny):
    """With no gradient the update is the decay: what it leaves alone is not decayed."""
    params = tiny.params()
    optimizer = OptimizerConfig(lr=0.5, weight_decay=0.1).build(10)

    @tiny.jit
    def step(params):
        zero = jax.tree.map(jnp.zeros_like, params)
        return apply_gradients(new_state(params, optimizer), zero, optimizer)

    after, _, seen = step(params)
    assert seen["grad_norm"] == 0
    kept, decayed = set(), set()
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(after), strict=True
    ):
        last = path[-1].key
        if np.array_equal(old, new):
            kept.add(last)
        else:
            np.testing.assert_allclose(new, old * (1 - 0.5 * 0.1), rtol=1e-5)
            decayed.add(last)
    assert kept == {"bias", "scale"}
    assert decayed == {"kernel", "embedding", "head"}


def test_gradients_are_clipped_and_their_norm_is_that_before(tiny):
    params = {"kernel": jnp.zeros(4)}
    grads = {"kernel": jnp.array([3.0, 0.0, -4.0, 0.0])}
    clip = OptimizerConfig(lr=1.0, clip_norm=0.5)
    optimizer = optax.chain(optax.clip_by_global_norm(clip.clip_norm), optax.sgd(1.0))
    after, _, seen = apply_gradients(new_state(params, optimizer), grads, optimizer)
    np.testing.assert_allclose(after["kernel"], [-0.3, 0, 0.4, 0], rtol=1e-6)
    assert seen["grad_norm"] == 5
    # Adam's first moment, of the built optimizer, is of the clipped gradient.
    built = clip.build(3)
    _, opt_state, seen = apply_gradients(new_state(params, built), grads, built)
    moment = optax.tree_utils.tree_get(opt_state, "mu")["kernel"]
    np.testing.assert_allclose(moment, (1 - clip.b1) * np.array([0.3, 0, -0.4, 0]), rtol=1e-5)
    assert seen["grad_norm"] == 5


def test_moments_in_bfloat16_follow_those_in_float32(tiny):
    """Kept in half the memory; parameters after ten updates differ by rounding alone."""
    rng = np.random.default_rng(0)
    grads = [{"kernel": jnp.asarray(rng.standard_normal(64) + 1, jnp.float32)} for _ in range(10)]
    after, states = {}, {}
    for dtype in ("float32", "bfloat16"):
        optimizer = OptimizerConfig(lr=0.1, moments=dtype).build(10)
        step = tiny.jit(lambda state, grad, by=optimizer: apply_gradients(state, grad, by)[:2])
        state = new_state({"kernel": jnp.zeros(64)}, optimizer)
        for grad in grads:
            params, opt_state = step(state, grad)
            state = state.replace(params=params, opt_state=opt_state)
        after[dtype], states[dtype] = np.asarray(params["kernel"]), opt_state
    for name in ("mu", "nu"):
        exact, kept = (optax.tree_utils.tree_get(states[dtype], name)["kernel"] for dtype in after)
        assert (exact.dtype, kept.dtype) == (jnp.float32, jnp.bfloat16)
        # Every update rounds by at most 1/256, and forgets: nine tenths of it stay of the first.
        bound = {"mu": 10, "nu": 20}[name] / 256 * np.abs(exact).max()
        np.testing.assert_allclose(kept.astype(jnp.float32), exact, atol=bound)
    assert np.abs(after["float32"]).max() > 0.5
    np.testing.assert_allclose(after["bfloat16"], after["float32"], atol=0.02)
    assert np.any(after["bfloat16"] != after["float32"])


@pytest.fixture(scope="module")
def split_update(tiny):
    """A state on eight devices, and an update of it as a run compiles it: its buffers given away.

    `(state, grads, sound) -> (state, metrics)`
    """
    mesh = tiny.mesh(data=1, fsdp=2, tensor=4)
    rng = np.random.default_rng(0)
    params = {
        "q": {"kernel": jnp.asarray(rng.standard_normal((8, 4, 2)), jnp.float32)},
        "o": {"bias": -jnp.zeros(3)},  # Adding 0 would lose the sign.
    }
    optimizer = OptimizerConfig(lr=0.1, weight_decay=0.1).build(10)
    state = new_state(params, optimizer)
    shardings = meshes.state_shardings(mesh, state, params)

    def update(state, grads, sound):
        params, opt_state, seen = apply_gradients(state, grads, optimizer, sound)
        return state.replace(params=params, opt_state=opt_state), seen

    program = jax.jit(update, donate_argnums=0, out_shardings=(shardings, NamedSharding(mesh, P())))
    return lambda: jax.device_put(jax.tree.map(jnp.copy, state), shardings), program


def gradients(value=1.0):
    """Ones, and `value` in one place."""
    kernel = np.ones((8, 4, 2), np.float32)
    kernel[3, 1, 0] = value
    return {"q": {"kernel": kernel}, "o": {"bias": np.ones(3, np.float32)}}


def same_bits(left, right):
    return all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes() and a.sharding == b.sharding
        for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    )


@pytest.mark.parametrize(
    ("value", "sound"),
    [(np.nan, True), (np.inf, True), (-np.inf, True), (1e30, True), (1.0, False)],
)
def test_an_update_that_is_not_finite_leaves_the_state_bit_for_bit(split_update, value, sound):
    make, update = split_update
    first, _ = update(make(), gradients(), True)  # moments that are not 0
    kept = jax.tree.map(jnp.copy, first)
    after, seen = update(first, gradients(value), sound)
    assert same_bits(after, kept)
    assert seen["skipped_updates"] == 1
    assert np.isfinite(seen["param_norm"])
    # What comes after is what would have come without it.
    later, seen = update(after, gradients(), True)
    expected, _ = update(kept, gradients(), True)
    assert same_bits(later, expected)
    assert seen["skipped_updates"] == 0


@pytest.mark.parametrize(
    ("wrong", "grad"), [({"lr": 1e22}, 1.0), ({"lr": 0.1, "eps": 0.0}, 0.0)], ids=["lr", "eps"]
)
def test_parameters_that_overflow_show_in_their_norm(wrong, grad):
    optimizer = OptimizerConfig(**wrong).build(3)
    state = new_state({"kernel": jnp.ones(4)}, optimizer)
    grads = {"kernel": jnp.array([1.0, 1.0, 1.0, grad])}
    _, _, seen = apply_gradients(state, grads, optimizer)
    assert np.isfinite(seen["grad_norm"])
    assert not np.isfinite(seen["param_norm"])


def test_new_state_is_at_step_0(tiny):
    state = new_state(tiny.params(), OptimizerConfig(lr=1.0).build(1))
    assert state.step == 0
    assert state.step.dtype == jnp.int32


def test_parameters_are_made_where_they_live(tiny, monkeypatch):
    monkeypatch.setattr(jax, "jit", tiny.jit)
    mesh = tiny.mesh(data=1, fsdp=2, tensor=4)
    shapes = abstract_params(tiny.model())
    shardings = meshes.param_shardings(mesh, shapes)
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    params = init_sharded(tiny.model(), jax.random.key(0), like)
    alone = tiny.jit(lambda key: init_params(tiny.model(), key))(jax.random.key(0))
    jax.tree.map(lambda x, s: None if x.sharding == s else pytest.fail(str(s)), params, shardings)
    assert isinstance(params["embedding"].sharding, NamedSharding)
    assert params["embedding"].addressable_shards[0].data.shape == (8, 16)
    tiny.assert_near(params, alone, 1e-6)


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"clip_norm": 0.0}])
def test_nonsense_is_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected above 0, found"):
        OptimizerConfig(**{"lr": 1.0} | wrong)
