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

from morer1_jax.files import temporary_path
from morer1_jax.run import binding
from morer1_jax.run.config import ConfigError
from morer1_jax.run.features import features_shape
from morer1_jax.run.job import Job

# Bytes of all that is not counted one by one: logs, scores, the page.
_OTHERS = 64 << 20


@dataclasses.dataclass(frozen=True)
class Training:
    """What one training keeps, in bytes.

    Attributes:
      state: of a checkpoint: parameters that train and the optimizer's state.
      best: of the best parameters.
      keep: checkpoints that stay while it trains.
      saves: checkpoints that it makes.
      after: checkpoints that stay once it is done.
    """

    state: int
    best: int
    keep: int
    saves: int
    after: int

    @property
    def most(self) -> int:
        """While it trains: what is new is whole before what is old is deleted."""
        keep, more = min(self.keep, self.saves), min(self.keep + 1, self.saves)
        return max(keep * self.state + 2 * self.best, more * self.state + self.best)

    @property
    def left(self) -> int:
        """Once it is done."""
        return self.best + self.after * self.state


def check_room(job: Job, names: Sequence[str]) -> None:
    """Finds out whether what the stages will write fits the disk.

    Args:
      names: the stages that will run, in order.

    Raises:
      ConfigError: it does not.
    """
    keys = [f"{name}.keep_checkpoints" for name in names if name in ("sft", "grpo")]
    lower = f"lower {' or '.join(keys)}, " if keys else ""
    check_free(
        job.workdir, needed_bytes(job, names), f"{lower}make room, or name another --workdir"
    )


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


def needed_bytes(job: Job, names: Sequence[str]) -> int:
    """What the stages need at most at any time, beyond what they have written already."""
    trainings = {name: _trainings(job, name, names) for name in binding.TRAINED}
    there = {name: bytes_in(job.workdir / name) for name in binding.TRAINED}
    held = dict(there)
    for name, parts in trainings.items():
        if name not in names and held[name] and binding.begun(job.workdir, name):
            # Of a stage that is done its states go before anything is written.
            held[name] = min(held[name], sum(part.left for part in parts))
    most = 0
    for name in names:
        parts = trainings.get(name, [])
        held[name] = 0
        for part in parts:
            most = max(most, sum(held.values()) + part.most)
            held[name] += part.left
    new = max(0, most - sum(there.values()))
    if job.settings.data.keep_features and not (job.workdir / "features").exists():
        shape, dtype = features_shape(job)
        new += math.prod(shape) * np.dtype(dtype).itemsize
        # What a killed encoding has left goes first.
        new -= bytes_in(temporary_path(job.workdir / "features"))
    return new + _OTHERS


def _trainings(job: Job, name: str, names: Sequence[str]) -> list[Training]:
    """What a stage trains, one after another."""
    config = getattr(job.settings, name)
    like = job.settings.sft if name == "control" else config
    keep, every = (
        (1, like.eval_every) if name == "baselines" else (like.keep_checkpoints, like.save_every)
    )
    # As `binding.drop_states` has it.
    grows = name == "control" or config.optimizer.schedule == "constant"
    later = {"sft": {"rate", "grpo", "control"}, "grpo": {"control"}}.get(name, set())
    used = later & {*names} or any(binding.begun(job.workdir, one) for one in later)
    training = Training(
        state=tree_bytes(job.like_state(like.optimizer.build(1, job.parts))),
        best=tree_bytes(job.like[0]),
        keep=keep,
        saves=keep + 1 if config.steps is None else -(-config.steps // every),
        after=int(grows and not used),
    )
    return [training] * (2 if name == "baselines" else 1)


def tree_bytes(tree: Any) -> int:
    """Of all arrays of a tree, or of what stands for them."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bytes_in(folder: Path) -> int:
    """Of all files below a folder; 0 if there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _shown(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
