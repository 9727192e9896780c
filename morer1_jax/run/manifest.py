"""Writes, reads and verifies a checkpoint's manifest, which holds the digests of its files.

Orbax restores a file with a changed byte without an error, so the digests are written and verified
here.  A folder with a valid manifest is a whole checkpoint.
"""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from morer1_jax import stores
from morer1_jax.errors import DataError
from morer1_jax.files import named
from morer1_jax.hosts import group

ARRAYS = "arrays"
MANIFEST = "manifest.json"
# Orbax merges all processes' arrays into this file last of all; without it none can be read.
_MERGED = f"{ARRAYS}/manifest.ocdbt"
_FORMAT = 1
_DIGEST_THREADS = 8


class CheckpointError(DataError):
    """A damaged or missing checkpoint, or one of another structure; the message is one line."""


class DamagedError(CheckpointError):
    """A checkpoint of which a file is missing, or is not what was saved."""


def describe(leaf: Any) -> str:
    """Returns the dtype and shape of an array, such as `float32[16, 8]`."""
    return f"{leaf.dtype}{list(leaf.shape)}"


def manifest_body(step: int, extra: Mapping[str, Any], leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a manifest's body without the files' digests, as JSON reads it back.

    Raises:
        ValueError: a value of `extra` is not JSON, or not finite.
    """
    body = {
        "format": _FORMAT,
        "step": step,
        "extra": extra,
        "leaves": {name: describe(leaf) for name, leaf in leaves.items()},
    }
    return json.loads(json.dumps(body, allow_nan=False))


def own_digests(folder: Path) -> dict[str, str]:
    """Returns the SHA-256 of the files that this process wrote, by their paths in the folder.

    Each process writes arrays into a folder of its own; the first counts all other files as its.
    """
    own, prefix = f"{ARRAYS}/ocdbt.process_{group.index()}/", f"{ARRAYS}/ocdbt.process_"
    names = [
        name
        for name in stores.files(folder)
        if name.startswith(own) or (group.is_first() and not name.startswith(prefix))
    ]
    return dict(zip(names, _file_digests(folder, names), strict=True))


def write_manifest(folder: Path, body: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """Writes the manifest of a folder in which every other file is already written.

    Args:
        digests: SHA-256 of each of these, by its path in the folder.
    """
    body = {**body, "files": dict(sorted(digests.items()))}
    text = json.dumps({"sha256": _json_digest(body), "body": body}, indent=1, allow_nan=False)
    stores.write_bytes(folder / MANIFEST, text.encode())


def check_saved(path: Path, expected: Mapping[str, str], saved: Mapping[str, Any]) -> None:
    """Checks that orbax's own metadata of the files list every leaf.

    Raises:
        CheckpointError: a leaf is missing, or has another shape or dtype.
    """
    for name, description in expected.items():
        found = describe(saved[name]) if name in saved else "nothing"
        if found != description:
            raise CheckpointError(
                f"{path}: {name}: expected {description}, found {found} after saving; older "
                "checkpoints are kept, use a --workdir on another disk or of another name"
            )


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Returns the body of a checkpoint's manifest; None if the checkpoint is not whole.

    Raises:
        OSError: the file system fails, so that the checkpoint may be whole; the error has the
            file's name.
        CheckpointError: another version of this package wrote it, in another format.
    """
    try:
        with named(path / MANIFEST):
            manifest = json.loads(stores.read_bytes(path / MANIFEST))
        body = manifest["body"]
        whole = manifest["sha256"] == _json_digest(body) and _MERGED in body["files"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    if whole and body["format"] != _FORMAT:
        raise CheckpointError(
            f"{path}: expected format {_FORMAT}, found {body['format']}; read it with the version "
            "that wrote it"
        )
    return body if whole else None


def verify(path: Path, digests: Mapping[str, str]) -> None:
    """Compares every file with its digest; each process reads a share, and all agree on the result.

    Args:
        digests: SHA-256 by the file's path in the checkpoint's folder.

    Raises:
        DamagedError: a file is missing or differs.
    """
    names = sorted(digests)
    own_names = names[group.index() :: group.count()]
    own_digests = zip(own_names, _file_digests(path, own_names), strict=True)
    bad_names = [name for name, digest in own_digests if digest != digests[name]]
    first_bad = names.index(bad_names[0]) if bad_names else len(names)
    first_bad = min(group.gather("digests", first_bad))
    if first_bad < len(names):
        raise DamagedError(
            f"{path / names[first_bad]}: expected the file that was saved, found none or another "
            f"SHA-256; delete {path} to go on from the checkpoint before it"
        )


def _json_digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _file_digests(folder: Path, names: list[str]) -> list[str | None]:
    """Returns the SHA-256 of each file; None for a missing one."""
    with ThreadPoolExecutor(_DIGEST_THREADS) as pool:
        return list(pool.map(lambda name: stores.sha256(folder / name), names))
