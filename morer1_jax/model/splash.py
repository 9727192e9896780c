"""Attention over whole sequences on TPUs: splash attention.

It keeps no scores, and skips the blocks that a static mask hides. What is known when a step is
compiled (causality, which completion a place of a row belongs to) is the static mask; what is known
with the data only (segments, padding) is passed as segment ids.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Bool, Float, Int

from morer1_jax.model.attention import Keys, Queries
from morer1_jax.model.products import exact
from morer1_jax.model.rotary import Rotary, rotate_by_product

# The width of a TPU's vector registers, which heads and blocks are padded to multiples of.
_LANES = 128
# Sides of a block to choose from, the largest first, and the padding that one may add, as a share
# of the row.
_BLOCKS, _MAX_PADDING = (512, 256, _LANES), 1 / 8
# Bits of a query's place in the row in `_SharedPrefixMask`; those above hold its completion.
_PLACE_BITS = 23


@dataclasses.dataclass(frozen=True)
class Splash:
    """`attention.Kernels` by splash attention.

    Queries are scaled before their products, and rounded to their own dtype; other kernels scale
    the scores.

    Attributes:
        interpret: whether the kernel runs in Pallas's interpreter, on any platform.
    """

    interpret: bool = False

    def rotate(self, x: Float[Array, "*s h e"], rotary: Rotary) -> Float[Array, "*s h e"]:
        """Rotates by a product."""
        return rotate_by_product(x, rotary)

    def causal(self, q: Queries, k: Keys, v: Keys, segment_ids: Int[Array, "b s"]) -> Queries:
        """Attends under the kernel's causal mask."""
        return self._attend(q, k, v, segment_ids, lambda n: splash.CausalMask((n, n)))

    def full(self, q: Queries, k: Keys, v: Keys, segment_ids: Int[Array, "b s"]) -> Queries:
        """Attends under segments alone."""
        return self._attend(q, k, v, segment_ids, lambda n: splash.FullMask((n, n)))

    def shared_prefix(
        self,
        q: Queries,
        k: Keys,
        v: Keys,
        prompt_mask: Bool[Array, "b p"],
        completion_mask: Bool[Array, "b g t"],
    ) -> Queries:
        """Attends under a static mask of the row's completions."""
        p = prompt_mask.shape[1]
        b, g, t = completion_mask.shape
        valid = jnp.concatenate([prompt_mask, completion_mask.reshape(b, g * t)], axis=1)
        ids = valid.astype(jnp.int32)
        return self._attend(q, k, v, ids, lambda n: _SharedPrefixMask(p, g, t, n))

    def _attend(
        self,
        q: Queries,
        k: Keys,
        v: Keys,
        ids: Int[Array, "b s"],
        mask: Callable[[int], splash.Mask],
    ) -> Queries:
        """Attends among tokens of the same id under a static mask.

        A length that is not a multiple of a block's side is padded with tokens of an id of their
        own.
        """
        _, length, _, e = q.shape
        block, padded = _blocks(length)
        q = (q.astype(jnp.float32) * e**-0.5).astype(q.dtype)
        padding = [(0, 0), (0, 0), (0, padded - length), (0, -e % _LANES)]
        q, k, v = (jnp.pad(jnp.moveaxis(x, 2, 1), padding) for x in (q, k, v))
        ids = jnp.pad(ids, [(0, 0), (0, padded - length)], constant_values=np.iinfo(np.int32).min)
        out = _run(q, k, v, ids, mask=mask(padded), block=block, interpret=self.interpret)
        return jnp.moveaxis(out[:, :, :length, :e], 1, 2)


def _run(
    q: Array, k: Array, v: Array, ids: Array, *, mask: splash.Mask, block: int, interpret: bool
) -> Array:
    """Runs the kernel over rows; q, k and v are [b heads s e], `ids` [b s]."""

    def attend(q: Array, k: Array, v: Array, ids: Array) -> Array:
        kernel = splash.make_splash_mha(
            splash.MultiHeadMask([mask] * q.shape[1]),
            block_sizes=splash.BlockSizes(
                block_q=block,
                block_kv=block,
                block_q_dkv=block,
                block_kv_dkv=block,
                block_q_dq=block,
                block_kv_dq=block,
            ),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        # Compilers do not say what a kernel computes; the name tells it (`cost/kernels.py`).
        with jax.named_scope("blocks_{}_of_{}".format(*_count_blocks(mask, block))):
            return jax.vmap(kernel)(q, k, v, splash.SegmentIds(ids, ids))

    # The kernel's own products set no precision.
    return (exact(attend) if q.dtype == jnp.float32 else attend)(q, k, v, ids)


@functools.lru_cache(maxsize=64)
def _count_blocks(mask: splash.Mask, block: int) -> tuple[int, int]:
    """Returns how many blocks a mask leaves something of, and how many there are."""
    starts = [range(0, length, block) for length in mask.shape]
    left = [
        bool(mask[slice(q, q + block), slice(k, k + block)].any())
        for q, k in itertools.product(*starts)
    ]
    return sum(left), len(left)


def _blocks(length: int) -> tuple[int, int]:
    """Returns the side of a block, and `length` padded to a multiple of it."""
    for block in _BLOCKS:
        padded = -(-length // block) * block
        if padded - length <= length * _MAX_PADDING:
            break
    return block, padded


@dataclasses.dataclass(frozen=True)
class _SharedPrefixMask(splash.Mask):
    """Which tokens see which in [prompt | completion 1 | … | completion g | padding].

    The kernel computes it from a query's entry of `q_sequence` and from a key's place.

    Attributes:
        prompt: tokens of the prompt.
        group: number of completions.
        completion: tokens of each completion.
        length: tokens of the row, padding included.
    """

    prompt: int
    group: int
    completion: int
    length: int

    def __post_init__(self) -> None:
        if self.length > 1 << _PLACE_BITS or self.group >= 1 << (31 - _PLACE_BITS):
            raise ValueError(
                f"group of completions: expected at most {1 << _PLACE_BITS} places in a row and "
                f"{(1 << (31 - _PLACE_BITS)) - 1} completions, found {self.length} and "
                f"{self.group}; make groups smaller"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.length, self.length

    @functools.cached_property
    def q_sequence(self) -> np.ndarray:
        """Each place of the row and, in the bits above, the number of its completion."""
        place = np.arange(self.length, dtype=np.int32)
        number = np.maximum(place - self.prompt, 0) // self.completion
        return place | number << _PLACE_BITS

    def mask_function(self, query: Array, key: Array) -> Array:
        # Causal in the row; of the completions, the query's own alone.
        place = query & ((1 << _PLACE_BITS) - 1)
        own = self.prompt + (query >> _PLACE_BITS) * self.completion
        return (key <= place) & ((key < self.prompt) | (key >= own))

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        queries, keys = index
        return self.mask_function(
            self.q_sequence[queries, None], np.arange(self.length, dtype=np.int32)[None, keys]
        )
