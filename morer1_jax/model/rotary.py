"""Rotary positions: each pair of a head's numbers turns by an angle (RoFormer, arXiv 2104.09864).

Axes: s sequence (any number of axes), h heads, e head size, r = e/2.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from morer1_jax.model.products import einsum

Rotary = tuple[Float[Array, "*s r"], Float[Array, "*s r"]]
"""Cosines and sines of the angles of the first half of a head."""


def rotate(x: Float[Array, "*s h e"], rotary: Rotary) -> Float[Array, "*s h e"]:
    """Rotates each pair (x_i, x_{i+e/2}) by its angle, in float32."""
    cos, sin = (angle[..., None, :] for angle in rotary)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


@jax.custom_vjp
def rotate_by_product(x: Float[Array, "*s h e"], rotary: Rotary) -> Float[Array, "*s h e"]:
    """Computes `rotate` with a product that exchanges a head's halves, (a, b) to (-b, a), exactly.

    Half of a head fills a part of a TPU's vector registers, and to cut them apart takes longer.
    There is no gradient with respect to the angles.
    """
    cos, sin = (jnp.concatenate([angle, angle], axis=-1)[..., None, :] for angle in rotary)
    one = np.eye(x.shape[-1] // 2)
    exchange = np.block([[np.zeros_like(one), one], [-one, np.zeros_like(one)]])
    exchanged = einsum("...e,ef->...f", x, jnp.asarray(exchange, x.dtype))
    return (x.astype(jnp.float32) * cos + exchanged.astype(jnp.float32) * sin).astype(x.dtype)


def _forward(x: Array, rotary: Rotary) -> tuple[Array, Rotary]:
    return rotate_by_product(x, rotary), rotary


def _backward(rotary: Rotary, cotangent: Array) -> tuple[Array, None]:
    cos, sin = rotary
    return rotate_by_product(cotangent, (cos, -sin)), None


rotate_by_product.defvjp(_forward, _backward)
