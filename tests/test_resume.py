"""A run that is killed, at any moment, and started again is the run that never was."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from morer1_jax.run.checkpoint import Checkpointer

CONFIG = Path(__file__).parent / "configs" / "tiny.py"
STAGES = "synthesise,sft,rate,grpo"
STEPS = {"sft": 40, "grpo": 8}
# GRPO with several updates to a rollout, each of a part.
GRPO = [f"--config.grpo.{key}" for key in ("updates=2", "micro_batches=2", "scale_rewards=batch")]
# Of a constant learning rate, and used by no later stage: its last state is kept.
GOES_ON = ("grpo",)
TIMEOUT = 900.0  # of a busy machine

# What depends on the machine's mood, and on how often the run was started.
TIMED = ("step_time", "time/", "throughput/", "mfu", "compilations")


@pytest.fixture(scope="module")
def start(without_torch, tmp_path_factory):
    """Starts a run: `(process, its log's path)`."""
    environment = {
        **without_torch(),
        "OMP_NUM_THREADS": "1",
        # Of this file alone: a killed run may leave half of a program.
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        # Of programs this small, compiling is most of the time.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }

    def begin(workdir, stages=STAGES, *overrides):
        command = [sys.executable, "-m", "morer1_jax.train", f"--config={CONFIG}"]
        command += [f"--workdir={workdir}", f"--config.stages={stages}", *GRPO, *overrides]
        with open(workdir.with_suffix(".log"), "ab") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log), log.name

    return begin


@pytest.fixture(scope="module")
def reference(start, tmp_path_factory):
    """The workdir of a run that is left in peace."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    finish(start(workdir))
    return workdir


def finish(run):
    process, log = run
    try:
        code = process.wait(TIMEOUT)
    finally:
        process.kill()
    assert code == 0, Path(log).read_text()[-3000:]


def kill(run, workdir, stage, step, delay):
    """Kills the run a moment after the step is in its log."""
    process, log = run
    deadline = time.monotonic() + TIMEOUT
    try:
        while not any(r["stage"] == stage and r["step"] >= step for r in records(workdir)):
            assert process.poll() is None, Path(log).read_text()[-3000:]
            assert time.monotonic() < deadline, f"{stage} step {step} never came"
            time.sleep(0.005)
        time.sleep(delay)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL, f"ended before it was killed at {stage} step {step}"


def records(workdir, name="metrics.jsonl"):
    """The whole lines of a log."""
    path = workdir / name
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def arrays(workdir, stage):
    """The arrays that a stage leaves, by name: the best, and the last state where it is kept."""
    checkpoints = Checkpointer(workdir / stage / "checkpoints")
    step = STEPS[stage]
    assert checkpoints.best()[0] == step
    assert checkpoints.latest() == (step if stage in GOES_ON else None)
    out = {f"best/{name}": x for name, x in read(checkpoints.folder / "best", step).items()}
    return out | (read(checkpoints.folder, step) if stage in GOES_ON else {})


def read(folder, step):
    folder = folder / f"step_{step:08d}"
    names = json.loads((folder / "manifest.json").read_text())["body"]["leaves"]
    as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    found = reader.restore(
        folder / "arrays",
        args=ocp.args.PyTreeRestore(item=dict.fromkeys(names, 0), restore_args=as_numpy),
    )
    return {name: np.asarray(found[name]) for name in names}


def check_same(workdir, reference):
    for stage in STEPS:
        found, expected = arrays(workdir, stage), arrays(reference, stage)
        assert found.keys() == expected.keys()
        for name, array in found.items():
            np.testing.assert_array_equal(array, expected[name], f"{stage}: {name}")
        assert len(found) > 20
        best = Checkpointer(workdir / stage / "checkpoints").best()
        assert best == Checkpointer(reference / stage / "checkpoints").best()
    for file in ("rate/ratings.jsonl", "config.json", "rollouts.jsonl"):
        assert (workdir / file).read_bytes() == (reference / file).read_bytes(), file
    found, expected = (
        [{k: v for k, v in record.items() if not k.startswith(TIMED)} for record in records(folder)]
        for folder in (workdir, reference)
    )
    assert found == expected


def check_killed(workdir, start, reference, kills):
    """Kills one run at each of `kills` in turn, then lets it end."""
    for stage, step, delay in kills:
        kill(start(workdir), workdir, stage, step, delay)
    finish(start(workdir))
    check_same(workdir, reference)


def test_a_run_logs_every_step_once_and_learns_from_its_rollouts(reference):
    heads = [(r["stage"], r["step"], r["kind"]) for r in records(reference)]
    assert heads == [
        *(("sft", step, "train") for step in range(1, 41)),
        ("sft", 40, "valid"),
        *(("grpo", step, "train") for step in range(1, 9)),
        ("grpo", 8, "valid"),
    ]
    rollouts = [(r["step"], r["sample"]) for r in records(reference, "rollouts.jsonl")]
    assert rollouts == [(step, sample) for step in range(1, 9) for _ in "ab" for sample in (0, 1)]
    # Else the runs below would agree whatever became of their rollouts.
    assert len({r["reward"] for r in records(reference, "rollouts.jsonl")}) > 2
    assert all("kl" in r for r in records(reference) if r["kind"] == "train" and "reward" in r)
    before, after = arrays(reference, "sft"), arrays(reference, "grpo")
    assert (after["step"], after["opt_state/1/0/count"]) == (STEPS["grpo"], 2 * STEPS["grpo"])
    moved = [n for n in after if n.startswith("best/") and (after[n] != before[n]).any()]
    assert len(moved) > 20


def test_the_stages_beside_the_main_way_run_and_are_scored(reference, start, tmp_path):
    workdir = shutil.copytree(reference, tmp_path / "run")
    finish(start(workdir, "baselines,control,evaluate", "--config.control.steps=3"))
    systems = ("sft", "control", "grpo", "majority", "photo_hidden", "title_hidden")
    for name in systems:
        assert "micro_f1" in json.loads((workdir / "eval" / f"{name}.json").read_text())
        answers = [json.loads(line) for line in (workdir / "eval" / f"{name}.answers.jsonl").open()]
        assert len(answers) == 8
    stages = {record["stage"] for record in records(workdir)}
    assert stages == {
        "sft",
        "grpo",
        "control",
        *(f"baselines/{n}_hidden" for n in ("photo", "title")),
    }
    page = (workdir / "report.html").read_text()
    assert all(name in page for name in ("SFT for longer", "Title hidden", "Majority label"))


@pytest.mark.soak
def test_without_mixing_and_without_a_reference(reference, start, tmp_path):
    workdir = tmp_path / "run"
    for name in ("data", "tokenizer", "sft", "rate"):
        shutil.copytree(reference / name, workdir / name)
    overrides = [f"--config.grpo.{key}" for key in ("mixing=False", "loss.beta=0.0", "steps=3")]
    finish(start(workdir, "grpo", *overrides))
    trained = [r for r in records(workdir) if r["kind"] == "train"]
    assert [r["step"] for r in trained] == [1, 2, 3]
    found = read(workdir / "grpo" / "checkpoints", 3)
    assert (found["step"], found["opt_state/1/0/count"]) == (3, 6)
    # What there is no reference for is not logged as 0.
    assert not any("kl" in r for r in trained)


def test_a_run_killed_twice_ends_as_one_never_killed(reference, start, tmp_path):
    rng = random.Random(0)
    kills = (
        ("sft", rng.randint(2, 38), rng.uniform(0, 0.2)),
        ("grpo", rng.randint(3, 6), rng.uniform(0, 0.2)),
    )
    check_killed(tmp_path / "run", start, reference, kills)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 5))
def test_runs_killed_twenty_times_end_as_one_never_killed(reference, start, tmp_path, seed):
    rng = random.Random(seed)
    # Far enough apart that a run cannot have passed its next moment before it is killed.
    steps = [("sft", step + rng.randint(0, 3)) for step in sorted(rng.sample(range(1, 36, 7), 3))]
    steps += [("grpo", rng.randint(1, 2)), ("grpo", rng.randint(5, 6))]
    kills = [(*moment, rng.uniform(0, 0.2)) for moment in steps]
    check_killed(tmp_path / "run", start, reference, kills)
