"""The compiled group sampler: G answers to each prompt, read by the automaton as they grow.

One program encodes the images, prefills each prompt once, and decodes the group's samples token by
token until all have ended. Noise is keyed by (seed, step, fact, sample, position), so a sample
depends on no other row and not on the mesh.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from morer1_jax.batch import PromptBatch
from morer1_jax.data.grammar import GrammarTables
from morer1_jax.model.attention import PackedCausal
from morer1_jax.model.decoding import KVCache, init_cache, separate_layers
from morer1_jax.model.logprobs import DISALLOWED
from morer1_jax.model.scorer import Params, embed_prompts, last_valid
from morer1_jax.model.special import SpecialIds
from morer1_jax.model.vlm import Qwen25VL

# The completions' cache begins with room for so many tokens, or for all there can be.
_LEAST = 64
# Ids that are summed together on the way to the one drawn.
_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """How completions are drawn.

    Attributes:
      group: samples a prompt.
      length: most tokens of a completion, end-of-turn among them.
      temperature: logits are divided by it; 0 takes the likeliest token (greedy).
      end_of_turn: the id that ends a completion.
      guided: whether a token may be drawn only if what is left of the length suffices to end in
        *format* after it.
    """

    group: int
    length: int
    temperature: float
    end_of_turn: int
    guided: bool = False

    def __post_init__(self) -> None:
        if self.group < 1 or self.length < 1 or not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"group {self.group}, length {self.length} and temperature {self.temperature}: at "
                "least 1, 1 and 0 expected"
            )


@struct.dataclass
class Rollout:
    """Completions of a batch of prompts, and what the automaton read off them.

    Attributes:
      tokens: int32 ids; meaningless where `mask` is False.
      mask: True up to and including end-of-turn.
      logprobs: float32, the log-probability each token was drawn with; not finite where the model
        gave no number for it.
      ended: False if the completion was cut off at the length limit.
      format, answer, effort: the three outcomes of `task.answer`; `answer` is a label's id or -1.
    """

    tokens: Int[Array, "b g t"]
    mask: Bool[Array, "b g t"]
    logprobs: Float[Array, "b g t"]
    ended: Bool[Array, "b g"]
    format: Bool[Array, "b g"]
    answer: Int[Array, "b g"]
    effort: Int[Array, "b g"]


@struct.dataclass
class LoopState:
    """The decode loop's state before token `index` is drawn."""

    index: Int[Array, ""]
    cache: KVCache
    tokens: Int[Array, "b g t"]
    mask: Bool[Array, "b g t"]
    logprobs: Float[Array, "b g t"]
    ended: Bool[Array, "b g"]
    steps: Int[Array, "b g"]
    answer: Int[Array, "b g"]
    effort: Int[Array, "b g"]


def allowed_ids(special: SpecialIds, tokenizer_size: int, rows: int) -> Bool[np.ndarray, " v"]:
    """Ids that may be sampled: no padding, image, vision or video token, no row without a token.

    Args:
      tokenizer_size: number of ids the tokenizer has.
      rows: rows of the embedding, at least as many.
    """
    allowed = np.arange(rows) < tokenizer_size
    allowed[list(special.never_sampled)] = False
    return allowed


def sample_keys(
    seed: int, step: Int[Array, ""], fact: Int[Array, " b"], group: int
) -> Key[Array, "b g"]:
    """A key for each (fact, sample) of a step, [b, g]."""
    base = jax.random.fold_in(jax.random.key(seed), step)

    def one(fact: Array, sample: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(base, fact), sample)

    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(fact, jnp.arange(group))


def sample(
    model: Qwen25VL,
    params: Params,
    prompts: PromptBatch,
    grammar: GrammarTables,
    allowed: Bool[Array, " v"],
    keys: Key[Array, "b g"],
    config: SampleConfig,
) -> Rollout:
    """Draws `config.group` completions of each prompt.

    Args:
      keys: of `sample_keys`; not read when greedy.
    """
    b, g, t = prompts.tokens.shape[0], config.group, config.length
    lengths, unroll = cache_lengths(t), model.runtime.decode_unroll

    def prefill(module: Qwen25VL) -> tuple[Array, KVCache]:
        x = embed_prompts(module, prompts)
        positions = jnp.moveaxis(prompts.positions, 1, 0)
        attend = PackedCausal(prompts.mask.astype(jnp.int32), model.runtime.kernels)
        hidden, kv = module.forward(x, positions, attend, keep_kv=True)
        return last_valid(hidden, prompts.mask), init_cache(
            kv, prompts.mask, group=g, length=lengths[0], stacked=not unroll
        )

    def decode(module: Qwen25VL, tokens: Array, index: Array, cache: KVCache):
        x = module.embed(tokens)
        positions = jnp.broadcast_to((prompts.next_position + index)[:, None], (b, g))
        hidden, cache = module.decode(x, positions, cache)
        return hidden, cache

    variables = {"params": params}
    apart = {"params": separate_layers(params)} if unroll else variables

    def drawn(state: LoopState, hidden: Array) -> LoopState:
        """With token `state.index`, drawn from the hidden state at the place before it."""
        logits = model.apply(variables, hidden, method=Qwen25VL.logits)
        permitted = allowed
        if config.guided:
            left = t - state.index - 1
            permitted = allowed & leads_to_end(grammar, state.steps, state.answer, left)
        token, logprob = _draw(logits, permitted, keys, state.index, config.temperature)
        token = jnp.where(state.ended, 0, token)
        alive = ~state.ended
        kind = grammar.token_class[token]
        added = grammar.effort_added[kind, state.steps].astype(jnp.int32)
        at = (0, 0, state.index)
        return state.replace(
            index=state.index + 1,
            tokens=jax.lax.dynamic_update_slice(state.tokens, token[..., None], at),
            mask=jax.lax.dynamic_update_slice(state.mask, alive[..., None], at),
            logprobs=jax.lax.dynamic_update_slice(
                state.logprobs, jnp.where(alive, logprob, 0.0)[..., None], at
            ),
            ended=state.ended | (token == config.end_of_turn),
            steps=jnp.where(alive, grammar.steps_next[kind, state.steps], state.steps),
            answer=jnp.where(alive, grammar.answer_next[kind, state.answer], state.answer),
            effort=state.effort + jnp.where(alive, added, 0),
        )

    def step(state: LoopState) -> LoopState:
        before = state.index - 1
        token = jax.lax.dynamic_index_in_dim(state.tokens, before, axis=-1, keepdims=False)
        hidden, cache = model.apply(apart, token, before, state.cache, method=decode)
        return drawn(state.replace(cache=cache), hidden)

    last, cache = model.apply(variables, method=prefill)
    start = LoopState(
        index=jnp.zeros((), jnp.int32),
        cache=cache,
        tokens=jnp.zeros((b, g, t), jnp.int32),
        mask=jnp.zeros((b, g, t), bool),
        logprobs=jnp.zeros((b, g, t), jnp.float32),
        ended=jnp.zeros((b, g), bool),
        steps=jnp.zeros((b, g), grammar.steps_next.dtype),
        answer=jnp.zeros((b, g), grammar.answer_next.dtype),
        effort=jnp.zeros((b, g), jnp.int32),
    )
    # The first token needs no decoding, and nothing is decoded after the last one.
    end = drawn(start, jnp.broadcast_to(last[:, None], (b, g, last.shape[-1])))
    for length in lengths:
        end = jax.lax.while_loop(
            lambda state, length=length: (state.index < length) & ~jnp.all(state.ended),
            step,
            end.replace(cache=end.cache.grown(length)),
        )
    answer = grammar.answer_label[end.answer].astype(jnp.int32)
    return Rollout(
        tokens=end.tokens,
        mask=end.mask,
        logprobs=end.logprobs,
        ended=end.ended,
        format=grammar.steps_accept[end.steps] & (answer >= 0),
        answer=answer,
        effort=end.effort,
    )


def leads_to_end(
    grammar: GrammarTables,
    steps: Int[Array, "b g"],
    answer: Int[Array, "b g"],
    left: Int[Array, ""],
) -> Bool[Array, "b g v"]:
    """Tokens after which `left` more can end the completion in *format*."""
    steps, answer = grammar.steps_next[:, steps], grammar.answer_next[:, answer]
    # Within the answer the step automaton stands still, and the other one tells the distance.
    distance = grammar.steps_distance[steps]
    distance = jnp.where(distance > 0, distance, grammar.answer_distance[answer])
    return jnp.moveaxis(distance <= left, 0, -1)[..., grammar.token_class]


def cache_lengths(most: int) -> tuple[int, ...]:
    """Lengths that the completions' cache grows through, a loop of the sampler each: attention
    reads all that is allocated."""
    return tuple(sorted({min(most, max(_LEAST, most // part)) for part in (4, 2, 1)}))


def _draw(
    logits: Float[Array, "b g v"],
    allowed: Bool[Array, "*b v"],
    keys: Key[Array, "b g"],
    index: Int[Array, ""],
    temperature: float,
) -> tuple[Int[Array, "b g"], Float[Array, "b g"]]:
    """A token of each sample and its log-probability, normalised as the scorer does."""
    scaled = logits / temperature if temperature else logits
    logits = jnp.where(allowed, scaled, DISALLOWED)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - largest)
    if temperature:
        at = jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, index)))(keys)
        token = _inverse_cdf(weights, jax.vmap(jax.vmap(jax.random.uniform))(at))
    else:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    chosen = jnp.take_along_axis(logits, token[..., None], axis=-1)
    logprob = chosen - largest - jnp.log(jnp.sum(weights, axis=-1, keepdims=True))
    # Where the logits of all ids that are allowed are -inf, one that is not would seem likely.
    logprob = jnp.where(chosen <= DISALLOWED, -jnp.inf, logprob)
    return token, logprob[..., 0]


def _inverse_cdf(weights: Float[Array, "b g v"], uniform: Float[Array, "b g"]) -> Int[Array, "b g"]:
    """The first id up to which the weights' share exceeds the uniform number.

    One number a row in place of one an id, as Gumbel noise would take. The sum runs over blocks of
    ids, then within the block that is hit.
    """
    v = weights.shape[-1]
    blocks = jnp.pad(weights, ((0, 0), (0, 0), (0, -v % _BLOCK)))
    blocks = blocks.reshape(*uniform.shape, -1, _BLOCK)
    sums = jnp.sum(blocks, axis=-1)
    target = uniform * jnp.sum(sums, axis=-1)
    block, before = _hit(sums, target)
    inside = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    place, _ = _hit(inside, target - before)
    return block * _BLOCK + place


def _hit(
    weights: Float[Array, "b g n"], target: Float[Array, "b g"]
) -> tuple[Int[Array, "b g"], Float[Array, "b g"]]:
    """The first place with a weight up to which the sum exceeds the target, and the sum before it;
    the last place with a weight where rounding leaves none."""
    total = jnp.cumsum(weights, axis=-1)
    some = weights > 0
    beyond = some & (total > target[..., None])
    last = weights.shape[-1] - 1 - jnp.argmax(some[..., ::-1], axis=-1)
    place = jnp.where(jnp.any(beyond, axis=-1), jnp.argmax(beyond, axis=-1), last)
    before = jnp.take_along_axis(total - weights, place[..., None], axis=-1)[..., 0]
    return place.astype(jnp.int32), before
