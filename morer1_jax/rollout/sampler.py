"""The compiled group sampler: G answers to each prompt, by noise keyed by fact and sample.

One program prefills each prompt once, its images too where they are not encoded yet, and decodes
the group's samples token by token until all have ended. Noise is keyed by (seed, step, fact,
sample, position), so a sample depends on no other row and not on the mesh. Axes: b prompts, g
samples of a prompt, t tokens of a completion, v vocabulary, d model.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from morer1_jax.batch import PromptBatch
from morer1_jax.bounds import at_least, check_bounds
from morer1_jax.data.grammar import GrammarTables
from morer1_jax.model.attention import PackedCausal
from morer1_jax.model.decoding import KV, KVCache, init_cache
from morer1_jax.model.layers import Params
from morer1_jax.model.parts import PyTree, fitting_parts, map_rows
from morer1_jax.model.scorer import embed_prompts, last_valid
from morer1_jax.model.special import SpecialIds
from morer1_jax.model.vlm import Qwen25VL
from morer1_jax.rollout.draw import draw_token, leads_to_end

# Tokens that the completions' cache has room for at first, where completions may be longer.
_MIN_CACHE_LENGTH = 64


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """How completions are sampled.

    Attributes:
        group: samples of each prompt.
        length: most tokens of a completion, end-of-turn among them.
        temperature: logits are divided by it; 0 takes the likeliest token (greedy).
        end_of_turn: the id that ends a completion.
        guided: whether only those tokens are permitted after which the rest of the length suffices
            to end in *format*.

    Raises:
        FieldError: a field is out of its bounds.
    """

    group: int = at_least(1)
    length: int = at_least(1)
    temperature: float = at_least(0)
    end_of_turn: int
    guided: bool = False

    def __post_init__(self) -> None:
        check_bounds(self)


@struct.dataclass
class Rollout:
    """Completions of a batch of prompts, and what the automaton read in them.

    Attributes:
        tokens: int32 ids; meaningless where `mask` is False.
        mask: True up to and including end-of-turn.
        logprobs: float32, the log-probability with which each token was sampled, in nats; not
            finite where the model's logits were not.
        ended: False if the completion was cut off at the length limit.
        format: whether tags and steps are there; see `task.answer`.
        answer: int32, the label's id, or -1 without a readable answer.
        effort: int32, bytes of reasoning, white space apart.
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
    """The decode loop's state before the token at place `index` is sampled.

    Attributes:
        index: int32, the place of the next token, the same for every sample.
        cache: keys and values of the prompts, and of the completions up to place `index - 2`: those
            of the last token are written when the next one is decoded.
        tokens: int32; 0 from `index` on, and after a sample has ended.
        mask: True up to and including end-of-turn.
        logprobs: float32, in nats; 0 where `mask` is False.
        ended: whether a sample's end-of-turn has been sampled.
        steps_state: int16, state of the automaton that reads *format*; see `data.grammar`.
        answer_state: int16, state of the automaton that reads the label.
        effort: int32, bytes of reasoning so far.
    """

    index: Int[Array, ""]
    cache: KVCache
    tokens: Int[Array, "b g t"]
    mask: Bool[Array, "b g t"]
    logprobs: Float[Array, "b g t"]
    ended: Bool[Array, "b g"]
    steps_state: Int[Array, "b g"]
    answer_state: Int[Array, "b g"]
    effort: Int[Array, "b g"]


def allowed_ids(special: SpecialIds, tokenizer_size: int, rows: int) -> Bool[np.ndarray, " v"]:
    """Returns the ids that may be sampled.

    Padding, image, vision and video may not, nor rows of the embedding without a token.

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
    """Returns a key for each (fact, sample) of a run's step; `fact` is that of `PromptBatch`."""
    # Folded one number at a time, so that a key depends on nothing else of the batch.
    base = jax.random.fold_in(jax.random.key(seed), step)

    def sample_key(fact: Array, sample: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(base, fact), sample)

    return jax.vmap(jax.vmap(sample_key, (None, 0)), (0, None))(fact, jnp.arange(group))


def sample(
    model: Qwen25VL,
    params: Params,
    prompts: PromptBatch,
    grammar: GrammarTables,
    allowed: Bool[Array, " v"],
    keys: Key[Array, "b g"],
    config: SampleConfig,
) -> Rollout:
    """Samples `config.group` completions of each prompt.

    Args:
        params: the whole tree; layers are decoded in a plain loop where the decoder's are apart
            (`decoding.separate_layers`), else in a scan.
        prompts: with images or their features.
        grammar: tables over the model's vocabulary.
        allowed: of `allowed_ids`.
        keys: of `sample_keys`; not read when greedy.
        config: static, a part of the compiled program.
    """
    prompts = jax.tree.map(model.runtime.layout.rows, prompts)
    lengths = cache_lengths(config.length)

    def append(state: LoopState, hidden: Array) -> LoopState:
        logits = model.apply({"params": params}, hidden, method=Qwen25VL.logits)
        return append_token(state, logits, grammar, allowed, keys, config)

    def step(state: LoopState) -> LoopState:
        state, hidden = decode_last_token(model, params, state, prompts.next_position)
        return append(state, hidden)

    # Prompts and images run once. Their last hidden state gives the first token of every sample,
    # so that the loop decodes one token less than it samples.
    parts = fitting_parts(model.runtime.layout, *prompts.tokens.shape)
    hidden, cache = prefill(model, params, prompts, config.group, lengths[0], parts)
    state = append(first_state(cache, grammar, hidden.shape[:2], config.length), hidden)
    # Attention reads all of the cache that is allocated: a loop for each length it grows to.
    for length in lengths:
        state = jax.lax.while_loop(
            functools.partial(unfinished, length=length),
            step,
            state.replace(cache=state.cache.grown(length)),
        )
    return outcome(state, grammar)


def cache_lengths(length: int) -> tuple[int, ...]:
    """Returns the lengths that the completions' cache grows through, up to `length` tokens."""
    return tuple(sorted({min(length, max(_MIN_CACHE_LENGTH, length // n)) for n in (4, 2, 1)}))


def prefill(
    model: Qwen25VL, params: Params, prompts: PromptBatch, group: int, length: int, parts: int = 1
) -> tuple[Float[Array, "b g d"], KVCache]:
    """Runs the prompts, images too, once for their groups.

    Args:
        parts: of the prompts that are run one after another.

    Returns:
        The hidden state that predicts each sample's first token, and a cache that holds the prompts
        and has room for `length` tokens of each completion.
    """
    apart = "layers" not in params["language"]

    def run(module: Qwen25VL, prompts: PromptBatch) -> tuple[Array, PyTree]:
        x = embed_prompts(module, prompts)
        positions = jnp.moveaxis(prompts.positions, 1, 0)
        attend = PackedCausal(prompts.mask.astype(jnp.int32), model.runtime.kernels)
        hidden, kv = module.forward(x, positions, attend, keep_kv=True)
        return last_valid(hidden, prompts.mask), kv if apart else _exchanged(kv)

    def of_part(part: PromptBatch) -> tuple[Array, PyTree]:
        return model.apply({"params": params}, part, method=run)

    # Parts are of rows, which stand behind the layers where these are stacked.
    last, kv = map_rows(of_part, prompts, parts)
    kv = kv if apart else _exchanged(kv)
    layout = model.runtime.layout
    cache = init_cache(kv, prompts.mask, group=group, length=length, layout=layout)
    return jnp.broadcast_to(last[:, None], (last.shape[0], group, last.shape[-1])), cache


def _exchanged(kv: KV) -> KV:
    """Returns keys and values with their first two axes exchanged."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), kv)


def first_state(
    cache: KVCache, grammar: GrammarTables, rows: tuple[int, int], length: int
) -> LoopState:
    """Returns the state before any token is sampled; the automata start in state 0.

    Args:
        grammar: whose states' dtypes are taken.
        rows: (b, g).
        length: t.
    """
    return LoopState(
        index=jnp.zeros((), jnp.int32),
        cache=cache,
        tokens=jnp.zeros((*rows, length), jnp.int32),
        mask=jnp.zeros((*rows, length), bool),
        logprobs=jnp.zeros((*rows, length), jnp.float32),
        ended=jnp.zeros(rows, bool),
        steps_state=jnp.zeros(rows, grammar.steps_next.dtype),
        answer_state=jnp.zeros(rows, grammar.answer_next.dtype),
        effort=jnp.zeros(rows, jnp.int32),
    )


def unfinished(state: LoopState, length: int) -> Bool[Array, ""]:
    """Returns whether a sample has not ended and its `length` tokens are not all sampled."""
    return (state.index < length) & ~jnp.all(state.ended)


def decode_last_token(
    model: Qwen25VL, params: Params, state: LoopState, first_position: Int[Array, " b"]
) -> tuple[LoopState, Float[Array, "b g d"]]:
    """Runs the token sampled last, and writes its keys and values to the cache.

    Args:
        state: with at least one token.
        first_position: M-RoPE position of each prompt's first completion token, on all three axes.

    Returns:
        The state with that cache, and the hidden state that predicts each sample's next token.
    """
    last = state.index - 1
    token = jax.lax.dynamic_index_in_dim(state.tokens, last, axis=-1, keepdims=False)

    def run(module: Qwen25VL) -> tuple[Array, KVCache]:
        # Completions are text: one position for all three axes, going on from the prompt's.
        x = module.embed(token)
        positions = jnp.broadcast_to((first_position + last)[:, None], token.shape)
        return module.decode(x, positions, state.cache)

    hidden, cache = model.apply({"params": params}, method=run)
    return state.replace(cache=cache), hidden


def append_token(
    state: LoopState,
    logits: Float[Array, "b g v"],
    grammar: GrammarTables,
    allowed: Bool[Array, " v"],
    keys: Key[Array, "b g"],
    config: SampleConfig,
) -> LoopState:
    """Samples the token at `state.index` and lets the automata read it.

    A sample that has ended gets id 0, which counts for nothing.
    """
    # The token, of those allowed and, if guided, permitted by the length left.
    permitted = allowed
    if config.guided:
        tokens_left = config.length - state.index - 1
        permitted = allowed & leads_to_end(
            grammar, state.steps_state, state.answer_state, tokens_left
        )
    token, logprob = draw_token(logits, permitted, keys, state.index, config.temperature)
    token = jnp.where(state.ended, 0, token)
    alive = ~state.ended

    # What the automata read: by the token's class and their state (see `data.grammar`).
    token_class = grammar.token_class[token]
    effort = grammar.effort_added[token_class, state.steps_state].astype(jnp.int32)
    steps_state = grammar.steps_next[token_class, state.steps_state]
    answer_state = grammar.answer_next[token_class, state.answer_state]

    # Into the state; what belongs to a sample that has ended stays as it is.
    def written(values: Array, value: Array) -> Array:
        return jax.lax.dynamic_update_slice(values, value[..., None], (0, 0, state.index))

    return state.replace(
        index=state.index + 1,
        tokens=written(state.tokens, token),
        mask=written(state.mask, alive),
        logprobs=written(state.logprobs, jnp.where(alive, logprob, 0.0)),
        ended=state.ended | (token == config.end_of_turn),
        steps_state=jnp.where(alive, steps_state, state.steps_state),
        answer_state=jnp.where(alive, answer_state, state.answer_state),
        effort=state.effort + jnp.where(alive, effort, 0),
    )


def outcome(state: LoopState, grammar: GrammarTables) -> Rollout:
    """Returns the completions with what their automata ended in."""
    answer = grammar.answer_label[state.answer_state].astype(jnp.int32)
    return Rollout(
        tokens=state.tokens,
        mask=state.mask,
        logprobs=state.logprobs,
        ended=state.ended,
        format=grammar.steps_accept[state.steps_state] & (answer >= 0),
        answer=answer,
        effort=state.effort,
    )
