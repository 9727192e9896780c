"""Written reasoning through the `datasets` library: JSONL, Parquet, or a name on the hub."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable
from pathlib import Path

from morer1_jax.task.fact import DataError, Fact, one_line
from morer1_jax.task.more import check_reasoning
from morer1_jax.task.ontology import Ontology

# A lone file's suffix, compressed or not, to the builder that reads it.
_BUILDERS = ((r"\.jsonl?(\.\w+)?$", "json"), (r"\.parquet$", "parquet"))


def read_reasoning_dataset(
    source: str, facts: Iterable[Fact], ontology: Ontology, split: str = "train"
) -> dict[str, str]:
    """Reads rows of `fact` (an id, `train:12`) and `text`.

    Args:
      source: a JSONL or Parquet file, local or in a bucket; or what `datasets.load_dataset` takes,
        a folder or the name of a dataset on the hub.
      split: of the dataset; a file has `train` alone.

    Returns:
      Fact id to text, in the rows' order.

    Raises:
      DataError: there is no such file, the `datasets` library is not installed, the source cannot
        be loaded or is empty, or, naming the row counted from 0, see `check_reasoning`.
    """
    builder = next((name for suffix, name in _BUILDERS if re.search(suffix, source)), None)
    if builder and "://" not in source and not (Path(source).exists() or glob.glob(source)):
        raise DataError(f"{source}: no such file; expected rows of fact and text")
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{source}: to read it takes the datasets library; pip install 'morer1-jax[datasets]'"
        ) from None
    try:
        if builder is None:
            rows = datasets.load_dataset(source, split=split)
        else:
            rows = datasets.load_dataset(builder, data_files=source, split=split)
    except StopIteration:  # An empty file's.
        rows = ()
    except Exception as error:  # Of many libraries: the hub's, Arrow's, a file system's.
        raise DataError(
            f"{source}: split {split!r} cannot be loaded: {one_line(error.__cause__ or error)}; "
            "expected rows of fact and text in JSONL or Parquet"
        ) from error
    if not len(rows):
        raise DataError(f"{source}: split {split!r} is empty, expected rows of fact and text")
    records = ((f"{source}: {split} row {number}", row) for number, row in enumerate(rows))
    return check_reasoning(records, facts, ontology)
