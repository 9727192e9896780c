"""Samples as arrays of fixed shapes: what the compiled programs take.

A batch is a NamedTuple of NumPy arrays whose leading axis is the row, so that any program can take
it and a mesh can shard it by rows. Rows are padded on the right to the sizes of a `Buckets`;
whatever does not fit is an error that names the fact, never cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from transformers import PreTrainedTokenizerFast

from morer1_jax.data import layout
from morer1_jax.data.features import FeatureStore
from morer1_jax.data.images import ImageConfig, ImageReader, Patches
from morer1_jax.data.tokenizer import SpecialIds
from morer1_jax.task import more
from morer1_jax.task.fact import DataError, Fact
from morer1_jax.task.ontology import Ontology
from morer1_jax.task.prompt import IMAGE_PAD, student_prompt


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Fixed sizes of a batch.

    Attributes:
      prompt: tokens of a prompt, vision tokens among them.
      completion: tokens of a completion, end-of-turn among them.
      windows: attention windows of a row's images; 0 for a batch without images.
    """

    prompt: int
    completion: int
    windows: int


class VisionBatch(NamedTuple):
    """Patches in window slots; see `layout.vision_layout`."""

    patches: Float[np.ndarray, "b w p c"]
    positions: Int[np.ndarray, "b w p 2"]
    image_ids: Int[np.ndarray, "b w p"]


class FeatureBatch(NamedTuple):
    """Kept features in place of patches, image after image; m as the tower would give."""

    features: Float[np.ndarray, "b m d"]


class SequenceBatch(NamedTuple):
    """Whole samples, prompt and target, possibly several to a row.

    Attributes:
      tokens: int32; padding holds the pad id.
      targets: int32, the token that follows each one.
      weights: float32, 1 where the loss counts the target.
      segment_ids: int32, 1.. for the row's samples, 0 for padding.
      positions: int32, the three M-RoPE axes.
      vision_index: int32, merged slot of the vision token at each place, -1 elsewhere.
    """

    tokens: Int[np.ndarray, "b s"]
    targets: Int[np.ndarray, "b s"]
    weights: Float[np.ndarray, "b s"]
    segment_ids: Int[np.ndarray, "b s"]
    positions: Int[np.ndarray, "b 3 s"]
    vision_index: Int[np.ndarray, "b s"]
    vision: VisionBatch | FeatureBatch


class PromptBatch(NamedTuple):
    """Prompts to sample from.

    Attributes:
      tokens: int32; padding holds the pad id.
      mask: True where there is a token.
      positions: int32, the three M-RoPE axes.
      vision_index: as in `SequenceBatch`.
      next_position: int32, the position of the first sampled token on all three axes.
      fact: int32, which fact it is, in the order of its split; keys the sampling noise.
      gold: int32, the id of the right label.
    """

    tokens: Int[np.ndarray, "b s"]
    mask: Bool[np.ndarray, "b s"]
    positions: Int[np.ndarray, "b 3 s"]
    vision_index: Int[np.ndarray, "b s"]
    next_position: Int[np.ndarray, " b"]
    fact: Int[np.ndarray, " b"]
    gold: Int[np.ndarray, " b"]
    vision: VisionBatch | FeatureBatch


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
      buckets: sizes of every batch.
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
        buckets: Buckets,
        *,
        show_photo: bool = True,
        show_title: bool = True,
        photo_path: more.PhotoPath = more.photo_path,
        features: FeatureStore | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.ontology = ontology
        self.special = SpecialIds.of(tokenizer)
        self.buckets = buckets
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
        placed = self._layout([sample])
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

    def check(
        self, facts: Sequence[Fact], sizes: dict[str, tuple[int, int]], targets: dict[str, str]
    ) -> None:
        """Finds every fact that will not fit, before a step is spent.

        Args:
          facts: all facts the run will see.
          sizes: (width, height) of each photo by `Fact.photo`, as `more.check_photos` gives.
          targets: by fact id, what will be trained on.

        Raises:
          DataError: the first fact whose prompt, target or images exceed their bucket.
        """
        for fact in facts:
            grids = self.grids(fact, sizes[fact.photo])
            prompt = self.prompt_tokens(fact, grids)
            target = self.target_tokens(targets[fact.id]) if fact.id in targets else ()
            self._check_lengths(fact.id, len(prompt), len(target))
            self._check_windows(fact.id, grids)

    def measure(self, facts: Sequence[Fact], sizes: dict[str, tuple[int, int]]) -> tuple[int, int]:
        """The most tokens of a prompt, and the most attention windows, of any of the facts.

        Args:
          sizes: as `check` takes them.
        """
        prompt = windows = 0
        for fact in facts:
            grids = self.grids(fact, sizes[fact.photo])
            prompt = max(prompt, len(self.prompt_tokens(fact, grids)))
            windows = max(windows, layout.count_windows(grids, **self._sizes))
        return prompt, windows

    def _check_windows(self, name: str, grids: Sequence[layout.Grid]) -> None:
        windows = layout.count_windows(grids, **self._sizes)
        if windows > self.buckets.windows:
            raise DataError(
                f"{name}: its images fill {windows} attention windows, the bucket has "
                f"{self.buckets.windows}; raise data.windows or lower data.max_pixels"
            )

    def _check_lengths(self, name: str, prompt: int, target: int) -> None:
        for what, length, bucket in (
            ("prompt", prompt, self.buckets.prompt),
            ("target", target, self.buckets.completion),
        ):
            if length > bucket:
                key = "completion" if what == "target" else "prompt"
                raise DataError(
                    f"{name}: its {what} has {length} tokens, the bucket has {bucket}; raise "
                    f"data.{key}_length or leave the fact out"
                )

    def prompts(self, facts: Sequence[Fact], indices: Sequence[int]) -> PromptBatch:
        """Prompts of some facts, one to a row.

        Args:
          facts: what to ask.
          indices: each fact's place in its split, the key of its sampling noise.

        Raises:
          DataError: a fact exceeds its bucket; the message names it and the key.
        """
        s = self.buckets.prompt
        rows = []
        for fact, index in zip(facts, indices, strict=True):
            sample = self.sample(fact)
            self._check_lengths(sample.name, len(sample.prompt), 0)
            positions = self._positions(sample.prompt, sample.images.grids)
            placed = self._layout([sample])
            rows.append(
                PromptBatch(
                    tokens=_pad(sample.prompt, s, self.special.pad),
                    mask=np.arange(s) < len(sample.prompt),
                    positions=_pad(positions, s, 0),
                    vision_index=self._vision_index(placed, sample.prompt, s),
                    next_position=np.int32(positions.max() + 1),
                    fact=np.int32(index),
                    gold=np.int32(self.ontology.ids[fact.label]),
                    vision=self._vision(placed, [sample]),
                )
            )
        return _stack(rows)

    def sequences(self, rows: Sequence[Sequence[Sample]]) -> SequenceBatch:
        """Prompt and target of samples; each row holds one or more of them.

        Raises:
          DataError: a sample or a row exceeds its bucket; the message names the facts and the key.
        """
        s = self.buckets.prompt + self.buckets.completion
        batch = []
        for samples in rows:
            for x in samples:
                self._check_lengths(x.name, len(x.prompt), len(x.target))
            tokens = np.concatenate([np.r_[x.prompt, x.target] for x in samples])
            if len(tokens) > s:
                names = ", ".join(x.name for x in samples)
                raise DataError(
                    f"{names}: packed they have {len(tokens)} tokens, a row has {s}; raise "
                    "data.prompt_length or data.completion_length, or pack fewer"
                )
            targets = np.concatenate(
                [np.r_[x.prompt, x.target, self.special.pad][1:] for x in samples]
            )
            weights = np.concatenate(
                [_target_weights(len(x.prompt), len(x.target)) for x in samples]
            )
            segments = np.concatenate(
                [np.full(len(x.prompt) + len(x.target), i + 1) for i, x in enumerate(samples)]
            )
            positions = np.concatenate(
                [self._positions(np.r_[x.prompt, x.target], x.images.grids) for x in samples],
                axis=1,
            )
            placed = self._layout(samples)
            batch.append(
                SequenceBatch(
                    tokens=_pad(tokens, s, self.special.pad),
                    targets=_pad(targets.astype(np.int32), s, self.special.pad),
                    weights=_pad(weights, s, 0.0),
                    segment_ids=_pad(segments.astype(np.int32), s, 0),
                    positions=_pad(positions, s, 0),
                    vision_index=self._vision_index(placed, tokens, s),
                    vision=self._vision(placed, samples),
                )
            )
        return _stack(batch)

    def _positions(self, tokens: np.ndarray, grids: Sequence[layout.Grid]) -> np.ndarray:
        return layout.mrope_positions(
            tokens,
            grids,
            merge_size=self._sizes["merge_size"],
            image_token_id=self.special.image,
            video_token_id=self.special.video,
        )

    def _layout(self, samples: Sequence[Sample]) -> layout.VisionLayout:
        grids = [grid for sample in samples for grid in sample.images.grids]
        self._check_windows(", ".join(sample.name for sample in samples), grids)
        return layout.vision_layout(grids, **self._sizes, pad_to_windows=self.buckets.windows)

    def _vision_index(
        self, placed: layout.VisionLayout, tokens: np.ndarray, length: int
    ) -> np.ndarray:
        if self._features is not None:
            seen = tokens == self.special.image
            index = np.where(seen, np.cumsum(seen) - 1, -1).astype(np.int32)
        else:
            index = layout.vision_index(tokens, placed, image_token_id=self.special.image)
        return _pad(index, length, -1)

    def _vision(
        self, placed: layout.VisionLayout, samples: Sequence[Sample]
    ) -> VisionBatch | FeatureBatch:
        values = np.concatenate([sample.images.values for sample in samples])
        if self._features is not None:
            slots = placed.image_ids.size // self._sizes["merge_size"] ** 2
            return FeatureBatch(np.pad(values, ((0, slots - len(values)), (0, 0))))
        return VisionBatch(layout.place_patches(placed, values), placed.positions, placed.image_ids)


def _target_weights(prompt: int, target: int) -> np.ndarray:
    """1 at the places whose next token is the target's: from the prompt's last on."""
    weights = np.zeros(prompt + target, np.float32)
    weights[prompt - 1 : prompt + target - 1] = 1.0
    return weights


def _pad(values: np.ndarray, length: int, fill) -> np.ndarray:
    width = [(0, 0)] * (values.ndim - 1) + [(0, length - values.shape[-1])]
    return np.pad(values, width, constant_values=fill)


def _stack(rows: Sequence[NamedTuple]):
    """Stacks NamedTuples of arrays (and of NamedTuples) field by field."""
    first = rows[0]
    if isinstance(first, tuple):
        return type(first)(*(_stack(field) for field in zip(*rows, strict=True)))
    return np.stack(rows)
