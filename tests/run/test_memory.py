"""What is freed stays with the process, so that the next step need not map it again."""

import platform
import subprocess
import sys

import pytest

_SCRIPT = """
import sys
from pathlib import Path
import numpy as np
from morer1_jax.run.memory import keep_freed_memory

def resident():
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) // 1024

done = keep_freed_memory() if sys.argv[1] == "keep" else False
before = resident()
block = np.ones(1 << 28, np.uint8)
del block
print(int(done), resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is asked")
@pytest.mark.parametrize(
    ("way", "platforms", "kept"),
    [("keep", "cpu", True), ("keep", "tpu,cpu", False), ("return", "cpu", False)],
)
def test_freed_memory_stays(way, platforms, kept, monkeypatch):
    """256 MB that are freed at once, with and without; not beside an accelerator."""
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    ran = subprocess.run(
        [sys.executable, "-c", _SCRIPT, way], capture_output=True, text=True, check=True
    )
    done, more = map(int, ran.stdout.split())
    assert bool(done) == (more > 200) == kept
