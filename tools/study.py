"""The main job over several seeds beside its controls; prints the table of the README.

python tools/study.py --config=configs/demo.py --folder=runs/study --seeds=0,1,2,3,4
"""

from __future__ import annotations

import argparse
import sys

from bench.study import run_study
from morer1_jax.cli import ArgumentParser, run_main
from morer1_jax.files import check_writable
from morer1_jax.paths import local_path
from morer1_jax.processes import check_alone
from morer1_jax.run.lock import hold


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} found, whole numbers such as 0,1,2 expected"
        ) from None


def main(_: list[str]) -> None:
    """The command line's entry."""
    parser = ArgumentParser(__doc__)
    parser.add_argument("--config", default="configs/demo.py")
    parser.add_argument("--folder", required=True)
    parser.add_argument("--seeds", type=_seeds, default="0,1,2,3,4")
    arguments, overrides = parser.parse_known_args(sys.argv[1:])
    check_alone(devices=False)  # each run's process takes them
    folder = local_path(arguments.folder, "--folder")
    check_writable(folder, folder=True)
    with hold(folder, folder=True):
        run_study(arguments.config, folder, arguments.seeds, overrides)


if __name__ == "__main__":
    run_main(main, sys.argv[:1], interrupted="interrupted; the same command goes on where it was")
