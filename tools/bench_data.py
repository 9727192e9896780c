"""Measures how fast a dataset of MORE's size is read, and how fast a config's batches are made.

    python tools/bench_data.py --config=configs/demo.py --config.data.workers=2

    python tools/bench_data.py --config=configs/demo.py --folder=data/MORE --folder=gs://b/tfds/more

The second compares copies of one dataset, side by side: how fast batches are made from each.

Writes its data into a temporary folder. The loader's figures are for `--config.data.workers` and
`--config.data.worker_kind`, on a processor that does nothing else.
With `--json`, an interrupted command, started again, goes on from there.
"""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from morer1_jax.cli import needs_extra, run_main
from morer1_jax.config.settings import settings
from morer1_jax.files import check_writable, write_json
from morer1_jax.hosts.alone import check_alone
from morer1_jax.paths import local_path
from morer1_jax.run.lock import hold

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's config, a Python file.")
_FOLDER = flags.DEFINE_multi_string(
    "folder", None, "A dataset to compare with the others that are given, which are equal to it."
)
_JSON = flags.DEFINE_string("json", None, "File to write the figures to, as JSON.")


def main(argv: list[str]) -> None:
    """Runs the command line."""
    del argv
    check_alone()
    out = None if _JSON.value is None else local_path(_JSON.value, "--json")
    if out is not None:
        check_writable(out)
    with needs_extra("bench"):
        from bench.data import run_bench
        from bench.sources import compare_folders
    lock = contextlib.nullcontext() if out is None else hold(out)
    with lock, tempfile.TemporaryDirectory() as workdir:
        config = settings(_CONFIG.value)
        if _FOLDER.value:
            results = compare_folders(config, _FOLDER.value, Path(workdir))
            if out is not None:
                write_json(out, results)
        else:
            results = run_bench(config, Path(workdir), out=out)
    for name, figures in results.items():
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in figures.items()))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    run_main(main)
