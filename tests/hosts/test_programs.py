"""A run's programs on 1, 2 and 4 processes: the same numbers, whatever order the devices have."""

import math

import numpy as np
import pytest
from processes import ROOT, environment, flags, free_port, start, wait

PROGRAMS = ROOT / "tests" / "hosts" / "programs.py"
BOUND = 1e-5  # of a tensor's largest value

# Sizes of the mesh, processes, and the seed of the devices' order; rows of which the parts of a
# process are not neighbours, and axes `tensor` that span processes.
CASES = [
    ("2,1,2", 2, 3),
    ("2,2,2", 2, 3),
    ("2,2,2", 4, 0),
    ("2,2,2", 4, 5),
    ("8,1,1", 2, 4),
    ("8,1,1", 4, 5),
    ("1,8,1", 4, 5),
    ("1,2,4", 2, 3),
    ("1,2,4", 4, 0),
]
DAILY = CASES[:1]  # Of fewer devices, which compile faster.


def run(folder, mesh, processes, order):
    out, port = folder / f"{processes}.npz", free_port()
    command = [PROGRAMS, f"--mesh={mesh}", f"--order={order}", f"--out={out}"]
    own = [flags(number, processes, port) if processes > 1 else [] for number in range(processes)]
    devices = math.prod(map(int, mesh.split(",")))
    given = environment(devices // processes, JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    ended = wait([start([*command, *more], env=given) for more in own], seconds=900)
    assert [process.code for process in ended] == [0] * processes, ended
    return np.load(out)


@pytest.mark.parametrize(
    ("mesh", "processes", "order"),
    [
        pytest.param(*case, marks=() if case in DAILY else pytest.mark.soak, id=str(case))
        for case in CASES
    ],
)
def test_several_processes_compute_what_one_does(once, tmp_path, mesh, processes, order):
    alone = np.load(once(f"mesh-{mesh}", lambda folder: run(folder, mesh, 1, 0)) / "1.npz")
    together = run(tmp_path, mesh, processes, order)
    assert set(alone.files) == set(together.files)
    parts = int(np.prod([int(size) for size in mesh.split(",")[:2]]))
    # Each part of the rows was prepared, by as many processes as hold it.
    assert set(together["parts"]) == set(range(parts))
    compared = 0
    for name in set(alone.files) - {"parts"}:
        ours, theirs = together[name], alone[name]
        if theirs.dtype.kind != "f":
            np.testing.assert_array_equal(ours, theirs, name)
            continue
        worst = np.abs(ours - theirs).max() / max(np.abs(theirs).max(), 1e-30)
        assert worst <= BOUND, f"{name}: {worst:.2e} of the largest value"
        compared += np.abs(theirs).max() > 0
    assert compared > 150
