"""Asking the model about facts: greedy predictions with scores, and repeated samples."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from morer1_jax.batch import PromptBatch
from morer1_jax.data.encoder import Encoder
from morer1_jax.data.grammar import GrammarTables
from morer1_jax.data.loader import load_ahead
from morer1_jax.data.shapes import Shape
from morer1_jax.errors import ConfigError
from morer1_jax.progress import progress
from morer1_jax.rollout.sampler import Rollout, SampleConfig, sample, sample_keys
from morer1_jax.run.finite import check_drawn
from morer1_jax.run.job import Job
from morer1_jax.run.mesh import batch_parts, fetch, this_host
from morer1_jax.run.policy import Policy
from morer1_jax.run.shapes import widest_prompt_shape
from morer1_jax.task import metrics
from morer1_jax.task.fact import Fact
from morer1_jax.task.ontology import Ontology

# The step of the noise of what is asked here: no training step's, so that GRPO does not begin with
# the very samples by which its facts were rated.
_NOISE_STEP = -1


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model said of a fact.

    Attributes:
      fact: its id.
      label: the label read off the answer; None if it could not be read.
      text: the whole completion, decoded for display.
      format, effort: as `task.answer` defines them.
    """

    fact: str
    label: str | None
    text: str
    format: bool
    effort: int


class BatchSampler:
    """A compiled sampler over batches of facts of any number.

    Args:
      encoder: what the model sees; a blind baseline's leaves something out.
      batch: facts at once; as many more as the mesh needs to split them evenly.
      group: answers to each.
      temperature: 0 for the likeliest answer.
      guided: whether only tokens that still lead to a readable answer may be drawn.
      seed: of the noise.
      workers: threads that prepare batches.
      shape: of the prompts; None: as the encoder's limits allow.
    """

    def __init__(
        self,
        policy: Policy,
        encoder: Encoder,
        *,
        batch: int,
        group: int,
        temperature: float,
        guided: bool = False,
        seed: int = 0,
        workers: int = 1,
        shape: Shape | None = None,
    ) -> None:
        self._shape = shape
        self._policy, self._encoder = policy, encoder
        parts = batch_parts(policy.mesh)
        self.batch, self._workers = -(-batch // parts) * parts, workers
        config = SampleConfig(
            group=group,
            length=encoder.limits.completion,
            temperature=temperature,
            end_of_turn=policy.special.end_of_turn,
            guided=guided,
        )

        shortest = int(policy.grammar.steps_distance[0])
        if guided and shortest > config.length:
            raise ConfigError(
                f"--length: {config.length} found, at least {shortest} expected: the tokens of the "
                "shortest guided answer"
            )

        def rollout(
            params: Any, prompts: PromptBatch, grammar: GrammarTables, allowed: Any
        ) -> Rollout:
            keys = sample_keys(seed, jnp.int32(_NOISE_STEP), prompts.fact, group)
            return sample(policy.model, params, prompts, grammar, allowed, keys, config)

        whole = policy.replicated
        self._rollout = jax.jit(
            rollout,
            in_shardings=(policy.param_shardings, policy.rows, whole, whole),
            out_shardings=policy.rows,
        )

    @property
    def ontology(self) -> Ontology:
        """The labels that answers are read as."""
        return self._policy.ontology

    def ask(
        self, params: Any, facts: Sequence[Fact], desc: str, start: int = 0
    ) -> Iterator[tuple[Fact, Rollout]]:
        """Each fact with its completions, as NumPy arrays without the batch axis.

        Args:
          params: of the whole model.
          start: facts that are passed over, a multiple of the batch.

        Raises:
          NotFiniteError: an answer was drawn from what are no probabilities.
        """
        policy, size = self._policy, self.batch

        def make(number: int) -> PromptBatch:
            places = list(range(number * size, min((number + 1) * size, len(facts))))
            # The last batch is filled up to the compiled size; the filling is not yielded.
            places += places[-1:] * (size - len(places))
            mine = this_host().rows(places)
            return self._encoder.prompts([facts[place] for place in mine], mine, self._shape)

        count = -(-len(facts) // size)
        with progress(desc=desc, total=len(facts), initial=start, unit="fact") as bar:
            batches = load_ahead(make, start // size, count, workers=self._workers)
            for number, prompts in enumerate(batches, start=start // size):
                drawn = fetch(
                    self._rollout(params, policy.put(prompts), policy.grammar, policy.allowed)
                )
                chunk = facts[number * size : (number + 1) * size]
                for row, fact in enumerate(chunk):
                    answers = jax.tree.map(lambda x, row=row: x[row], drawn)
                    check_drawn(fact.id, answers, policy.model.runtime.dtype)
                    yield fact, answers
                bar.update(len(chunk))

    def answers(self, params: Any, facts: Sequence[Fact], desc: str) -> list[Answer]:
        """The first answer to each fact."""
        labels, tokenizer = self._policy.ontology.labels, self._policy.tokenizer
        out = []
        for fact, drawn in self.ask(params, facts, desc):
            label = int(drawn.answer[0])
            out.append(
                Answer(
                    fact=fact.id,
                    label=labels[label] if label >= 0 else None,
                    text=tokenizer.decode(drawn.tokens[0][drawn.mask[0]]),
                    format=bool(drawn.format[0]),
                    effort=int(drawn.effort[0]),
                )
            )
        return out


@functools.cache
def greedy_sampler(job: Job, encoder: Encoder) -> BatchSampler:
    """Asks for the likeliest answer; compiled once for all stages of a job."""
    return BatchSampler(
        job.policy,
        encoder,
        batch=job.settings.evaluate.batch,
        group=1,
        temperature=0.0,
        workers=job.settings.data.workers,
        shape=widest_prompt_shape(job, encoder),
    )


def validator(
    sampler: BatchSampler, job: Job, facts: Sequence[Fact]
) -> Callable[[Any], dict[str, float]]:
    """`params -> scores` on some facts: accuracy, micro and macro F1, unreadable, in percent.

    Its `params` are those that train.
    """

    def validate(params: Any) -> dict[str, float]:
        answers = sampler.answers(job.whole(params), facts, "validate")
        labels = [answer.label for answer in answers]
        scores = metrics.score(facts, labels, job.ontology)
        return {k: scores[k] for k in ("accuracy", "micro_f1", "macro_f1", "unreadable")}

    return validate
