"""The files of a score: what is in them, and what the counted baseline says."""

import dataclasses
import gc
import json
import types
import weakref

import pytest

from morer1_jax.data.dataset import open_dataset
from morer1_jax.run.batch_sampler import Answer
from morer1_jax.run.store import Store
from morer1_jax.stages.evaluate import (
    evaluate,
    evaluate_majority,
    read_scores,
    run_evaluate,
    write_scores,
)
from morer1_jax.stages.marker import write_marker

REQUIRED = (
    "accuracy",
    "micro_precision",
    "micro_recall",
    "micro_f1",
    "macro_f1",
    "unreadable",
)


@pytest.fixture
def run(small_world, tmp_path):
    """All of a run that scoring looks at."""
    return types.SimpleNamespace(
        workdir=tmp_path, store=Store(tmp_path), dataset=open_dataset(small_world)
    )


def answer(fact, label):
    return Answer(fact.id, label, f"text of {fact.id} é", label is not None, 7)


def test_scores_and_answers_are_written(run):
    test = run.dataset.splits["test"]
    answers = [answer(test[0], None), *(answer(fact, fact.label) for fact in test[1:])]
    scores = write_scores(run.workdir, "some", test, answers, run.dataset.ontology)
    written = json.loads((run.workdir / "eval" / "some.json").read_text())
    assert written == scores
    assert set(REQUIRED) <= written.keys()
    assert written["accuracy"] == pytest.approx(100 * (len(test) - 1) / len(test))
    assert written["unreadable"] == pytest.approx(100 / len(test))
    assert written["facts"] == len(test)
    lines = (run.workdir / "eval" / "some.answers.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [dataclasses.asdict(a) for a in answers]
    assert sorted(p.name for p in (run.workdir / "eval").iterdir()) == [
        "some.answers.jsonl",
        "some.json",
    ]


def test_the_whole_test_split_is_asked(run):
    class BatchSampler:
        def answers(self, params, facts, desc):
            assert params == "params"
            assert facts == run.dataset.splits["test"]
            return [answer(fact, "none") for fact in facts]

    evaluate(run, "greedy", "params", BatchSampler())
    scores = read_scores(run.workdir)["greedy"]
    none = sum(fact.label == "none" for fact in run.dataset.splits["test"])
    assert scores["accuracy"] == pytest.approx(100 * none / len(run.dataset.splits["test"]))
    assert scores["facts"] == len(run.dataset.splits["test"])


def test_one_models_parameters_go_before_the_next_ones_are_read(run, monkeypatch):
    """Two of a model that fills a device would not fit."""

    class Params:
        """Parameters that can be watched."""

    alive, at_each_read = weakref.WeakSet(), []

    def best_params(folder):
        gc.collect()
        at_each_read.append(len(alive))
        alive.add(params := Params())
        return params

    for name in ("sft", "grpo"):
        write_marker(run.workdir / name, {}, {})
    run.trainee = types.SimpleNamespace(best_params=best_params, whole=lambda params: params)
    run.greedy = types.SimpleNamespace(
        answers=lambda params, facts, desc: [answer(fact, "none") for fact in facts]
    )
    monkeypatch.setattr("morer1_jax.stages.evaluate.write_report", lambda *_: gc.collect())
    run_evaluate(run, ["sft", "control", "grpo"])
    assert at_each_read == [0, 0]
    gc.collect()
    assert not alive


def test_the_majority_is_that_of_the_training_relations(run):
    labels = [fact.label for fact in run.dataset.splits["train"] if fact.label != "none"]
    most = max(labels.count(label) for label in labels)
    evaluate_majority(run)
    lines = (run.workdir / "eval" / "majority.answers.jsonl").read_text().splitlines()
    (predicted,) = {json.loads(line)["label"] for line in lines}
    assert labels.count(predicted) == most


def test_without_any_relation_the_majority_is_none(run):
    run.dataset.splits["train"] = [
        dataclasses.replace(fact, label="none") for fact in run.dataset.splits["train"]
    ]
    evaluate_majority(run)
    assert read_scores(run.workdir)["majority"]["micro_f1"] == 0.0
