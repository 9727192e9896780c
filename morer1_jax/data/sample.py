"""Turns facts into samples: the ids of prompt and target, and the images.

Nothing is cut: what exceeds its limit is an error that names the fact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerFast

from morer1_jax.data.features import FeatureStore
from morer1_jax.data.images import ImageReader, Patches
from morer1_jax.data.shapes import SampleSize
from morer1_jax.errors import DataError, ErrorList
from morer1_jax.model.config import VisionConfig
from morer1_jax.model.special import IMAGE_PAD, SpecialIds
from morer1_jax.model.vision_layout import Grid
from morer1_jax.task.fact import Fact
from morer1_jax.task.ontology import Ontology
from morer1_jax.task.prompt import student_prompt


@dataclasses.dataclass(frozen=True)
class Limits:
    """The most room that one fact may take.

    Attributes:
        prompt: tokens of a prompt, vision tokens among them.
        completion: tokens of a completion, end-of-turn among them.
        slots: places of its images in the vision tower's layout; 0 where no image is shown.
    """

    prompt: int
    completion: int
    slots: int


@dataclasses.dataclass(frozen=True)
class View:
    """The parts of a fact that the model sees; a blind baseline lacks the photo or the title."""

    photo: bool = True
    title: bool = True


@dataclasses.dataclass(frozen=True)
class Sample:
    """One fact before it is padded.

    Attributes:
        name: the fact's id, for errors.
        prompt, target: int32 ids; the target ends in end-of-turn, or is empty.
        images: patches, or kept features, with the images' grids.
        gold: id of the right label.
    """

    name: str
    prompt: Int[np.ndarray, " s"]
    target: Int[np.ndarray, " t"]
    images: Patches
    gold: int


@dataclasses.dataclass(frozen=True)
class SampleReader:
    """Reads facts as samples.

    Attributes:
        tokenizer: of the Qwen2.5-VL family.
        ontology: the labels of the prompt and of `gold`.
        photos: where the photos are, and how they become patches.
        vision: the tower that the images are for.
        features: the store of all images' features, read in place of their pixels.
        special: ids of the tokenizer's special tokens.
    """

    tokenizer: PreTrainedTokenizerFast
    ontology: Ontology
    photos: ImageReader
    vision: VisionConfig
    limits: Limits
    view: View = View()
    features: FeatureStore | None = None
    special: SpecialIds = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "special", SpecialIds.of(self.tokenizer))

    def showing(self, view: View, completion: int) -> SampleReader:
        """Returns a reader of the same facts that shows another view of them.

        Args:
            completion: the most tokens of an answer.
        """
        slots = self.limits.slots if view.photo else 0
        limits = dataclasses.replace(self.limits, completion=completion, slots=slots)
        features = self.features if view.photo else None
        return dataclasses.replace(self, limits=limits, view=view, features=features)

    def read(self, fact: Fact, target: str | None = None) -> Sample:
        """Reads a fact's images and tokenizes its prompt.

        Args:
            target: the assistant's text; None where it is sampled.

        Raises:
            DataError: the fact exceeds its limits, or a photo cannot be read.
        """
        if not self.view.photo:
            images = Patches(np.zeros((0, self.vision.frame_dim), np.uint8), ())
        elif self.features is not None:
            images = self.features.images(fact)
        else:
            images = self.photos.patches(fact)
        sample = Sample(
            name=fact.id,
            prompt=self.prompt_ids(fact, images.grids),
            target=np.zeros(0, np.int32) if target is None else self.target_ids(target),
            images=images,
            gold=self.ontology.ids[fact.label],
        )
        self._check(sample.name, self.size_of(sample))
        return sample

    def size_of(self, sample: Sample) -> SampleSize:
        """Returns the room that a sample takes of a row."""
        slots = self.vision.image_cost(sample.images.grids).slots
        return SampleSize(len(sample.prompt), len(sample.target), slots)

    def size(
        self, fact: Fact, photo_size: tuple[int, int], target: str | None = None
    ) -> SampleSize:
        """Returns the room that a fact will take of a row, without reading its photo.

        Args:
            photo_size: (width, height) in pixels.
            target: the assistant's text, where it is known.

        Raises:
            DataError: the processor refuses the photo's shape.
        """
        return self._size(fact, self.grids(fact, photo_size), target)

    def sizes(
        self,
        facts: Sequence[Fact],
        photo_sizes: Mapping[str, tuple[int, int]],
        targets: Mapping[str, str],
    ) -> list[SampleSize]:
        """Returns the room that each fact will take of a row, and checks it against the limits.

        Args:
            photo_sizes: (width, height) of each photo by `Fact.photo`.
            targets: the assistant's text by the fact's id, where it is known.

        Raises:
            DataError: up to 20 photos of a shape that the processor refuses, each with the first
                fact that shows it; or the first fact whose prompt, target or images exceed the
                limits.
        """
        sizes, faults, refused_photos = [], ErrorList(), set()
        for fact in facts:
            try:
                grids = self.grids(fact, photo_sizes[fact.photo])
            except DataError as error:
                if fact.photo not in refused_photos:
                    refused_photos.add(fact.photo)
                    faults.add(error)
                continue
            try:
                sizes.append(self._size(fact, grids, targets.get(fact.id)))
            except DataError as error:
                faults.add(error)
        faults.check()
        for fact, size in zip(facts, sizes, strict=True):
            self._check(fact.id, size)
        return sizes

    def grids(self, fact: Fact, photo_size: tuple[int, int]) -> tuple[Grid, ...]:
        """Returns the grids of a fact's images, from the photo's (width, height)."""
        return self.photos.grids(fact, photo_size) if self.view.photo else ()

    def prompt_ids(self, fact: Fact, grids: Sequence[Grid]) -> Int[np.ndarray, " s"]:
        """Returns the prompt's ids, an image token for each merged patch."""
        text = student_prompt(
            fact, self.ontology, show_photo=self.view.photo, show_title=self.view.title
        )
        return self.expand(text, grids)

    def expand(self, text: str, grids: Sequence[Grid]) -> Int[np.ndarray, " s"]:
        """Returns a text's ids, with `IMAGE_PAD` once for each merged patch of its image."""
        counts = [self.vision.image_cost([grid]).tokens for grid in grids]
        ids: list[int] = []
        for number, piece in enumerate(pieces := text.split(IMAGE_PAD)):
            ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
            if number < len(pieces) - 1:
                ids += [self.special.image] * counts[number]
        return np.asarray(ids, np.int32)

    def target_ids(self, text: str) -> Int[np.ndarray, " t"]:
        """Returns a target's ids, end-of-turn at its end."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return np.asarray([*ids, self.special.end_of_turn], np.int32)

    def _size(self, fact: Fact, grids: Sequence[Grid], target: str | None) -> SampleSize:
        return SampleSize(
            prompt=len(self.prompt_ids(fact, grids)),
            target=0 if target is None else len(self.target_ids(target)),
            slots=self.vision.image_cost(grids).slots,
        )

    def _check(self, name: str, size: SampleSize) -> None:
        limits = self.limits
        for what, key, length, limit in (
            ("prompt", "prompt", size.prompt, limits.prompt),
            ("target", "completion", size.target, limits.completion),
        ):
            if length > limit:
                raise DataError(
                    f"{name}: its {what} has {length} tokens, expected at most {limit}; raise "
                    f"data.{key}_length or leave the fact out"
                )
        if size.slots > limits.slots:
            raise DataError(
                f"{name}: its images fill {size.slots} attention windows, expected at most "
                f"{limits.slots}; raise data.windows or lower data.max_pixels"
            )
