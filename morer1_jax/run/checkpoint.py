"""Checkpoints that are whole, finite and verified, or absent.

Orbax writes and reads the arrays; it does not notice that a byte on the disk has changed.  So the
digest of every file is kept in a manifest, which is written last, into a hidden folder that is only
then renamed: a folder with a manifest is whole, one without was never finished.

    <folder>/step_00000100/arrays/…       orbax's files
    <folder>/step_00000100/manifest.json  step, extra, shape and dtype of each leaf, digests
    <folder>/best/step_00000080/…         the best by a metric, in the same form
"""

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from morer1_jax.errors import DataError, NotFiniteError
from morer1_jax.files import atomic_dir, atomic_write, full_disk, named, remove, temporary_path
from morer1_jax.paths import plain_path
from morer1_jax.run.finite import first_not_finite
from morer1_jax.run.mesh import path_name

PyTree = Any

ARRAYS = "arrays"
MANIFEST = "manifest.json"
# What orbax merges all processes' arrays into, last of all; without it none can be read.
_MERGED = f"{ARRAYS}/manifest.ocdbt"
_FORMAT = 1
_DIGEST_THREADS = 8
_TRIES = 5  # To read what a run beside may replace.


class CheckpointError(DataError):
    """A checkpoint that is damaged, missing or of another structure; the message is one line."""


class Checkpointer:
    """Saves and restores training states in one folder of a file system all processes share.

    In a run of several processes every method is called by all of them at the same point.  `save`
    returns when the checkpoint is whole on the disk.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2):
        """Opens the folder; it is made by the first save.

        Args:
          keep: how many of the newest checkpoints stay; older ones go after a newer is whole.

        Raises:
          ValueError: `keep` is below 1.
        """
        if keep < 1:
            raise ValueError(f"keep: {keep} found, at least 1 expected")
        self.folder = Path(folder).absolute()
        self.keep = keep
        self._orbax = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True))

    def save(self, step: int, state: PyTree, extra: Mapping[str, Any] | None = None) -> None:
        """Saves the state as of `step`.

        Args:
          state: a tree of `jax.Array`.
          extra: what the host must remember: JSON values by name, floats finite.

        Raises:
          CheckpointError: a checkpoint of this or a later step is there.
          NotFiniteError: a leaf has a value that is not finite; nothing is written.
        """
        latest = self.latest()
        if latest is not None and step <= latest:
            raise CheckpointError(
                f"{self.folder}: step {step} to be saved, but step {latest} is there; "
                "go on from that one or delete it"
            )
        self._write(self._path(step), step, state, dict(extra or {}))
        if _is_first():
            whole = [found for found in _steps(self.folder) if _manifest(self._path(found))]
            for found in _steps(self.folder):
                if found < step and found not in whole[: self.keep]:
                    remove(self._path(found))

    def save_best(self, step: int, params: PyTree, metric: float) -> bool:
        """Keeps `params` if `metric` is the highest so far; the earlier of equals stays.

        Returns:
          Whether they were kept.  Those of a metric that is NaN never are.

        Raises:
          NotFiniteError: a leaf has a value that is not finite; nothing is written.
        """
        best = self.best()
        if math.isnan(metric) or (best is not None and metric <= best[1]):
            return False
        best_folder = self.folder / "best"
        self._write(_step_path(best_folder, step), step, params, {"metric": float(metric)})
        if _is_first():
            for found in _steps(best_folder):
                if found != step:
                    remove(_step_path(best_folder, found))
        return True

    def surplus(self, keep: int) -> list[Path]:
        """All states but the newest `keep`, and what a killed save left; best ones stay."""
        whole = [step for step in _steps(self.folder) if _manifest(self._path(step))]
        older = [step for step in _steps(self.folder) if not keep or step < max(whole, default=0)]
        states = [self._path(step) for step in older if step not in whole[:keep]]
        return [*self.folder.glob(".step_*.tmp"), *states]

    def drop(self, keep: int) -> None:
        """Deletes the surplus."""
        for path in self.surplus(keep) if _is_first() else ():
            shutil.rmtree(path) if path.suffix else remove(path)

    def latest(self) -> int | None:
        """The newest step with a whole checkpoint; others are passed over with a warning."""
        return _newest(self.folder)

    def best(self) -> tuple[int, float] | None:
        """Step and metric of the best parameters kept, or None."""
        folder = self.folder / "best"
        best, steps = None, _steps(folder)
        for step in steps:
            manifest = _manifest(_step_path(folder, step))
            # A run killed before it removed the best but one leaves both.
            if manifest and (best is None or manifest["extra"]["metric"] > best[1]):
                best = (step, manifest["extra"]["metric"])
        # A run may have put a better one in its place meanwhile.
        return self.best() if best is None and _steps(folder) != steps else best

    def restore(self, step: int | None, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """Verifies a checkpoint's digests, then reads it.

        Args:
          step: which one; the latest if None.
          like: the tree to restore, of `jax.ShapeDtypeStruct`, each with the sharding wanted (which
            need not be the one saved under); without a sharding, onto the first local device.

        Returns:
          The state and the `extra` it was saved with.

        Raises:
          CheckpointError: none is there, a file differs from its digest, a leaf of `like` is not
            in the checkpoint with this shape and dtype, or the other way round, or a leaf has a
            value that is not finite, as older versions saved them.
        """
        step = self.latest() if step is None else step
        if step is None:
            raise CheckpointError(f"{self.folder}: no whole checkpoint found; train first")
        return self._read(self._path(step), like)

    def restore_best(self, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """As `restore`, for what `save_best` kept; `extra` holds `metric`.

        If a run keeps a better one meanwhile, that one.
        """
        tries = _TRIES
        while True:
            best, tries = self.best(), tries - 1
            if best is None:
                raise CheckpointError(
                    f"{self.folder / 'best'}: no whole checkpoint found; train first"
                )
            path = _step_path(self.folder / "best", best[0])
            try:
                return self._read(path, like)
            except Exception:  # Whatever orbax says of what is gone.
                if not tries or (path.exists() and self.best() == best):
                    raise

    def _path(self, step: int) -> Path:
        return _step_path(self.folder, step)

    def _write(self, path: Path, step: int, state: PyTree, extra: dict[str, Any]) -> None:
        leaves = _leaves(state)
        for name, leaf in leaves.items():
            if not isinstance(leaf, jax.Array):
                raise TypeError(f"{name}: {type(leaf).__name__} found, a jax.Array expected")
        body = {
            "format": _FORMAT,
            "step": step,
            "extra": extra,
            "leaves": {name: _describe(leaf) for name, leaf in leaves.items()},
        }
        # As it will be read back, and refused before anything is written if it cannot be.
        body = json.loads(json.dumps(body, allow_nan=False))
        if (bad := first_not_finite(leaves)) is not None:
            raise NotFiniteError(
                f"{path}: {bad} is not finite, so that step {step} is not saved; the checkpoints "
                "before it are kept"
            )
        first = _is_first()
        if first:
            for unfinished in path.parent.glob(".step_*.tmp"):
                shutil.rmtree(unfinished)
            if path.exists():  # Not whole: of a whole one the callers know.
                remove(path)
        with atomic_dir(path) if first else contextlib.nullcontext(temporary_path(path)) as folder:
            with _one_error(path), plain_path(folder) as at:
                self._orbax.save(at / ARRAYS, args=ocp.args.PyTreeSave(leaves))
                saved = self._orbax.metadata(at / ARRAYS).item_metadata
            if first:
                _check_saved(path, body["leaves"], {} if saved is None else saved.tree)
                names = sorted(
                    os.path.relpath(os.path.join(parent, name), folder)
                    for parent, _, files in os.walk(folder)
                    for name in files
                )
                body["files"] = dict(zip(names, _digests(folder, names), strict=True))
                manifest = {"sha256": _json_digest(body), "body": body}
                atomic_write(folder / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False))
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"checkpoint {path}")

    def _read(self, path: Path, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        manifest = _manifest(path)
        if manifest is None:
            raise CheckpointError(f"{path}: no whole checkpoint; choose another step")
        wanted = _leaves(like)
        saved = manifest["leaves"]
        for name in sorted(wanted.keys() | saved.keys()):
            here = _describe(wanted[name]) if name in wanted else "no such leaf"
            there = saved.get(name, "no such leaf")
            if here != there:
                raise CheckpointError(
                    f"{path}: {name}: {there} in the checkpoint, {here} expected; "
                    "the checkpoint belongs to another model or optimizer"
                )
        _verify(path, manifest["files"])
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        targets = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or device)
            for name, leaf in wanted.items()
        }
        with plain_path(path) as at:
            arrays = self._orbax.restore(
                at / ARRAYS,
                args=ocp.args.PyTreeRestore(
                    item=targets, restore_args=ocp.checkpoint_utils.construct_restore_args(targets)
                ),
            )
        if (bad := first_not_finite(arrays)) is not None:
            way = f"delete {path} to go on from the one before it"
            if path.parent.name == "best":  # There is none before it.
                way = "ask a stage before this one, or train in a new --workdir"
            raise CheckpointError(
                f"{path}: {bad} is not finite, a checkpoint of finite numbers expected; {way}"
            )
        tree = jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted])
        return tree, manifest["extra"]


def _check_saved(path: Path, wanted: Mapping[str, str], saved: Mapping[str, Any]) -> None:
    """Finds out whether every leaf can be found again where orbax says that it has saved it.

    Raises:
      CheckpointError: one cannot.
    """
    for name, described in wanted.items():
        found = _describe(saved[name]) if name in saved else "nothing"
        if found != described:
            raise CheckpointError(
                f"{path}: {name}: {described} saved, {found} found; older checkpoints are "
                "kept, use a --workdir on another disk or of another name"
            )


def _is_first() -> bool:
    return jax.process_index() == 0


def _leaves(tree: PyTree) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _step_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def _steps(folder: Path) -> list[int]:
    """Steps that have a folder, whole or not, newest first."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        names = []
    return sorted((int(m[1]) for n in names if (m := re.fullmatch(r"step_(\d+)", n))), reverse=True)


def _newest(folder: Path) -> int | None:
    newest = -1
    if _is_first():
        for step in _steps(folder):
            if _manifest(_step_path(folder, step)):
                newest = step
                break
            logging.warning("%s is not a whole checkpoint; passed over", _step_path(folder, step))
    if jax.process_count() > 1:
        newest = int(multihost_utils.broadcast_one_to_all(np.int32(newest)))
    return None if newest < 0 else newest


def _manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a whole checkpoint; None if it is missing or damaged itself.

    Raises:
      OSError: it cannot be read now, which says nothing of the checkpoint; with the file's name.
    """
    try:
        with named(path / MANIFEST):
            found = json.loads((path / MANIFEST).read_bytes())
        body = found["body"]
        whole = found["sha256"] == _json_digest(body) and _MERGED in body["files"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None
    if whole and body["format"] != _FORMAT:
        raise CheckpointError(
            f"{path}: format {body['format']} found, {_FORMAT} expected; "
            "read it with the version that wrote it"
        )
    return body if whole else None


def _json_digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _digests(folder: Path, names: list[str]) -> list[str | None]:
    """Of each file; None of one that is not there."""

    def digest(name: str) -> str | None:
        path = folder / name
        try:
            with named(path), open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except (FileNotFoundError, NotADirectoryError):
            return None

    with ThreadPoolExecutor(_DIGEST_THREADS) as pool:
        return list(pool.map(digest, names))


def _verify(path: Path, expected: Mapping[str, str]) -> None:
    """Compares every file with its digest; the processes share the work and the verdict."""
    names = sorted(expected)
    mine = names[jax.process_index() :: jax.process_count()]
    bad = [n for n, d in zip(mine, _digests(path, mine), strict=True) if d != expected[n]]
    first_bad = names.index(bad[0]) if bad else len(names)
    if jax.process_count() > 1:
        first_bad = int(multihost_utils.process_allgather(np.int32(first_bad)).min())
    if first_bad < len(names):
        raise CheckpointError(
            f"{path / names[first_bad]}: missing or not what was saved (its SHA-256 differs); "
            f"delete {path} to go on from the checkpoint before it"
        )


@contextlib.contextmanager
def _one_error(path: Path) -> Iterator[None]:
    """Makes a full disk one error with a file's name; orbax's threads log it, too."""

    def keep(record: logging.LogRecord) -> bool:
        return "_SignalingThread" not in str(record.msg)

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        yield
    except Exception as error:
        if full := full_disk(error):
            raise OSError(errno.ENOSPC, full[1], str(path)) from None
        raise
    finally:
        logger.removeFilter(keep)
