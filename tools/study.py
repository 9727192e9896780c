"""Runs the main job and its controls over several seeds; prints the README's tables.

python tools/study.py --config=configs/demo.py --folder=runs/study --seeds=0,1,2,3,4

Further `--config.key=value` flags go to every run.
"""

from __future__ import annotations

import argparse
import sys

from bench.study import run_study
from morer1_jax.cli import ArgumentParser, run_main
from morer1_jax.files import check_writable
from morer1_jax.hosts.alone import check_alone
from morer1_jax.paths import local_path
from morer1_jax.run.lock import hold


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected whole numbers such as 0,1,2, found {text!r}"
        ) from None


def main(_: list[str]) -> None:
    """Runs the command line."""
    parser = ArgumentParser(__doc__)
    parser.add_argument("--config", default="configs/demo.py", help="config file of every run")
    parser.add_argument("--folder", required=True, help="folder of the runs' workdirs")
    parser.add_argument(
        "--seeds", type=_seeds, default="0,1,2,3,4", help="seeds, separated by commas"
    )
    arguments, overrides = parser.parse_known_args(sys.argv[1:])
    check_alone(devices=False)  # each run's process takes them
    folder = local_path(arguments.folder, "--folder")
    check_writable(folder, folder=True)
    with hold(folder, folder=True):
        run_study(arguments.config, folder, arguments.seeds, overrides)


if __name__ == "__main__":
    run_main(main, sys.argv[:1], interrupted="interrupted; the same command goes on where it was")
