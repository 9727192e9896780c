"""What only XLA's compiler for CPUs needs.

Left to itself it computes cosines and sines again in every layer. On other platforms `cos_sin`
calls cosine and sine alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def cos_sin(
    angles: Float[Array, "*s r"],
) -> tuple[Float[Array, "*s r"], Float[Array, "*s r"]]:
    """Returns cosines and sines, computed once for all layers.

    XLA on a CPU would compute them again for every head of every layer outside of a scan, through
    an optimization barrier too; but it does not look into branches.
    """

    def cos_and_sin(angles: Array) -> tuple[Array, Array]:
        return jnp.cos(angles), jnp.sin(angles)

    if not angles.size:
        return cos_and_sin(angles)

    def branch(angles: Array) -> tuple[Array, Array]:
        # A condition that always holds, but that the compiler does not know to.
        first = angles[(0,) * angles.ndim]
        return jax.lax.cond(
            jnp.isfinite(first), cos_and_sin, lambda angles: (angles, angles), angles
        )

    return jax.lax.platform_dependent(angles, cpu=branch, default=cos_and_sin)
