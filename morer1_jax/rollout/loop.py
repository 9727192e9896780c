"""The decode loop's state, and its steps: run the last token, sample the next, drop ended samples.

All samples in the loop have the same number of tokens. Axes: b rows, g samples of a row, t tokens
of a completion, v vocabulary, d model; p parts of the mesh's rows, n samples of a part, m slots of
a part. At first b are the prompts and g their samples; once slots are fewer than samples, b are the
slots, and g is 1.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from morer1_jax.data.grammar import GrammarTables
from morer1_jax.model.decoding import KVCache
from morer1_jax.model.layers import Params
from morer1_jax.model.sharding import Layout
from morer1_jax.model.slots import taken
from morer1_jax.model.vlm import Qwen25VL
from morer1_jax.rollout.config import SampleConfig
from morer1_jax.rollout.draw import draw_token, leads_to_end


@struct.dataclass
class Samples:
    """What is known of each sample.

    Attributes:
        tokens: int32; 0 where `mask` is False.
        mask: True up to and including the token that ends it.
        logprobs: float32, in nats; 0 where `mask` is False.
        open: whether it has neither ended nor reached the limit.
        ended: whether a token that ends it has been sampled.
        steps_state: int16, state of the automaton that reads *format*; see `data.grammar`.
        answer_state: int16, state of the automaton that reads the label.
        effort: int32, bytes of reasoning so far.
        attempts: int32, how often it was begun before.
    """

    tokens: Int[Array, "b g t"]
    mask: Bool[Array, "b g t"]
    logprobs: Float[Array, "b g t"]
    open: Bool[Array, "b g"]
    ended: Bool[Array, "b g"]
    steps_state: Int[Array, "b g"]
    answer_state: Int[Array, "b g"]
    effort: Int[Array, "b g"]
    attempts: Int[Array, "b g"]


@struct.dataclass
class LoopState:
    """The loop's state before the token at place `index` is sampled.

    Attributes:
        index: int32, the place of the next token, the same for every sample.
        cache: keys and values of the prompts, and of the completions up to place `index - 2`: those
            of the last token are written when the next one is decoded.
        samples: in the slots.
        keys: of their noise; see `sampler.sample_keys`.
        position: int32, M-RoPE position of their first token, on all three axes.
        number: int32, the sample in each slot, counted through its part of the mesh's rows.
    """

    index: Int[Array, ""]
    cache: KVCache
    samples: Samples
    keys: Key[Array, "b g"]
    position: Int[Array, "b g"]
    number: Int[Array, "p m"]


def nothing_sampled(grammar: GrammarTables, rows: tuple[int, int], length: int) -> Samples:
    """Returns samples without a token; the automata start in state 0.

    Args:
        grammar: whose states' dtypes are taken.
        rows: (b, g).
        length: t.
    """
    return Samples(
        tokens=jnp.zeros((*rows, length), jnp.int32),
        mask=jnp.zeros((*rows, length), bool),
        logprobs=jnp.zeros((*rows, length), jnp.float32),
        open=jnp.ones(rows, bool),
        ended=jnp.zeros(rows, bool),
        steps_state=jnp.zeros(rows, grammar.steps_next.dtype),
        answer_state=jnp.zeros(rows, grammar.answer_next.dtype),
        effort=jnp.zeros(rows, jnp.int32),
        attempts=jnp.zeros(rows, jnp.int32),
    )


def open_slots(state: LoopState) -> Int[Array, ""]:
    """Returns the most slots with an open sample that a part of the mesh's rows has."""
    slots = state.samples.open.reshape(state.number.shape)
    return jnp.max(jnp.sum(slots, axis=1, dtype=jnp.int32))


def narrowed(state: LoopState, slots: int, layout: Layout) -> LoopState:
    """Returns the state with fewer slots: those with open samples, the first of them if too many.

    Args:
        slots: of each part of the mesh's rows.
    """
    is_open = state.samples.open.reshape(state.number.shape)
    # Open ones first, in their order; if they are too few, others fill the slots.
    kept = jnp.argsort(~is_open, axis=1, stable=True)[:, :slots].astype(jnp.int32)

    def of_slots(x: Array) -> Array:
        return layout.rows(taken(x.reshape(-1, 1, *x.shape[2:]), kept))

    return state.replace(
        cache=state.cache.narrowed(kept, layout),
        samples=jax.tree.map(of_slots, state.samples),
        keys=of_slots(state.keys),
        position=of_slots(state.position),
        number=jnp.take_along_axis(state.number, kept, axis=1),
    )


def noted(samples: Samples, state: LoopState) -> Samples:
    """Returns all samples, of which those in the state's slots are as these are now."""
    rows = samples.open.shape
    parts = len(state.number)

    def put(values: Array, new: Array) -> Array:
        flat = values.reshape(parts, -1, *values.shape[2:])
        new = new.reshape(*state.number.shape, *new.shape[2:])
        flat = jax.vmap(lambda x, at, y: x.at[at].set(y, unique_indices=True))(
            flat, state.number, new
        )
        return flat.reshape(*rows, *values.shape[2:])

    return jax.tree.map(put, samples, state.samples)


def decode_last_token(
    model: Qwen25VL, params: Params, state: LoopState
) -> tuple[LoopState, Float[Array, "b g d"]]:
    """Runs the token sampled last, and writes its keys and values to the cache.

    Args:
        state: with at least one token.

    Returns:
        The state with that cache, and the hidden state that predicts each sample's next token.
    """
    last = state.index - 1
    token = jax.lax.dynamic_index_in_dim(state.samples.tokens, last, axis=-1, keepdims=False)

    def run(module: Qwen25VL) -> tuple[Array, KVCache]:
        # Completions are text: one position for all three axes, going on from the prompt's.
        positions = jnp.broadcast_to(state.position + last, token.shape)
        return module.decode(module.embed(token), positions, state.cache)

    hidden, cache = model.apply({"params": params}, method=run)
    return state.replace(cache=cache), hidden


def append_token(
    state: LoopState,
    logits: Float[Array, "b g v"],
    grammar: GrammarTables,
    allowed: Bool[Array, " v"],
    config: SampleConfig,
) -> LoopState:
    """Samples the token at `state.index` and lets the automata read it.

    A sample that is not open gets id 0, which counts for nothing.
    """
    # The token, of those allowed and, if guided, permitted by the length left.
    before, permitted = state.samples, allowed
    if config.guided:
        tokens_left = config.length - state.index - 1
        permitted = allowed & leads_to_end(
            grammar, before.steps_state, before.answer_state, tokens_left
        )
    token, logprob = draw_token(logits, permitted, state.keys, state.index, config.temperature)
    token = jnp.where(before.open, token, 0)

    # What the automata read: by the token's class and their state (see `data.grammar`).
    token_class = grammar.token_class[token]
    effort = grammar.effort_added[token_class, before.steps_state].astype(jnp.int32)
    steps_state = grammar.steps_next[token_class, before.steps_state]
    answer_state = grammar.answer_next[token_class, before.answer_state]

    # Into the samples; what belongs to one that is not open stays as it is.
    def written(values: Array, value: Array) -> Array:
        return jax.lax.dynamic_update_slice(values, value[..., None], (0, 0, state.index))

    ends = before.open & _is_one_of(token, config.ends)
    samples = Samples(
        tokens=written(before.tokens, token),
        mask=written(before.mask, before.open),
        logprobs=written(before.logprobs, jnp.where(before.open, logprob, 0.0)),
        open=before.open & ~ends & (state.index + 1 < config.length),
        ended=before.ended | ends,
        steps_state=jnp.where(before.open, steps_state, before.steps_state),
        answer_state=jnp.where(before.open, answer_state, before.answer_state),
        effort=before.effort + jnp.where(before.open, effort, 0),
        attempts=before.attempts,
    )
    return state.replace(index=state.index + 1, samples=samples)


def _is_one_of(token: Int[Array, "b g"], ids: tuple[int, ...]) -> Bool[Array, "b g"]:
    return jnp.any(token[..., None] == jnp.asarray(ids, token.dtype), axis=-1)
