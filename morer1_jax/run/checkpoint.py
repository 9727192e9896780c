"""Saves and restores checkpoints that are whole, finite and verified, or absent.

Orbax writes and reads the arrays. The manifest, which holds the files' digests, is written last: a
folder with a manifest is whole, one without was never finished.

    <folder>/step_00000100/arrays/…       orbax's files
    <folder>/step_00000100/manifest.json  step, extra, shape and dtype of each leaf, digests
    <folder>/best/step_00000080/…         the best by a metric, in the same form

Orbax's CheckpointManager is not used: it deletes older checkpoints as soon as its own files are
there, before their digests are; what it was deleting when it was killed it takes for a checkpoint;
and it does not see what another process keeps or deletes.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from morer1_jax.errors import DataError, NotFiniteError, one_line
from morer1_jax.hosts import group, join
from morer1_jax.paths import plain_path
from morer1_jax.run.finite import first_not_finite
from morer1_jax.run.manifest import (
    ARRAYS,
    CheckpointError,
    DamagedError,
    check_saved,
    describe,
    manifest_body,
    own_digests,
    read_manifest,
    verify,
    write_manifest,
)
from morer1_jax.run.mesh import path_name
from morer1_jax.run.saving import full_disk_named, written
from morer1_jax.run.shelf import Shelf, delete, unfinished

PyTree = Any

_ATTEMPTS = 5  # at reading what another process may replace


class Checkpointer:
    """Saves and restores training states in one folder of a file system all processes share.

    In a run of several processes every method is called by all of them at the same point. In the
    background, `save` and `save_best` return once what they save is copied to the host, and their
    order is that in which checkpoints become whole; `wait` for them, or leave the `with` block.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        keep: int = 2,
        *,
        background: bool = False,
        before_whole: Callable[[], None] = lambda: None,
    ) -> None:
        """Opens the folder, which the first save makes.

        Args:
            keep: number of newest checkpoints that stay; older ones are deleted once a newer one is
                whole.
            background: whether files are written while the caller goes on.
            before_whole: called by the first process, in the background too, when all but a
                checkpoint's manifest is written: what must be there before it counts.

        Raises:
            ValueError: `keep` is below 1.
        """
        if keep < 1:
            raise ValueError(f"keep: expected at least 1, found {keep}")
        self.shelf = Shelf(folder)
        self.folder = self.shelf.folder
        self.keep = keep
        self._background, self._before_whole = background, before_whole
        self._writers: dict[Path, ocp.AsyncCheckpointer] = {}
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: list[tuple[Path, Future[None]]] = []
        self._best: tuple[int, float] | None = None  # that is being saved

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is None:
            self.wait()
        else:  # Of two errors the first counts.
            with contextlib.suppress(Exception):
                self.wait()

    def wait(self) -> None:
        """Waits until all that was saved is whole; raises the error of what could not be."""
        while self._pending:
            self._pending.pop(0)[1].result()

    def check(self) -> None:
        """Raises the error of a save that has failed in the background, if one has."""
        while self._pending and self._pending[0][1].done():
            self._pending.pop(0)[1].result()

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
        self._write(
            self.shelf.state(step),
            step,
            state,
            dict(extra or {}),
            then=lambda: self.shelf.drop(self.keep),
        )

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
        path = self.shelf.best_parameters(step)
        self._wait_for(path.parent)
        extra = {"metric": float(metric)}
        self._write(path, step, params, extra, then=lambda: self.shelf.drop_best_but(step))
        self._best = step, float(metric)
        return True

    def latest(self) -> int | None:
        """Returns the newest step with a whole checkpoint; warns of newer ones that are not.

        Waits for a state that is being saved.
        """
        self._wait_for(self.folder)
        return group.of_first("newest checkpoint", self.shelf.latest)

    def best(self) -> tuple[int, float] | None:
        """Returns step and metric of the best parameters, those being saved too; or None."""
        if self._best is not None:
            return self._best
        best = group.of_first("best checkpoint", self.shelf.best)
        return None if best is None else (best[0], best[1])

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
        return self._read(self.shelf.state(step), like)

    def restore_best(self, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        """Restores what `save_best` saved, as `restore` does; `extra` holds `metric`.

        If another process replaces it meanwhile, the new best is restored.
        """
        attempts = _ATTEMPTS
        while True:
            best, attempts = self.best(), attempts - 1
            if best is None:
                raise CheckpointError(
                    f"{self.folder / 'best'}: expected a whole checkpoint, found none; train first"
                )
            path = self.shelf.best_parameters(best[0])
            try:
                return self._read(path, like)
            except Exception:  # Orbax has no class of its own for a missing file.
                # Of several processes only this one may have met it; they own the folder, too.
                together = group.count() > 1
                if together or not attempts or (path.exists() and self.best() == best):
                    raise

    def restore_newest(self, like: PyTree) -> tuple[int, PyTree, dict[str, Any]] | None:
        """Restores the newest checkpoint that is not damaged; warns of those that are.

        These no longer count, so that their steps can be saved anew.

        Returns:
            Its step, the state, and the `extra` it was saved with; None if there is no checkpoint.

        Raises:
            CheckpointError: all are damaged, or see `restore`.
        """
        damaged: list[tuple[int, DamagedError]] = []
        for step in group.of_first("whole checkpoints", self.shelf.whole):
            try:
                state, extra = self._read(self.shelf.state(step), like)
            except DamagedError as error:
                damaged.append((step, error))
                continue
            for bad_step, error in damaged:
                logging.warning("%s; training goes on from step %d", one_line(error), step)
                group.by_first("damaged", functools.partial(self.shelf.set_aside, bad_step))
            return step, state, extra
        if damaged:
            raise CheckpointError(
                f"{self.folder}: expected a checkpoint as it was saved, found all "
                f"{len(damaged)} damaged ({one_line(damaged[0][1])}); delete the folder to train "
                "this stage anew"
            )
        return None

    def _wait_for(self, folder: Path) -> None:
        """Waits for what is being written into a folder, and for all that was begun before it."""
        while any(path.parent == folder for path, _ in self._pending):
            self._pending.pop(0)[1].result()

    def _write(
        self,
        path: Path,
        step: int,
        state: PyTree,
        extra: dict[str, Any],
        then: Callable[[], None],
    ) -> None:
        """Copies a state to the host, and has it written; `then` is called by the first process."""
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
        if group.is_first():
            for left in unfinished(path.parent):
                delete(left)
            delete(path)  # Not whole: the callers refuse to overwrite a whole one.
        # All processes write there; the first adds the manifest last of all.
        files = contextlib.ExitStack()
        with files:
            folder = files.enter_context(written(path))
            group.meet("room for a checkpoint")
            files.enter_context(full_disk_named(path))
            plain = files.enter_context(plain_path(folder))
            writer = self._writer(path.parent)
            writer.save(plain / ARRAYS, args=ocp.args.PyTreeSave(leaves))
            files = files.pop_all()
        key = group.ticket("checkpoint")
        finish = functools.partial(self._finish, writer, files, folder, plain, body, then, key)
        self._pending.append((path, self._finisher.submit(_ending_all, path, finish)))
        if not self._background:
            self.wait()

    def _finish(
        self,
        writer: ocp.AsyncCheckpointer,
        files: contextlib.ExitStack,
        folder: Path,
        plain: Path,
        body: Mapping[str, Any],
        then: Callable[[], None],
        key: str,
    ) -> None:
        """Makes a checkpoint whole, once its arrays are written.

        Args:
            files: what to leave then; it renames the folder.
            plain: the folder by another name.
            key: from `group.ticket`.
        """
        with files:
            writer.wait_until_finished()
            digests = group.to_first("digests", own_digests(folder), key)
            if digests is not None:
                saved = writer.metadata(plain / ARRAYS).item_metadata
                check_saved(folder, body["leaves"], {} if saved is None else saved.tree)
                self._before_whole()
                write_manifest(folder, body, {n: d for own in digests for n, d in own.items()})
        if digests is not None:
            then()
        group.meet("is whole", key)

    def _writer(self, folder: Path) -> ocp.AsyncCheckpointer:
        """Returns what writes arrays into a folder's checkpoints, one after another."""
        if folder not in self._writers:
            # Not compressed: of such numbers it saves little room for most of the time.
            handler = ocp.PyTreeCheckpointHandler(
                use_ocdbt=True, use_zarr3=True, use_compression=False
            )
            # Its barriers need names of their own, since the best parameters and a state are
            # written at once.
            options = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=folder.name)
            self._writers[folder] = ocp.AsyncCheckpointer(handler, multiprocessing_options=options)
        return self._writers[folder]

    def _read(self, path: Path, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
        manifest = group.of_first("manifest", lambda: read_manifest(path))
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
            reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True))
            arrays = reader.restore(
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


def _ending_all(path: Path, finish: Callable[[], None]) -> None:
    """Calls `finish`; of several processes, which wait for each other there, an error ends all."""
    try:
        finish()
    except BaseException as error:
        code = 2 if isinstance(error, DataError | OSError) else 1
        join.leave(code, f"{path}: {one_line(error)}", error)
        raise


def _leaves(tree: PyTree) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
