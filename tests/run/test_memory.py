"""What is freed stays with the process, so that the next step need not map it again."""

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

done = keep_freed_memory() if sys.argv[1] == "keep" else True
before = resident()
block = np.ones(1 << 28, np.uint8)
del block
print(int(done), resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator is asked")
@pytest.mark.parametrize("way", ["keep", "return"])
def test_freed_memory_stays(way):
    """256 MB that are freed at once, with and without."""
    ran = subprocess.run(
        [sys.executable, "-c", _SCRIPT, way], capture_output=True, text=True, check=True
    )
    done, more = map(int, ran.stdout.split())
    if not done:
        pytest.skip("the C library is not glibc")
    assert (more > 200) == (way == "keep")
