"""The commands that take a checkpoint: predict, evaluate, rate, convert."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from morer1_jax.config.binding import read_config
from morer1_jax.config.settings import settings
from morer1_jax.data.ratings import Rating, read_ratings, write_ratings
from morer1_jax.errors import ConfigError, NotFiniteError, WeightsError
from morer1_jax.model.attention import XLA
from morer1_jax.run.setup import open_run, open_setup
from morer1_jax.serve.export import export
from morer1_jax.serve.loaded import open_model
from morer1_jax.serve.predict import predict, read_questions
from morer1_jax.stages.grpo import run_grpo
from morer1_jax.task import more
from morer1_jax.task.answer import Special, read
from morer1_jax.train import train
from morer1_jax.weights.published import SINGLE

pytestmark = pytest.mark.usefixtures("quick_compiles")

ROOT = Path(__file__).parents[1]
PREDICT, EVALUATE = "morer1_jax.predict", "morer1_jax.evaluate"
RATE, CONVERT = (str(ROOT / "tools" / f"{name}.py") for name in ("rate_difficulty", "convert"))


@pytest.fixture(scope="module")
def workdir(small_run, tmp_path_factory):
    """A run that trained for three steps, and has learnt nothing."""
    return shutil.copytree(small_run, tmp_path_factory.mktemp("run") / "tiny")


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    export(open_model(str(workdir)), folder)
    return folder


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A file of questions about real photos."""
    data = pytest.importorskip("skimage.data")
    folder = tmp_path_factory.mktemp("questions")
    names = ("astronaut", "cat", "coffee", "camera", "rocket", "coins")
    for name in names:
        Image.fromarray(getattr(data, name)()).save(folder / f"{name}.png")
    lines = [
        {"image": f"{n}.png", "box": [0.5, 0.4, 0.5, 0.5], "title": f"A {n} is seen", "entity": n}
        for n in names
    ]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def process(without_torch):
    """A command in a process of its own, on one device, as most users have."""

    def run(*args, code=0):
        done = subprocess.run(
            [sys.executable, *map(str, args)],
            cwd=ROOT,
            env=without_torch(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, done.stderr
        return done

    return run


def test_predict_prints_text_json_and_a_picture(command, process, exported, questions, tmp_path):
    picture = tmp_path / "box.png"
    given = ["--image", questions.parent / "cat.png", "--box=0.5,0.4,0.5,0.5"]
    given += ["--title", "A cat, is seen", "--entity=cat", "--guided"]
    ask = [f"--checkpoint={exported}", *given]
    shown = process("-m", PREDICT, *ask, "--picture", picture).stdout.splitlines()
    assert [line.split(":")[0] for line in shown if line.startswith("Step")] == [
        f"Step {k}" for k in range(1, 7)
    ]
    labels = more.read_ontology(exported).labels
    assert shown[-1].removeprefix("Answer: ") in labels
    with Image.open(questions.parent / "cat.png") as photo, Image.open(picture) as drawn:
        assert photo.size == drawn.size
    parsed = json.loads(command(PREDICT, *ask, "--json", code=0)[0])
    assert parsed["label"] == shown[-1].removeprefix("Answer: ")


def test_an_export_answers_as_the_run_it_is_of(workdir, exported, questions):
    facts = read_questions(questions)
    ours, theirs = (
        list(predict(open_model(str(path), completion=40), facts, batch=4, guided=False))
        for path in (workdir / "sft", exported)
    )
    assert ours == theirs
    assert [answer.fact for answer in ours] == [fact.id for fact in facts]


@pytest.mark.parametrize("attention", ["splash", None])
def test_a_run_of_other_devices_is_opened_here(workdir, tmp_path, attention):
    """Also one from before there was a choice of kernels."""
    moved = shutil.copytree(workdir, tmp_path / "run")
    config = json.loads((moved / "config.json").read_text())
    del config["runtime"]["attention"]
    if attention is not None:
        config["runtime"]["attention"] = attention
    (moved / "config.json").write_text(json.dumps(config))
    assert open_model(str(moved)).model.runtime.kernels == XLA()


def guided_answers(exported, questions, count):
    facts = read_questions(questions)
    facts = [facts[i % len(facts)] for i in range(count)]
    loaded = open_model(str(exported))
    labels = loaded.ontology.labels
    for answer in predict(loaded, facts, batch=min(count, 50), guided=True):
        outcome = read([answer.text.removesuffix("<|im_end|>").encode(), Special.END], labels)
        assert answer.format
        assert outcome.format
        assert labels[outcome.answer] == answer.label


def test_guided_answers_of_an_untrained_model_are_readable(exported, questions):
    guided_answers(exported, questions, 12)


def test_a_length_too_short_for_a_guided_answer_is_named(exported, questions):
    loaded = open_model(str(exported), completion=20)
    with pytest.raises(
        ConfigError, match=r"^--length: expected at least \d+ tokens, .* found 20; "
    ):
        next(predict(loaded, read_questions(questions), batch=1, guided=True))
    assert "params" not in vars(loaded)


@pytest.mark.soak
def test_a_thousand_guided_answers(exported, questions):
    guided_answers(exported, questions, 1000)


@pytest.mark.parametrize("guided", [True, False])
def test_an_answer_of_a_model_whose_numbers_overflow_is_none(exported, questions, guided):
    """Guided or not, tokens are drawn; guided, they are a label."""
    loaded = open_model(str(exported), completion=48)
    loaded.params["language"]["norm"]["scale"] *= 3e38
    facts = read_questions(questions)
    with pytest.raises(
        NotFiniteError, match=r"^fact question:1: expected a finite log-probability of token 1 "
    ):
        list(predict(loaded, facts, batch=4, guided=guided))


@pytest.fixture(scope="module")
def spoilt(exported, tmp_path_factory):
    """The export with one NaN in one tensor, and the error that every command ends in."""
    folder = shutil.copytree(exported, tmp_path_factory.mktemp("spoilt") / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(folder / SINGLE)
    tensors[name][3, 5] = np.nan
    save_file(tensors, folder / SINGLE)
    size = tensors[name].size
    return folder, f"{folder / SINGLE}: {name}: expected finite values, found 1 of {size} "


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize("stage", ["sft", "rate", "grpo"])
def test_a_tensor_that_is_not_finite_is_trained_by_no_stage(spoilt, small_world, tmp_path, stage):
    folder, message = spoilt
    config = read_config(ROOT / "tests" / "configs" / "tiny.py")
    config.stages, config.data.folder, config.model.path = stage, str(small_world), str(folder)
    config.rate.begin = "checkpoint"
    config.mesh.update(data=1, fsdp=1, tensor=-1)
    run = open_run(open_setup(settings(config), tmp_path), reasoning_needed=False)
    if stage == "grpo":
        ratings = [Rating(fact.id, 0.0, "hard") for fact in run.dataset.splits["train"]]
        write_ratings(tmp_path / "rate" / "ratings.jsonl", ratings)
    with pytest.raises(WeightsError) as error:
        run_grpo(run) if stage == "grpo" else train(config, tmp_path)
    assert str(error.value).startswith(message)
    assert not list(tmp_path.glob("*/checkpoints/step_*"))
    assert not list(tmp_path.glob("*/DONE.json"))


def test_a_tensor_that_is_not_finite_answers_nothing(
    process, spoilt, questions, small_world, tmp_path
):
    folder, message = spoilt
    with pytest.raises(WeightsError) as error:
        list(predict(open_model(str(folder)), read_questions(questions), batch=4, guided=True))
    assert str(error.value).startswith(message)
    args = ["-m", EVALUATE, "--checkpoint", folder, "--data", small_world]
    done = process(*args, "--out", tmp_path, code=2)
    assert done.stderr.splitlines()[-1].startswith(f"error: {message}")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("eval/*"))


def test_evaluate_writes_tables_and_page(command, exported, small_world, tmp_path):
    args = [EVALUATE, "--checkpoint", exported, "--data", small_world]
    out, _ = command(*args, "--split=valid", "--out", tmp_path, "--name=untrained", code=0)
    assert "untrained" in out
    scores = json.loads((tmp_path / "eval" / "untrained.json").read_text())
    assert scores["facts"] == 16
    page = (tmp_path / "report.html").read_text()
    assert "Valid scores" in page
    assert "untrained on the valid facts" in page
    _, error = command(*args, "--split=test", "--out", tmp_path, code=2)
    assert "to the split test, found untrained.answers.jsonl of valid:1; name another" in error


def test_a_model_is_told_from_one_of_another_run_of_as_many_steps(workdir, tmp_path):
    """Or a rating that was killed would go on with another model."""
    digest = open_model(str(workdir / "sft")).digest
    other = shutil.copytree(workdir, tmp_path / "other")
    assert open_model(str(other / "sft")).digest == digest
    for path in (
        next((other / "sft" / "checkpoints" / "best").glob("*/manifest.json")),
        other / "tokenizer" / "tokenizer.json",
    ):
        before = path.read_text(encoding="utf-8")
        path.write_text(before + " ", encoding="utf-8")
        assert open_model(str(other / "sft")).digest != digest
        path.write_text(before, encoding="utf-8")


def test_rating_by_command_is_what_grpo_reads(command, workdir, small_world, tmp_path):
    out = tmp_path / "ratings.jsonl"
    args = [RATE, "--checkpoint", workdir / "sft", "--data", small_world]
    shown, _ = command(*args, "--out", out, "--samples=2", "--length=8", code=0)
    assert "pass rates of 48 facts" in shown
    assert len(read_ratings(out)) == 48
    assert os.listdir(tmp_path) == ["ratings.jsonl"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([PREDICT, "--checkpoint=nowhere", "--jsonl=none.jsonl"], "none.jsonl"),
        ([PREDICT, "--checkpoint=nowhere"], "--image, --box, --title, --entity"),
        ([CONVERT, "--checkpoint=nowhere", "--out=x"], "nowhere: expected a run's workdir"),
    ],
)
def test_what_is_wrong_is_one_line(command, args, message):
    error = command(*args, code=2)[1].strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
