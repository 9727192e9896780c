"""What a run was begun with, by digests: it goes on with the same only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from morer1_jax.errors import DataError
from morer1_jax.files import read_json, write_json

# Kinds of digests, which a name is of up to its first /, that runs begun before did not keep.
_PHOTOS = "img_org"
_ADDED = (_PHOTOS, "tokenizer")
# Of a tokenizer's folder, what tokens depend on.
_TOKENIZER = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
_WAYS = ("changed", "new", "gone")
# Names of a way that an error has room for.
_NAMED = 2


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
    kept = read_json(path, "use a new --workdir") if path.exists() else {}
    kinds = {_kind(name) for name in kept}
    new = {
        name: digest
        for name, digest in found.items()
        if not kept or (_kind(name) in _ADDED and _kind(name) not in kinds)
    }
    if changed := differences({**kept, **new}, found):
        raise DataError(
            f"{where}: {changed} since the run began ({path}); put what was there back, or use a "
            "new --workdir"
        )
    if new:
        write_json(path, kept | new)


def differences(kept: Mapping[str, str], found: Mapping[str, str]) -> str:
    """What is another, is new or is gone: some names of each, texts before photos; "" if nothing.

    A few words, such as `txt/train.txt changed, img_org/train/1.jpg and 7 more gone`.
    """
    groups: dict[tuple[bool, int], list[str]] = {}
    for name in sorted(name for name in {*kept, *found} if kept.get(name) != found.get(name)):
        way = 1 if name not in kept else 2 if name not in found else 0
        groups.setdefault((_kind(name) == _PHOTOS, way), []).append(name)
    return ", ".join(f"{_listed(names)} {_WAYS[way]}" for (_, way), names in sorted(groups.items()))


def _listed(names: list[str]) -> str:
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
