"""The compiled group sampler: G answers to each prompt, by noise keyed by fact and sample.

One program prefills each prompt once, its images too where they are not encoded yet, and decodes
the group's samples token by token until all have ended, in stages with fewer and fewer slots
(`rollout.config`). Noise is keyed by (seed, step, fact, sample, position), so that beyond rounding
a sample depends on no other row, on no stage and not on the mesh. Axes: b prompts, g samples of a
prompt, t tokens of a completion, v vocabulary, d model.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from morer1_jax.batch import PromptBatch
from morer1_jax.data.grammar import GrammarTables
from morer1_jax.model.attention import PackedCausal
from morer1_jax.model.decoding import KV, init_cache
from morer1_jax.model.layers import Params
from morer1_jax.model.parts import PyTree, fitting_parts, map_rows
from morer1_jax.model.scorer import embed_prompts, last_valid
from morer1_jax.model.sharding import Layout
from morer1_jax.model.special import SpecialIds
from morer1_jax.model.vlm import Qwen25VL
from morer1_jax.rollout.config import SampleConfig, slots_again
from morer1_jax.rollout.loop import (
    LoopState,
    Samples,
    append_token,
    decode_last_token,
    narrowed,
    noted,
    nothing_sampled,
    open_slots,
)

# Names the loop over further attempts, for estimates of a program's time: as a rule there are none.
ATTEMPTS = "further_attempts"

# Slots of a part of the mesh's rows, and tokens that caches have room for, of each stage.
Stages = Sequence[tuple[int, int]]


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
        attempts: int32, how often it was begun; see `config.Stage`.
    """

    tokens: Int[Array, "b g t"]
    mask: Bool[Array, "b g t"]
    logprobs: Float[Array, "b g t"]
    ended: Bool[Array, "b g"]
    format: Bool[Array, "b g"]
    answer: Int[Array, "b g"]
    effort: Int[Array, "b g"]
    attempts: Int[Array, "b g"]


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
    layout = model.runtime.layout
    prompts = jax.tree.map(layout.rows, prompts)
    # Prompts and images run once. Their last hidden state gives the first token of every sample,
    # so that the loop decodes one token less than it samples.
    hidden, kv = prefill(model, params, prompts, fitting_parts(layout, *prompts.tokens.shape))
    rows = b, g = len(hidden), config.group
    hidden = jnp.broadcast_to(hidden[:, None], (b, g, hidden.shape[-1]))
    parts = layout.parts(b)
    samples_of_part = b * g // parts
    cache = init_cache(kv, prompts.mask, group=g, length=0, layout=layout)

    def append(state: LoopState, hidden: Array) -> LoopState:
        logits = model.apply({"params": params}, hidden, method=Qwen25VL.logits)
        return append_token(state, logits, grammar, allowed, config)

    def step(state: LoopState) -> LoopState:
        return append(*decode_last_token(model, params, state))

    def attempt(samples: Samples, stages: Stages) -> Samples:
        numbers = jnp.arange(samples_of_part, dtype=jnp.int32)
        state = LoopState(
            index=jnp.zeros((), jnp.int32),
            cache=cache,
            samples=nothing_sampled(grammar, rows, config.length).replace(open=samples.open),
            keys=keys,
            position=jnp.broadcast_to(prompts.next_position[:, None], rows),
            number=layout.rows(jnp.broadcast_to(numbers, (parts, len(numbers)))),
        )
        return _in_stages(append(state, hidden), samples, stages, step, layout)

    stages = [(stage.slots(samples_of_part), stage.length) for stage in config.whole_stages]
    samples = attempt(nothing_sampled(grammar, rows, config.length), stages)
    # What found no slot in a later stage begins anew, a few at a time, each with a slot to the end.
    # It draws the same tokens again, as far as rounding lets it.
    if again := slots_again(config, samples_of_part):
        retry = functools.partial(attempt, stages=[(again, config.length)])
        with jax.named_scope(ATTEMPTS):
            samples = jax.lax.while_loop(lambda samples: jnp.any(samples.open), retry, samples)
    return _outcome(samples, grammar)


def _in_stages(
    state: LoopState,
    before: Samples,
    stages: Stages,
    step: Callable[[LoopState], LoopState],
    layout: Layout,
) -> Samples:
    """Returns all samples as they were, but what was open sampled anew in stages.

    Args:
        state: after the first token.
        before: all samples, of which `state` has the open ones.
        step: runs and samples a token.
    """
    found = state.samples
    for (slots, length), (following, _) in itertools.pairwise([*stages, (0, 0)]):
        if slots < state.number.shape[1]:
            found = noted(found, state)
            state = narrowed(state, slots, layout)
        state = state.replace(cache=state.cache.grown(length))
        enough = following if following < slots else 0
        going_on = functools.partial(_goes_on, length=length, enough=enough)
        state = jax.lax.while_loop(going_on, step, state)
    found = noted(found, state)

    def merged(now: Array, old: Array) -> Array:
        was_open = before.open.reshape(*before.open.shape, *(1,) * (now.ndim - 2))
        return jnp.where(was_open, now, old)

    samples = jax.tree.map(merged, found, before)
    return samples.replace(attempts=before.attempts + before.open)


def _goes_on(state: LoopState, length: int, enough: int) -> Bool[Array, ""]:
    """Returns whether the cache has room for a token, and more than `enough` slots are open."""
    return (state.index < length) & (open_slots(state) > enough)


def prefill(
    model: Qwen25VL, params: Params, prompts: PromptBatch, parts: int = 1
) -> tuple[Float[Array, "b d"], KV | tuple[KV, ...]]:
    """Runs the prompts, images too, once for their groups.

    Args:
        parts: of the prompts that are run one after another.

    Returns:
        The hidden state that predicts the first token, and the prompts' keys and values.
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
    return last, kv if apart else _exchanged(kv)


def _exchanged(kv: KV) -> KV:
    """Returns keys and values with their first two axes exchanged."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), kv)


def _outcome(samples: Samples, grammar: GrammarTables) -> Rollout:
    """Returns the completions with what their automata ended in."""
    answer = grammar.answer_label[samples.answer_state].astype(jnp.int32)
    return Rollout(
        tokens=samples.tokens,
        mask=samples.mask,
        logprobs=samples.logprobs,
        ended=samples.ended,
        format=grammar.steps_accept[samples.steps_state] & (answer >= 0),
        answer=answer,
        effort=samples.effort,
        attempts=samples.attempts,
    )
