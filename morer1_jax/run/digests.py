"""What a run was begun with, by digests: it goes on with the same only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from morer1_jax.files import atomic_write, read_text
from morer1_jax.task.fact import DataError

# Kinds of digests, which a name is of up to its first /, that runs begun before did not keep.
_ADDED = ("img_org", "tokenizer")
# Of a tokenizer's folder, what tokens depend on.
_TOKENIZER = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
# Names an error has room for.
_NAMED = 3


def bind(path: Path, found: Mapping[str, str], where: object) -> None:
    """Keeps digests at first use, and compares them afterwards.

    Of a kind that the file knows nothing of, what is found is taken as it is and added.

    Args:
      path: the file they are kept in.
      found: name to digest.
      where: what errors say the names are of.

    Raises:
      DataError: one differs, is missing or is new; it is named, with what to do.
    """
    kept = json.loads(read_text(path)) if path.exists() else {}
    kinds = {_kind(name) for name in kept}
    new = {
        name: digest
        for name, digest in found.items()
        if not kept or (_kind(name) in _ADDED and _kind(name) not in kinds)
    }
    if changed := differing({**kept, **new}, found):
        raise DataError(
            f"{where}: {listed(changed)} changed since the run began ({path}); put what was there "
            "back, or use a new --workdir"
        )
    if new:
        atomic_write(path, json.dumps(kept | new, indent=1) + "\n")


def differing(kept: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """The names, sorted, whose digest is another or is in one of the two alone."""
    return sorted(name for name in {*kept, *found} if kept.get(name) != found.get(name))


def listed(names: list[str]) -> str:
    """Some names, and of how many more they stand for."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def of_tokenizer(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that tokens depend on, as `tokenizer/<name>`."""
    paths = [folder / name for name in _TOKENIZER if (folder / name).exists()]
    return {f"tokenizer/{p.name}": hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def of_lines(lines: Iterable[str]) -> str:
    """SHA-256 of lines of text."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _kind(name: str) -> str:
    return name.partition("/")[0]
