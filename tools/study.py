"""The main job over several seeds beside its controls; prints the table of the README.

python tools/study.py --config=configs/demo.py --folder=runs/study --seeds=0,1,2,3,4
"""

from __future__ import annotations

import argparse
from pathlib import Path

from morer1_jax.run.study import run_study

if __name__ == "__main__":
    # An abbreviation would take what is meant for the run, such as a misspelt key.
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", default="configs/demo.py")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    arguments, overrides = parser.parse_known_args()
    run_study(
        arguments.config, arguments.folder, [int(s) for s in arguments.seeds.split(",")], overrides
    )
