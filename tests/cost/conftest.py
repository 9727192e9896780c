"""Programs compiled for TPUs, where libtpu is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def compiled(once):
    """`compiled(name)`: the optimised HLO of a program in `programs.py`, for sixteen chips."""
    pytest.importorskip("libtpu")

    def make(folder):
        # Compiled as users' programs are: with all optimisations, sources and no cache.
        settings = ("XLA_", "JAX_", "LIBTPU_")
        environment = {k: v for k, v in os.environ.items() if not k.startswith(settings)}
        root = str(Path(__file__).parents[2])
        environment["PYTHONPATH"] = os.pathsep.join((root, os.environ.get("PYTHONPATH", "")))
        script = Path(__file__).with_name("programs.py")
        subprocess.run([sys.executable, str(script), str(folder)], env=environment, check=True)

    folder = once("tpu_programs", make)
    return lambda name: (folder / f"{name}.hlo").read_text(encoding="utf-8")
