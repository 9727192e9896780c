"""The disk: what a run writes at most, compared with what is free before its first step."""

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
from morer1_jax.run.checkpoint import Checkpointer
from morer1_jax.run.features import features_shape
from morer1_jax.run.setup import Run
from morer1_jax.run.trainee import Trainee
from morer1_jax.stages.table import Stage, Training
from morer1_jax.stages.workdir import Progress, trainings

# Bytes of all that is not counted one by one: logs, scores, the page.
_OTHERS = 64 << 20


@dataclasses.dataclass(frozen=True)
class _Space:
    """What one training keeps, in bytes.

    Attributes:
      state: of a checkpoint: parameters that train and the optimizer's state.
      best: of the best parameters.
      keep: checkpoints that stay while it trains.
      there: of what it has written already and will not delete before its first save.
      states: checkpoints in that.
      best_there: whether the best parameters are in that.
      saves: checkpoints that it will make.
    """

    state: int
    best: int
    keep: int
    there: int
    states: int
    best_there: bool
    saves: int

    @property
    def peak(self) -> int:
        """Bytes while it trains: what is new is whole before what is old is deleted."""
        if not self.saves:
            return self.there
        total = self.states + self.saves
        kept, with_new = min(self.keep, total), min(self.keep + 1, total)
        beside = self.there + self.state + (0 if self.best_there else self.best)
        return max(kept * self.state + 2 * self.best, with_new * self.state + self.best, beside)

    @property
    def left(self) -> int:
        """Bytes when it has ended, as long as its stage has not."""
        return min(self.keep, self.states + self.saves) * self.state + self.best


def check_room(run: Run, progress: Progress, stages: Sequence[Stage]) -> None:
    """Checks that what the stages will write fits the disk.

    Args:
      stages: those that will run, in order.

    Raises:
      ConfigError: it does not.
    """
    keys = [
        f"{stage.name}.keep_checkpoints"
        for stage in stages
        if hasattr(getattr(run.settings, stage.name, None), "keep_checkpoints")
    ]
    lower = f"lower {' or '.join(keys)}, " if keys else ""
    needed = needed_bytes(run.trainee, progress, stages) + _features_bytes(run) + _OTHERS
    check_free(run.workdir, needed, f"{lower}make room, or name another --workdir")


def check_free(path: Path, needed: int, ways: str) -> None:
    """Compares the bytes that will be written at `path` with those that are free there.

    Raises:
      ConfigError: they are too few; it ends in `ways`.
    """
    path = Path(path).absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ConfigError(
            f"{path}: expected {_shown(needed)} free, the most that will be written, found "
            f"{_shown(free)}; {ways}"
        )


def needed_bytes(trainee: Trainee, progress: Progress, stages: Sequence[Stage]) -> int:
    """Returns what checkpoints need at most at any time, beyond what is written already.

    What `Progress.drop_states` deletes goes before anything is written, and after each stage.
    """
    every = {stage.name: training for stage, training in trainings(progress.settings)}
    folders = {name: _folders(progress, name, training) for name, training in every.items()}
    gone = progress.surplus([stage.name for stage in stages])
    there = {folder: bytes_in(folder) for name in every for folder in folders[name]}
    held = {
        folder: count - sum(bytes_in(path) for path in gone if path.is_relative_to(folder))
        for folder, count in there.items()
    }
    ended = [stage for stage, _ in trainings(progress.settings) if progress.is_done(stage)]
    peak = 0
    for place, stage in enumerate(stages):
        if stage.name in every:
            for folder in folders[stage.name]:
                space = _space(trainee, every[stage.name], folder, held[folder], gone)
                peak = max(peak, sum(held.values()) - held[folder] + space.peak)
                held[folder] = space.left
            ended.append(stage)
        later = [one.name for one in stages[: place + 1]]
        for one in ended:
            state, best = _sizes(trainee, every[one.name])
            after = best + state * progress.kept_when_done(one, later)
            held |= {folder: min(held[folder], after) for folder in folders[one.name]}
    return max(0, peak - sum(there.values()))


def _features_bytes(run: Run) -> int:
    """Returns what kept features will take, if they are still to be encoded."""
    folder = run.workdir / "features"
    if not run.settings.data.keep_features or folder.exists():
        return 0
    shape, dtype = features_shape(run.dataset, run.trainee, run.reader)
    # What a killed encoding has left goes first.
    return math.prod(shape) * np.dtype(dtype).itemsize - bytes_in(temporary_path(folder))


def _folders(progress: Progress, name: str, training: Training) -> list[Path]:
    """Returns the folders of a stage's trainings, as checkpoints name theirs."""
    return [(progress.workdir / name / folder).absolute() for folder in training.folders]


def _space(
    trainee: Trainee, training: Training, folder: Path, there: int, gone: Sequence[Path]
) -> _Space:
    """Returns what a training keeps in its folder, which will hold `there` bytes without `gone`."""
    checkpoints, keep, steps = (
        Checkpointer(folder / "checkpoints"),
        training.keep_checkpoints,
        training.steps,
    )
    state, best = _sizes(trainee, training)
    every = training.save_every
    return _Space(
        state=state,
        best=best,
        keep=keep,
        there=there,
        states=sum(path not in gone for path in checkpoints.folder.glob("step_*")),
        best_there=checkpoints.best() is not None,
        # Of as many steps as time allows any number.
        saves=keep + 1
        if steps is None
        else max(0, -(-steps // every) - (checkpoints.latest() or 0) // every),
    )


def _sizes(trainee: Trainee, training: Training) -> tuple[int, int]:
    """Returns bytes of a state and of the best parameters."""
    state = trainee.like_state(training.optimizer.build(1, trainee.trainable))
    return tree_bytes(state), tree_bytes(trainee.like)


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays of a tree, or of what stands for them."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bytes_in(folder: Path) -> int:
    """Returns the bytes of all files below a folder; 0 if there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _shown(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
