"""One process alone: what is refused until a run may have several.

Processes that a launcher starts side by side do not know of one another before
`jax.distributed.initialize`: each believes that it is alone, and all write the same files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping

import jax

from morer1_jax.errors import ConfigError

# How many processes there are: by Slurm (of srun's step; a job that has room for several tasks may
# start one), Open MPI, MPICH and Intel MPI, MVAPICH, torchrun, JAX's own, and slices of TPUs.
_COUNTS = (
    "SLURM_STEP_NUM_TASKS",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "WORLD_SIZE",
    "JAX_NUM_PROCESSES",
    "MEGASCALE_NUM_SLICES",
)
# Which of them this one is, from 0.
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
# All of them, separated by commas.
_LISTS = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")


def check_alone(*, devices: bool = True, environment: Mapping[str, str] | None = None) -> None:
    """Finds out whether this process is the only one of its command.

    Args:
      devices: whether to ask JAX too, which takes hold of the devices.
      environment: the launcher's variables; None: this process's.

    Raises:
      ConfigError: there are several, with what said so.
    """
    for name, value, count in _told(os.environ if environment is None else environment):
        if count > 1:
            raise _refusal(
                count,
                f"{name}={value}; start one process, or unset {name} where this is the only one",
            )
    if devices and (count := jax.process_count()) > 1:
        raise _refusal(count, "jax.process_count(); start it on a machine of one host")


def _told(environment: Mapping[str, str]) -> Iterator[tuple[str, str, int]]:
    """Each variable that is there, its value, and how many processes it means at least."""
    for name in (*_COUNTS, *_NUMBERS, *_LISTS):
        value = environment.get(name, "").strip()
        if name in _LISTS:
            yield name, value, len([host for host in value.split(",") if host.strip()])
        elif re.fullmatch(r"\d+", value):
            yield name, value, int(value) + (name in _NUMBERS)


def _refusal(count: int, why: str) -> ConfigError:
    return ConfigError(
        f"{count} processes found, one expected: several hosts are not supported yet ({why})"
    )
