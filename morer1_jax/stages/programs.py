"""Lists the compiled programs of a config by shapes alone, with no weights and no data.

Batches are the largest that the config permits (`stages.largest`). A run's own, whose shapes follow
from its data, are at most as large. Where the config leaves the decode loop's stages to the data,
all samples have slots to the end.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np
import optax

from morer1_jax.batch import PromptBatch
from morer1_jax.config.settings import Settings
from morer1_jax.learn.trainable import join
from morer1_jax.model.flops import batch_vision_flops
from morer1_jax.model.layers import Params
from morer1_jax.model.scorer import ScoreConfig
from morer1_jax.model.vlm import split_tower
from morer1_jax.rollout.config import SampleConfig, slots_again
from morer1_jax.run import mesh as meshes
from morer1_jax.run.batch_sampler import sampler_program
from morer1_jax.run.mesh import PyTree, like_on
from morer1_jax.run.placed import Placed
from morer1_jax.run.slots import decode_stages, step_cost
from morer1_jax.run.throughput import Passes, group_work, sequence_work
from morer1_jax.stages import largest
from morer1_jax.stages.grpo_step import (
    Arguments,
    Programs,
    arguments_of,
    make_programs,
    parts_of,
)
from morer1_jax.stages.sft import sft_program
from morer1_jax.stages.table import stages_to_run

# Qwen's id; any other makes a program of the same cost.
_END_OF_TURN = 151_645


@dataclasses.dataclass(frozen=True)
class PlannedProgram:
    """A program that a config will run.

    Attributes:
        lower: lowers it for the mesh, with shapes in place of arrays.
        params: the whole model's, as the program takes them: shapes with shardings.
        beside: what lies on the devices while it runs and is not among its arguments: shapes with
            shardings, by name.
        flops: model FLOPs of a call (`model.flops`) over all devices, without those of its decode
            loops.
        loops: its decode loops in their order.
        chunks: of logits, in each of its parts.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    params: Params
    beside: dict[str, PyTree]
    flops: float
    loops: tuple[DecodeLoop, ...] = ()
    chunks: int = 0


@dataclasses.dataclass(frozen=True)
class DecodeLoop:
    """A loop over tokens: a stage of the sampler, or the loop of samples that begin anew.

    Attributes:
        tokens: turns if no sample ends.
        slots: samples that are decoded, of all devices.
        flops: model FLOPs of the last turn, over all devices.
        cache: tokens of each completion that the cache has room for.
        reads: bytes that a device must read for a turn: the decoder's weights, the head, and what
            the cache has room for.
    """

    tokens: int
    slots: int
    flops: float
    cache: int
    reads: float


def planned_programs(settings: Settings, placed: Placed) -> list[PlannedProgram]:
    """Returns the programs of the config's stages, each once.

    Raises:
        ConfigError: a stage is unknown.
    """
    names = {stage.name for stage in stages_to_run(settings)}
    plan, programs = _Plan(settings, placed), []
    if names & {"sft", "control"}:
        programs.append(plan.sft())
    # Answers are sampled while a training's state is on the devices.
    held = plan.parameters
    if names & {"sft", "control"}:
        held = plan.sft_state
    if "grpo" in names:
        held = plan.grpo_state
    sampled = names & {"sft", "baselines", "rate", "grpo", "control", "evaluate"}
    if sampled and not settings.data.keep_features:
        batches = settings.evaluate.batch, settings.rate.batch, settings.grpo.prompts
        asked = sampled - {"rate", "grpo"}, names & {"rate"}, names & {"grpo"}
        most = max(batch for batch, stages in zip(batches, asked, strict=True) if stages)
        programs.append(plan.images(most, held))
    if sampled and placed.sampling.moved:
        programs.append(plan.move(held))
    if sampled - {"rate"}:
        programs.append(plan.answers("greedy answers", settings.evaluate.batch, 1, 0.0, held))
    if "rate" in names and settings.rate.file is None:
        own = settings.rate
        given = own.batch, own.samples, own.temperature
        programs.append(plan.answers("rating", *given, plan.parameters))
    if "grpo" in names:
        programs += plan.grpo()
    return programs


class _Plan:
    """Plans the programs of a config on a mesh."""

    def __init__(self, settings: Settings, placed: Placed) -> None:
        self._settings, self._placed = settings, placed
        self._config = placed.model.config
        self._passes = Passes.of(placed.trainable)
        self._length = settings.data.completion_length
        whole, ids = placed.replicated, self._config.text.vocab_size
        self._allowed = like_on(jax.ShapeDtypeStruct((ids,), bool), whole)
        self._grammar = like_on(largest.grammar(ids), whole)
        self._params = join(placed.like, placed.like_frozen)
        self._tower = split_tower(self._params)[0]

    @property
    def parameters(self) -> dict[str, PyTree]:
        """What of the parameters in training's layout the sampler's own do not share."""
        return {"parameters": [*self._placed.sampling.moved.values(), self._tower]}

    @property
    def sft_state(self) -> dict[str, PyTree]:
        """What lies beside the sampler's parameters while SFT is validated."""
        own = self._settings.sft
        return self._held(own.optimizer.build(own.steps, self._placed.trainable))

    @property
    def grpo_state(self) -> dict[str, PyTree]:
        """What lies beside the sampler's parameters in a step of GRPO."""
        return self._held(self._grpo_optimizer) | self._reference

    def sft(self) -> PlannedProgram:
        """One step of SFT; each sample has a row of its own."""
        own, placed = self._settings.sft, self._placed
        transform = own.optimizer.build(own.steps, placed.trainable)
        step = sft_program(placed, transform, own.micro_batches, self._settings.score.chunk)
        multiple = placed.parts * own.micro_batches
        rows = -(-own.batch // multiple) * multiple
        batch = largest.sequences(self._settings.data, placed.model, rows)
        shapes = like_on(batch, placed.rows)
        return PlannedProgram(
            name="SFT step",
            lower=lambda: step.lower(placed.like_state(transform), placed.like_frozen, shapes),
            params=self._params,
            beside={"next batch": shapes},
            flops=sequence_work(self._config, self._passes, batch).flops,
            chunks=self._chunks(rows // own.micro_batches, (batch.weights > 0).sum(1).max()),
        )

    @property
    def _score_config(self) -> ScoreConfig:
        return ScoreConfig(self._settings.grpo.temperature, self._settings.score.chunk)

    def _chunks(self, rows: int, counted: int) -> int:
        """Returns how many chunks of logits rows have, of which so many places count."""
        layout = self._placed.model.runtime.layout
        return math.ceil(counted / self._score_config.of_row(rows, layout))

    def _chunks_of_groups(self, parts: int) -> int:
        own = self._settings.grpo
        return self._chunks(own.prompts // parts, own.group * self._length)

    def images(self, batch: int, held: dict[str, PyTree]) -> PlannedProgram:
        """The vision tower on a batch's images, before answers are sampled."""
        placed, config = self._placed, self._config
        prompts = self._prompts(self._rows(batch), encoded=False)
        images, index = like_on((prompts.vision, prompts.vision_index), placed.rows)
        return PlannedProgram(
            name="images",
            lower=lambda: placed.tower.lower(self._tower, images, index),
            params=self._tower,
            beside=held | {"parameters": split_tower(self._params)[1], "next batch": images},
            flops=batch_vision_flops(config.vision, prompts.vision),
        )

    def move(self, held: dict[str, PyTree]) -> PlannedProgram:
        """The last move of a parameter to the sampler's layout, of the largest."""
        placed = self._placed
        number = max(
            placed.sampling.moved, key=lambda key: math.prod(placed.sampling.moved[key].shape)
        )
        largest_one = placed.sampling.moved[number]
        return PlannedProgram(
            name="move to the sampler",
            lower=lambda: placed.sampling.move(number).lower(largest_one),
            params=self._params,
            beside=held
            | {
                "parameters": [
                    *(leaf for key, leaf in placed.sampling.moved.items() if key != number),
                    self._tower,
                ],
                "moved before": [
                    t for key, t in enumerate(placed.sampling.targets) if key != number
                ],
            },
            flops=0.0,
        )

    def answers(
        self, name: str, batch: int, group: int, temperature: float, beside: dict[str, PyTree]
    ) -> PlannedProgram:
        """Answers to a batch of facts, for rating or evaluation."""
        placed = self._placed
        rows = self._rows(batch)
        run = sampler_program(placed, self._sampling(group, temperature), seed=0)
        prompts = like_on(self._prompts(rows, encoded=True), placed.rows)
        return PlannedProgram(
            name=name,
            lower=lambda: run.lower(placed.sampling.like, prompts, self._grammar, self._allowed),
            params=placed.sampling.like,
            beside=beside | {"next batch": prompts},
            flops=self._flops(rows, group, 0),
            loops=self._loops(rows, group),
        )

    def grpo(self) -> list[PlannedProgram]:
        """Rollout, score and update of GRPO's step."""
        own, placed = self._settings.grpo, self._placed
        programs = make_programs(
            placed,
            own,
            self._grpo_optimizer,
            self._sampling(own.group, own.temperature),
            score_config=self._score_config,
            seed=0,
        )
        prompts = like_on(self._prompts(own.prompts, encoded=False), placed.rows)
        given = placed, own, self._grpo_optimizer, prompts, self._grammar, self._allowed
        takes = arguments_of(programs, *given)
        state, following = self.grpo_state, {"next batch": prompts}
        rollout = PlannedProgram(
            name="rollout",
            lower=lambda: programs.rollout.lower(*takes.rollout),
            params=placed.sampling.like,
            beside=state | following,
            flops=self._flops(own.prompts, own.group, 0),
            loops=self._loops(
                own.prompts // placed.micro_batches(own.prompts, own.rollout_parts), own.group
            ),
        )
        # A tower that trains is an argument of what follows, one that does not lies beside it.
        if not placed.tower_trains:
            following["tower"] = self._tower
        scores = [self._score(programs, takes, following)] if takes.scores else []
        return [rollout, *scores, self._update(programs, takes, following)]

    def _score(
        self, programs: Programs, takes: Arguments, beside: dict[str, PyTree]
    ) -> PlannedProgram:
        own, given = self._settings.grpo, takes.scores[0]
        # The reference is scored in place of the parameters that train.
        state = self._held(self._grpo_optimizer) | {"parameters": self._placed.like}
        return PlannedProgram(
            name="score",
            lower=lambda: programs.score.lower(*given),
            params=given[0],
            beside=beside | state | {"rollout": takes.scored},
            flops=self._flops(
                own.prompts, own.group, self._length, encoded=not self._placed.tower_trains
            ),
            chunks=self._chunks_of_groups(parts_of(self._placed, own)[1]),
        )

    def _update(
        self, programs: Programs, takes: Arguments, beside: dict[str, PyTree]
    ) -> PlannedProgram:
        own, placed, given = self._settings.grpo, self._placed, takes.updates[-1]
        forward, with_update = (
            self._flops(
                own.prompts,
                own.group,
                self._length,
                encoded=not placed.tower_trains,
                updates=updates,
            )
            for updates in (0, 1)
        )
        return PlannedProgram(
            name="update",
            lower=lambda: programs.update.lower(*given),
            params=self._params,
            beside=beside | self._reference,
            flops=with_update - forward,
            chunks=self._chunks_of_groups(parts_of(placed, own)[0]),
        )

    @property
    def _grpo_optimizer(self) -> optax.GradientTransformation:
        own = self._settings.grpo
        return own.optimizer.build(own.steps * own.updates, self._placed.trainable)

    def _held(self, transform: optax.GradientTransformation) -> dict[str, PyTree]:
        optimizer = self._placed.like_state(transform).opt_state
        return {"optimizer": optimizer} | self.parameters

    @property
    def _reference(self) -> dict[str, PyTree]:
        return {"reference": self._placed.like_reference} if self._settings.grpo.loss.beta else {}

    def _sampling(self, group: int, temperature: float) -> SampleConfig:
        # Nothing is known of lengths without data.
        return SampleConfig(
            group=group,
            length=self._length,
            temperature=temperature,
            ends=(_END_OF_TURN,),
            stages=decode_stages(self._placed, self._settings, (), group, self._length),
        )

    def _rows(self, batch: int) -> int:
        """Returns the rows of a batch of facts that are asked."""
        return -(-batch // self._placed.parts) * self._placed.parts

    def _prompts(self, rows: int, *, encoded: bool) -> PromptBatch:
        return largest.prompts(self._settings.data, self._placed.model, rows, encoded=encoded)

    def _flops(
        self, rows: int, group: int, length: int, *, encoded: bool = True, updates: int = 0
    ) -> float:
        """Returns the FLOPs of a forward pass over prompts and completions, and of updates."""
        lengths, batch = np.full((rows, group), length), self._prompts(rows, encoded=encoded)
        work = group_work(self._config, self._passes, batch, lengths, scored=0, updates=updates)
        return work.flops

    def _loops(self, rows: int, group: int) -> tuple[DecodeLoop, ...]:
        """Returns the decode loops: the sampler's stages."""
        parts, config = meshes.batch_parts(self._placed.sampling_mesh), self._sampling(group, 1.0)
        samples = rows * group // parts
        sizes = [(stage.slots(samples), stage.length) for stage in config.whole_stages]
        if again := slots_again(config, samples):
            sizes.append((again, config.length))
        loops, begins = [], 1  # the first token of each sample comes from the prompt
        for slots, length in sizes:
            if length == 1:
                continue  # no loop
            # What the last of its tokens adds, for samples with and without a slot alike.
            last = self._flops(rows, group, length) - self._flops(rows, group, length - 1)
            loops.append(
                DecodeLoop(
                    tokens=max(0, length - begins),
                    slots=parts * slots,
                    flops=last * slots / samples,
                    cache=length,
                    reads=self._reads(rows, parts * slots, length),
                )
            )
            begins = max(begins, length)
        return tuple(loops)

    def _reads(self, rows: int, slots: int, cache: int) -> float:
        """Returns the bytes that a device reads for a token of all its slots."""
        cost, parts = step_cost(self._placed), meshes.batch_parts(self._placed.sampling_mesh)
        prompts = min(rows, slots) * largest.prompt_length(self._settings.data)
        tokens = prompts + slots * cache
        return cost.weights + tokens / parts * cost.token
