"""Measures how fast a dataset of MORE's size is read, and how fast a config's batches are made.

    python tools/bench_data.py --config=configs/demo.py --config.data.workers=2

    python tools/bench_data.py --config=configs/demo.py --folder=data/MORE --folder=gs://b/tfds/more

The second compares copies of one dataset, side by side: how fast batches are made from each.

Writes its data into a temporary folder. The loader's figures are for `--config.data.workers` and
`--config.data.worker_kind`, on a processor that does nothing else.
With `--json`, an interrupted command, started again, goes on from there.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from bench.figures import json_file, print_figures
from morer1_jax.cli import needs_extra, run_main
from morer1_jax.config.settings import settings
from morer1_jax.files import write_json
from morer1_jax.hosts.alone import check_alone

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's config, a Python file.")
_FOLDER = flags.DEFINE_multi_string(
    "folder", None, "A dataset to compare with the others that are given, which are equal to it."
)
_JSON = flags.DEFINE_string("json", None, "File to write the figures to, as JSON.")


def main(argv: list[str]) -> None:
    """Runs the command line."""
    del argv
    check_alone()
    with needs_extra("bench"):
        from bench.data import run_bench
        from bench.sources import compare_folders
    with json_file(_JSON.value) as out, tempfile.TemporaryDirectory() as workdir:
        config = settings(_CONFIG.value)
        if _FOLDER.value:
            results = compare_folders(config, _FOLDER.value, Path(workdir))
            if out is not None:
                write_json(out, results)
        else:
            results = run_bench(config, Path(workdir), out=out)
    print_figures(results)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    run_main(main)
