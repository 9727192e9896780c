"""Lists the stages: what each runs, which stages come before it, which keys it depends on."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

from morer1_jax.config.settings import Settings
from morer1_jax.data.sample import View
from morer1_jax.errors import ConfigError
from morer1_jax.learn.state import OptimizerConfig
from morer1_jax.run.setup import Run
from morer1_jax.stages.ahead import Program
from morer1_jax.stages.baselines import BLIND, run_baselines
from morer1_jax.stages.control import control_programs, run_control
from morer1_jax.stages.evaluate import evaluate_programs, run_evaluate
from morer1_jax.stages.grpo import grpo_programs, run_grpo
from morer1_jax.stages.marker import MARKER
from morer1_jax.stages.rate import check_rating, check_start, rate_programs, run_rate
from morer1_jax.stages.sft import run_sft, sft_programs
from morer1_jax.stages.synthesise import run_synthesise

_DATA = ("seed", "world", "data")
_MODEL = (*_DATA, "model", "tune", "runtime", "score")
_SFT = (*_MODEL, "sft")
_GRPO = (*_SFT, "rate", "grpo")
# Pools are derived from stored pass rates, so that rating does not depend on these keys.
_POOLS = ("rate.easy_from", "rate.never")


@dataclasses.dataclass(frozen=True)
class Training:
    """What a stage trains, as far as checkpoints and the disk are concerned.

    Attributes:
        steps: number of each training's steps; None: as many as time allows.
        schedule: of the learning rate; where it is constant, the steps may grow after the stage.
        save_every: steps between checkpoints.
        keep_checkpoints: number of checkpoints that stay while it trains.
        optimizer: its state is in each checkpoint.
        folders: of the stage's trainings, in their order, relative to the stage's folder.
    """

    steps: int | None
    schedule: str
    save_every: int
    keep_checkpoints: int
    optimizer: OptimizerConfig
    folders: tuple[str, ...] = ("",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """A part of a workdir that later commands use again.

    Attributes:
        name: of its folder in the workdir.
        depends: prefixes of the config's keys that it depends on.
        free: prefixes of keys below these that it does not depend on.
        signs: files of which one exists as soon as it has begun; empty for a stage that trains,
            whose checkpoints tell.
    """

    name: str
    depends: Callable[[Settings], tuple[str, ...]]
    free: tuple[str, ...] = ()
    signs: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage(Output):
    """One row of the table; `config.stages` and the stage's metrics use the same `name`.

    Attributes:
        run: does the stage's work in a `Run`; takes the `Setup` instead if `makes_data`.
        needs: names of stages whose output it reads.
        training: what it trains; None: nothing.
        reads_reasoning: whether it learns from written reasoning.
        reads_images: whether its models see images, so that kept features are needed.
        blind_views: views of the facts that its models see beside the whole one.
        check: checks what it will read, before any stage runs.
        programs: yields the programs to compile ahead, and prepares the run for its stage.
        shaped_by: names of stages that must be done before its programs' shapes are known.
        scores: names of the systems it scores on the test split; `report.tables.NAMES` has their
            titles.
        rank: of its model; a workdir stands for the model of the highest rank. 0: no model.
        makes_data: whether it makes the data that a `Run` is opened from.
        repeats: whether it runs each time, on all models that the workdir has.
    """

    run: Callable[[Any], None]
    needs: Callable[[Settings], tuple[str, ...]] = lambda settings: ()
    training: Callable[[Settings], Training | None] = lambda settings: None
    reads_reasoning: Callable[[Settings], bool] = lambda settings: False
    reads_images: Callable[[Settings], bool] = lambda settings: True
    blind_views: tuple[View, ...] = ()
    check: Callable[[Run], None] = lambda run: None
    programs: Callable[[Run], Iterable[Program]] = lambda run: ()
    shaped_by: Callable[[Settings], tuple[str, ...]] = lambda settings: ()
    scores: tuple[str, ...] = ()
    rank: int = 0
    makes_data: bool = False
    repeats: bool = False


def _starting_model(settings: Settings) -> tuple[str, ...]:
    """Returns the stage that trains the parameters that rating and GRPO start from."""
    return ("sft",) if settings.rate.begin == "sft" else ()


def _sft_training(settings: Settings) -> Training:
    sft = settings.sft
    return Training(
        sft.steps, sft.optimizer.schedule, sft.save_every, sft.keep_checkpoints, sft.optimizer
    )


def _baselines_training(settings: Settings) -> Training:
    own = settings.baselines
    schedule = own.optimizer.schedule
    return Training(own.steps, schedule, own.eval_every, 1, own.optimizer, tuple(BLIND))


def _grpo_training(settings: Settings) -> Training:
    grpo = settings.grpo
    return Training(
        grpo.steps, grpo.optimizer.schedule, grpo.save_every, grpo.keep_checkpoints, grpo.optimizer
    )


def _control_training(settings: Settings) -> Training:
    sft = dataclasses.replace(_sft_training(settings), schedule="constant")
    return dataclasses.replace(sft, steps=settings.control.steps)


_BEFORE_EVALUATION = (
    Stage(
        name="synthesise",
        run=run_synthesise,
        depends=lambda settings: _DATA,
        signs=("synthesise", "data", "tokenizer", "data.json"),
        makes_data=True,
    ),
    Stage(
        name="sft",
        run=run_sft,
        programs=sft_programs,
        depends=lambda settings: _SFT,
        training=_sft_training,
        reads_reasoning=lambda settings: True,
        scores=("sft",),
        rank=1,
    ),
    Stage(
        name="baselines",
        run=run_baselines,
        depends=lambda settings: (*_MODEL, "baselines"),
        training=_baselines_training,
        reads_reasoning=lambda settings: settings.baselines.facts == "written",
        blind_views=tuple(BLIND.values()),
        scores=("majority", *BLIND),
    ),
    Stage(
        name="rate",
        run=run_rate,
        programs=rate_programs,
        depends=lambda settings: (*_SFT, "rate"),
        free=_POOLS,
        needs=_starting_model,
        check=check_rating,
        reads_images=lambda settings: settings.rate.file is None,
        signs=(f"rate/{MARKER}", "rate/ratings.jsonl", "rate/ratings.jsonl.unfinished"),
    ),
    Stage(
        name="grpo",
        run=run_grpo,
        programs=grpo_programs,
        # Which facts a step draws follows from their ratings.
        shaped_by=lambda settings: ("rate",),
        depends=lambda settings: _GRPO,
        needs=lambda settings: (*_starting_model(settings), "rate"),
        check=check_start,
        training=_grpo_training,
        scores=("grpo",),
        rank=3,
    ),
    Stage(
        name="control",
        run=run_control,
        programs=control_programs,
        shaped_by=lambda settings: () if settings.control.steps else ("sft", "rate", "grpo"),
        # With its own number of steps it takes nothing from GRPO.
        depends=lambda settings: (*(_SFT if settings.control.steps else _GRPO), "control"),
        needs=lambda settings: ("sft",) if settings.control.steps else ("sft", "rate", "grpo"),
        training=_control_training,
        reads_reasoning=lambda settings: True,
        scores=("control",),
        rank=2,
    ),
)
STAGES = (
    *_BEFORE_EVALUATION,
    Stage(
        name="evaluate",
        run=functools.partial(run_evaluate, models=[s.name for s in _BEFORE_EVALUATION if s.rank]),
        programs=evaluate_programs,
        depends=lambda settings: (),
        repeats=True,
    ),
)
# Not a stage: the first stage that reads images encodes them.
KEPT_FEATURES = Output(name="features", depends=lambda settings: _MODEL, signs=("features",))
BY_NAME = {stage.name: stage for stage in STAGES}


def stages_to_run(settings: Settings) -> list[Stage]:
    """Returns the rows that the config names, in its order.

    Raises:
        ConfigError: it names an unknown stage.
    """
    names = settings.stages.split(",")
    if unknown := [name for name in names if name not in BY_NAME]:
        raise ConfigError(
            f"config.stages: expected names of {', '.join(BY_NAME)}, separated by commas, found "
            f"{', '.join(map(repr, unknown))}"
        )
    return [BY_NAME[name] for name in names]
