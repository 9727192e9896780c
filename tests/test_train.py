"""The command as a whole: stages that run alone, and bad input that is named before any work."""

import ast
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from morer1_jax.config.binding import read_config
from morer1_jax.config.settings import settings
from morer1_jax.data import more_tfds
from morer1_jax.data.ratings import Rating, read_ratings
from morer1_jax.errors import ConfigError, DataError, Stopped
from morer1_jax.run.checkpoint import Checkpointer
from morer1_jax.run.hooks import Validation
from morer1_jax.run.setup import open_run, open_setup
from morer1_jax.stages.grpo import _pools, _schedule, run_grpo
from morer1_jax.stages.table import BY_NAME
from morer1_jax.train import train

# The tiny model has too few heads for all devices.
pytestmark = pytest.mark.usefixtures("one_device")

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "configs" / "tiny.py"


def tiny_config():
    config = read_config(TINY)
    config.mesh.update(data=1, fsdp=1, tensor=-1)
    return config


@pytest.fixture
def data(small_world, tmp_path):
    """A copy of a dataset, to be spoilt."""
    return shutil.copytree(small_world, tmp_path / "data")


@pytest.fixture
def config(data):
    config = tiny_config()
    config.stages = "synthesise,sft"
    config.data.folder = str(data)
    return config


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "run"


def put_line(data, number, **changes):
    """Changes a line of the training split: `h_pos=…`; a callable gets the old value."""
    path = data / "txt" / "train.txt"
    lines = path.read_text().splitlines()
    fact = ast.literal_eval(lines[number - 1])
    for name, value in changes.items():
        *outer, key = name.split("__")
        part = fact[outer[0]] if outer else fact
        part[key] = value(part[key]) if callable(value) else value
    lines[number - 1] = repr(fact)
    path.write_text("".join(line + "\n" for line in lines))
    return fact


def check_refused(config, workdir, error, *parts):
    """The run ends in one line that holds `parts`, and leaves nothing."""
    with pytest.raises(error) as raised:
        train(config, workdir)
    message = str(raised.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    assert not workdir.exists()


def opened(config, workdir):
    return open_run(open_setup(settings(config), workdir), reasoning_needed=True)


def replace(monkeypatch, name, run):
    """Has a stage do something else."""
    monkeypatch.setitem(BY_NAME, name, dataclasses.replace(BY_NAME[name], run=run))


def test_good_data_is_not_refused(config, workdir):
    opened(config, workdir)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"relation": "/per/per/nemesis"}, "/per/per/nemesis"),
        ({"t__box": (0.9, 0.5, 0.4, 0.4)}, "expected fractions within 0 to 1"),
        ({"t__box": (0.5, 0.5, 0.0, 0.4)}, "expected a width and height above 0"),
        ({"h__pos": [3, 300]}, "h.pos"),
        ({"h__pos": [2, 2]}, "h.pos"),
        ({"img_id": "absent.jpg"}, "absent.jpg"),
        ({"token": []}, "token"),
    ],
)
def test_a_bad_field_is_named_with_its_file_and_line(data, config, workdir, changes, expected):
    put_line(data, 7, **changes)
    check_refused(config, workdir, DataError, f"{data}/txt/train.txt:7: ", expected)


@pytest.mark.parametrize("line", ["{'token': [", "{'token': ['a']}", "__import__('os')", "[1]"])
def test_a_malformed_line_is_named(data, config, workdir, line):
    path = data / "txt" / "train.txt"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], line, *lines[4:]]) + "\n")
    check_refused(config, workdir, DataError, f"{path}:5: ")


def test_a_missing_photo_is_named(data, config, workdir):
    fact = put_line(data, 3)
    (data / "img_org" / "train" / fact["img_id"]).unlink()
    check_refused(config, workdir, DataError, "txt/train.txt:", fact["img_id"])


def truncate(data, split="test"):
    photo = sorted((data / "img_org" / split).iterdir())[-1]
    photo.write_bytes(photo.read_bytes()[:-200])
    return photo


def test_a_truncated_photo_is_named_with_its_fact(data, config, workdir):
    photo = truncate(data)
    check_refused(config, workdir, DataError, str(photo), "fact test:")


def test_reasoning_for_an_unknown_fact_is_named(data, config, workdir):
    path = data / "reasoning.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], json.dumps({"fact": "train:999", "text": "x"})]))
    check_refused(config, workdir, DataError, f"{path}:2: ", "train:999")


def test_data_without_reasoning_is_named_with_what_is_missing(data, config, workdir):
    (data / "reasoning.jsonl").unlink()
    check_refused(config, workdir, DataError, str(data / "reasoning.jsonl"), '{"fact": "train:1"')


def test_reasoning_that_ends_in_another_label_is_named(data, config, workdir):
    path = data / "reasoning.jsonl"
    first = json.loads(path.read_text().splitlines()[0])
    thought, _, answer = first["text"].rpartition("<answer>")
    gold = answer.removesuffix("</answer>")
    other = "none" if gold != "none" else "/per/per/self"
    text = f"{thought}<answer>{other}</answer>"
    path.write_text(json.dumps({**first, "text": text}) + "\n")
    check_refused(
        config,
        workdir,
        DataError,
        f"{path}:1: ",
        first["fact"],
        f"at the end, found '{other}'",
        repr(gold),
    )


@pytest.mark.parametrize(
    ("key", "size", "where"),
    [
        ("prompt_length", 60, "train:1: its prompt has "),
        ("completion_length", 20, ": its target has "),
        ("windows", 1, ": its images fill "),
    ],
)
def test_a_fact_beyond_its_bucket_is_named_with_the_key(config, workdir, key, size, where):
    config.data[key] = size
    check_refused(config, workdir, DataError, where, f"data.{key}")


def test_a_special_token_in_a_title_is_named(data, config, workdir):
    put_line(data, 2, token=lambda words: [*words, "<|im_end|>"])
    check_refused(config, workdir, DataError, "train:2: ", "<|im_end|>", "title")


def test_an_unknown_key_is_named_and_makes_no_workdir(config, workdir):
    with config.unlocked():
        config.sft.stepz = 3
    with pytest.raises(ConfigError, match=r"^config\.sft\.stepz: unknown key; did you mean"):
        train(config, workdir)
    assert not workdir.exists()


def absent_reasoning(config, tmp_path):
    config.data.reasoning = str(tmp_path / "absent.jsonl")
    return "absent.jsonl: no such file"


def absent_reasoning_of_the_synthetic_world(config, tmp_path):
    config.data.folder = None
    return absent_reasoning(config, tmp_path)


def absent_data(config, tmp_path):
    config.data.folder = str(tmp_path / "absent")
    return "rel2id.json"


def absent_ratings(config, tmp_path):
    config.stages = "synthesise,sft,rate"
    config.rate.file = str(tmp_path / "absent.jsonl")
    return "absent.jsonl: expected a rating"


@pytest.mark.parametrize(
    "spoil",
    [
        absent_reasoning,
        absent_reasoning_of_the_synthetic_world,
        absent_data,
        absent_ratings,
    ],
)
def test_a_command_may_be_corrected_after_a_start_that_failed(
    config, workdir, tmp_path, monkeypatch, spoil
):
    replace(monkeypatch, "sft", lambda run: None)
    good = config.copy_and_resolve_references()
    workdir.mkdir()
    (workdir / "notes").write_text("mine")
    with pytest.raises((ConfigError, DataError), match=spoil(config, tmp_path)):
        train(config, workdir)
    assert [path.name for path in workdir.iterdir()] == ["notes"]
    train(good, workdir)
    kept = contents(workdir)
    assert {"config.json", "data.json", "sft"} <= {path.name for path in kept}
    # Now it is a run's, and what fails takes nothing away.
    good.stages = "sft,rate"
    monkeypatch.setattr("morer1_jax.train.open_run", lambda *_, **__: interrupt())
    with pytest.raises(KeyboardInterrupt):
        train(good, workdir)
    assert contents(workdir) == kept


def contents(folder):
    """Every folder, and every file with its bytes."""
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("refusal", ["stages", "photo", "disk", "steps"])
def test_a_refused_command_takes_nothing_from_a_run(data, config, workdir, monkeypatch, refusal):
    """Neither what it is bound to, nor states that a command that goes on takes away."""

    def run_sft(run):
        checkpoints = Checkpointer(workdir / "sft" / "checkpoints")
        checkpoints.save(2, {"w": jnp.ones(3)})
        checkpoints.save_best(2, {"w": jnp.ones(3)}, 1.0)

    replace(monkeypatch, "sft", run_sft)
    replace(monkeypatch, "rate", lambda run: None)
    config.sft.optimizer.schedule = "cosine"
    config.stages = "sft"
    train(config, workdir)
    checkpoints = Checkpointer(workdir / "sft" / "checkpoints")
    assert checkpoints.latest() is None
    # As a killed deletion leaves it.
    checkpoints.save(2, {"w": jnp.ones(3)})
    before = contents(workdir)
    # It goes through keys that bind nothing yet, and is refused after that.
    wrong = config.copy_and_resolve_references()
    wrong.stages, wrong.rate.samples, wrong.sft.log_every = "synthesise,rate", 7, 3
    with pytest.MonkeyPatch.context() as patch:
        if refusal == "stages":
            wrong.stages, error = "synthesise,grpo", ConfigError
        elif refusal == "photo":
            patch.setattr("morer1_jax.run.setup._bind_data", lambda *_: interrupt())
            error = KeyboardInterrupt
        elif refusal == "disk":
            patch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=0))
            error = ConfigError
        else:
            Checkpointer(workdir / "grpo" / "checkpoints").save_best(9, {"w": jnp.ones(3)}, 1.0)
            before, error = contents(workdir), ConfigError
        with pytest.raises(error):
            train(wrong, workdir)
    assert contents(workdir) == before
    config.stages = "synthesise,rate"
    if refusal == "steps":
        config.grpo.steps = 9
    train(config, workdir)
    assert checkpoints.latest() is None
    assert checkpoints.best() == (2, 1.0)
    assert json.loads((workdir / "sft" / "DONE.json").read_text())["config"]["sft.steps"] == 40
    assert json.loads((workdir / "config.json").read_text())["rate"]["samples"] == 2


def test_what_differs_is_named_before_steps_that_would_too(config, workdir, monkeypatch):
    def run_sft(run):
        Checkpointer(workdir / "sft" / "checkpoints").save_best(40, {"w": jnp.ones(3)}, 1.0)

    replace(monkeypatch, "sft", run_sft)
    config.stages = "sft"
    config.sft.optimizer.schedule = "constant"
    train(config, workdir)
    config.sft.steps = 20
    with pytest.raises(ConfigError, match=r"sft\.steps: expected at least 40, .* found 20; raise"):
        train(config, workdir)
    config.seed = 7
    with pytest.raises(ConfigError, match=r"found another run's: seed: expected 7, found 0"):
        train(config, workdir)


def test_a_second_run_is_refused_and_takes_nothing_from_the_first(config, workdir, monkeypatch):
    bad = config.copy_and_resolve_references()
    bad.data.folder = "none"

    def second(run):
        (workdir / "sft").mkdir()
        before = {path for path in workdir.rglob("*") if path.is_file()}
        for other in (config, bad):
            with pytest.raises(
                ConfigError, match=f"run: expected no .* found process {os.getpid()} on "
            ):
                train(other, workdir)
        assert {path for path in workdir.rglob("*") if path.is_file()} == before

    replace(monkeypatch, "sft", second)
    train(config, workdir)
    assert {"config.json", "data.json", "sft", "synthesise", "tokenizer"} == {
        path.name for path in workdir.iterdir()
    }
    train(config, workdir)


@pytest.fixture
def plain_signals():
    """Signals as a terminal has them; whoever started the tests may ignore some (`nohup`)."""
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("plain_signals")
@pytest.mark.parametrize(
    "end",
    [
        lambda: os.kill(os.getpid(), signal.SIGTERM),  # As a scheduler does.
        lambda: os.kill(os.getpid(), signal.SIGHUP),  # As a terminal does that is closed.
        interrupt,
    ],
)
def test_a_start_that_is_ended_takes_what_it_made_and_no_more(config, workdir, monkeypatch, end):
    config.data.folder = None
    workdir = workdir / "deep"

    def check(*_, **__):
        assert (workdir / "config.json").exists()
        assert (workdir / "data" / "rel2id.json").exists()
        (workdir / "out.txt").write_text("of `… | tee`")
        end()
        raise AssertionError("it goes on")

    monkeypatch.setattr("morer1_jax.train.open_run", check)
    with pytest.raises((Stopped, SystemExit, KeyboardInterrupt)) as ended:
        train(config, workdir)
    if ended.type is SystemExit:
        assert ended.value.code == 128 + signal.SIGHUP
    assert [path.name for path in workdir.iterdir()] == ["out.txt"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.usefixtures("plain_signals")
def test_a_start_that_waits_for_another_run_can_be_told_to_stop(config, workdir, monkeypatch):
    @contextlib.contextmanager
    def held(store):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it goes on")
        yield

    monkeypatch.setattr("morer1_jax.train.Store.held", held)
    with pytest.raises(Stopped, match="before the first step"):
        train(config, workdir)
    assert not (workdir / "config.json").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.usefixtures("plain_signals")
def test_a_start_under_nohup_outlives_its_terminal(config, workdir, monkeypatch):
    def check(*_, **__):
        os.kill(os.getpid(), signal.SIGHUP)
        raise DataError("it goes on")

    monkeypatch.setattr("morer1_jax.train.open_run", check)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with pytest.raises(DataError, match="it goes on"):
        train(config, workdir)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize(
    ("stages", "folder", "changes", "named"),
    [
        ("sft", False, {}, ["expected synthesise before sft,", "stages=synthesise,sft "]),
        ("sft,synthesise", False, {}, ["expected synthesise before sft,"]),
        ("evaluate", False, {}, ["expected synthesise before evaluate,", "data.folder"]),
        (
            "grpo",
            False,
            {},
            ["synthesise and sft and rate before grpo,", "=synthesise,sft,rate,grpo runs"],
        ),
        ("synthesise,rate", False, {}, ["expected sft before rate,", "model.path=…"]),
        ("grpo", True, {}, ["expected sft and rate before grpo,"]),
        ("grpo", True, {"rate.begin": "checkpoint"}, ["expected rate before grpo,"]),
        ("sft,rate,control", True, {}, ["expected grpo before control,"]),
        ("control", True, {"control.steps": 3}, ["expected sft before control,"]),
    ],
)
def test_a_stage_before_what_it_goes_on_from_is_named(
    config, workdir, stages, folder, changes, named
):
    config.stages = stages
    config.update_from_flattened_dict(changes)
    if not folder:
        config.data.folder = None
    check_refused(config, workdir, ConfigError, f"nor done in {workdir}; ", *named)


@pytest.mark.parametrize("stages", ["sft,rate", "rate,grpo"])
def test_a_checkpoint_that_is_not_named_is_found_before_a_stage_runs(config, workdir, stages):
    config.stages, config.rate.begin = stages, "checkpoint"
    expected = "config.rate.begin: expected 'sft' where config.model.path names no checkpoint"
    check_refused(config, workdir, ConfigError, expected)


def test_a_workdir_that_is_a_file_is_named(config, workdir):
    workdir.write_text("mine")
    with pytest.raises(OSError, match="expected a folder to write, found a file") as error:
        train(config, workdir)
    assert error.value.filename == str(workdir)
    assert workdir.read_text() == "mine"


def test_a_workdir_of_another_run_is_left_as_it_was(config, workdir):
    config.stages = "synthesise"
    train(config, workdir)
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()}
    config.sft.optimizer.lr = 0.5  # Nothing has been trained with it.
    config.seed = 7
    config.data.vocabulary = 999
    with pytest.raises(ConfigError, match=r"config\.json: .* found another run\'s: ") as error:
        train(config, workdir)
    assert "data.vocabulary: expected 999, found 1024 (synthesise depends on it)" in str(
        error.value
    )
    assert "; seed: expected 7, found 0 (synthesise depends on it); use a new" in str(error.value)
    assert "lr" not in str(error.value)
    assert {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file()} == before


def test_a_stage_may_be_run_alone_and_is_not_run_again(config, workdir, capsys):
    config.data.folder = None
    config.stages = "synthesise"
    train(config, workdir)
    photos = {p: p.stat().st_mtime_ns for p in workdir.rglob("*.jpg")}
    assert photos
    config.stages = "synthesise,synthesise"  # Other stages are no other run.
    train(config, workdir)
    assert capsys.readouterr().out.count("stage synthesise: done before") == 2
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*.jpg")} == photos


def test_data_that_changed_since_the_run_began_is_named(data, config, workdir, monkeypatch):
    """Indices of facts are all that a later stage keeps of the data."""
    replace(monkeypatch, "sft", lambda run: None)
    config.stages = "sft"
    train(config, workdir)
    kept = (workdir / "data.json").read_bytes()
    train(config, workdir)
    path = data / "reasoning.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[1:]))
    (workdir / "sft" / "DONE.json").unlink()
    with pytest.raises(DataError, match=r"reasoning\.jsonl changed since the run began"):
        train(config, workdir)
    assert (workdir / "data.json").read_bytes() == kept
    path.write_text("".join(lines))
    train(config, workdir)


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.usefixtures("one_device")
def test_a_run_out_of_memory_goes_on_with_other_parts_and_for_longer(
    config, workdir, tmp_path, monkeypatch
):
    """As one that had these parts and steps from the start, within rounding."""
    # What is validated is not in question, and takes long to compile.
    scores = Validation({"micro_f1": 0.0}, decisive="micro_f1")
    monkeypatch.setattr("morer1_jax.stages.sft.validator", lambda *_: lambda params: scores)
    config.stages = "sft"
    config.sft.optimizer.update(schedule="constant", warmup=0)
    config.sft.update(batch=4, save_every=2, steps=2)
    config.data.shapes = 1
    config.model.vision.update(depth=1, fullatt_block_indexes=(0,))  # Compiles faster.
    whole = config.copy_and_resolve_references()
    whole.sft.steps = 4
    train(whole, tmp_path / "whole")
    train(config, workdir)
    marker = json.loads((workdir / "sft" / "DONE.json").read_text())
    config.sft.update(steps=4, micro_batches=2, eval_facts=2)
    config.runtime.update(remat="full", decode_unroll=False)
    config.score.chunk = 256
    config.evaluate.batch = 2
    train(config, workdir)
    assert marker["config"]["sft.steps"] == 2
    assert json.loads((workdir / "sft" / "DONE.json").read_text())["config"]["sft.steps"] == 4
    # The old last step was validated, too, and the earlier of equals is the best.
    best = [Checkpointer(d / "sft/checkpoints").best() for d in (workdir, tmp_path / "whole")]
    assert best == [(2, 0.0), (4, 0.0)]
    # Each says what all steps before it did. (A key's bias has no gradient but for rounding, which
    # Adam makes large, so parameters themselves differ.)
    found, expected = losses(workdir), losses(tmp_path / "whole")
    assert found.keys() == expected.keys() == {1, 2, 3, 4}
    assert found == pytest.approx(expected, rel=1e-4)
    assert abs(expected[4] / expected[2] - 1) > 1e-3
    config.sft.optimizer.lr = 0.5
    with pytest.raises(ConfigError, match=r"sft\.optimizer\.lr: expected 0\.5, found 0\.01 \(sft"):
        train(config, workdir)


def test_an_empty_pool_is_corrected_without_rating_again(config, workdir, monkeypatch, capsys):
    """With the keys that the error names; not once GRPO has trained on the pools."""
    facts = opened(config, workdir).dataset.splits["train"]
    rates = [0.25, 0.25, 0.0] * (len(facts) // 3)
    replace(monkeypatch, "sft", lambda run: None)

    def run_rate(run):
        ratings = [Rating(f.id, r, "hard") for f, r in zip(facts, rates, strict=True)]
        rate_as(workdir, *(json.dumps(dataclasses.asdict(rating)) for rating in ratings))
        print("rated")

    pools = {}

    def run_grpo(run):
        pools.update(_pools(run))
        _schedule(run, pools)

    replace(monkeypatch, "rate", run_rate)
    replace(monkeypatch, "grpo", run_grpo)
    config.stages = "sft,rate,grpo"
    config.grpo.mix.update(start=0.5, end=0.1)
    with pytest.raises(DataError, match=r"easy facts is empty.*in this workdir.*rate.easy_from"):
        train(config, workdir)
    config.rate.update(easy_from=0.25, never="drop")
    config.grpo.mix.update(start=1.0, end=1.0)
    train(config, workdir)
    assert capsys.readouterr().out.count("rated") == 1
    assert [len(pools[name]) for name in ("easy", "hard", "dropped")] == [32, 0, 16]
    kept = [rating.pool for rating in read_ratings(workdir / "rate" / "ratings.jsonl")]
    assert kept.count("easy") == 32
    config.rate.easy_from = 0.5
    with pytest.raises(ConfigError, match=r"rate\.easy_from: expected 0\.5, found 0\.25 \(grpo"):
        train(config, workdir)


def test_too_small_a_disk_is_named_and_leaves_nothing(config, workdir, monkeypatch):
    small = types.SimpleNamespace(free=10_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: small)
    check_refused(config, workdir, ConfigError, "the most that will be written, found 0.0 MB; ")


def rate_as(workdir, *lines):
    (workdir / "rate").mkdir(parents=True)
    (workdir / "rate" / "ratings.jsonl").write_text("".join(line + "\n" for line in lines))


def rating(fact, pool):
    rates = {"easy": 1.0, "hard": 0.25, "dropped": 0.0}
    return json.dumps({"fact": fact, "pass_rate": rates[pool], "pool": pool})


@pytest.mark.parametrize(
    ("there", "empty", "mixing", "way"),
    [
        ("easy", "hard", True, "raise rate.easy_from = 0.5, "),
        ("hard", "easy", True, "lower rate.easy_from = 0.5, .*grpo.mixing=False.*sft.steps"),
        ("dropped", "training", False, "rate.never=hard"),
    ],
)
def test_an_empty_pool_is_named_with_the_ways_out_before_a_rollout(
    config, workdir, there, empty, mixing, way
):
    config.grpo.mix.update(start=0.5, end=0.0)
    config.grpo.mixing = mixing
    config.rate.never = "drop"
    run = opened(config, workdir)
    rate_as(workdir, *(rating(fact.id, there) for fact in run.dataset.splits["train"]))
    with pytest.raises(DataError, match=f"the pool of {empty} facts is empty.*{way}") as error:
        run_grpo(run)
    assert f"48 {there}" in str(error.value)
    assert "in this workdir, without rating again: " in str(error.value)
    assert "\n" not in str(error.value)
    assert {p.name for p in workdir.iterdir()} == {"rate", "tokenizer", "data.json"}


def test_a_rating_of_no_training_fact_is_named_with_its_line(config, workdir):
    rate_as(workdir, rating("train:1", "hard"), rating("valid:1", "easy"))
    with pytest.raises(DataError, match=r"ratings\.jsonl:2: .* found fact 'valid:1';"):
        run_grpo(opened(config, workdir))


def test_pass_rates_that_changed_since_grpo_began_are_named(config, workdir, monkeypatch):
    """The pools follow from them, and the batches from the pools."""

    class Began(Exception):
        pass

    def begin(*_):
        raise Began

    monkeypatch.setattr("morer1_jax.stages.grpo.this_host", begin)
    run = opened(config, workdir)
    rate_as(workdir, *(rating(fact.id, "hard") for fact in run.dataset.splits["train"]))
    for _ in range(2):
        with pytest.raises(Began):
            run_grpo(run)
    path = workdir / "rate" / "ratings.jsonl"
    path.write_text(path.read_text().replace("0.25", "0.5", 1))
    with pytest.raises(DataError, match=rf"^{workdir}: rate/ratings\.jsonl changed since"):
        run_grpo(run)


def test_a_record_is_of_the_fact_in_its_row(config, workdir, monkeypatch):
    """Rows have the order in which they best share images, not that of the draw."""
    prompts, trained = 8, []

    def grpo_step(state, batch, number):
        # Each fact's right label as its answer.
        answer = np.broadcast_to(batch.gold[:, None], (prompts, 2))
        empty = np.zeros((prompts, 2, 1), np.int32)
        rollout = types.SimpleNamespace(tokens=empty, mask=empty > 0, answer=answer)
        rewards = np.zeros((prompts, 2))
        scored = types.SimpleNamespace(
            fact=batch.fact, rollout=rollout, reward=rewards, advantages=rewards, reward_parts={}
        )
        return state, {}, scored

    def train(name, folder, hooks, *_, **options):
        trained.append(hooks.batch(0))
        hooks.step(None, trained[0], 0)

    monkeypatch.setattr("morer1_jax.stages.grpo.make_programs", lambda *_, **__: None)
    monkeypatch.setattr("morer1_jax.stages.grpo.make_grpo_step", lambda *_: grpo_step)
    monkeypatch.setattr("morer1_jax.stages.grpo.fetch", lambda scored: scored)
    monkeypatch.setattr("morer1_jax.stages.grpo.train", train)
    monkeypatch.setattr(
        "morer1_jax.data.feed.share_images", lambda slots, _: list(range(len(slots)))[::-1]
    )
    config.grpo.prompts, config.grpo.loss.beta = prompts, 0.0
    run = opened(config, workdir)
    facts = run.dataset.splits["train"]
    rate_as(workdir, *(rating(fact.id, "hard") for fact in facts))
    run_grpo(run)
    records = list(map(json.loads, (workdir / "rollouts.jsonl").read_text().splitlines()))
    assert [record["fact"] for record in records[::2]] == [facts[i].id for i in trained[0].fact]
    assert [record["gold"] for record in records] == [record["answer"] for record in records]
    assert len({record["gold"] for record in records}) > 1


@pytest.fixture
def typed(command):
    """Runs the command, which ends in an error of the user's."""
    return lambda *args: command("morer1_jax.train", f"--config={TINY}", *args, code=2)


def test_the_command_ends_in_one_line_and_exit_code_2(typed, data, workdir):
    photo = truncate(data)
    given = [f"--workdir={workdir}", f"--config.data.folder={data}"]
    given += ["--config.stages=synthesise,sft", "--config.mesh.data=1", "--config.mesh.tensor=-1"]
    _, said = typed(*given)
    assert said.splitlines()[-1].startswith(f"error: {photo} (fact test:")
    assert "Traceback" not in said
    _, said = typed(*given, "--config.sft.stepz=3")
    assert said == "error: --config.sft.stepz: unknown key; did you mean sft.steps?\n"


def test_a_run_from_the_tensorflow_dataset_is_that_from_the_files(data, config, tmp_path):
    """Bit for bit; `tests/data/test_source.py` compares every batch."""
    more_tfds.build(data, tmp_path / "tfds")
    built = tmp_path / "tfds" / "more"
    shutil.copy(data / "reasoning.jsonl", built)
    config.sft.update(steps=2, eval_every=2, save_every=2)

    def run(name, folder):
        config.data.folder = str(folder)
        train(config, tmp_path / name)
        (best,) = (tmp_path / name / "sft" / "checkpoints" / "best").glob("step_*")
        parameters = ocp.PyTreeCheckpointer().restore(best / "arrays")
        metrics = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        learned = [
            {key: x for key, x in json.loads(line).items() if "time" not in key and "/" not in key}
            for line in metrics
        ]
        return parameters, learned, json.loads((tmp_path / name / "data.json").read_text())

    (ours, *our_rest), (theirs, *their_rest) = run("built", built), run("files", data)
    assert our_rest == their_rest
    assert [line["loss"] for line in our_rest[0] if "loss" in line]
    assert ours.keys() == theirs.keys() != set()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name])
