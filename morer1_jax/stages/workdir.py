"""Tells how far a workdir's stages are, and which keys of the config can no longer change.

A key may change until a stage that depends on it has begun. After that another value is refused,
with two exceptions: keys on which no number depends beyond rounding (`OPERATIONAL`), and the steps
of a stage whose learning rate is constant, which may grow: training goes on from where it ended.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from morer1_jax import stores
from morer1_jax.config.binding import OPERATIONAL, differences, flatten, identity, matches
from morer1_jax.config.schema import to_tree
from morer1_jax.config.settings import Settings
from morer1_jax.errors import ConfigError
from morer1_jax.run.shelf import Shelf
from morer1_jax.run.store import Store
from morer1_jax.stages.marker import MARKER, read_marker, write_marker
from morer1_jax.stages.table import KEPT_FEATURES, STAGES, Output, Stage, Training


@dataclasses.dataclass(frozen=True)
class WorkdirStatus:
    """How far the stages of a workdir are, under a config; of several processes the first asks.

    Attributes:
        config: the whole config, by dotted keys.
        settings: the same config, typed.
    """

    config: Mapping[str, Any]
    settings: Settings
    store: Store

    @classmethod
    def of(cls, settings: Settings, store: Store) -> WorkdirStatus:
        """Returns the status of a workdir under a config."""
        return cls(flatten(to_tree(settings)), settings, store)

    @property
    def workdir(self) -> Path:
        """The local folder of all but the checkpoints."""
        return self.store.folder

    # Which stages are done.

    def done(self, stage: Stage) -> bool:
        """Returns whether a stage's output is whole, and has as many steps as the config.

        Raises:
            ConfigError: the output is of another config, or the marker cannot be read.
        """
        folder, steps_key = self.workdir / stage.name, self.steps_that_may_grow(stage)
        marker = None if stage.repeats else read_marker(folder)
        if marker is None:
            return False
        # Leave out the marker's keys that the stage no longer depends on.
        current, prefixes = self.depends(stage), stage.depends(self.settings)
        marked = {
            key: value
            for key, value in marker["config"].items()
            if matches(key, prefixes) and not matches(key, (*OPERATIONAL, *stage.free))
        }
        # Compare all keys but the steps that may grow.
        marked_steps = {} if steps_key is None else {steps_key: marked.get(steps_key)}
        if changed := "; ".join(differences(marked, current | marked_steps)):
            raise ConfigError(
                f"{folder}: expected stage {stage.name} of this config, found that of another "
                f"({changed}); use a new --workdir, or delete this folder to run the stage again"
            )
        return steps_key is None or marked.get(steps_key) == current[steps_key]

    def finish(self, stage: Stage, results: Mapping[str, Any]) -> None:
        """Marks a stage's output as whole; called last of all."""
        write_marker(self.workdir / stage.name, self.depends(stage), results)

    def begun(self, output: Output) -> bool:
        """Returns whether the workdir has anything that this or a later stage would go on from."""
        if output.signs:
            return any((self.workdir / sign).exists() for sign in output.signs)
        checkpoints = self.checkpoints(output)
        has_saved = any(c.latest() is not None or c.best() is not None for c in checkpoints)
        return has_saved or (self.workdir / output.name / MARKER).exists()

    # Which keys can no longer change.

    def depends(self, output: Output) -> dict[str, Any]:
        """Returns the keys, with values, that an output depends on; a stage's steps included."""
        free = (*OPERATIONAL, *output.free)
        return identity(self.config, output.depends(self.settings), free)

    def steps_that_may_grow(self, stage: Stage) -> str | None:
        """Returns the key of a stage's steps if they may grow: no step depends on their number."""
        training = stage.training(self.settings)
        if training is None or training.schedule != "constant" or training.steps is None:
            return None
        return f"{stage.name}.steps"

    def why_bound(self, key: str) -> str | None:
        """Returns which begun stages depend on a key, as a sentence; None if it may change."""
        names = [output.name for output in self._dependants(key) if self.begun(output)]
        if not names:
            return None
        verb = "depends" if len(names) == 1 else "depend"
        cosine = key == f"{names[0]}.steps" and key != "control.steps"
        return f"{', '.join(names)} {verb} on it" + (
            ": the learning rate's cosine ends with the last step" if cosine else ""
        )

    def _dependants(self, key: str) -> list[Output]:
        """Returns the outputs, begun or not, that depend on a key."""
        return [
            output
            for output in (*STAGES, KEPT_FEATURES)
            if matches(key, output.depends(self.settings))
            and not matches(key, (*OPERATIONAL, *output.free))
            and not (isinstance(output, Stage) and key == self.steps_that_may_grow(output))
        ]

    def check_steps(self) -> None:
        """Checks, for each stage whose steps may grow, that their new number can be trained to.

        Raises:
            ConfigError: a stage has passed that step, or must go on from a state that is deleted.
        """
        for stage in STAGES:
            if (key := self.steps_that_may_grow(stage)) is not None:
                self._check_steps(stage, key, self.config[key])

    def _check_steps(self, stage: Stage, key: str, steps: int) -> None:
        # Where the stage is: the step it ended at, if it is done, and those it has saved.
        folder, trained = self.workdir / stage.name, self.checkpoints(stage)
        marker = read_marker(folder)
        ended = None if marker is None else marker["config"].get(key)
        saved = [checkpoints.latest() for checkpoints in trained]
        # The best parameters may be of a later step than the newest state.
        bests = [best[0] for checkpoints in trained if (best := checkpoints.best()) is not None]
        reached = max([*bests, *(step for step in saved if step is not None)], default=0)
        # It can end neither before that, nor go on without a state, nor end there unvalidated.
        if (least := max(reached, ended or 0)) > steps:
            raise ConfigError(
                f"config.{key}: expected at least {least}, the step that {folder} is at, found "
                f"{steps}; raise it, or use a new --workdir"
            )
        if ended is not None and steps > ended and None in saved:
            raise ConfigError(
                f"config.{key}: expected {ended}, where {folder} ended and left no optimizer's "
                f"state, found {steps}; set it back, or use a new --workdir"
            )
        unvalidated = (c.best() is None and not c.is_unvalidated() for c in trained)
        if reached == steps and marker is None and any(unvalidated):
            raise ConfigError(
                f"config.{key}: expected at least {steps + 1}, since {folder} has passed step "
                f"{steps} without a validation, found {steps}; raise it"
            )

    # Which checkpoints stay.

    def checkpoints(self, output: Output) -> list[Shelf]:
        """Returns the checkpoints of each of a stage's trainings; the baselines have several."""
        below = sorted(stores.names(self.store.root / output.name))
        names = [output.name, *(f"{output.name}/{name}" for name in below)]
        folders = [self.store.checkpoints(name) for name in names]
        return [Shelf(folder) for folder in folders if folder.is_dir()]

    def drop_states(self, goes_on: Collection[str] = ()) -> None:
        """Deletes the states of stages that are done, but the number that `kept_when_done` keeps.

        The best parameters stay.

        Args:
            goes_on: names of stages that are not done and will go on; their states beyond
                `keep_checkpoints` are deleted too.
        """
        for checkpoints, keep in self._kept(goes_on):
            checkpoints.drop(keep)

    def surplus(self, goes_on: Collection[str] = ()) -> list[Path]:
        """Returns the paths that `drop_states` would delete."""
        kept = self._kept(goes_on)
        return [path for checkpoints, keep in kept for path in checkpoints.surplus(keep)]

    def kept_when_done(self, stage: Stage, later: Collection[str] = ()) -> int:
        """Returns how many states of a stage that is done stay: 1 if its steps may still grow.

        They may until a later stage has begun with what was trained.

        Args:
            later: names of stages to count as begun, beside those that have.
        """
        key = self.steps_that_may_grow(stage)
        dependants = [] if key is None else self._dependants(key)
        used = any(output.name in later or self.begun(output) for output in dependants)
        return int(key is not None and not used)

    def is_done(self, stage: Stage) -> bool:
        """Returns whether a stage is done under this config, and not under another."""
        try:
            return self.done(stage)
        except ConfigError:  # `done` raises it where the stage is to run.
            return False

    def _kept(self, goes_on: Collection[str]) -> Iterator[tuple[Shelf, int]]:
        """Yields checkpoints with the highest number of states that stay of them."""
        for stage, training in trainings(self.settings):
            done = self.is_done(stage)
            for checkpoints in self.checkpoints(stage):
                if done and checkpoints.best() is not None:
                    yield checkpoints, self.kept_when_done(stage)
                elif not done and stage.name in goes_on:
                    yield checkpoints, training.keep_checkpoints


def trainings(settings: Settings) -> Iterator[tuple[Stage, Training]]:
    """Yields each stage that trains with what it trains."""
    for stage in STAGES:
        if (training := stage.training(settings)) is not None:
            yield stage, training
