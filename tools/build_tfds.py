"""Builds the TensorFlow dataset `more` from a folder in MORE's released form.

python tools/build_tfds.py --folder=data/MORE --data_dir=data/tfds
"""

from __future__ import annotations

import contextlib
import os

from absl import flags

from morer1_jax.cli import needs_extra, run_main
from morer1_jax.files import check_writable
from morer1_jax.hosts.alone import check_alone
from morer1_jax.paths import any_path
from morer1_jax.run.lock import hold

_FOLDER = flags.DEFINE_string("folder", None, "MORE's folder, local or in a bucket.", required=True)
_DATA_DIR = flags.DEFINE_string(
    "data_dir", None, "Folder to write to, local or in a bucket.", required=True
)


def main(argv: list[str]) -> None:
    """Runs the command line."""
    del argv
    check_alone(devices=False)
    with needs_extra("tfds"):
        from morer1_jax.data.more_tfds import build
        from morer1_jax.data.tfds_source import NAME
    folder, data_dir = any_path(_FOLDER.value, "--folder"), any_path(_DATA_DIR.value, "--data_dir")
    lock = contextlib.nullcontext()
    if "://" not in os.fspath(data_dir):  # A bucket knows no locks.
        check_writable(data_dir, folder=True)
        lock = hold(data_dir, folder=True)
    with lock:
        folders = build(folder, data_dir)
    print(f"written: {' and '.join(folders)}")
    print(f"to load: tfds.builder_from_directory({folders[0]!r}).as_data_source(split='train')")
    print(f"to train: --config.data.folder={data_dir / NAME}, with reasoning.jsonl put into it")


if __name__ == "__main__":
    run_main(main)
