"""A process that a launcher started beside others knows it, before JAX does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from morer1_jax.errors import ConfigError
from morer1_jax.hosts.alone import check_alone

TOOL = Path(__file__).parents[2] / "tools" / "write_reasoning.py"
WORDS = "only `python -m morer1_jax.train` runs on several hosts"


@pytest.mark.parametrize(
    ("environment", "count", "named"),
    [
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}, 4, "SLURM_STEP_NUM_TASKS=4"),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "8"}, 2, "SLURM_STEP_NUM_TASKS=2"),
        ({"SLURM_PROCID": "3"}, 4, "SLURM_PROCID=3"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, 2, "OMPI_COMM_WORLD_SIZE=2"),
        ({"PMI_SIZE": "3", "PMI_RANK": "1"}, 3, "PMI_SIZE=3"),
        ({"WORLD_SIZE": "8", "RANK": "0"}, 8, "WORLD_SIZE=8"),
        ({"JAX_PROCESS_ID": "1"}, 2, "JAX_PROCESS_ID=1"),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1,t2,t3", "TPU_WORKER_ID": "0"}, 4, "=t0,t1,t2,t3"),
        ({"TPU_WORKER_ID": "5"}, 6, "TPU_WORKER_ID=5"),
        ({"MEGASCALE_NUM_SLICES": "2"}, 2, "MEGASCALE_NUM_SLICES=2"),
    ],
)
def test_one_of_several_is_refused_and_told_by_what(environment, count, named):
    message = f"^expected one process, found {count}: {WORDS}"
    with pytest.raises(ConfigError, match=message) as error:
        check_alone(environment=environment)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_NNODES": "1"},
        # A batch script, or an allocation's shell, with room for several, that starts one python.
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_PROCID": "0"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_TASKS_PER_NODE": "4"},
        # A step of one task in a job that has room for more.
        {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        {"TPU_WORKER_HOSTNAMES": "t0,", "TPU_PROCESS_ADDRESSES": "t0:8476"},
        {"WORLD_SIZE": "", "RANK": "none"},
    ],
)
def test_one_alone_passes(environment):
    check_alone(environment=environment)


def test_jax_is_asked_too_unless_nothing_is_computed(monkeypatch):
    monkeypatch.setattr("jax.process_count", lambda: 2)
    message = f"^expected one process, found 2: {WORDS} .jax.process_count"
    with pytest.raises(ConfigError, match=message):
        check_alone(environment={})
    check_alone(devices=False, environment={})


def test_two_that_a_launcher_starts_side_by_side_both_end(tmp_path):
    """To JAX each of them is alone."""
    # Of the commands the one that imports least.
    command = [sys.executable, str(TOOL), f"--data={tmp_path}", "--count=1", "--model=none"]
    both = [
        subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": str(number)},
        )
        for number in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [2, 2], said
    assert all(
        text.startswith(f"error: expected one process, found 2: {WORDS} (SLURM_STEP_NUM_TASKS=2; ")
        for text in said
    ), said
    assert [text.count("\n") for text in said] == [1, 1]
    assert not list(tmp_path.iterdir())
