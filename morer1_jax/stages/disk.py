"""Checks before the first step that what a run writes at most fits the free disk."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from morer1_jax.errors import ConfigError
from morer1_jax.files import temporary_path
from morer1_jax.run.features import features_shape
from morer1_jax.run.setup import Run
from morer1_jax.run.shelf import Shelf
from morer1_jax.run.store import COPIES
from morer1_jax.run.trainee import Trainee
from morer1_jax.stages.table import Stage, Training
from morer1_jax.stages.workdir import WorkdirStatus, trainings

# Bytes for all that is not counted one by one: logs, scores, the report page.
_OTHERS = 64 << 20


@dataclasses.dataclass(frozen=True)
class _Space:
    """Room on the disk that one training needs.

    Attributes:
        state: bytes of a checkpoint: parameters that train and the optimizer's state.
        best: bytes of the best parameters.
        keep: number of checkpoints that stay while it trains.
        present: bytes that are on the disk already and stay until its first save.
        present_states: number of checkpoints among these.
        present_best: whether the best parameters are among these.
        saves: number of checkpoints that it will make.
    """

    state: int
    best: int
    keep: int
    present: int
    present_states: int
    present_best: bool
    saves: int

    @property
    def peak(self) -> int:
        """Bytes at most while it trains; a new checkpoint is whole before an old one is deleted."""
        if not self.saves:
            return self.present
        total = self.present_states + self.saves
        kept, with_new = min(self.keep, total), min(self.keep + 1, total)
        # The new best beside the old one; a new state before the oldest goes; the first save.
        return max(
            kept * self.state + 2 * self.best,
            with_new * self.state + self.best,
            self.present + self.state + (0 if self.present_best else self.best),
        )

    @property
    def left(self) -> int:
        """Bytes after it has ended, until its stage ends and deletes states."""
        return min(self.keep, self.present_states + self.saves) * self.state + self.best


def check_room(run: Run, status: WorkdirStatus, stages: Sequence[Stage]) -> None:
    """Checks that what the stages will write fits the disk.

    Of a run whose workdir is in a bucket every process is to call it, else the first.

    Args:
        stages: those that will run, in order.

    Raises:
        ConfigError: the disk has less room.
    """
    keys = [
        f"{stage.name}.keep_checkpoints"
        for stage in stages
        if hasattr(getattr(run.settings, stage.name, None), "keep_checkpoints")
    ]
    if status.store.is_bucket:
        # Checkpoints go straight there. The rest is on the disk of every process, too.
        way = f"make room, or name a folder on another disk in {COPIES}"
        check_free(run.workdir, _features_bytes(run) + _OTHERS, way)
        return
    lower = f"lower {' or '.join(keys)}, " if keys else ""
    needed = needed_bytes(run.trainee, status, stages) + _features_bytes(run) + _OTHERS
    check_free(run.workdir, needed, f"{lower}make room, or name another --workdir")


def check_free(path: Path, needed: int, ways: str) -> None:
    """Checks that `needed` bytes are free on the disk of `path`, which need not exist.

    Raises:
        ConfigError: fewer are free; the message ends in `ways`.
    """
    path = Path(path).absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ConfigError(
            f"{path}: expected {_shown(needed)} free, the most that will be written, found "
            f"{_shown(free)}; {ways}"
        )


def needed_bytes(trainee: Trainee, status: WorkdirStatus, stages: Sequence[Stage]) -> int:
    """Returns the bytes that checkpoints need at most at any time, beyond those on the disk.

    `WorkdirStatus.drop_states` runs before anything is written, and after each stage.
    """
    # Bytes of each training's folder: as it is, and once what no stage goes on from is deleted.
    by_name = {stage.name: training for stage, training in trainings(status.settings)}
    folders = {name: _folders(status, name, training) for name, training in by_name.items()}
    surplus = status.surplus([stage.name for stage in stages])
    before = {folder: bytes_in(folder) for name in by_name for folder in folders[name]}
    sizes = {
        folder: size - sum(bytes_in(path) for path in surplus if path.is_relative_to(folder))
        for folder, size in before.items()
    }
    # Stage by stage: the peak while it trains, and what is left of all stages that are done.
    done_stages = [stage for stage, _ in trainings(status.settings) if status.is_done(stage)]
    peak = 0
    for place, stage in enumerate(stages):
        if stage.name in by_name:
            for folder in folders[stage.name]:
                space = _space(trainee, by_name[stage.name], folder, sizes[folder], surplus)
                peak = max(peak, sum(sizes.values()) - sizes[folder] + space.peak)
                sizes[folder] = space.left
            done_stages.append(stage)
        begun_names = [begun.name for begun in stages[: place + 1]]
        for done_stage in done_stages:
            state, best = _sizes(trainee, by_name[done_stage.name])
            left = best + state * status.kept_when_done(done_stage, begun_names)
            sizes |= {folder: min(sizes[folder], left) for folder in folders[done_stage.name]}
    return max(0, peak - sum(before.values()))


def _features_bytes(run: Run) -> int:
    """Returns the bytes of kept features that are still to be encoded."""
    folder = run.workdir / "features"
    if not run.settings.data.keep_features or folder.exists():
        return 0
    shape, dtype = features_shape(run.dataset, run.trainee, run.reader)
    # Files that a killed encoding left are deleted first.
    return math.prod(shape) * np.dtype(dtype).itemsize - bytes_in(temporary_path(folder))


def _folders(status: WorkdirStatus, name: str, training: Training) -> list[Path]:
    """Returns the folders of a stage's trainings, absolute as `Shelf.folder` is."""
    return [(status.workdir / name / folder).absolute() for folder in training.folders]


def _space(
    trainee: Trainee, training: Training, folder: Path, size: int, surplus: Sequence[Path]
) -> _Space:
    """Returns the room that a training needs; its folder has `size` bytes without the surplus."""
    checkpoints, every = Shelf(folder / "checkpoints"), training.save_every
    state, best = _sizes(trainee, training)
    # Where time decides the number of steps, assume more saves than are kept.
    saves = training.keep_checkpoints + 1
    if training.steps is not None:
        saves = max(0, -(-training.steps // every) - (checkpoints.latest() or 0) // every)
    return _Space(
        state=state,
        best=best,
        keep=training.keep_checkpoints,
        present=size,
        present_states=sum(path not in surplus for path in checkpoints.folder.glob("step_*")),
        present_best=checkpoints.best() is not None,
        saves=saves,
    )


def _sizes(trainee: Trainee, training: Training) -> tuple[int, int]:
    """Returns the bytes of a state and of the best parameters."""
    state = trainee.placed.like_state(training.optimizer.build(1, trainee.placed.trainable))
    return tree_bytes(state), tree_bytes(trainee.placed.like)


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays of a tree, which may be `jax.ShapeDtypeStruct`."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bytes_in(folder: Path) -> int:
    """Returns the bytes of all files below a folder; 0 if there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _shown(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
