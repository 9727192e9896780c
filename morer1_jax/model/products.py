"""Products of matrices that are as exact as their operands' dtype says.

By default TPUs round float32 operands to bfloat16 and GPUs to TF32: three digits in place of seven.
Every product of the model goes through here, so that float32 is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def precision(*operands: Array) -> jax.lax.Precision | None:
    """Returns a product's precision: the highest of float32 operands, else the platform's own."""
    all_float32 = all(x.dtype == jnp.float32 for x in operands)
    return jax.lax.Precision.HIGHEST if all_float32 else None


def einsum(axes: str, *operands: Array, **options: Any) -> Array:
    """Computes `jnp.einsum`; its gradients are products of the same precision."""
    return jnp.einsum(axes, *operands, precision=precision(*operands), **options)


def dot_general(x: Array, y: Array, dims: tuple, preferred: Any = None) -> Array:
    """Computes `jax.lax.dot_general` with a result of dtype `preferred`; gradients are as exact."""
    return jax.lax.dot_general(
        x, y, dims, precision=precision(x, y), preferred_element_type=preferred
    )


def exact(run: Callable[..., Array]) -> Callable[..., Array]:
    """Returns `run` with products of the highest precision, in its gradient too.

    For library code that sets no precision. A context around the call alone would not reach the
    rules of gradients, which are traced after it has ended.
    """

    @jax.custom_vjp
    def exactly(*args: Array) -> Array:
        with jax.default_matmul_precision("highest"):
            return run(*args)

    def forward(*args: Array) -> tuple[Array, Any]:
        with jax.default_matmul_precision("highest"):
            return jax.vjp(run, *args)

    def backward(pull: Any, cotangent: Array) -> tuple[Array, ...]:
        with jax.default_matmul_precision("highest"):
            return pull(cotangent)

    exactly.defvjp(forward, backward)
    return exactly
