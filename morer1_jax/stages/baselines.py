"""The stage `baselines`: scores that need no photo, or no title.

Two blind models (photo hidden, title hidden) of the same architecture learn, from scratch, to give
the label directly, on the facts that SFT learns from or on all. A third baseline always answers the
most common label.
"""

from __future__ import annotations

import functools

from morer1_jax.config.settings import SFTSettings
from morer1_jax.data.sample import View
from morer1_jax.run.batch_sampler import greedy_sampler
from morer1_jax.run.setup import Run
from morer1_jax.stages.evaluate import evaluate, evaluate_majority
from morer1_jax.stages.sft import train_sft
from morer1_jax.task.prompt import direct_answer

BLIND = {"photo_hidden": View(photo=False), "title_hidden": View(title=False)}


def run_baselines(run: Run) -> None:
    """Trains and scores the blind models, and scores the majority label."""
    # Direct answers as targets, and SFT's settings for them.
    config, dataset, trainee = run.settings.baselines, run.dataset, run.trainee
    targets = {
        fact.id: direct_answer(fact.label)
        for fact in dataset.splits["train"]
        if config.facts == "all" or fact.id in dataset.reasoning
    }
    longest = max(len(run.reader.target_ids(text)) for text in set(targets.values()))
    settings = SFTSettings(
        steps=config.steps,
        batch=config.batch,
        micro_batches=1,
        eval_every=config.eval_every,
        eval_facts=config.eval_facts,
        save_every=config.eval_every,
        log_every=1,
        keep_checkpoints=1,
        optimizer=config.optimizer,
    )
    # Train and score one model after the other.
    for stream, (name, view) in enumerate(BLIND.items(), start=1):
        reader = run.reader.showing(view, longest)
        facts, splits = dataset.facts, dataset.splits
        sizes = dict(
            zip(
                (fact.id for fact in facts),
                reader.sizes(facts, dataset.photo_sizes, {}),
                strict=True,
            )
        )
        sets = [splits["valid"][: config.eval_facts], splits["test"]]
        sampler = greedy_sampler(run.settings, trainee.policy, reader, sizes, sets)
        train_sft(
            run,
            f"baselines/{name}",
            settings,
            targets=targets,
            params=functools.partial(trainee.init_params, stream),
            stream=stream,
            reader=reader,
            sampler=sampler,
        )
        # Bound to no name, so that one model's parameters are freed before the next one trains.
        checkpoints = run.store.checkpoints(f"baselines/{name}")
        evaluate(run, name, trainee.whole(trainee.best_params(checkpoints)), sampler)
    evaluate_majority(run)
