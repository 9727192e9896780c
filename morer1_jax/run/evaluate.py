"""The stage `evaluate`: greedy answers on the test split, the score tables, the report page."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

from morer1_jax.files import atomic_write
from morer1_jax.run.answers import Answer, Asker
from morer1_jax.run.job import Job
from morer1_jax.task import metrics


def evaluate(job: Job, name: str, params: Any, asker: Asker) -> dict[str, Any]:
    """Scores parameters on the test split.

    Writes `eval/<name>.json` (the scores) and `eval/<name>.answers.jsonl` (every answer).
    """
    answers = asker.answers(params, job.facts["test"], f"evaluate {name}")
    return write_scores(job, name, answers)


def evaluate_majority(job: Job) -> dict[str, Any]:
    """Scores the most common training label other than `none`: the majority that has an F1.

    Predicting `none` throughout gives the better accuracy and no F1 at all; its accuracy is the
    share of `none`, which the table shows in its own right.
    """
    counts = Counter(fact.label for fact in job.facts["train"])
    del counts["none"]
    label = max(counts, key=counts.__getitem__, default="none")
    answers = [Answer(fact.id, label, "", False, 0) for fact in job.facts["test"]]
    return write_scores(job, "majority", answers)


def write_scores(job: Job, name: str, answers: list[Answer]) -> dict[str, Any]:
    """Scores answers to the whole test split and writes both files."""
    scores = metrics.score(job.facts["test"], [a.label for a in answers], job.ontology)
    folder = job.workdir / "eval"
    lines = [json.dumps(dataclasses.asdict(a), ensure_ascii=False) + "\n" for a in answers]
    atomic_write(folder / f"{name}.answers.jsonl", "".join(lines))
    atomic_write(folder / f"{name}.json", json.dumps(scores, indent=1) + "\n")
    return scores


def read_scores(workdir: Path) -> dict[str, dict[str, Any]]:
    """All score files of a workdir by name."""
    return {p.stem: json.loads(p.read_text()) for p in sorted((workdir / "eval").glob("*.json"))}
