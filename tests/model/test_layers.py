import jax
import jax.numpy as jnp
import numpy as np
import pytest

from morer1_jax.model.config import Runtime
from morer1_jax.model.layers import SwiGLU, cos_sin, linear_product, rms_norm, rotate

RUNTIME = Runtime(dtype="bfloat16")


def draw(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def test_rotate_turns_pairs_by_their_angle():
    x = draw(2, 3, 4, 6)
    angles = draw(2, 3, 3)
    turned = rotate(x, (jnp.cos(angles), jnp.sin(angles)))
    pairs = np.asarray(x[..., :3] + 1j * x[..., 3:]) * np.exp(1j * np.asarray(angles))[:, :, None]
    np.testing.assert_allclose(turned[..., :3], pairs.real, atol=1e-6)
    np.testing.assert_allclose(turned[..., 3:], pairs.imag, atol=1e-6)


def test_rms_norm_is_in_float32_whatever_comes_in():
    norm = rms_norm(1e-6, RUNTIME, name="norm")
    scale = 1 + draw(64)
    x = 300 * draw(5, 64).astype(jnp.bfloat16)
    y = norm.apply({"params": {"scale": scale}}, x)
    exact = np.asarray(x, np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(scale)
    assert y.dtype == jnp.bfloat16
    # One rounding to bfloat16 and no more.
    np.testing.assert_array_equal(y, exact.astype(np.float32).astype(jnp.bfloat16))


def test_swiglu():
    x = draw(3, 4)
    mlp = SwiGLU(4, 6, 0.1, Runtime(), bias=True)
    params = jax.tree.map(lambda leaf: draw(*leaf.shape), mlp.init(jax.random.key(0), x)["params"])
    gate, up, down = (params[name] for name in ("gate", "up", "down"))
    hidden = x @ gate["kernel"] + gate["bias"]
    hidden = hidden / (1 + np.exp(-hidden)) * (x @ up["kernel"] + up["bias"])
    expected = hidden @ down["kernel"] + down["bias"]
    np.testing.assert_allclose(mlp.apply({"params": params}, x), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "kernel", "axes"),
    [((5, 3), (3, 4), 1), ((2, 5, 3), (3, 2, 4), 1), ((2, 5, 3, 2), (3, 2, 4), 2)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_a_linear_product_is_jaxs_own(x, kernel, axes, dtype):
    x, kernel = draw(*x).astype(dtype), draw(*kernel).astype(dtype)
    dims = ((tuple(range(x.ndim - axes, x.ndim)), tuple(range(axes))), ((), ()))

    def gradients(product):
        def value(x, kernel):
            return jnp.sum(jnp.sin(product(x, kernel, dims).astype(jnp.float32)))

        return jax.value_and_grad(value, (0, 1))(x, kernel)

    ours, theirs = gradients(linear_product), gradients(jax.lax.dot_general)
    bound = 1e-5 if dtype == "float32" else 2e-2
    for got, wanted in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert got.dtype == wanted.dtype
        got, wanted = np.asarray(got, np.float32), np.asarray(wanted, np.float32)
        np.testing.assert_allclose(got, wanted, atol=bound * np.abs(wanted).max())


def test_angles_are_worked_out_once():
    """However many layers turn by them; XLA on a CPU is tempted to do it for each head of each."""
    x, angles = draw(2, 8, 4, 16), draw(2, 8, 8)

    def run(x, angles):
        rotary = cos_sin(angles)
        for _ in range(4):
            x = rotate(x @ jnp.ones((16, 16)), rotary)
        return x

    assert jax.jit(run).lower(x, angles).compile().as_text().count(" cosine(") == 1
    cos, sin = jax.jit(cos_sin)(angles)
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-6)


def test_turns_of_nothing():
    """As of a batch without photos."""
    cos, sin = jax.jit(cos_sin)(jnp.zeros((1, 0, 4, 8)))
    assert cos.shape == sin.shape == (1, 0, 4, 8)
