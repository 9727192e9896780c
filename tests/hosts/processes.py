"""Starts the processes of a run on this machine, and waits for them."""

import dataclasses
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

MEMBER = Path(__file__).with_name("member.py")
ROOT = Path(__file__).parents[2]
HOST = socket.gethostname()


def free_port():
    """A port that is free, as is the one after it."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("", port + 1))
            except (OSError, OverflowError):
                continue
            return port


@dataclasses.dataclass
class Ended:
    """How a process ended: its exit code, what it printed, and after how many seconds."""

    code: int
    out: str
    err: str
    seconds: float


def flags(process, count, port):
    return [f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={process}"]


def environment(devices=1, **others):
    """The environment of a process with so many devices, that no launcher has started."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_", "TPU_"))}
    quick = os.environ.get("XLA_FLAGS", "").split()
    own = [flag for flag in quick if "device_count" not in flag]
    return {
        **kept,
        "XLA_FLAGS": " ".join([f"--xla_force_host_platform_device_count={devices}", *own]),
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))),
        "PYTHONUNBUFFERED": "1",
    } | others


def start(command, **options):
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def wait(processes, seconds=90):
    """Waits for all of them; kills what has not ended in time, which then has a code below 0."""
    began, ended = time.monotonic(), []
    for process in processes:
        try:
            out, err = process.communicate(timeout=max(1, began + seconds - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
        ended.append(Ended(process.returncode, out, err, time.monotonic() - began))
    return ended


def members(count, *actions, port=None, commands=None, **environments):
    """Starts `member.py` as each process of a run; all do the same, or each its own action."""
    port = port or free_port()
    actions = actions * count if len(actions) == 1 else actions
    return [
        start([MEMBER, *flags(number, count, port), f"--action={action}"], env=environment())
        for number, action in enumerate(actions)
    ]
