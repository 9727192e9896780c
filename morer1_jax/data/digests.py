"""Digests of a run's data and tokenizer, which bind its workdir to them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from morer1_jax.errors import DataError, abridged
from morer1_jax.files import read_json, write_json

# Kinds of digests (a name's part before its first /) that earlier versions did not keep.
_PHOTOS = "img_org"
_ADDED = (_PHOTOS, "tokenizer")
# The files of a tokenizer's folder that tokens depend on.
_TOKENIZER = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
_WAYS = ("changed", "new", "gone")
# The most names that an error lists of each of these.
_MAX_NAMES = 2


def bind(path: Path, digests: Mapping[str, str], source: object) -> None:
    """Writes digests at first use, and compares them afterwards.

    Digests of a kind that the file lacks are added without comparison.

    Args:
        path: the file that keeps the digests.
        digests: the present digests by name.
        source: the place of the data, for errors.

    Raises:
        DataError: a digest differs, is missing or is new; the message names it and what to do.
    """
    old_digests = read_json(path, "use a new --workdir") if path.exists() else {}
    kinds = {_kind(name) for name in old_digests}
    new_digests = {
        name: digest
        for name, digest in digests.items()
        if not old_digests or (_kind(name) in _ADDED and _kind(name) not in kinds)
    }
    if changed := differences({**old_digests, **new_digests}, digests):
        raise DataError(
            f"{source}: {changed} since the run began ({path}); put what was there back, or use a "
            "new --workdir"
        )
    if new_digests:
        write_json(path, old_digests | new_digests)


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Returns what changed, is new or is gone, texts before photos; "" if nothing.

    For example: `txt/train.txt changed, img_org/train/1.jpg and 7 more gone`.
    """
    groups: dict[tuple[bool, int], list[str]] = {}
    for name in sorted(name for name in {*before, *now} if before.get(name) != now.get(name)):
        way = 1 if name not in before else 2 if name not in now else 0
        groups.setdefault((_kind(name) == _PHOTOS, way), []).append(name)
    return ", ".join(
        f"{abridged(names, _MAX_NAMES)} {_WAYS[way]}" for (_, way), names in sorted(groups.items())
    )


def of_tokenizer(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of the files that tokens depend on, by `tokenizer/<name>`."""
    paths = [folder / name for name in _TOKENIZER if (folder / name).exists()]
    return {f"tokenizer/{p.name}": hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def of_lines(lines: Iterable[str]) -> str:
    """Returns the SHA-256 of lines of text."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _kind(name: str) -> str:
    return name.partition("/")[0]
