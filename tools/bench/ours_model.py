"""Opens our model and makes its batches, for every task of ours."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.cases import Inputs, Preset, Prompt
from bench.flops import call_flops
from morer1_jax.batch import PromptBatch
from morer1_jax.data.collate import Collator
from morer1_jax.data.images import ImageReader, Patches
from morer1_jax.data.sample import Limits, Sample, SampleReader
from morer1_jax.data.shapes import Shape
from morer1_jax.learn.state import OptimizerConfig, TrainState, new_state
from morer1_jax.model.attention import XLA
from morer1_jax.model.config import Runtime
from morer1_jax.model.vlm import split_tower
from morer1_jax.run.placed import place
from morer1_jax.run.policy import Policy
from morer1_jax.serve.loaded import LoadedModel, open_model
from morer1_jax.task.photos import PhotoFiles

_WHOLE = (0.5, 0.5, 1.0, 1.0)


class PromptReader(SampleReader):
    """Reads prompts that need no dataset."""

    def __init__(self, loaded: LoadedModel) -> None:
        super().__init__(
            loaded.policy.tokenizer,
            loaded.policy.ontology,
            ImageReader(PhotoFiles("."), loaded.images),
            loaded.model.config.vision,
            Limits(0, 0, 0),
        )

    def read(self, fact: Prompt, target: str | None = None) -> Sample:
        """Reads a prompt and its answer, in place of a fact and its reasoning."""
        pictures = [self.photos.encode(p, _WHOLE, fact.id, which=0) for p in fact.pictures()]
        grids = tuple(grid for picture in pictures for grid in picture.grids)
        return Sample(
            name=fact.id,
            prompt=self.expand(fact.text(self.tokenizer), grids),
            target=np.zeros(0, np.int32) if target is None else self.target_ids(target),
            images=Patches(np.concatenate([picture.values for picture in pictures]), grids),
            gold=self.ontology.ids[fact.label],
        )


class Ours:
    """The model, policy, optimizer and inputs that our tasks share."""

    def __init__(self, folder: Path, preset: Preset) -> None:
        self.folder, self.preset = folder, preset
        self.loaded = open_model(str(folder))
        self.inputs = Inputs(preset, self.loaded.policy.tokenizer)
        config = self.loaded.model.config
        runtime = Runtime(
            dtype=preset.dtype,
            remat=preset.remat,
            scan_unroll=preset.unroll,
            decode_unroll=jax.default_backend() == "cpu",
        )
        placed = place(config, runtime, self.loaded.placed.mesh)
        self.model, loaded = placed.model, self.loaded.policy
        self.policy = Policy(placed, loaded.tokenizer, loaded.ontology)
        self.optimizer = OptimizerConfig(lr=1e-6).build(1)

    def flops(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> float | None:
        """Returns `call_flops`; None with attention kernels, whose products it does not see."""
        if self.model.runtime.kernels != XLA():
            return None
        return call_flops(function, *arguments, **options)

    def encoded(self, prompts: PromptBatch) -> PromptBatch:
        """Returns prompts with images that the tower has run on."""
        return self.policy.placed.encode(self.loaded.params, prompts)

    def tower_flops(self, prompts: PromptBatch) -> float | None:
        """Returns what `encoded` takes, as `flops` does."""
        tower, _ = split_tower(self.loaded.params)
        given = tower, prompts.vision, prompts.vision_index
        return self.flops(self.policy.placed.tower, *given)

    def state(self) -> TrainState:
        """Returns a new state with a copy of the folder's parameters."""
        return self._new_state(self.loaded.params)

    def like_state(self) -> TrainState:
        """Returns a state's shapes."""
        return jax.eval_shape(self._new_state, self.loaded.params)

    @functools.cached_property
    def _new_state(self) -> Callable[[Any], TrainState]:
        return jax.jit(lambda p: new_state(jax.tree.map(jnp.copy, p), self.optimizer))

    @functools.cached_property
    def reader(self) -> PromptReader:
        return PromptReader(self.loaded)

    def prompts(self, length: int, count: int | None = None) -> PromptBatch:
        """Returns prompts of this length in tokens, on the device; as many as the preset's."""
        prompts = self.inputs.prompts(length, count or self.preset.batch)
        samples = [self.reader.read(prompt) for prompt in prompts]
        shape = Shape(length, self.windows(prompts))
        batch = Collator.of(self.reader).prompts(samples, range(len(prompts)), shape)
        return jax.device_put(batch)

    def windows(self, prompts: list[Prompt]) -> int:
        """Returns the most attention windows that a prompt's images fill, none of them shared."""
        unit = self.loaded.model.config.vision.window_size
        return max(
            sum(-(-h // unit) * -(-w // unit) for h, w, _ in (i.shape for i in prompt.images))
            for prompt in prompts
        )
