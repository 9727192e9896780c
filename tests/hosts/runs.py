"""Starts whole runs of the tiny config on several processes, and compares what they leave."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from processes import ROOT, environment, flags, free_port

from morer1_jax import stores
from morer1_jax.run.shelf import Shelf

CONFIG = ROOT / "tests" / "configs" / "tiny.py"
DOOMED = Path(__file__).with_name("doomed.py")
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
# Seconds: for a run on a busy machine, and in which all must have ended after one has.
TIMEOUT, SOON = 900.0, 60.0
# What depends on the machine's mood, and on how often the run was started.
TIMED = ("step_time", "time/", "throughput/", "mfu", "compilations")
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


class Started:
    """The processes of a run; their output is in files in a folder."""

    def __init__(self, folder, workdir, count, devices, more=(), fates=None, given=SET):
        """Starts them.

        Args:
            devices: of all processes together.
            more: flags after `given`, the config's that all these runs share.
            fates: by a process's number, arguments of `doomed.py` but for the file.
        """
        port = free_port()
        self.count = count
        self.logs = [folder / f"{time.time_ns()}-{number}.log" for number in range(count)]
        # When each process's moment had come: the file's time.
        self.moments = [log.with_suffix(".moment") for log in self.logs]
        self.processes = []
        variables = environment(devices // count, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
        # All of a folder's runs on so many processes share their programs, also the small ones.
        variables["JAX_COMPILATION_CACHE_DIR"] = str(folder / f"compiled-{count}")
        variables["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        for number, log in enumerate(self.logs):
            own = flags(number, count, port) if count > 1 else []
            program = ["-m", "morer1_jax.train"]
            if fate := (fates or {}).get(number):
                program = [str(DOOMED), json.dumps({**fate, "file": str(self.moments[number])})]
            command = [*program, f"--config={CONFIG}", f"--workdir={workdir}"]
            with open(log, "wb") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *command, *given, *more, *own],
                        env=variables,
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
        """Waits until all have ended, with these codes; returns the seconds since the moment of the
        process that has one, else since this call."""
        began, ended = time.monotonic(), time.time()
        try:
            found = [process.wait(max(1, began + seconds - time.monotonic())) for process in self]
            ended = time.time()
        finally:
            for process in self:
                process.kill()
        assert found == codes, self.said()
        moments = [os.stat(path).st_mtime for path in self.moments if path.exists()]
        return ended - moments[0] if moments else time.monotonic() - began

    def __iter__(self):
        return iter(self.processes)


def copy_of(root, cache):
    """The folder in which the first process of a run works whose workdir is in a bucket."""
    name = hashlib.sha256(root.encode()).hexdigest()[:16]
    return cache / f"{name}-0"


def logged(workdir, stage, step):
    """Whether a stage's step is in the log."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return any(r["stage"] == stage and r["step"] >= step for r in map(json.loads, lines))


def records(workdir):
    """The log's lines without times, in the order of steps."""
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


def best_arrays(workdir, stage):
    """Step and metric of a stage's best parameters, and these."""
    shelf = Shelf(workdir / stage / "checkpoints")
    best = shelf.best()
    return best, arrays(shelf.best_parameters(best[0]))


def check_same(workdir, reference, steps=STEPS, files=FILES):
    """Two workdirs hold the same run, bit for bit."""
    workdir, reference = map(stores.absolute, (workdir, reference))
    assert records(workdir) == records(reference)
    check_whole(workdir, steps)
    for name in files:
        assert stores.read_bytes(workdir / name) == stores.read_bytes(reference / name), name
    for stage in steps:
        best, found = best_arrays(workdir, stage)
        best_expected, expected = best_arrays(reference, stage)
        assert best == best_expected
        assert found.keys() == expected.keys()
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name], f"{stage}: {name}")
        assert len(found) > 20


def check_close(workdir, reference, steps, bound=1e-5):
    """Two workdirs hold the same run, on different numbers of processes: files and tokens are
    equal, numbers within a share of each tensor's largest value."""
    workdir, reference = map(stores.absolute, (workdir, reference))
    check_whole(workdir, steps)
    for found, expected in zip(records(workdir), records(reference), strict=True):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key] == (value if isinstance(value, str) else _near(value)), (key, found)
    for name in set(FILES) - {"rollouts.jsonl"}:  # It has numbers, too.
        assert stores.read_bytes(workdir / name) == stores.read_bytes(reference / name), name
    for found, expected in zip(*map(_rollouts, (workdir, reference)), strict=True):
        assert (found["fact"], found["completion"]) == (expected["fact"], expected["completion"])
    for stage in steps:
        best, found = best_arrays(workdir, stage)
        best_expected, expected = best_arrays(reference, stage)
        assert best[0] == best_expected[0]
        for name, array in expected.items():
            largest = max(np.abs(array).max(), 1e-30)
            # A bias of keys changes no attention: its gradient is rounding alone, which the
            # optimizer makes as large as any, step after step.
            of_keys = name.endswith(("/k/bias", "/qkv/bias"))
            most = np.abs(found[name] - array).max() / largest
            assert most < (10 * bound if of_keys else bound), (name, most)


def check_whole(workdir, steps):
    """Every step is in the log once, and there is one report."""
    heads = [(r["stage"], r["step"], r["kind"]) for r in records(workdir)]
    assert len(set(heads)) == len(heads)
    assert {h[:2] for h in heads if h[2] == "train"} == {
        (stage, step) for stage, last in steps.items() for step in range(1, last + 1)
    }
    if stores.names(workdir / "eval"):
        assert b"<html" in stores.read_bytes(workdir / "report.html")


def _near(value):
    return pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True)


def _rollouts(workdir):
    return [json.loads(s) for s in stores.read_bytes(workdir / "rollouts.jsonl").splitlines()]
