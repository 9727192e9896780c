import jax
import jax.numpy as jnp
import numpy as np

from morer1_jax.model.config import Runtime
from morer1_jax.model.layers import SwiGLU, rms_norm

RUNTIME = Runtime(dtype="bfloat16")


def draw(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


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
