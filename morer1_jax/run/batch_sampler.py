"""Samples answers to facts, batch by batch: the likeliest one with its score, or several."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp

from morer1_jax.batch import PromptBatch
from morer1_jax.config.settings import Settings
from morer1_jax.data.asking import Asked, AskPlan, asked_batches
from morer1_jax.data.collate import Collator
from morer1_jax.data.grammar import GrammarTables
from morer1_jax.data.loader import load_ahead
from morer1_jax.data.sample import SampleReader
from morer1_jax.data.shapes import SampleSize, Shape, round_up
from morer1_jax.errors import ConfigError
from morer1_jax.hosts.stop import check_stop
from morer1_jax.model.layers import Params
from morer1_jax.progress import progress
from morer1_jax.rollout.config import SampleConfig, Stage
from morer1_jax.rollout.sampler import Rollout, sample, sample_keys
from morer1_jax.run.finite import check_drawn
from morer1_jax.run.hooks import Validation
from morer1_jax.run.mesh import fetch, program, this_host
from morer1_jax.run.placed import Placed
from morer1_jax.run.policy import Policy
from morer1_jax.run.shapes import ask_plan
from morer1_jax.run.slots import decode_stages
from morer1_jax.run.trainee import Trainee
from morer1_jax.task import metrics
from morer1_jax.task.fact import Fact
from morer1_jax.task.ontology import Ontology

# The step in the seed of the noise. No training step has it, so that GRPO does not begin with the
# very samples by which its facts were rated.
_NOISE_STEP = -1


@dataclasses.dataclass(frozen=True)
class Answer:
    """A model's answer to a fact.

    Attributes:
        fact: the fact's id.
        label: the answer's label; None if unreadable.
        text: the whole completion, decoded for display.
        format, effort: as `task.answer` defines them.
    """

    fact: str
    label: str | None
    text: str
    format: bool
    effort: int


class BatchSampler:
    """Samples answers to any number of facts, in batches of facts of about one size.

    Attributes:
        batch: rows of a batch.
        program: from `sampler_program`.

    Args:
        reader: makes a fact's prompt; a blind baseline's hides the photo or the title.
        batch: facts at once, rounded up to a multiple of the parts that the mesh splits rows into.
        group: answers to each fact.
        temperature: 0 for the likeliest answer.
        guided: whether to draw only tokens that can still lead to a readable answer.
        seed: of the noise.
        workers: threads that prepare batches.
        stages: of the decode loop, see `SampleConfig`.
        plan: the batches' shapes, each of which has a compiled program; None: one that holds what
            the reader's limits permit, and facts are asked in their order.

    Raises:
        ConfigError: the shortest guided answer is longer than the reader's limit.
    """

    def __init__(
        self,
        policy: Policy,
        reader: SampleReader,
        *,
        batch: int,
        group: int,
        temperature: float,
        guided: bool = False,
        seed: int = 0,
        workers: int = 1,
        stages: tuple[Stage, ...] = (),
        plan: AskPlan | None = None,
    ) -> None:
        limits = reader.limits
        self._policy, self._reader, self.plan = policy, reader, plan
        self.batch, self._workers = round_up(batch, policy.placed.parts), workers
        config = SampleConfig(
            group=group,
            length=limits.completion,
            temperature=temperature,
            ends=(policy.special.end_of_turn,),
            guided=guided,
            stages=stages,
        )
        if guided and (shortest := int(policy.grammar.steps_distance[0])) > config.length:
            raise ConfigError(
                f"--length: expected at least {shortest} tokens, those of the shortest guided "
                f"answer, found {config.length}; raise it"
            )

        self.program = sampler_program(policy.placed, config, seed)

    @property
    def ontology(self) -> Ontology:
        """The labels that an answer may have."""
        return self._policy.ontology

    def sample(
        self,
        params: Params,
        facts: Sequence[Fact],
        desc: str,
        done: Container[str] = frozenset(),
    ) -> Iterator[tuple[Fact, Rollout]]:
        """Yields each fact with its completions, as NumPy arrays without the batch axis.

        Their order is that of the batches, which follow from all facts: those that are done are
        left out only with all of their batch, so that the others have the same neighbours.

        Args:
            params: of the whole model.
            facts: whose places among all of them key the noise.
            desc: text before the progress bar.
            done: ids of facts not to yield.

        Raises:
            NotFiniteError: a token of an answer has a log-probability that is not finite.
            Stopped: the run was told to stop.
        """
        policy, collator = self._policy, Collator.of(self._reader)
        host = this_host(policy.placed.mesh)
        # Each batch with the places of those facts that are to be yielded, each once.
        batches, met = [], set()
        for asked in self._batches(facts):
            new = set(asked.places) - met
            met |= new
            if new := {place for place in new if facts[place].id not in done}:
                batches.append((asked, new))
        left = sum(len(new) for _, new in batches)

        def make(number: int) -> PromptBatch:
            asked, _ = batches[number]
            host_places = host.rows(asked.places)
            samples = [self._reader.read(facts[place]) for place in host_places]
            return collator.prompts(samples, host_places, asked.shape)

        placed = policy.placed
        ready = placed.sampling.params(params)
        with progress(desc=desc, total=len(facts), initial=len(facts) - left, unit="fact") as bar:
            ahead = load_ahead(make, 0, len(batches), workers=self._workers)
            for prompts, (_, new) in zip(ahead, batches, strict=True):
                check_stop()
                encoded = placed.encode(params, placed.put(prompts))
                rollout = self.program(ready, encoded, policy.grammar, policy.allowed)
                rollout, asked_places = fetch((rollout, encoded.fact))
                # By what the rows themselves say that they are, whichever device they were on.
                row_of = {place: row for row, place in enumerate(asked_places.tolist())}
                for place in sorted(new):
                    row = row_of[place]
                    completions = jax.tree.map(lambda x, row=row: x[row], rollout)
                    check_drawn(facts[place].id, completions, policy.model.runtime.dtype)
                    yield facts[place], completions
                bar.update(len(new))

    def answers(self, params: Params, facts: Sequence[Fact], desc: str) -> list[Answer]:
        """Returns the first answer to each fact, in the order of the facts; see `sample`."""
        labels, tokenizer = self._policy.ontology.labels, self._policy.tokenizer
        answers = {}
        for fact, completions in self.sample(params, facts, desc):
            label = int(completions.answer[0])
            answers[fact.id] = Answer(
                fact=fact.id,
                label=labels[label] if label >= 0 else None,
                text=tokenizer.decode(completions.tokens[0][completions.mask[0]]),
                format=bool(completions.format[0]),
                effort=int(completions.effort[0]),
            )
        return [answers[fact.id] for fact in facts]

    def shapes(self, facts: Sequence[Fact]) -> list[Shape]:
        """Returns the shapes of the batches in which these facts are asked, each once."""
        return list(dict.fromkeys(asked.shape for asked in self._batches(facts)))

    def _batches(self, facts: Sequence[Fact]) -> list[Asked]:
        if self.plan is not None:
            return self.plan.batches(facts, self.batch)
        limits = self._reader.limits
        sizes = [SampleSize(limits.prompt, 0, limits.slots)] * len(facts)
        return asked_batches(sizes, self.batch, [Shape(limits.prompt, limits.slots)])


def sampler_program(placed: Placed, config: SampleConfig, seed: int) -> Callable[..., Rollout]:
    """Compiles `(params, prompts, grammar, allowed) -> rollout` for the mesh; see `sample`.

    Parameters lie as `Placed.sampling.like` says.

    Args:
        seed: of the noise.
    """

    def rollout(
        params: Params, prompts: PromptBatch, grammar: GrammarTables, allowed: jax.Array
    ) -> Rollout:
        keys = sample_keys(seed, jnp.int32(_NOISE_STEP), prompts.fact, config.group)
        return sample(placed.sampling.model, params, prompts, grammar, allowed, keys, config)

    rows, whole = placed.rows, placed.replicated
    return program(rollout, takes=(placed.sampling.like, rows, whole, whole), gives=rows)


def greedy_sampler(
    settings: Settings,
    policy: Policy,
    reader: SampleReader,
    sizes: Mapping[str, SampleSize],
    sets: Sequence[Sequence[Fact]],
) -> BatchSampler:
    """Returns a sampler of the likeliest answers, for evaluation and validation.

    Args:
        sizes: by the fact's id, of all facts it may be given.
        sets: of facts that it will be given, for which its shapes are chosen.
    """
    placed = policy.placed
    batch = round_up(settings.evaluate.batch, placed.parts)
    length = reader.limits.completion
    return BatchSampler(
        policy,
        reader,
        batch=batch,
        group=1,
        temperature=0.0,
        workers=settings.data.workers,
        stages=decode_stages(placed, settings, sizes.values(), batch, length),
        plan=ask_plan(placed, settings.data, sizes, sets, batch),
    )


def validator(
    sampler: BatchSampler, trainee: Trainee, facts: Sequence[Fact]
) -> Callable[[Params], Validation]:
    """Returns a function from the parameters that train to their scores on the facts, in percent.

    The scores are accuracy, micro F1, macro F1 and the share of unreadable answers.
    """

    def validate(params: Params) -> Validation:
        answers = sampler.answers(trainee.whole(params), facts, "validate")
        labels = [answer.label for answer in answers]
        scores = metrics.score(facts, labels, sampler.ontology)
        names = ("accuracy", "micro_f1", "macro_f1", "unreadable")
        return Validation({name: scores[name] for name in names}, decisive="micro_f1")

    return validate
