"""Tells from a launcher's variables whether it started several processes; refuses them if asked.

Most commands are made for one process: several would all write the same files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping

import jax

from morer1_jax.errors import ConfigError

# The number of processes according to Slurm (of srun's step, since a job of several tasks may start
# only one), Open MPI, MPICH and Intel MPI, MVAPICH, torchrun, JAX itself, and slices of TPUs.
_COUNTS = (
    "SLURM_STEP_NUM_TASKS",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "WORLD_SIZE",
    "JAX_NUM_PROCESSES",
    "MEGASCALE_NUM_SLICES",
)
# The index of this process among them, from 0.
_NUMBERS = (
    "SLURM_PROCID",
    "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",
    "MV2_COMM_WORLD_RANK",
    "RANK",
    "JAX_PROCESS_ID",
    "TPU_WORKER_ID",
    "CLOUD_TPU_TASK_ID",
)
# The processes' hosts, separated by commas.
_LISTS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")


def check_alone(*, devices: bool = True, environment: Mapping[str, str] | None = None) -> None:
    """Checks that this process is the only one of its command.

    Args:
        devices: whether to ask JAX too, which then reserves the devices.
        environment: the launcher's variables; this process's by default.

    Raises:
        ConfigError: there are several; the message names the variable that tells so.
    """
    if (several := started_beside_others(environment)) is not None:
        evidence, count = several
        variable = evidence.partition("=")[0]
        raise _refusal(
            count,
            f"{evidence}; start one process, or unset {variable} where this is the only one",
        )
    if devices and (count := jax.process_count()) > 1:
        raise _refusal(count, "jax.process_count(); start it on a machine of one host")


def started_beside_others(environment: Mapping[str, str] | None = None) -> tuple[str, int] | None:
    """Returns a launcher's variable that tells of several processes, and how many at least.

    Args:
        environment: the launcher's variables; this process's by default.
    """
    counts = _process_counts(os.environ if environment is None else environment)
    return next(((f"{name}={value}", count) for name, value, count in counts if count > 1), None)


def _process_counts(environment: Mapping[str, str]) -> Iterator[tuple[str, str, int]]:
    """Yields name and value of each launcher's variable, and the fewest processes it implies."""
    for name in (*_COUNTS, *_NUMBERS, *_LISTS):
        value = environment.get(name, "").strip()
        if name in _LISTS:
            yield name, value, len([host for host in value.split(",") if host.strip()])
        elif re.fullmatch(r"\d+", value):
            yield name, value, int(value) + (name in _NUMBERS)


def _refusal(count: int, evidence: str) -> ConfigError:
    return ConfigError(
        f"expected one process, found {count}: only `python -m morer1_jax.train` runs on several "
        f"hosts ({evidence})"
    )
