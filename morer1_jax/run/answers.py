"""Asking the model about facts: greedy predictions with scores, and repeated samples."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from morer1_jax.data.batch import Encoder
from morer1_jax.data.loader import load_ahead
from morer1_jax.rollout.program import Scored, make_rollout
from morer1_jax.rollout.sampler import SampleConfig
from morer1_jax.run.job import Job
from morer1_jax.run.log import progress
from morer1_jax.run.mesh import fetch
from morer1_jax.task import metrics
from morer1_jax.task.fact import Fact

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


class Asker:
    """A compiled sampler over batches of facts of any number.

    Args:
      encoder: what the model sees; a blind baseline's leaves something out.
      batch: facts at once.
      group: answers to each.
      temperature: 0 for the likeliest answer.
    """

    def __init__(
        self, job: Job, encoder: Encoder, *, batch: int, group: int, temperature: float
    ) -> None:
        self._job, self._encoder = job, encoder
        self._batch = batch
        config = SampleConfig(
            group=group,
            length=encoder.buckets.completion,
            temperature=temperature,
            end_of_turn=job.special.end_of_turn,
        )
        rollout = make_rollout(
            job.model, config, job.settings.grpo.reward, "none", job.settings.seed
        )
        self._rollout = jax.jit(
            lambda *args: rollout(*args)[0],
            in_shardings=(
                job.param_shardings,
                job.rows,
                job.replicated,
                job.replicated,
                job.replicated,
            ),
            out_shardings=job.rows,
        )

    def ask(self, params: Any, facts: Sequence[Fact], desc: str) -> Iterator[tuple[Fact, Scored]]:
        """Each fact with its completions, as NumPy arrays without the batch axis."""
        job, size = self._job, self._batch

        def make(number: int) -> Any:
            chunk = list(facts[number * size : (number + 1) * size])
            # The last batch is filled up to the compiled size; the filling is not yielded.
            chunk += [chunk[-1]] * (size - len(chunk))
            mine = job.host.rows(chunk)
            return self._encoder.prompts(mine, [job.index[fact.id] for fact in mine])

        noise_step = jnp.int32(_NOISE_STEP)
        count = -(-len(facts) // size)
        with progress(desc=desc, total=len(facts), unit="fact") as bar:
            batches = load_ahead(make, 0, count, workers=job.settings.data.workers)
            for number, prompts in enumerate(batches):
                scored = fetch(
                    self._rollout(params, job.put(prompts), job.reader, job.allowed, noise_step)
                )
                chunk = facts[number * size : (number + 1) * size]
                for row, fact in enumerate(chunk):
                    yield fact, jax.tree.map(lambda x, row=row: x[row], scored)
                bar.update(len(chunk))

    def answers(self, params: Any, facts: Sequence[Fact], desc: str) -> list[Answer]:
        """The first answer to each fact."""
        labels, tokenizer = self._job.ontology.labels, self._job.tokenizer
        out = []
        for fact, scored in self.ask(params, facts, desc):
            drawn = scored.rollout
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
def greedy_asker(job: Job, encoder: Encoder) -> Asker:
    """Asks for the likeliest answer; compiled once for all stages of a job."""
    return Asker(job, encoder, batch=job.settings.evaluate.batch, group=1, temperature=0.0)


def validator(asker: Asker, job: Job, facts: Sequence[Fact]) -> Callable[[Any], dict[str, float]]:
    """`params -> scores` on some facts: accuracy, micro and macro F1, unreadable, in percent."""

    def validate(params: Any) -> dict[str, float]:
        labels = [answer.label for answer in asker.answers(params, facts, "validate")]
        scores = metrics.score(facts, labels, job.ontology)
        return {k: scores[k] for k in ("accuracy", "micro_f1", "macro_f1", "unreadable")}

    return validate
