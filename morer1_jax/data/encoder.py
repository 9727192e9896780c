"""Facts to samples, and samples to batches.

Whatever does not fit is an error that names the fact, never cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerFast

from morer1_jax.batch import FeatureBatch, PromptBatch, SequenceBatch, VisionBatch, pad, stack
from morer1_jax.data import layout
from morer1_jax.data.features import FeatureStore
from morer1_jax.data.images import ImageReader, Patches
from morer1_jax.data.shapes import Need, Shape
from morer1_jax.errors import DataError, Faults
from morer1_jax.model.config import ImageConfig
from morer1_jax.model.special import IMAGE_PAD, SpecialIds
from morer1_jax.task import more
from morer1_jax.task.fact import Fact
from morer1_jax.task.ontology import Ontology
from morer1_jax.task.prompt import student_prompt


@dataclasses.dataclass(frozen=True)
class Limits:
    """The most that one fact may take.

    Attributes:
      prompt: tokens of a prompt, vision tokens among them.
      completion: tokens of a completion, end-of-turn among them.
      windows: attention windows of its images; 0 for an encoder without images.
    """

    prompt: int
    completion: int
    windows: int


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sample before it is padded: its name in errors, tokens and images."""

    name: str
    prompt: np.ndarray
    target: np.ndarray
    images: Patches


class Encoder:
    """Facts to arrays.

    Args:
      folder: the dataset's.
      tokenizer: of the Qwen2.5-VL family.
      ontology: the labels of the prompt and of `gold`.
      images: pixel limits and patch sizes.
      window_size: side of the vision tower's attention windows, in pixels.
      limits: what a fact may take at most; also the shapes of batches where none are asked for.
      show_photo, show_title: False for the blind baselines.
      photo_path: where in the folder a fact's photo is.
      features: kept ones of all images, in place of their pixels.
    """

    def __init__(
        self,
        folder,
        tokenizer: PreTrainedTokenizerFast,
        ontology: Ontology,
        images: ImageConfig,
        window_size: int,
        limits: Limits,
        *,
        show_photo: bool = True,
        show_title: bool = True,
        photo_path: more.PhotoPath = more.photo_path,
        features: FeatureStore | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.ontology = ontology
        self.special = SpecialIds.of(tokenizer)
        self.limits = limits
        self.show_photo = show_photo
        self.show_title = show_title
        self._reader = ImageReader(folder, images, photo_path)
        self._sizes = {
            "patch_size": images.patch_size,
            "merge_size": images.merge_size,
            "window_size": window_size,
        }
        self._features = features
        self._patch_dim = 3 * images.temporal_patch_size * images.patch_size**2

    def prompt_tokens(self, fact: Fact, grids: Sequence[layout.Grid]) -> np.ndarray:
        """The prompt's ids, image tokens expanded to one per merged patch."""
        text = student_prompt(
            fact, self.ontology, show_photo=self.show_photo, show_title=self.show_title
        )
        return self.expand(text, grids)

    def expand(self, text: str, grids: Sequence[layout.Grid]) -> np.ndarray:
        """A text's ids, each `IMAGE_PAD` as many as its image has merged patches."""
        parts = text.split(IMAGE_PAD)
        merge = self._sizes["merge_size"]
        counts = [layout.count_image_tokens(grid, merge_size=merge) for grid in grids]
        ids: list[int] = []
        for number, part in enumerate(parts):
            ids += self.tokenizer(part, add_special_tokens=False)["input_ids"]
            if number < len(parts) - 1:
                ids += [self.special.image] * counts[number]
        return np.asarray(ids, np.int32)

    def target_tokens(self, text: str) -> np.ndarray:
        """A target's ids, end-of-turn at its end."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return np.asarray([*ids, self.special.end_of_turn], np.int32)

    def grids(self, fact: Fact, size: tuple[int, int]) -> tuple[layout.Grid, ...]:
        """The grids of a fact's images, from the photo's (width, height)."""
        return self._reader.grids(fact, size) if self.show_photo else ()

    def image(self, fact: Fact, which: int) -> tuple[VisionBatch, np.ndarray]:
        """One image alone, photo (0) or crop (1), as a row without its axis.

        Returns:
          The patches, and the merged slots of its vision tokens in their order.
        """
        images = self._reader.patches(fact, which)
        sample = Sample(fact.id, np.zeros(0, np.int32), np.zeros(0, np.int32), images)
        placed = self._layout([sample], self.limits.windows)
        count = layout.count_image_tokens(images.grids[0], merge_size=self._sizes["merge_size"])
        tokens = np.full(count, self.special.image, np.int32)
        return self._vision(placed, [sample]), self._vision_index(placed, tokens, count)

    def sample(self, fact: Fact, target: str | None = None) -> Sample:
        """Reads a fact's images and tokenizes it; `target` is what the assistant says."""
        if not self.show_photo:
            images = Patches(np.zeros((0, self._patch_dim), np.float32), ())
        elif self._features is not None:
            images = self._features.images(fact)
        else:
            images = self._reader.patches(fact)
        tokens = np.zeros(0, np.int32) if target is None else self.target_tokens(target)
        return Sample(fact.id, self.prompt_tokens(fact, images.grids), tokens, images)

    def need(self, fact: Fact, size: tuple[int, int], target: str | None = None) -> Need:
        """What a fact takes, without its pixels.

        Args:
          size: the photo's (width, height).
          target: what the assistant says, if anything is known of it.
        """
        return self._need(fact, self.grids(fact, size), target)

    def _need(self, fact: Fact, grids: Sequence[layout.Grid], target: str | None) -> Need:
        prompt = len(self.prompt_tokens(fact, grids))
        tokens = 0 if target is None else len(self.target_tokens(target))
        return Need(prompt, tokens, layout.count_windows(grids, **self._sizes))

    def needs(
        self, facts: Sequence[Fact], sizes: dict[str, tuple[int, int]], targets: dict[str, str]
    ) -> list[Need]:
        """What each fact takes; finds every one that will not fit, before a step is spent.

        Args:
          facts: all facts the run will see.
          sizes: (width, height) of each photo by `Fact.photo`, as `more.photo_sizes` gives.
          targets: by fact id, what will be trained on.

        Raises:
          DataError: the photos, up to 20, of a shape that the processor refuses, each with the
            first fact it refuses; or the first fact whose prompt, target or images exceed the
            limits.
        """
        found, faults, refused = [], Faults(), set()
        for fact in facts:
            try:
                grids = self.grids(fact, sizes[fact.photo])
            except DataError as e:
                if fact.photo not in refused:
                    refused.add(fact.photo)
                    faults.add(e)
                continue
            try:
                found.append(self._need(fact, grids, targets.get(fact.id)))
            except DataError as e:
                faults.add(e)
        faults.check()
        for fact, need in zip(facts, found, strict=True):
            self._check(fact.id, need)
        return found

    def _check(self, name: str, need: Need) -> None:
        limits = self.limits
        for what, key, length, most in (
            ("prompt", "prompt", need.prompt, limits.prompt),
            ("target", "completion", need.target, limits.completion),
        ):
            if length > most:
                raise DataError(
                    f"{name}: its {what} has {length} tokens, at most {most} expected; raise "
                    f"data.{key}_length or leave the fact out"
                )
        if need.windows > limits.windows:
            raise DataError(
                f"{name}: its images fill {need.windows} attention windows, at most "
                f"{limits.windows} expected; raise data.windows or lower data.max_pixels"
            )

    def need_of(self, sample: Sample) -> Need:
        """What a sample takes."""
        windows = layout.count_windows(sample.images.grids, **self._sizes)
        return Need(len(sample.prompt), len(sample.target), windows)

    def prompts(
        self, facts: Sequence[Fact], indices: Sequence[int], shape: Shape | None = None
    ) -> PromptBatch:
        """Prompts of some facts, one to a row.

        Args:
          facts: what to ask.
          indices: each fact's place in its split, the key of its sampling noise.
          shape: of a row; None: of the longest prompt there may be.

        Raises:
          DataError: a fact exceeds its limits or the shape; the message names it and the key.
        """
        shape = shape or Shape(self.limits.prompt, self.limits.windows)
        rows = []
        for fact, index in zip(facts, indices, strict=True):
            sample = self.sample(fact)
            need = self.need_of(sample)
            self._check(sample.name, need)
            self._check_room([sample], need.prompt, need.windows, shape)
            positions = self._positions(sample.prompt, sample.images.grids)
            placed = self._layout([sample], shape.windows)
            rows.append(
                PromptBatch(
                    tokens=pad(sample.prompt, shape.length, self.special.pad),
                    mask=np.arange(shape.length) < len(sample.prompt),
                    positions=pad(positions, shape.length, 0),
                    vision_index=self._vision_index(placed, sample.prompt, shape.length),
                    next_position=np.int32(positions.max() + 1),
                    fact=np.int32(index),
                    gold=np.int32(self.ontology.ids[fact.label]),
                    vision=self._vision(placed, [sample]),
                )
            )
        return stack(rows)

    def sequences(
        self, rows: Sequence[Sequence[Sample]], shape: Shape | None = None
    ) -> SequenceBatch:
        """Prompt and target of samples; each row holds some of them, or none.

        Args:
          shape: of a row; None: of the longest sample there may be.

        Raises:
          DataError: a sample exceeds its limits, or a row the shape; the message names the facts
            and the key.
        """
        limits = self.limits
        shape = shape or Shape(limits.prompt + limits.completion, limits.windows)
        return stack([self._sequence(samples, shape) for samples in rows])

    def _sequence(self, samples: Sequence[Sample], shape: Shape) -> SequenceBatch:
        needs = [self.need_of(sample) for sample in samples]
        for sample, need in zip(samples, needs, strict=True):
            self._check(sample.name, need)
        self._check_room(
            samples, sum(n.tokens for n in needs), sum(n.windows for n in needs), shape
        )
        # Of the row, the ids of one sample after another; each part begins with nothing, so that
        # a row without samples has a type.
        tokens, targets, segments = ([np.zeros(0, np.int32)] for _ in range(3))
        weights, positions = [np.zeros(0, np.float32)], [np.zeros((3, 0), np.int32)]
        for number, sample in enumerate(samples, start=1):
            ids = np.r_[sample.prompt, sample.target]
            tokens.append(ids)
            targets.append(np.r_[ids[1:], np.int32(self.special.pad)])
            weights.append(_target_weights(len(sample.prompt), len(sample.target)))
            segments.append(np.full(len(ids), number, np.int32))
            positions.append(self._positions(ids, sample.images.grids))
        length, placed = shape.length, self._layout(samples, shape.windows)
        row = np.concatenate(tokens)
        return SequenceBatch(
            tokens=pad(row, length, self.special.pad),
            targets=pad(np.concatenate(targets), length, self.special.pad),
            weights=pad(np.concatenate(weights), length, 0.0),
            segment_ids=pad(np.concatenate(segments), length, 0),
            positions=pad(np.concatenate(positions, axis=1), length, 0),
            vision_index=self._vision_index(placed, row, length),
            vision=self._vision(placed, samples),
        )

    def _check_room(
        self, samples: Sequence[Sample], tokens: int, windows: int, shape: Shape
    ) -> None:
        if tokens > shape.length or windows > shape.windows:
            names = ", ".join(sample.name for sample in samples)
            raise DataError(
                f"{names}: {tokens} tokens and {windows} attention windows, but a row has "
                f"{shape.length} and {shape.windows}; raise data.prompt_length, "
                "data.completion_length or data.windows, or pack fewer"
            )

    def _positions(self, tokens: np.ndarray, grids: Sequence[layout.Grid]) -> np.ndarray:
        return layout.mrope_positions(
            tokens,
            grids,
            merge_size=self._sizes["merge_size"],
            image_token_id=self.special.image,
            video_token_id=self.special.video,
        )

    def _layout(self, samples: Sequence[Sample], windows: int) -> layout.VisionLayout:
        grids = [grid for sample in samples for grid in sample.images.grids]
        counts = [len(sample.images.grids) for sample in samples]
        return layout.vision_layout(grids, **self._sizes, samples=counts, pad_to_windows=windows)

    def _vision_index(
        self, placed: layout.VisionLayout, tokens: np.ndarray, length: int
    ) -> np.ndarray:
        if self._features is not None:
            seen = tokens == self.special.image
            index = np.where(seen, np.cumsum(seen) - 1, -1).astype(np.int32)
        else:
            index = layout.vision_index(tokens, placed, image_token_id=self.special.image)
        return pad(index, length, -1)

    def _vision(
        self, placed: layout.VisionLayout, samples: Sequence[Sample]
    ) -> VisionBatch | FeatureBatch:
        if self._features is not None:
            nothing = self._features.nothing
        else:
            nothing = np.zeros((0, self._patch_dim), np.float32)
        values = np.concatenate([nothing, *(sample.images.values for sample in samples)])
        if self._features is not None:
            slots = placed.image_ids.size // self._sizes["merge_size"] ** 2
            return FeatureBatch(np.pad(values, ((0, slots - len(values)), (0, 0))))
        patches = layout.place_patches(placed, values)
        return VisionBatch(patches, placed.positions, placed.image_ids, placed.part_ids)


def _target_weights(prompt: int, target: int) -> np.ndarray:
    """1 at the places whose next token is the target's: from the prompt's last on."""
    weights = np.zeros(prompt + target, np.float32)
    weights[prompt - 1 : prompt + target - 1] = 1.0
    return weights
