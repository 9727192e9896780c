"""Draws one token from a model's logits by keyed noise; which tokens guided sampling permits.

Axes: b prompts, g samples of a prompt, v vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from morer1_jax.data.grammar import GrammarTables
from morer1_jax.model.logprobs import DISALLOWED

# Ids whose weights `inverse_cdf` sums together before it looks inside a block.
_CDF_BLOCK = 128


def leads_to_end(
    grammar: GrammarTables,
    steps_state: Int[Array, "b g"],
    answer_state: Int[Array, "b g"],
    tokens_left: Int[Array, ""],
) -> Bool[Array, "b g v"]:
    """Returns the tokens after which `tokens_left` more can end the completion in *format*."""
    steps_state = grammar.steps_next[:, steps_state]
    answer_state = grammar.answer_next[:, answer_state]
    # Within the answer the step automaton stands still, and the other one tells the distance.
    distance = grammar.steps_distance[steps_state]
    distance = jnp.where(distance > 0, distance, grammar.answer_distance[answer_state])
    return jnp.moveaxis(distance <= tokens_left, 0, -1)[..., grammar.token_class]


def draw_token(
    logits: Float[Array, "b g v"],
    allowed: Bool[Array, "*b v"],
    keys: Key[Array, "b g"],
    index: Int[Array, ""],
    temperature: float,
) -> tuple[Int[Array, "b g"], Float[Array, "b g"]]:
    """Draws a token of each sample, normalised as the scorer does.

    Args:
        logits: float32.
        allowed: ids to draw from.
        keys: of `sample_keys`; not read at temperature 0.
        index: place in the completion, folded into the keys.
        temperature: as in `SampleConfig`.

    Returns:
        int32 ids and their float32 log-probabilities in nats. Where no allowed id has a finite
        logit, an id that is not allowed may be drawn; its log-probability is -inf.
    """
    # A softmax in parts: its weights serve the draw and the log-probability alike.
    scaled = logits / temperature if temperature else logits
    logits = jnp.where(allowed, scaled, DISALLOWED)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - largest)
    if temperature:
        token_keys = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, index)))(keys)
        token = inverse_cdf(weights, jax.vmap(jax.vmap(jax.random.uniform))(token_keys))
    else:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)
    logprob = chosen - largest - jnp.log(jnp.sum(weights, axis=-1, keepdims=True))
    # Where the logits of all ids that are allowed are -inf, one that is not would seem likely.
    logprob = jnp.where(chosen <= DISALLOWED, -jnp.inf, logprob)
    return token, logprob[..., 0]


def inverse_cdf(weights: Float[Array, "b g v"], uniform: Float[Array, "b g"]) -> Int[Array, "b g"]:
    """Returns the first id up to which the weights' share exceeds the uniform number.

    It takes one random number a row, where Gumbel noise would take one an id. The sum runs over
    blocks of ids, then within the block that holds the id.
    """
    v = weights.shape[-1]
    blocks = jnp.pad(weights, ((0, 0), (0, 0), (0, -v % _CDF_BLOCK)))
    blocks = blocks.reshape(*uniform.shape, -1, _CDF_BLOCK)
    sums = jnp.sum(blocks, axis=-1)
    target = uniform * jnp.sum(sums, axis=-1)
    block, sum_before = _first_beyond(sums, target)
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    place, _ = _first_beyond(inside, target - sum_before)
    return block * _CDF_BLOCK + place


def _first_beyond(
    weights: Float[Array, "b g n"], target: Float[Array, "b g"]
) -> tuple[Int[Array, "b g"], Float[Array, "b g"]]:
    """Returns the first place with a weight up to which the sum exceeds the target.

    Where rounding leaves none, that is the last place with a weight. Also returns the sum before
    that place.
    """
    total = jnp.cumsum(weights, axis=-1)
    has_weight = weights > 0
    beyond = has_weight & (total > target[..., None])
    last = weights.shape[-1] - 1 - jnp.argmax(has_weight[..., ::-1], axis=-1)
    place = jnp.where(jnp.any(beyond, axis=-1), jnp.argmax(beyond, axis=-1), last)
    sum_before = jnp.take_along_axis(total - weights, place[..., None], axis=-1)[..., 0]
    return place.astype(jnp.int32), sum_before
