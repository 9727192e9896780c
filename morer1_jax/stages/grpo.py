"""The stage `grpo`: rollouts on a mix of easy and hard facts, and updates on them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from morer1_jax.batch import PromptBatch
from morer1_jax.data.curriculum import EmptyPoolError, Mixer, Pool
from morer1_jax.data.digests import bind, of_lines
from morer1_jax.data.feed import Draw, PromptFeed
from morer1_jax.data.ratings import FILE, POOLS, read_ratings
from morer1_jax.errors import DataError, NotFiniteError
from morer1_jax.learn.state import TrainState
from morer1_jax.model.layers import Params
from morer1_jax.rollout.program import Scored
from morer1_jax.run.batch_sampler import greedy_sampler, validator
from morer1_jax.run.checkpoint import Checkpointer
from morer1_jax.run.finite import ways
from morer1_jax.run.job import Job
from morer1_jax.run.log import RecordLog
from morer1_jax.run.loop import Hooks, Metrics, train
from morer1_jax.run.mesh import fetch, this_host
from morer1_jax.run.phases import PhaseTimer
from morer1_jax.run.shapes import prompt_shapes
from morer1_jax.run.throughput import Passes, Work, group_work
from morer1_jax.stages.grpo_step import GRPOStep
from morer1_jax.stages.rate import pool_again
from morer1_jax.stages.sft import loop_config

# What to change where no fact was rated so: pools follow from the pass rates that are there.
_WAYS = {
    "easy": "lower rate.easy_from = {easy_from:g}, draw hard facts alone (grpo.mix.start=0, "
    "grpo.mix.end=0), or do not mix (grpo.mixing=False); or train SFT longer (sft.steps) in a new "
    "--workdir",
    "hard": "raise rate.easy_from = {easy_from:g}, keep facts never solved (rate.never=hard), draw "
    "easy facts alone (grpo.mix.start=1, grpo.mix.end=1), or do not mix (grpo.mixing=False)",
    "training": "keep facts never solved (rate.never=hard)",
}


def run_grpo(job: Job, params: Callable[[], Params]) -> Checkpointer:
    """Trains on the pools of the stage `rate`.

    Metrics are those of `rollout_metrics` and `grpo_gradients`, with `curriculum/easy_share` and
    `curriculum/hard_share`; every `rollouts_every` steps `rollouts.jsonl` gets the completions.

    Args:
      params: makes those that train as they are at the start, which are also the reference.
    """
    grpo = job.settings.grpo
    facts = job.facts["train"]
    pools = _pools(job)
    draw = _schedule(job, pools)
    _bind_ratings(job)
    easy = set(pools["easy"])
    needs = [job.needs[fact.id] for fact in facts]
    shapes = prompt_shapes(job, needs, draw, grpo.steps)
    transform = grpo.optimizer.build(grpo.steps * grpo.updates, job.parts)
    like = job.like_state(transform)
    reference, timer = params() if grpo.loss.beta else None, PhaseTimer()
    step = GRPOStep(
        job.policy,
        grpo,
        like,
        transform,
        job.frozen,
        reference,
        score=job.score,
        length=job.encoder.limits.completion,
        seed=job.settings.seed,
        timer=timer,
    )
    records = RecordLog(job.workdir / "rollouts.jsonl", "grpo")

    def train_step(state: TrainState, prompts: PromptBatch, number: int):
        state, metrics, scored = step(state, prompts, number)
        share = float(np.mean([i in easy for i in draw(number)]))
        metrics |= {"curriculum/easy_share": share, "curriculum/hard_share": 1.0 - share}
        if (number + 1) % grpo.rollouts_every == 0:
            records.write(number + 1, list(_records(job, draw(number), fetch(scored))))
            records.sync()
        return state, metrics

    config, passes = job.policy.model.config, Passes.of(job.parts)
    scored = (grpo.loss.beta > 0) + (grpo.updates > 1)

    def work(prompts: PromptBatch, metrics: Metrics) -> Work:
        lengths, bad = fetch((metrics["completions/lengths"], metrics["not_finite"]))
        _check_finite(job, bad)
        return group_work(config, passes, prompts, lengths, scored=scored, updates=grpo.updates)

    sampler = greedy_sampler(job, job.encoder)
    hooks = Hooks(
        batch=PromptFeed(job.encoder, facts, draw, this_host(), needs, shapes),
        step=train_step,
        validate=validator(sampler, job, job.facts["valid"][: grpo.eval_facts]),
        work=work,
        timer=timer,
        resume=records.resume_at,
        shown=("reward", "rewards/accuracy/mean"),
        updates=grpo.updates,
        dtype=job.policy.model.runtime.dtype,
    )
    return train(
        "grpo",
        job.workdir,
        # The update gives its state away, and the reference must outlive it: `new_state` copies.
        lambda: job.new_state(params() if reference is None else reference, transform),
        like,
        hooks,
        loop_config(grpo),
        **job.loading,
        profile=job.settings.profile.steps,
    )


def _check_finite(job: Job, bad: np.ndarray) -> None:
    """Sees to it that a rollout is of finite numbers; one that is not was not trained on.

    Args:
      bad: `not_finite` of `make_grpo_update`.

    Raises:
      NotFiniteError: naming the first fact of a group that is not.
    """
    bad = bad[bad >= 0]
    if bad.size:
        facts = job.facts["train"]
        # A fact that a batch has twice has other noise, and so another number, the second time.
        raise NotFiniteError(
            f"fact {facts[bad[0] % len(facts)].id}: an advantage, or the "
            "log-probability of a token that was drawn (by the sampler, the old parameters or the "
            "reference), is no finite number; its rollout is not trained on; "
            + ways(job.policy.model.runtime.dtype, "with a new --workdir, lower grpo.optimizer.lr")
        )


def _pools(job: Job) -> dict[str, list[int]]:
    """Indices of the training facts of each pool."""
    pools: dict[str, list[int]] = {name: [] for name in POOLS}
    path = job.workdir / "rate" / FILE
    known = {fact.id for fact in job.facts["train"]}
    for number, rating in enumerate(pool_again(path, job.settings.rate), start=1):
        if rating.fact not in known:
            raise DataError(
                f"{path}:{number}: fact {rating.fact!r} found, a fact of the training split "
                "expected; run the stage `rate` again"
            )
        pools[rating.pool].append(job.index[rating.fact])
    return pools


def _bind_ratings(job: Job) -> None:
    """Keeps a digest of the pass rates, so that training goes on with the same pools only."""
    path = job.workdir / "rate" / FILE
    rates = (f"{rating.fact} {rating.pass_rate}" for rating in read_ratings(path))
    found = {f"rate/{FILE}": of_lines(rates)}
    bind(job.workdir / "grpo" / "data.json", found, job.workdir)


def _schedule(job: Job, pools: dict[str, list[int]]) -> Draw:
    """The facts of each step."""
    grpo, seed = job.settings.grpo, job.settings.seed
    easy, hard = pools["easy"], pools["hard"]
    try:
        if grpo.mixing:
            return Mixer(easy, hard, grpo.mix, grpo.prompts, grpo.steps, seed).batch
        return functools.partial(
            Pool("training", sorted(easy + hard), (seed, 2)).batch, size=grpo.prompts
        )
    except EmptyPoolError as error:
        ways = _WAYS[error.pool].format(easy_from=job.settings.rate.easy_from)
        raise DataError(
            f"{error} (rated {len(easy)} easy, {len(hard)} hard, {len(pools['dropped'])} dropped); "
            f"in this workdir, without rating again: {ways}"
        ) from None


def _records(job: Job, indices: np.ndarray, scored: Scored) -> Iterator[dict[str, Any]]:
    """What `rollouts.jsonl` keeps of a rollout: every completion with what it earned."""
    labels, drawn = job.ontology.labels, scored.rollout
    for row, index in enumerate(indices):
        fact = job.facts["train"][index]
        for sample in range(drawn.tokens.shape[1]):
            answer = int(drawn.answer[row, sample])
            yield {
                "fact": fact.id,
                "sample": sample,
                "gold": fact.label,
                "answer": labels[answer] if answer >= 0 else None,
                "completion": job.tokenizer.decode(
                    drawn.tokens[row, sample][drawn.mask[row, sample]]
                ),
                "reward": float(scored.reward[row, sample]),
                "advantage": float(scored.advantages[row, sample]),
                **{
                    f"rewards/{name}": float(part[row, sample])
                    for name, part in scored.parts.items()
                },
            }
