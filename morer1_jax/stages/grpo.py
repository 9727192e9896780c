"""The stage `grpo`: rollouts on a mix of easy and hard facts, and updates on them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import optax

from morer1_jax.batch import PromptBatch
from morer1_jax.config.settings import RateSettings
from morer1_jax.data.curriculum import EmptyPoolError, Mixer, Pool
from morer1_jax.data.digests import bind, of_lines
from morer1_jax.data.feed import Draw, Host, PromptFeed
from morer1_jax.data.ratings import FILE, POOLS, read_ratings
from morer1_jax.data.shapes import SampleSize, Shape
from morer1_jax.errors import DataError, NotFiniteError
from morer1_jax.hosts import group
from morer1_jax.learn.state import TrainState
from morer1_jax.model.scorer import ScoreConfig
from morer1_jax.rollout.config import SampleConfig
from morer1_jax.rollout.program import ScoredRollout
from morer1_jax.run.batch_sampler import validator
from morer1_jax.run.finite import ways
from morer1_jax.run.hooks import Hooks, Metrics
from morer1_jax.run.log import RecordLog
from morer1_jax.run.loop import train
from morer1_jax.run.mesh import fetch, this_host
from morer1_jax.run.phases import PhaseTimer
from morer1_jax.run.setup import Run
from morer1_jax.run.shapes import prompt_shapes
from morer1_jax.run.slots import decode_stages
from morer1_jax.run.throughput import Passes, Work, group_work
from morer1_jax.stages.ahead import Program, answers, images, moves, prompts_like
from morer1_jax.stages.grpo_step import Programs, arguments_of, make_grpo_step, make_programs
from morer1_jax.stages.rate import pool_again, starting_params
from morer1_jax.task.fact import Fact

# What to change where a pool is empty; pools are derived again from stored pass rates.
_WAYS = {
    "easy": "lower rate.easy_from = {easy_from:g}, draw hard facts alone (grpo.mix.start=0, "
    "grpo.mix.end=0), or do not mix (grpo.mixing=False); or train SFT longer (sft.steps) in a new "
    "--workdir",
    "hard": "raise rate.easy_from = {easy_from:g}, keep facts never solved (rate.never=hard), draw "
    "easy facts alone (grpo.mix.start=1, grpo.mix.end=1), or do not mix (grpo.mixing=False)",
    "training": "keep facts never solved (rate.never=hard)",
}


def run_grpo(run: Run) -> None:
    """Trains on the pools of the stage `rate`, starting from the parameters that were rated.

    Metrics are those of `rollout_metrics` and `grpo_gradients`, with `curriculum/easy_share` and
    `curriculum/hard_share`; every `rollouts_every` steps `rollouts.jsonl` gets the completions.
    """
    grpo, trainee, policy = run.settings.grpo, run.trainee, run.trainee.policy
    facts = run.dataset.splits["train"]
    ready = run.prepared.pop("grpo", None) or _prepare(run)
    draw, transform = ready.draw, ready.transform
    # The pools must not change once training has begun.
    group.by_first("ratings", lambda: _bind_ratings(run))
    host = this_host(trainee.placed.mesh)
    feed = PromptFeed(run.reader, facts, draw, host, ready.sizes, ready.shapes)
    timer = PhaseTimer()
    reference = trainee.placed.reference(starting_params(run)) if grpo.loss.beta else None
    grpo_step = make_grpo_step(ready.programs, policy, grpo, trainee.frozen, reference, timer)
    # The step: its facts' shares by pool join the metrics, and its completions the records.
    records, easy = RecordLog(run.workdir / "rollouts.jsonl", "grpo"), set(ready.pools["easy"])

    def train_step(
        state: TrainState, prompts: PromptBatch, number: int
    ) -> tuple[TrainState, Metrics]:
        state, metrics, scored = grpo_step(state, prompts, number)
        share = float(np.mean([i in easy for i in draw(number)]))
        metrics |= {"curriculum/easy_share": share, "curriculum/hard_share": 1.0 - share}
        if (number + 1) % grpo.rollouts_every == 0:
            scored = fetch(scored)
            # By what the rows themselves say; a fact's second place in a batch has a number beyond.
            facts_of_rows = [facts[number % len(facts)] for number in scored.fact]
            records.write(number + 1, list(_records(run, facts_of_rows, scored)))
            records.sync()
        return state, metrics

    hooks = Hooks(
        batch=feed,
        # Read again: a reference in another dtype is rounded, and the update donates its state.
        begin=lambda: trainee.new_state(starting_params(run), transform),
        like=trainee.placed.like_state(transform),
        step=train_step,
        validate=validator(run.greedy, trainee, run.dataset.splits["valid"][: grpo.eval_facts]),
        work=_work_of(run, host),
        timer=timer,
        resume=records.resume_at,
        shown=("reward", "rewards/accuracy/mean"),
        updates=grpo.updates,
        dtype=policy.model.runtime.dtype,
    )
    train("grpo", run.store, hooks, grpo, **run.loop_options)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The training before it begins.

    Attributes:
        pools: indices of the training facts of each.
        draw: the indices of each step's facts.
        sizes: one a training fact.
        shapes: of the batches of prompts.
        transform: the optimizer.
        programs: of a step.
    """

    pools: dict[str, list[int]]
    draw: Draw
    sizes: Sequence[SampleSize]
    shapes: tuple[Shape, ...]
    transform: optax.GradientTransformation
    programs: Programs


def _prepare(run: Run) -> Prepared:
    """Chooses the facts of each step and the shapes of batches, and makes the step's programs."""
    grpo, trainee = run.settings.grpo, run.trainee
    pools = group.of_first("pools", lambda: _pools(run))
    draw = _schedule(run, pools)
    sizes = [run.sizes[fact.id] for fact in run.dataset.splits["train"]]
    shapes = prompt_shapes(trainee.placed, run.settings.data, grpo, sizes, draw)
    transform = grpo.optimizer.build(grpo.steps * grpo.updates, trainee.placed.trainable)
    length, placed = run.reader.limits.completion, trainee.placed
    rows = grpo.prompts // placed.micro_batches(grpo.prompts, grpo.rollout_parts)
    sampling = SampleConfig(
        group=grpo.group,
        length=length,
        temperature=grpo.temperature,
        ends=(trainee.policy.special.end_of_turn,),
        stages=decode_stages(placed, run.settings, sizes, rows * grpo.group, length),
    )
    programs = make_programs(
        trainee.placed,
        grpo,
        transform,
        sampling,
        score_config=ScoreConfig(grpo.temperature, run.settings.score.chunk),
        seed=run.settings.seed,
    )
    return Prepared(pools, draw, sizes, shapes, transform, programs)


def grpo_programs(run: Run) -> Iterator[Program]:
    """Yields the stage's programs, and prepares the run for it; the facts must be rated."""
    grpo, policy, placed = run.settings.grpo, run.trainee.policy, run.trainee.placed
    ready = run.prepared["grpo"] = _prepare(run)
    made = ready.programs
    yield from moves(placed)
    for shape in ready.shapes:
        prompts = prompts_like(run, grpo.prompts, shape)
        given = placed, grpo, ready.transform, prompts, policy.grammar, policy.allowed
        takes = arguments_of(made, *given)
        yield from images(placed, prompts)
        calls = [("rollout", made.rollout, takes.rollout), ("weights", made.weigh, takes.weigh)]
        # Of equal parameters both scores are one program.
        calls += [("score", made.score, score) for score in takes.scores]
        calls += [("update", made.update, update) for update in takes.updates]
        size = f"{grpo.prompts} prompts of {shape.length}, {shape.slots} windows"
        for number, (name, jitted, like) in enumerate(calls):
            yield Program.of(f"{name} ({number}), {size}", jitted, *like)
    facts = run.dataset.splits["valid"][: grpo.eval_facts]
    yield from answers(run, "greedy answers", run.greedy, facts)


def _work_of(run: Run, host: Host) -> Callable[[PromptBatch, Metrics], Work]:
    """Returns a function from a step's batch and metrics to the work of the rows of one host.

    It raises NotFiniteError for a rollout that was not trained on; see `_check_finite`.
    """
    grpo, model = run.settings.grpo, run.trainee.policy.model
    passes = Passes.of(run.trainee.placed.trainable)
    scored = (grpo.loss.beta > 0) + (grpo.updates > 1)

    def work(prompts: PromptBatch, metrics: Metrics) -> Work:
        lengths, not_finite = fetch((metrics["completions/lengths"], metrics["not_finite"]))
        _check_finite(run.dataset.splits["train"], not_finite, model.runtime.dtype)
        own, lengths = host.counted_rows((prompts, np.asarray(host.rows(lengths))))
        return group_work(model.config, passes, own, lengths, scored=scored, updates=grpo.updates)

    return work


def _check_finite(facts: Sequence[Fact], not_finite: np.ndarray, dtype: str) -> None:
    """Checks that a rollout's numbers are finite; a rollout whose are not was not trained on.

    Args:
        not_finite: from `make_grpo_update`.

    Raises:
        NotFiniteError: naming the fact of the first group with a number that is not finite.
    """
    bad = not_finite[not_finite >= 0]
    if bad.size:
        # A fact's second place in a batch has a number beyond the facts', so its noise differs.
        raise NotFiniteError(
            f"fact {facts[bad[0] % len(facts)].id}: expected finite advantages and "
            "log-probabilities of sampled tokens (by the sampler, the old parameters or the "
            "reference), found NaN or infinity; its rollout is not trained on; "
            + ways(dtype, "with a new --workdir, lower grpo.optimizer.lr")
        )


def _pools(run: Run) -> dict[str, list[int]]:
    """Returns indices of the training facts of each pool."""
    pools: dict[str, list[int]] = {name: [] for name in POOLS}
    path = run.workdir / "rate" / FILE
    index = {fact.id: i for i, fact in enumerate(run.dataset.splits["train"])}
    for number, rating in enumerate(pool_again(path, run.settings.rate), start=1):
        if rating.fact not in index:
            raise DataError(
                f"{path}:{number}: expected a fact of the training split, found fact "
                f"{rating.fact!r}; run the stage `rate` again"
            )
        pools[rating.pool].append(index[rating.fact])
    return pools


def _bind_ratings(run: Run) -> None:
    """Stores a digest of the pass rates, or checks that it is the one stored at the start."""
    path = run.workdir / "rate" / FILE
    rates = (f"{rating.fact} {rating.pass_rate}" for rating in read_ratings(path))
    bind(run.workdir / "grpo" / "data.json", {f"rate/{FILE}": of_lines(rates)}, run.workdir)


def _schedule(run: Run, pools: dict[str, list[int]]) -> Draw:
    """Returns a function from a step to the indices of the facts it draws."""
    grpo, seed = run.settings.grpo, run.settings.seed
    easy, hard = pools["easy"], pools["hard"]
    try:
        if grpo.mixing:
            return Mixer(easy, hard, grpo.mix, grpo.prompts, grpo.steps, seed).batch
        return functools.partial(
            Pool("training", sorted(easy + hard), (seed, 2)).batch, size=grpo.prompts
        )
    except EmptyPoolError as error:
        counts = f"{len(easy)} easy, {len(hard)} hard, {len(pools['dropped'])} dropped"
        raise DataError(
            f"{error} (rated {counts}); in this workdir, without rating again: "
            f"{_what_to_change(error.pool, run.settings.rate)}"
        ) from None


def _what_to_change(pool: str, rate: RateSettings) -> str:
    return _WAYS[pool].format(easy_from=rate.easy_from)


def _records(run: Run, facts: Sequence[Fact], scored: ScoredRollout) -> Iterator[dict[str, Any]]:
    """Yields a rollout's records for `rollouts.jsonl`: each completion with its rewards."""
    labels, rollout = run.dataset.ontology.labels, scored.rollout
    decode = run.trainee.policy.tokenizer.decode
    for row, fact in enumerate(facts):
        for sample in range(rollout.tokens.shape[1]):
            answer = int(rollout.answer[row, sample])
            yield {
                "fact": fact.id,
                "sample": sample,
                "gold": fact.label,
                "answer": labels[answer] if answer >= 0 else None,
                "completion": decode(rollout.tokens[row, sample][rollout.mask[row, sample]]),
                "reward": float(scored.reward[row, sample]),
                "advantage": float(scored.advantages[row, sample]),
                **{
                    f"rewards/{name}": float(part[row, sample])
                    for name, part in scored.reward_parts.items()
                },
            }
