"""The stage `evaluate`: greedy answers on the test split, the score tables, the report page."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from morer1_jax.files import read_json, write_json, write_jsonl
from morer1_jax.model.layers import Params
from morer1_jax.report.report import write_report
from morer1_jax.run.batch_sampler import Answer, BatchSampler
from morer1_jax.run.setup import Run
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
        folder = run.workdir / name
        if (folder / MARKER).exists():
            # Bound to no name, so that one model's parameters are freed before the next are read.
            evaluate(run, name, run.trainee.whole(run.trainee.best_params(folder)), run.greedy)
    print(metrics.format_table(read_scores(run.workdir)))
    print(f"report: {write_report(run.workdir, run.dataset.folder)}")


def evaluate(run: Run, name: str, params: Params, sampler: BatchSampler) -> dict[str, Any]:
    """Scores a whole model's parameters on the test split, into the workdir; see `write_scores`."""
    facts = run.dataset.splits["test"]
    answers = sampler.answers(params, facts, f"evaluate {name}")
    return write_scores(run.workdir, name, facts, answers, run.dataset.ontology)


def evaluate_majority(run: Run) -> dict[str, Any]:
    """Scores the most common training label other than `none`.

    Always answering `none` gives a higher accuracy but no F1; that accuracy is the share of `none`,
    which the table shows separately.
    """
    counts = Counter(fact.label for fact in run.dataset.splits["train"])
    del counts["none"]
    label = max(counts, key=counts.__getitem__, default="none")
    facts = run.dataset.splits["test"]
    answers = [Answer(fact.id, label, "", False, 0) for fact in facts]
    return write_scores(run.workdir, "majority", facts, answers, run.dataset.ontology)


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
