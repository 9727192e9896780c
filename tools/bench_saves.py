"""Measures what saving checkpoints adds to the time of training's steps.

    python tools/bench_saves.py --parameters=300e6 --every=50 --rounds=3

Steps alone, with a copy of the state to the host and with a save are timed in turns. Writes its
checkpoints into a temporary folder; TMPDIR chooses the disk. Each has 12 bytes for each parameter,
and three of them and the state, twice, must have room on the disk and in memory.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from absl import flags

from bench.figures import json_file, print_figures
from bench.saves import time_saves
from morer1_jax.cli import run_main
from morer1_jax.files import write_json
from morer1_jax.hosts.alone import check_alone

_PARAMETERS = flags.DEFINE_float("parameters", 300e6, "Parameters of the state.", lower_bound=1)
_EVERY = flags.DEFINE_integer("every", 20, "Steps for each save.", lower_bound=1)
_ROUNDS = flags.DEFINE_integer(
    "rounds", 5, "Saves that are timed, each in turn with as many steps without.", lower_bound=1
)
_WAIT = flags.DEFINE_float(
    "wait", 1.5, "On a CPU, seconds of the steps in which the host waits.", lower_bound=0
)
_JSON = flags.DEFINE_string("json", None, "File to write the figures to, as JSON.")


def main(argv: list[str]) -> None:
    """Runs the command line."""
    del argv
    check_alone()
    with json_file(_JSON.value) as out, tempfile.TemporaryDirectory() as folder:
        results = time_saves(
            Path(folder), int(_PARAMETERS.value), _EVERY.value, _ROUNDS.value, _WAIT.value
        )
        if out is not None:
            write_json(out, results)
    print_figures(results)


if __name__ == "__main__":
    run_main(main)
