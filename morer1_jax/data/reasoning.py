"""Reads written reasoning with the `datasets` library: JSONL, Parquet, or a name on the hub."""

from __future__ import annotations

import glob
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from morer1_jax.errors import DataError, one_line
from morer1_jax.paths import did_you_mean, expand_home, hub_hint, is_hub_name, plain_path
from morer1_jax.task.fact import Fact
from morer1_jax.task.more import check_reasoning
from morer1_jax.task.ontology import Ontology

# A lone file's suffix, compressed or not, to the builder that reads it.
_BUILDERS = ((r"\.jsonl?(\.\w+)?$", "json"), (r"\.parquet$", "parquet"))


def read_reasoning_dataset(
    source: str, facts: Iterable[Fact], ontology: Ontology, split: str = "train"
) -> dict[str, str]:
    """Reads rows of `fact` (an id, `train:12`) and `text`.

    Args:
        source: a JSONL or Parquet file, local or in a bucket; or a dataset as
            `datasets.load_dataset` takes it, a folder or a name on the hub (`owner/name`); or a
            glob.
        facts: all facts that reasoning may be about.
        split: the dataset's split; a file has `train` alone.

    Returns:
        Fact id to text, in the rows' order.

    Raises:
        DataError: there is no such file, the `datasets` library is not installed, the source cannot
            be loaded or is empty, or a row is malformed (counted from 0; see `check_reasoning`).
    """
    # The kind of source, and whether it is there.
    local = "://" not in source
    if local:
        source = expand_home(source, "data.reasoning")
    builder = next((name for suffix, name in _BUILDERS if re.search(suffix, source)), None)
    exists = local and os.path.exists(source)
    if local and not (exists or glob.glob(source)) and (builder or not is_hub_name(source)):
        raise DataError(
            f"{source}: no such file{did_you_mean(source)}; expected rows of fact and text in "
            "JSONL or Parquet, or a dataset on the hub, owner/name"
            + hub_hint(source, "--repo-type=dataset ")
        )
    if builder is None and local and os.path.isfile(source):
        raise DataError(f"{source}: not named as what it holds; expected .jsonl, .json or .parquet")
    try:
        import datasets  # noqa: F401
    except ImportError:
        raise DataError(
            f"{source}: reading it takes the datasets library; pip install 'morer1-jax[datasets]'"
        ) from None
    # The library itself resolves globs, buckets and names on the hub.
    if not exists:
        return _check(source, _rows(source, source, builder, split), split, facts, ontology)
    # A local path must be without the characters that the library takes for a glob or a URL.
    absolute = Path(source).absolute()
    with plain_path(absolute) as library_path:
        # The library caches a file under its path, which lasts for this block only.
        cache = None if library_path == absolute else library_path.parent
        if cache is not None and absolute.is_dir():
            # The library would resolve a link to the folder's own name.
            library_path = cache / "files"
            shutil.copytree(absolute, library_path, copy_function=os.symlink)
        rows = _rows(source, os.fspath(library_path), builder, split, cache_dir=cache)
        return _check(source, rows, split, facts, ontology)


def _rows(source: str, path: str, builder: str | None, split: str, **options: Any) -> Any:
    """Returns the rows that `datasets` reads at a path; errors call it `source`."""
    import datasets

    if builder is not None:
        options["data_files"] = path
    try:
        return datasets.load_dataset(builder or path, split=split, **options)
    except StopIteration:  # An empty file raises it.
        return ()
    except Exception as error:  # The hub, Arrow and file systems have classes of their own.
        raise DataError(
            f"{source}: split {split!r} cannot be loaded: {one_line(error.__cause__ or error)}; "
            "expected rows of fact and text in JSONL or Parquet"
        ) from error


def _check(
    source: str, rows: Any, split: str, facts: Iterable[Fact], ontology: Ontology
) -> dict[str, str]:
    if not len(rows):
        raise DataError(f"{source}: split {split!r} is empty, expected rows of fact and text")
    records = ((f"{source}: {split} row {number}", row) for number, row in enumerate(rows))
    return check_reasoning(records, facts, ontology)
