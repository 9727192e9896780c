"""The stage `baselines`: what can be scored without looking, or without reading.

Two blind models (photo hidden, title hidden) of the same architecture learn, from scratch, to give
the label directly, of the facts that SFT learns from or of all; a third baseline counts.
"""

from __future__ import annotations

import functools

from morer1_jax.run.batch_sampler import greedy_sampler
from morer1_jax.run.job import Job
from morer1_jax.run.loop import LoopConfig
from morer1_jax.stages.evaluate import evaluate, evaluate_majority
from morer1_jax.stages.sft import train_sft
from morer1_jax.task.prompt import direct_answer

BLIND = {"photo_hidden": {"show_photo": False}, "title_hidden": {"show_title": False}}


def run_baselines(job: Job) -> None:
    """Trains and scores the blind models, and scores the majority label."""
    config = job.settings.baselines
    targets = {
        fact.id: direct_answer(fact.label)
        for fact in job.facts["train"]
        if config.facts == "all" or fact.id in job.reasoning
    }
    longest = max(len(job.encoder.target_tokens(text)) for text in set(targets.values()))
    for stream, (name, blind) in enumerate(BLIND.items(), start=1):
        encoder = job.new_encoder(completion=longest, **blind)
        checkpoints = train_sft(
            job,
            f"baselines/{name}",
            encoder=encoder,
            targets=targets,
            params=functools.partial(job.init_params, stream),
            optimizer=config.optimizer,
            loop=LoopConfig(
                steps=config.steps,
                eval_every=config.eval_every,
                save_every=config.eval_every,
                log_every=1,
                keep_checkpoints=1,
            ),
            batch=config.batch,
            micro_batches=1,
            eval_facts=config.eval_facts,
            stream=stream,
        )
        params, _ = checkpoints.restore_best(job.like[0])
        sampler = greedy_sampler(job, encoder)
        evaluate(job, name, job.whole(params), sampler)
    evaluate_majority(job)
