"""The files of a score: what is in them, and what the counted baseline says."""

import dataclasses
import json
import types

import pytest

from morer1_jax.run.batch_sampler import Answer
from morer1_jax.stages.evaluate import evaluate, evaluate_majority, read_scores, write_scores
from morer1_jax.task import more

REQUIRED = (
    "accuracy",
    "micro_precision",
    "micro_recall",
    "micro_f1",
    "macro_f1",
    "unreadable",
)


@pytest.fixture
def job(small_world, tmp_path):
    """All of a job that scoring looks at."""
    ontology = more.read_ontology(small_world)
    facts = {split: more.read_split(small_world, split, ontology) for split in more.SPLITS}
    return types.SimpleNamespace(workdir=tmp_path, ontology=ontology, facts=facts)


def answer(fact, label):
    return Answer(fact.id, label, f"text of {fact.id} é", label is not None, 7)


def test_scores_and_answers_are_written(job):
    test = job.facts["test"]
    answers = [answer(test[0], None), *(answer(fact, fact.label) for fact in test[1:])]
    scores = write_scores(job.workdir, "some", test, answers, job.ontology)
    written = json.loads((job.workdir / "eval" / "some.json").read_text())
    assert written == scores
    assert set(REQUIRED) <= written.keys()
    assert written["accuracy"] == pytest.approx(100 * (len(test) - 1) / len(test))
    assert written["unreadable"] == pytest.approx(100 / len(test))
    assert written["facts"] == len(test)
    lines = (job.workdir / "eval" / "some.answers.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [dataclasses.asdict(a) for a in answers]
    assert sorted(p.name for p in (job.workdir / "eval").iterdir()) == [
        "some.answers.jsonl",
        "some.json",
    ]


def test_the_whole_test_split_is_asked(job):
    class BatchSampler:
        def answers(self, params, facts, desc):
            assert params == "params"
            assert facts == job.facts["test"]
            return [answer(fact, "none") for fact in facts]

    scores = evaluate(job, "greedy", "params", BatchSampler())
    none = sum(fact.label == "none" for fact in job.facts["test"])
    assert scores["accuracy"] == pytest.approx(100 * none / len(job.facts["test"]))
    assert read_scores(job.workdir) == {"greedy": scores}


def test_the_majority_is_that_of_the_training_relations(job):
    labels = [fact.label for fact in job.facts["train"] if fact.label != "none"]
    most = max(labels.count(label) for label in labels)
    evaluate_majority(job)
    lines = (job.workdir / "eval" / "majority.answers.jsonl").read_text().splitlines()
    (predicted,) = {json.loads(line)["label"] for line in lines}
    assert labels.count(predicted) == most


def test_without_any_relation_the_majority_is_none(job):
    job.facts["train"] = [dataclasses.replace(fact, label="none") for fact in job.facts["train"]]
    evaluate_majority(job)
    assert read_scores(job.workdir)["majority"]["micro_f1"] == 0.0
