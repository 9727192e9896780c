"""How far a workdir's stages are, and which keys of the config that binds.

A key may change until a stage that depends on it has begun. Then another value is refused, but of
keys on which no number depends beyond rounding (`OPERATIONAL`), and of a stage's own steps
where its learning rate is constant: more of them go on from where it ended.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from morer1_jax.config.binding import OPERATIONAL, differences, flatten, identity, matches
from morer1_jax.config.schema import to_tree
from morer1_jax.config.settings import Settings
from morer1_jax.errors import ConfigError
from morer1_jax.run.checkpoint import Checkpointer
from morer1_jax.stages.marker import MARKER, read_marker, write_marker
from morer1_jax.stages.table import KEPT_FEATURES, STAGES, Output, Stage, Training


@dataclasses.dataclass(frozen=True)
class Progress:
    """The stages of a workdir under a config.

    Attributes:
      config: the whole, by dotted keys.
      settings: the same, typed.
    """

    config: Mapping[str, Any]
    settings: Settings
    workdir: Path

    @classmethod
    def of(cls, settings: Settings, workdir: Path) -> Progress:
        """Returns the progress of a workdir under a config."""
        return cls(flatten(to_tree(settings)), settings, workdir)

    # Which stages are done.

    def done(self, stage: Stage) -> bool:
        """Returns whether a stage's output is whole, and as much as is asked for.

        Raises:
          ConfigError: it is whole, but was made under another config, or the marker cannot be read.
        """
        folder, steps_key = self.workdir / stage.name, self.steps_that_may_grow(stage)
        marker = None if stage.repeats else read_marker(folder)
        if marker is None:
            return False
        # Keys that bind no more may have been others.
        here, prefixes = self.depends(stage), stage.depends(self.settings)
        there = {
            key: value
            for key, value in marker["config"].items()
            if matches(key, prefixes) and not matches(key, (*OPERATIONAL, *stage.free))
        }
        grown = {} if steps_key is None else {steps_key: there.get(steps_key)}
        if changed := "; ".join(differences(there, here | grown)):
            raise ConfigError(
                f"{folder}: expected stage {stage.name} of this config, found that of another "
                f"({changed}); use a new --workdir, or delete this folder to run the stage again"
            )
        return steps_key is None or there.get(steps_key) == here[steps_key]

    def finish(self, stage: Stage, results: Mapping[str, Any]) -> None:
        """Marks a stage's output as whole: the last thing that is done of it."""
        write_marker(self.workdir / stage.name, self.depends(stage), results)

    def begun(self, output: Output) -> bool:
        """Returns whether there is something that the stage, or a later one, would go on with."""
        if output.signs:
            return any((self.workdir / sign).exists() for sign in output.signs)
        saved = self.checkpoints(output)
        kept = any(c.latest() is not None or c.best() is not None for c in saved)
        return kept or (self.workdir / output.name / MARKER).exists()

    # Which keys are bound.

    def depends(self, output: Output) -> dict[str, Any]:
        """Returns the keys that an output depends on, a stage's own steps among them."""
        free = (*OPERATIONAL, *output.free)
        return identity(self.config, output.depends(self.settings), free)

    def steps_that_may_grow(self, stage: Stage) -> str | None:
        """Returns the key of a stage's steps where each step is the same however many there are."""
        training = stage.training(self.settings)
        if training is None or training.schedule != "constant" or training.steps is None:
            return None
        return f"{stage.name}.steps"

    def why_bound(self, key: str) -> str | None:
        """Says which stages that have begun depend on a key; None if it may change."""
        names = [output.name for output in self._dependants(key) if self.begun(output)]
        if not names:
            return None
        verb = "depends" if len(names) == 1 else "depend"
        cosine = key == f"{names[0]}.steps" and key != "control.steps"
        return f"{', '.join(names)} {verb} on it" + (
            ": the learning rate's cosine ends with the last step" if cosine else ""
        )

    def _dependants(self, key: str) -> list[Output]:
        """Returns what depends on a key."""
        return [
            output
            for output in (*STAGES, KEPT_FEATURES)
            if matches(key, output.depends(self.settings))
            and not matches(key, (*OPERATIONAL, *output.free))
            and not (isinstance(output, Stage) and key == self.steps_that_may_grow(output))
        ]

    def check_steps(self) -> None:
        """Checks that no stage is to end before where it is, or to go on from what is gone.

        Raises:
          ConfigError: one is.
        """
        for stage in STAGES:
            if (key := self.steps_that_may_grow(stage)) is not None:
                self._check_steps(stage, key, self.config[key])

    def _check_steps(self, stage: Stage, key: str, steps: int) -> None:
        folder, kept = self.workdir / stage.name, self.checkpoints(stage)
        marker = read_marker(folder)
        ended = None if marker is None else marker["config"].get(key)
        saved = [checkpoints.latest() for checkpoints in kept]
        # Of what was trained since, a validation may have been kept without its state.
        bests = [best[0] for checkpoints in kept if (best := checkpoints.best()) is not None]
        reached = max([*bests, *(step for step in saved if step is not None)], default=0)
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
        if reached == steps and marker is None and any(c.best() is None for c in kept):
            raise ConfigError(
                f"config.{key}: expected at least {steps + 1}, since {folder} has passed step "
                f"{steps} without a validation, found {steps}; raise it"
            )

    # Which checkpoints stay.

    def checkpoints(self, output: Output) -> list[Checkpointer]:
        """Returns the checkpoints of a stage that trains; of the baselines there are several."""
        folder = self.workdir / output.name
        folders = [folder, *sorted(folder.iterdir())] if folder.is_dir() else []
        folders = [one / "checkpoints" for one in folders if (one / "checkpoints").is_dir()]
        return [Checkpointer(one) for one in folders]

    def drop_states(self, goes_on: Collection[str] = ()) -> None:
        """Deletes what no stage can go on from any more: the states of stages that are done.

        The best parameters stay; of states `kept_when_done`.

        Args:
          goes_on: names of stages that are not done and will go on: states beyond those they keep
            go too.
        """
        for checkpoints, keep in self._kept(goes_on):
            checkpoints.drop(keep)

    def surplus(self, goes_on: Collection[str] = ()) -> list[Path]:
        """Returns what `drop_states` would delete."""
        return [path for one, keep in self._kept(goes_on) for path in one.surplus(keep)]

    def kept_when_done(self, stage: Stage, later: Collection[str] = ()) -> int:
        """Returns how many states stay of a stage that is done: one where more steps may be wanted.

        That is until a later stage has begun with what was trained.

        Args:
          later: names of stages to be taken as begun, beside those that have.
        """
        key = self.steps_that_may_grow(stage)
        dependants = [] if key is None else self._dependants(key)
        used = any(output.name in later or self.begun(output) for output in dependants)
        return int(key is not None and not used)

    def is_done(self, stage: Stage) -> bool:
        """Returns whether a stage is done under this config, and not under another."""
        try:
            return self.done(stage)
        except ConfigError:  # Has been said where it matters.
            return False

    def _kept(self, goes_on: Collection[str]) -> Iterator[tuple[Checkpointer, int]]:
        """Yields checkpoints with the number of states that are to stay of them, at most."""
        for stage, training in trainings(self.settings):
            done = self.is_done(stage)
            for checkpoints in self.checkpoints(stage):
                if done and checkpoints.best() is not None:
                    yield checkpoints, self.kept_when_done(stage)
                elif not done and stage.name in goes_on:
                    yield checkpoints, training.keep_checkpoints


def trainings(settings: Settings) -> Iterator[tuple[Stage, Training]]:
    """Yields the stages that train, with what each trains."""
    for stage in STAGES:
        if (training := stage.training(settings)) is not None:
            yield stage, training
