"""Slots of the decode loop that hold some of a batch's samples: gathers between both orders.

Samples count through a part of the mesh's rows, prompt by prompt, so that no gather crosses from
one part to another. Axes: p parts, n samples of a part, m slots of a part.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int, Shaped


def taken(
    x: Shaped[Array, "*l q ..."], index: Int[Array, "p m"], axis: int = 0
) -> Shaped[Array, "*l r ..."]:
    """Returns elements along an axis that counts through the parts, from each part its own.

    Args:
        x: with q = p · n.
        index: within the part.
        axis: of the q; not negative.

    Returns:
        An array with r = p · m.
    """
    parts, m = index.shape
    shape = x.shape
    apart = x.reshape(*shape[:axis], parts, shape[axis] // parts, *shape[axis + 1 :])

    def of_part(x: Array, index: Array) -> Array:
        return jnp.take(x, index, axis=axis, mode="clip")

    picked = jax.vmap(of_part, (axis, 0), axis)(apart, index)
    return picked.reshape(*shape[:axis], parts * m, *shape[axis + 1 :])


@struct.dataclass
class Places:
    """Which samples the slots hold.

    Attributes:
        sample: int32, the sample in each slot.
        slot: int32, each sample's slot; any where it has none.
    """

    sample: Int[Array, "p m"]
    slot: Int[Array, "p n"]

    @classmethod
    def of(cls, sample: Int[Array, "p m"], samples: int) -> Places:
        """Makes the places of samples in slots; `samples` is n."""
        slots = jnp.arange(sample.shape[1], dtype=sample.dtype)
        nowhere = jnp.zeros(samples, sample.dtype)
        return cls(sample, jax.vmap(lambda sample: nowhere.at[sample].set(slots))(sample))

    def by_sample(self, x: Shaped[Array, "pm ..."]) -> Shaped[Array, "pn ..."]:
        """Returns, from what each slot has, each sample's; any for samples without a slot."""
        return taken(x, self.slot)

    def by_slot(self, x: Shaped[Array, "pn ..."]) -> Shaped[Array, "pm ..."]:
        """Returns, from what each sample has, each slot's."""
        return taken(x, self.sample)
