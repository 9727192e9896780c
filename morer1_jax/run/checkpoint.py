"""Saves and restores checkpoints that are whole, finite and verified, or absent.

Orbax writes and reads the arrays.  The manifest, which holds the files' digests, is written last,
into a hidden folder that is only then renamed: a folder with a manifest is whole, one without was
never finished.

    <folder>/step_00000100/arrays/…       orbax's files
    <folder>/step_00000100/manifest.json  step, extra, shape and dtype of each leaf, digests
    <folder>/best/step_00000080/…         the best by a metric, in the same form

Orbax's CheckpointManager is not used: it deletes older checkpoints as soon as its own files are
there, before their digests are; what it was deleting when it was killed it takes for a checkpoint;
and it does not see what another process keeps or deletes.
"""

import contextlib
import errno
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from morer1_jax.errors import NotFiniteError
from morer1_jax.files import atomic_dir, full_disk, remove, temporary_path
from morer1_jax.paths import plain_path
from morer1_jax.run.finite import first_not_finite
from morer1_jax.run.manifest import (
    ARRAYS,
    CheckpointError,
    describe,
    manifest_body,
    read_manifest,
    verify,
    write_manifest,
)
from morer1_jax.run.mesh import path_name

PyTree = Any

_ATTEMPTS = 5  # at reading what another process may replace


class Checkpointer:
    """Saves and restores training states in one folder of a file system all processes share.

    In a run of several processes every method is called by all of them at the same point.  `save`
    returns when the checkpoint is whole on the disk.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2):
        """Opens the folder, which the first save makes.

        Args:
            keep: number of newest checkpoints that stay; older ones are deleted once a newer one is
                whole.

        Raises:
            ValueError: `keep` is below 1.
        """
        if keep < 1:
            raise ValueError(f"keep: expected at least 1, found {keep}")
        self.folder = Path(folder).absolute()
        self.keep = keep
        self._orbax = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True))

    @property
    def _best_folder(self) -> Path:
        return self.folder / "best"

    def save(self, step: int, state: PyTree, extra: Mapping[str, Any] | None = None) -> None:
        """Saves the state as of `step`.

        Args:
            step: the last step that the state has taken.
            state: a tree of `jax.Array`.
            extra: state of the host: JSON values by name, floats finite.

        Raises:
            CheckpointError: a checkpoint of this or a later step exists.
            NotFiniteError: a leaf has a value that is not finite; nothing is written.
        """
        latest = self.latest()
        if latest is not None and step <= latest:
            raise CheckpointError(
                f"{self.folder}: expected a step after {latest}, the newest saved, found {step}; "
                f"go on from step {latest} or delete it"
            )
        self._write(_step_path(self.folder, step), step, state, dict(extra or {}))
        self.drop(self.keep)

    def save_best(self, step: int, params: PyTree, metric: float) -> bool:
        """Saves `params` if `metric` is the highest so far, and deletes the best before them.

        Returns:
            Whether they were saved.  The earlier of equals stays; a NaN is never the highest.

        Raises:
            NotFiniteError: a leaf has a value that is not finite; nothing is written.
        """
        best = self.best()
        if math.isnan(metric) or (best is not None and metric <= best[1]):
            return False
        path = _step_path(self._best_folder, step)
        self._write(path, step, params, {"metric": float(metric)})
        for saved_step in _steps(self._best_folder) if _is_first() else ():
            if saved_step != step:
                remove(_step_path(self._best_folder, saved_step))
        return True

    def surplus(self, keep: int) -> list[Path]:
        """Returns folders of all states but the newest `keep`, and those that killed saves left.

        The best parameters are never among them.
        """
        paths = {step: _step_path(self.folder, step) for step in _steps(self.folder)}
        whole = [step for step, path in paths.items() if read_manifest(path)]
        # A folder newer than all whole ones stays: perhaps only its manifest is damaged.
        states = [
            path
            for step, path in paths.items()
            if step not in whole[:keep] and (not keep or step < max(whole, default=0))
        ]
        return [*self.folder.glob(".step_*.tmp"), *states]

    def drop(self, keep: int) -> None:
        """Deletes what `surplus` returns."""
        for path in self.surplus(keep) if _is_first() else ():
            shutil.rmtree(path) if path.suffix else remove(path)

    def latest(self) -> int | None:
        """Returns the newest step with a whole checkpoint; warns of newer ones that are not."""
        latest = -1
        for step in _steps(self.folder) if _is_first() else ():
            path = _step_path(self.folder, step)
            if read_manifest(path):
                latest = step
                break
            logging.warning("%s is not a whole checkpoint; passed over", path)
        if jax.process_count() > 1:
            latest = int(multihost_utils.broadcast_one_to_all(np.int32(latest)))
        return None if latest < 0 else latest

    def best(self) -> tuple[int, float] | None:
        """Returns step and metric of the best parameters, or None."""
        while True:
            steps = _steps(self._best_folder)
            # A run killed before it removed the best but one leaves both.
            manifests = {step: read_manifest(_step_path(self._best_folder, step)) for step in steps}
            metrics = {step: m["extra"]["metric"] for step, m in manifests.items() if m}
            if metrics:
                return max(metrics.items(), key=lambda item: item[1])
            if steps == _steps(self._best_folder):  # Else another process has replaced it.
                return None

    def restore(self, step: int | None, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """Verifies a checkpoint's digests, then reads it.

        Args:
            step: the step it was saved at; the latest if None.
            like: the tree to restore, of `jax.ShapeDtypeStruct`. A leaf's sharding may differ from
                the one it was saved under; without one, it goes to the first local device.

        Returns:
            The state and the `extra` it was saved with.

        Raises:
            CheckpointError: no such checkpoint exists, a file differs from its digest, the tree
                differs from `like` in a leaf, its shape or its dtype, or a leaf has a value that is
                not finite, as older versions saved them.
        """
        step = self.latest() if step is None else step
        if step is None:
            raise CheckpointError(
                f"{self.folder}: expected a whole checkpoint, found none; train first"
            )
        return self._read(_step_path(self.folder, step), like)

    def restore_best(self, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """Restores what `save_best` saved, as `restore` does; `extra` holds `metric`.

        If another process replaces it meanwhile, the new best is restored.
        """
        attempts = _ATTEMPTS
        while True:
            best, attempts = self.best(), attempts - 1
            if best is None:
                raise CheckpointError(
                    f"{self._best_folder}: expected a whole checkpoint, found none; train first"
                )
            path = _step_path(self._best_folder, best[0])
            try:
                return self._read(path, like)
            except Exception:  # Orbax has no class of its own for a missing file.
                if not attempts or (path.exists() and self.best() == best):
                    raise

    def _write(self, path: Path, step: int, state: PyTree, extra: dict[str, Any]) -> None:
        # Refuse what cannot be saved before anything is written.
        leaves = _leaves(state)
        for name, leaf in leaves.items():
            if not isinstance(leaf, jax.Array):
                raise TypeError(f"{name}: expected a jax.Array, found {type(leaf).__name__}")
        body = manifest_body(step, extra, leaves)
        if (bad := first_not_finite(leaves)) is not None:
            raise NotFiniteError(
                f"{path}: {bad}: expected finite values, found NaN or infinity; step {step} is not "
                "saved, the checkpoints before it are kept"
            )
        # Delete what killed saves left, to make room.
        first = _is_first()
        if first:
            for unfinished in path.parent.glob(".step_*.tmp"):
                shutil.rmtree(unfinished)
            remove(path)  # Not whole: the callers refuse to overwrite a whole one.
        # All processes write into the hidden folder; the first adds the manifest and renames it.
        with atomic_dir(path) if first else contextlib.nullcontext(temporary_path(path)) as folder:
            with _full_disk_named(path), plain_path(folder) as plain:
                self._orbax.save(plain / ARRAYS, args=ocp.args.PyTreeSave(leaves))
                saved = self._orbax.metadata(plain / ARRAYS).item_metadata
            if first:
                _check_saved(path, body["leaves"], {} if saved is None else saved.tree)
                write_manifest(folder, body)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"checkpoint {path}")

    def _read(self, path: Path, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        manifest = read_manifest(path)
        if manifest is None:
            raise CheckpointError(
                f"{path}: expected a whole checkpoint, found none; choose another step"
            )
        # Compare leaves, then the files' bytes.
        leaves, saved = _leaves(like), manifest["leaves"]
        for name in sorted(leaves.keys() | saved.keys()):
            expected = describe(leaves[name]) if name in leaves else "no such leaf"
            found = saved.get(name, "no such leaf")
            if expected != found:
                raise CheckpointError(
                    f"{path}: {name}: expected {expected}, found {found} in the checkpoint; it "
                    "belongs to another model or optimizer"
                )
        verify(path, manifest["files"])
        # Read the arrays onto the devices that `like` names.
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        targets = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or device)
            for name, leaf in leaves.items()
        }
        with plain_path(path) as plain:
            arrays = self._orbax.restore(
                plain / ARRAYS,
                args=ocp.args.PyTreeRestore(
                    item=targets, restore_args=ocp.checkpoint_utils.construct_restore_args(targets)
                ),
            )
        # Versions before `save` refused such values may have saved them.
        if (bad := first_not_finite(arrays)) is not None:
            remedy = f"delete {path} to go on from the one before it"
            if path.parent.name == "best":  # There is none before it.
                remedy = "ask a stage before this one, or train in a new --workdir"
            raise CheckpointError(
                f"{path}: {bad}: expected finite values, found NaN or infinity; {remedy}"
            )
        tree = jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in leaves])
        return tree, manifest["extra"]


def _check_saved(path: Path, expected: Mapping[str, str], saved: Mapping[str, Any]) -> None:
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


def _is_first() -> bool:
    return jax.process_index() == 0


def _leaves(tree: PyTree) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _step_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def _steps(folder: Path) -> list[int]:
    """Returns the steps that have a folder, whole or not, newest first."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        names = []
    return sorted((int(m[1]) for n in names if (m := re.fullmatch(r"step_(\d+)", n))), reverse=True)


@contextlib.contextmanager
def _full_disk_named(path: Path) -> Iterator[None]:
    """Turns a full disk into one error with a file's name; hides the log of orbax's threads."""

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
