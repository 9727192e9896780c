"""Finds out which process of which run this one is: from flags, or from what launched it."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping

# What `jax.distributed.initialize` uses; this alone tells without connecting.
from jax._src import clusters, hardware_utils

from morer1_jax.errors import ConfigError, one_line
from morer1_jax.hosts.alone import started_beside_others

# Seconds that processes wait for each other at the start: those that a person starts by hand with
# flags, where a typing error should be told soon; and those of a launcher, whose images may have to
# be fetched first.
BY_HAND, BY_LAUNCHER = 50, 600
_CHIPS = "TPU chips"
_FLAGS = "--coordinator=host:port of process 0, --processes=number of all, --process=this one's"


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of this process among those of its run.

    Attributes:
        coordinator: host of the first process and a port that is free there, as is the next one.
        processes: number of all.
        process: this one's number, from 0.
        devices: numbers of the host's devices that are this process's; None for all.
        patience: seconds that the processes wait for each other at the start.
        said_by: what told so, for errors.
    """

    coordinator: str
    processes: int
    process: int
    devices: tuple[int, ...] | None
    patience: float
    said_by: str

    @property
    def host_and_port(self) -> tuple[str, int]:
        """The coordinator's two parts."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


def find_place(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    patience: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> Place | None:
    """Returns this process's place; None if it is alone.

    Flags come first: all three are needed, or `processes` = 1 for a process alone. Without flags
    JAX finds the others on Cloud TPU (queued resources, GKE, several slices), under Slurm, Open MPI
    and in an indexed job of Kubernetes.

    A launcher that starts one process on each host gives it all of the host's devices; of several
    on a host, each gets the one device that JAX chooses for it.

    Args:
        coordinator, processes, process: the flags of these names.
        patience: seconds to wait for the others; None: by how the process was started.
        environment: the launcher's variables; this process's by default.

    Raises:
        ConfigError: flags are missing or do not fit each other, or a launcher started several
            processes that JAX cannot connect by itself.
    """
    if processes == 1 and coordinator is None and not process:
        return None
    if (coordinator, processes, process) != (None, None, None):
        _check_flags(coordinator, processes, process)
        patience = BY_HAND if patience is None else patience
        return Place(coordinator, processes, process, None, patience, "flags")
    environment = os.environ if environment is None else environment
    evidence = _evidence(environment)
    if evidence is None:
        return None
    patience = BY_LAUNCHER if patience is None else patience
    try:
        found = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, int(patience)
        )
    except Exception as error:  # Of requests, of the client of Kubernetes, or RuntimeError.
        raise _unknown(evidence, one_line(error)) from None
    coordinator, processes, process, devices = found
    if None in (coordinator, processes, process):
        if evidence.endswith(_CHIPS):
            return None  # Chips alone tell of no other host.
        raise _unknown(evidence, "JAX does not know this launcher")
    if processes == 1:
        return None
    # Under Slurm and Open MPI JAX gives each process the device of its number on the host, even if
    # it is the only one there.
    shared = devices is not None and _count_on_host(environment) != 1
    return Place(
        coordinator,
        processes,
        process,
        tuple(devices) if shared else None,
        patience,
        evidence,
    )


def _check_flags(coordinator: str | None, processes: int | None, process: int | None) -> None:
    flags = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    if missing := [name for name, value in flags.items() if value is None]:
        raise ConfigError(
            f"{' and '.join(missing)}: expected, since another of the three is given; give {_FLAGS}"
        )
    if not (match := re.fullmatch(r".+:(\d+)", coordinator)) or not 0 < int(match[1]) < 65536:
        raise ConfigError(f"--coordinator={coordinator}: expected host:port, such as 10.0.0.2:8476")
    if processes < 1:
        raise ConfigError(f"--processes={processes}: expected at least 1")
    if not 0 <= process < processes:
        raise ConfigError(
            f"--process={process}: expected 0 to {processes - 1}, since --processes={processes}"
        )


def _evidence(environment: Mapping[str, str]) -> str | None:
    """Returns what tells that this process may be one of several; None if nothing does."""
    if (several := started_beside_others(environment)) is not None:
        return several[0]
    if environment.get("KUBERNETES_SERVICE_HOST") and environment.get("JOB_COMPLETION_INDEX"):
        return f"JOB_COMPLETION_INDEX={environment['JOB_COMPLETION_INDEX']}"
    # On Cloud TPU VMs without GKE only the metadata server knows of other workers.
    chips, _ = hardware_utils.num_available_tpu_chips_and_device_id()
    if chips and "TPU_SKIP_MDS_QUERY" not in environment:
        return f"{chips} {_CHIPS}"
    return None


def _count_on_host(environment: Mapping[str, str]) -> int | None:
    """Returns how many processes of the run a launcher started on this host; None if unknown.

    Open MPI comes first, as in JAX: its processes may have the variables of a job of Slurm around
    them.
    """
    if ours := environment.get("OMPI_COMM_WORLD_LOCAL_SIZE"):
        return int(ours)
    # For each host of srun's step: `1(x4)`, or `2(x3),1`.
    counts = [
        int(match[1])
        for match in re.finditer(
            r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", "")
        )
        for _ in range(int(match[2] or 1))
    ]
    host = int(environment.get("SLURM_NODEID", 0))
    return counts[host] if host < len(counts) else None


def _unknown(evidence: str, reason: str) -> ConfigError:
    return ConfigError(
        f"expected to find the other processes of {evidence}, found none: {reason}; give {_FLAGS}; "
        "or --processes=1 where this is the only one"
    )
