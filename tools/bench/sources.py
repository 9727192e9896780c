"""Measures side by side how fast a run's batches are made from several copies of one dataset.

A copy is a folder in MORE's released form or of its TensorFlow dataset, local or in a bucket.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench.data import sequence_feed
from morer1_jax.batch import SequenceBatch
from morer1_jax.config.settings import Settings
from morer1_jax.data.feed import SequenceFeed
from morer1_jax.data.loader import load_ahead
from morer1_jax.errors import DataError
from morer1_jax.run.setup import open_run, open_setup


def compare_folders(
    config: Settings, folders: Sequence[str], workdir: Path, turns: int = 5, batches: int = 20
) -> dict[str, dict[str, Any]]:
    """Times SFT's batches from each folder in turns, as fast as the config's workers make them.

    Args:
        folders: datasets of the same facts and reasoning; the others are compared with the first.
        workdir: an empty folder, for what runs write.
        turns: measurements of each folder.
        batches: of a measurement; those that warm it up come before.

    Returns:
        By folder: the seconds to open it, with the first look at every photo and, of a bucket's
        TensorFlow dataset, the copy to this machine; the median of samples a second, each of which
        reads a photo; and the ratio of this median to the first folder's.

    Raises:
        DataError: the folders' batches are not equal.
    """
    # A run of each, and its batches.
    feeds, results = {}, {}
    for number, folder in enumerate(folders):
        data = dataclasses.replace(config.data, folder=folder)
        setup = open_setup(dataclasses.replace(config, data=data), workdir / str(number))
        start = time.perf_counter()
        run = open_run(setup, reasoning_needed=True)
        results[folder] = {"open_seconds": round(time.perf_counter() - start, 2)}
        feeds[folder] = functools.partial(_in_turn, *sequence_feed(run, 1))
    expected = feeds[folders[0]](0)
    for folder, feed in feeds.items():
        if not all(jax.tree.leaves(jax.tree.map(np.array_equal, feed(0), expected))):
            raise DataError(f"{folder}: expected the batches of {folders[0]}, found others")
    # Rates in turns, so that all meet the same machine.
    rates: dict[str, list[float]] = {folder: [] for folder in folders}
    options = {"workers": config.data.workers, "kind": config.data.worker_kind}
    warm_up = 2 * config.data.workers
    for _, (folder, feed) in itertools.product(range(turns), feeds.items()):
        made = load_ahead(feed, 0, warm_up + batches, **options)
        for _ in range(warm_up):
            next(made)
        start = time.perf_counter()
        for _ in range(batches):
            next(made)
        rates[folder].append(batches * config.sft.batch / (time.perf_counter() - start))
        made.close()
    medians = {folder: statistics.median(rates[folder]) for folder in folders}
    for folder in folders:
        results[folder] |= {
            "samples_per_second": round(medians[folder], 1),
            "of_the_first": round(medians[folder] / medians[folders[0]], 3),
        }
    return results


def _in_turn(feed: SequenceFeed, epoch: int, step: int) -> SequenceBatch:
    """Makes the batch of a step of the first epoch, which comes again and again."""
    return feed(step % epoch)
