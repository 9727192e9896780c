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
from morer1_jax.run.job import Job
from morer1_jax.stages import binding
from morer1_jax.stages.baselines import BLIND

# Bytes of all that is not counted one by one: logs, scores, the page.
_OTHERS = 64 << 20


@dataclasses.dataclass(frozen=True)
class Training:
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
    def most(self) -> int:
        """While it trains: what is new is whole before what is old is deleted."""
        if not self.saves:
            return self.there
        made = self.states + self.saves
        keep, more = min(self.keep, made), min(self.keep + 1, made)
        beside = self.there + self.state + (0 if self.best_there else self.best)
        return max(keep * self.state + 2 * self.best, more * self.state + self.best, beside)

    @property
    def left(self) -> int:
        """When it has ended, as long as its stage has not."""
        return min(self.keep, self.states + self.saves) * self.state + self.best


def check_room(job: Job, config: Any, names: Sequence[str]) -> None:
    """Finds out whether what the stages will write fits the disk.

    Args:
      config: the job's.
      names: the stages that will run, in order.

    Raises:
      ConfigError: it does not.
    """
    keys = [f"{name}.keep_checkpoints" for name in names if name in ("sft", "grpo")]
    lower = f"lower {' or '.join(keys)}, " if keys else ""
    needed = needed_bytes(job, config, names)
    check_free(job.workdir, needed, f"{lower}make room, or name another --workdir")


def check_free(path: Path, needed: int, ways: str) -> None:
    """Compares the bytes that will be written at `path` with those that are free there.

    Raises:
      ConfigError: they are too few; it ends in `ways`.
    """
    path = Path(path).absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise ConfigError(
            f"{path}: {_shown(needed)} more will be written at most, {_shown(free)} are free; "
            f"{ways}"
        )


def needed_bytes(job: Job, config: Any, names: Sequence[str]) -> int:
    """What the stages need at most at any time, beyond what they have written already.

    What `binding.drop_states` deletes goes before anything is written, and after each stage.
    """
    workdir = job.workdir
    gone = binding.surplus(config, workdir, names)
    there = {folder: bytes_in(folder) for name in binding.TRAINED for folder in _folders(job, name)}
    held = dict(there)
    for folder in held:
        held[folder] -= sum(bytes_in(path) for path in gone if path.is_relative_to(folder))
    ended = [name for name in binding.TRAINED if binding.is_done(config, workdir, name)]
    most = 0
    for place, name in enumerate(names):
        if name in binding.TRAINED:
            for folder in _folders(job, name):
                training = _training(job, config, name, folder, held[folder], gone)
                most = max(most, sum(held.values()) - held[folder] + training.most)
                held[folder] = training.left
            ended.append(name)
        for one in ended:
            state, best = _sizes(job, one)
            after = best + state * binding.kept_when_done(config, workdir, one, names[: place + 1])
            held |= {folder: min(held[folder], after) for folder in _folders(job, one)}
    new = max(0, most - sum(there.values()))
    if job.settings.data.keep_features and not (workdir / "features").exists():
        shape, dtype = features_shape(job)
        new += math.prod(shape) * np.dtype(dtype).itemsize
        # What a killed encoding has left goes first.
        new -= bytes_in(temporary_path(workdir / "features"))
    return new + _OTHERS


def _folders(job: Job, name: str) -> list[Path]:
    """Of what a stage trains, one after another."""
    folder = (job.workdir / name).absolute()  # As checkpoints name theirs.
    return [folder / one for one in BLIND] if name == "baselines" else [folder]


def _training(
    job: Job, config: Any, name: str, folder: Path, there: int, gone: Sequence[Path]
) -> Training:
    """What a stage trains into one folder, which will hold `there` bytes when `gone` is."""
    keep, steps = binding.kept_while_training(config, name), getattr(job.settings, name).steps
    like = job.settings.sft if name == "control" else getattr(job.settings, name)
    every = like.eval_every if name == "baselines" else like.save_every
    checkpoints = Checkpointer(folder / "checkpoints")
    state, best = _sizes(job, name)
    return Training(
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


def _sizes(job: Job, name: str) -> tuple[int, int]:
    """Bytes of a state and of the best parameters of what a stage trains."""
    like = job.settings.sft if name == "control" else getattr(job.settings, name)
    state = tree_bytes(job.like_state(like.optimizer.build(1, job.parts)))
    return state, tree_bytes(job.like[0])


def tree_bytes(tree: Any) -> int:
    """Of all arrays of a tree, or of what stands for them."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bytes_in(folder: Path) -> int:
    """Of all files below a folder; 0 if there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _shown(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
