"""The stage `evaluate`: greedy answers on the test split, the score tables, the report page."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from morer1_jax.files import read_json, write_json, write_jsonl
from morer1_jax.hosts import group
from morer1_jax.model.layers import Params
from morer1_jax.report.report import FILE as REPORT
from morer1_jax.report.report import write_report
from morer1_jax.run.batch_sampler import Answer, BatchSampler
from morer1_jax.run.setup import Run
from morer1_jax.stages.ahead import Program, answers
from morer1_jax.stages.marker import MARKER
from morer1_jax.task import metrics
from morer1_jax.task.fact import Fact
from morer1_jax.task.ontology import Ontology


def run_evaluate(run: Run, models: Sequence[str]) -> None:
    """Scores the models that the workdir has, prints the table, writes the report page.

    Args:
        models: names of the stages that train models.
    """
    for name in models:
        if group.of_first(f"{name} is done", (run.workdir / name / MARKER).exists):
            # Bound to no name, so that one model's parameters are freed before the next are read.
            evaluate(
                run,
                name,
                run.trainee.whole(run.trainee.best_params(run.store.checkpoints(name))),
                run.greedy,
            )
    group.by_first("report", lambda: _report(run))


def evaluate_programs(run: Run) -> Iterator[Program]:
    """Yields the stage's programs."""
    yield from answers(run, "greedy answers", run.greedy, run.dataset.splits["test"])


def _report(run: Run) -> None:
    print(metrics.format_table(read_scores(run.workdir)))
    write_report(run.workdir, run.dataset.folder)
    print(f"report: {run.store.root / REPORT}")


def evaluate(run: Run, name: str, params: Params, sampler: BatchSampler) -> None:
    """Scores a whole model's parameters on the test split, into the workdir; see `write_scores`."""
    facts = run.dataset.splits["test"]
    answers = sampler.answers(params, facts, f"evaluate {name}")
    _write(run, name, answers)


def evaluate_majority(run: Run) -> None:
    """Scores the most common training label other than `none`.

    Always answering `none` gives a higher accuracy but no F1; that accuracy is the share of `none`,
    which the table shows separately.
    """
    counts = Counter(fact.label for fact in run.dataset.splits["train"])
    del counts["none"]
    label = max(counts, key=counts.__getitem__, default="none")
    _write(run, "majority", [Answer(f.id, label, "", False, 0) for f in run.dataset.splits["test"]])


def _write(run: Run, name: str, answers: Sequence[Answer]) -> None:
    """Writes the scores of a run's system on the test split, in the first process."""
    facts, ontology = run.dataset.splits["test"], run.dataset.ontology
    group.by_first(
        f"scores of {name}",
        lambda: write_scores(run.workdir, name, facts, answers, ontology),
    )


def write_scores(
    folder: Path, name: str, facts: Sequence[Fact], answers: Sequence[Answer], ontology: Ontology
) -> dict[str, Any]:
    """Scores answers to all of a split's facts.

    Writes `eval/<name>.json` (the scores) and `eval/<name>.answers.jsonl` (every answer).
    """
    scores = metrics.score(facts, [a.label for a in answers], ontology)
    path = folder / "eval" / f"{name}.answers.jsonl"
    write_jsonl(path, map(dataclasses.asdict, answers), ascii_only=False)
    write_json(folder / "eval" / f"{name}.json", scores)
    return scores


def read_scores(workdir: Path) -> dict[str, dict[str, Any]]:
    """Reads all score files of a workdir, by name."""
    paths = sorted((workdir / "eval").glob("*.json"))
    return {path.stem: read_json(path, "evaluate again") for path in paths}
