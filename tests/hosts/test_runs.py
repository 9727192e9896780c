"""Whole runs on several processes, stopped and killed, with their workdir in a bucket."""

import hashlib
import json
import signal
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
from bucket import served
from processes import HOST, ROOT, environment, flags, free_port

from morer1_jax import stores
from morer1_jax.run.shelf import Shelf

CONFIG = ROOT / "tests" / "configs" / "tiny.py"
STAGES = "synthesise,sft,rate,grpo,evaluate"
STEPS = {"sft": 8, "grpo": 3}
SET = [
    f"--config.stages={STAGES}",
    *(f"--config.{stage}.steps={steps}" for stage, steps in STEPS.items()),
    "--config.sft.save_every=3",
    "--config.sft.eval_every=4",
    "--config.grpo.save_every=1",
    "--config.grpo.prompts=4",
    "--config.rate.batch=4",
]
TIMEOUT = 600.0
SOON = 60.0
# What depends on the machine's mood, and on how often the run was started.
TIMED = ("step_time", "time/", "throughput/", "mfu", "compilations")


class Started:
    """The processes of a run; their output is in files beside each other."""

    def __init__(self, folder, workdir, count, devices, more=()):
        port = free_port()
        self.count = count
        self.logs = [folder / f"{time.time_ns()}-{number}.log" for number in range(count)]
        self.processes = []
        given = environment(devices // count, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
        for number, log in enumerate(self.logs):
            own = flags(number, count, port) if count > 1 else []
            command = ["-m", "morer1_jax.train", f"--config={CONFIG}", f"--workdir={workdir}"]
            with open(log, "wb") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *command, *SET, *more, *own],
                        env=given,
                        stdout=file,
                        stderr=file,
                        cwd=ROOT,
                    )
                )

    def said(self):
        return "\n".join(f"-- {log}\n{log.read_text()[-3000:]}" for log in self.logs)

    def until(self, happened):
        """Waits until something has happened while the run goes on."""
        deadline = time.monotonic() + TIMEOUT
        while not happened():
            assert all(process.poll() is None for process in self.processes), self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def end(self, codes, seconds=TIMEOUT):
        """Waits until all have ended, with these codes; returns the seconds it took."""
        began = time.monotonic()
        try:
            found = [process.wait(max(1, began + seconds - time.monotonic())) for process in self]
        finally:
            for process in self:
                process.kill()
        assert found == codes, self.said()
        return time.monotonic() - began

    def __iter__(self):
        return iter(self.processes)


@pytest.fixture(scope="module")
def bucket():
    """A folder of a bucket that a server on loopback holds."""
    pytest.importorskip("gcp_storage_emulator")
    pytest.importorskip("gcsfs")
    with served() as root:
        yield root


@pytest.fixture(scope="module")
def reference(once):
    """A run on two processes that is left in peace: its workdir."""

    def make(folder):
        Started(folder, folder / "run", 2, 2).end([0, 0])

    return once("undisturbed", make) / "run"


def copy_of(root, cache):
    """The folder in which the first process of a run works."""
    name = hashlib.sha256(root.encode()).hexdigest()[:16]
    return cache / f"{name}-0"


def logged(workdir, stage, step):
    """Whether a stage's step is in the log."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return any(r["stage"] == stage and r["step"] >= step for r in map(json.loads, lines))


def records(workdir):
    lines = stores.read_bytes(workdir / "metrics.jsonl").decode().splitlines()
    untimed = [
        {k: v for k, v in json.loads(line).items() if not k.startswith(TIMED)} for line in lines
    ]
    return sorted(untimed, key=lambda r: (r["stage"], r["step"], r["kind"]))


def arrays(path):
    """A checkpoint's arrays by name, as NumPy arrays."""
    names = json.loads(stores.read_bytes(path / "manifest.json"))["body"]["leaves"]
    as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    found = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(
        path / "arrays",
        args=ocp.args.PyTreeRestore(item=dict.fromkeys(names, 0), restore_args=as_numpy),
    )
    return {name: np.asarray(found[name]) for name in names}


FILES = (
    "config.json",
    "data.json",
    "rate/ratings.jsonl",
    "rollouts.jsonl",
    "eval/sft.json",
    "eval/grpo.json",
    "eval/sft.answers.jsonl",
    "eval/grpo.answers.jsonl",
)


def check_same(workdir, reference):
    """Two workdirs hold the same run, bit for bit."""
    workdir, reference = map(stores.absolute, (workdir, reference))
    assert records(workdir) == records(reference)
    heads = [(r["stage"], r["step"], r["kind"]) for r in records(workdir)]
    assert len(set(heads)) == len(heads)
    assert {h[:2] for h in heads if h[2] == "train"} == {
        (stage, step) for stage, steps in STEPS.items() for step in range(1, steps + 1)
    }
    for name in FILES:
        assert stores.read_bytes(workdir / name) == stores.read_bytes(reference / name), name
    for stage in STEPS:
        ours, theirs = (Shelf(root / stage / "checkpoints") for root in (workdir, reference))
        assert ours.best() == theirs.best()
        step = ours.best()[0]
        found, expected = (arrays(shelf.best_parameters(step)) for shelf in (ours, theirs))
        assert found.keys() == expected.keys()
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name], f"{stage}: {name}")
        assert len(found) > 20
    assert b"<html" in stores.read_bytes(workdir / "report.html")


def test_a_run_in_a_bucket_that_is_stopped_and_killed_is_the_one_left_in_peace(
    tmp_path, bucket, reference, monkeypatch
):
    workdir = f"{bucket}/killed"
    cache = tmp_path / "cache"
    monkeypatch.setenv("MORER1_WORKDIR_CACHE", str(cache))
    # Told to stop in SFT: it saves, and says that it is to be started again.
    run = Started(tmp_path, workdir, 2, 2)
    local = copy_of(workdir, cache)
    run.until(lambda: logged(local, "sft", 2))
    run.processes[1].terminate()
    assert run.end([75, 75]) < SOON
    assert "the same command goes on" in run.said()
    assert Shelf(f"{workdir}/sft/checkpoints").latest() >= 2
    # One is killed while facts are rated: the other ends, and names it.
    run = Started(tmp_path, workdir, 2, 2)
    run.until(lambda: (local / "rate" / "ratings.jsonl.unfinished").exists())
    run.processes[1].kill()
    assert run.end([3, -signal.SIGKILL]) < SOON
    assert f"process 1 of 2 on {HOST}" in run.logs[0].read_text()
    # Started again it ends, and nothing tells that it was ever disturbed.
    Started(tmp_path, workdir, 2, 2).end([0, 0])
    check_same(workdir, reference)
