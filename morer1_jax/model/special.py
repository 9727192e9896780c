"""Special tokens of the Qwen2.5-VL family, and their ids in a tokenizer."""

from __future__ import annotations

import dataclasses

from transformers import PreTrainedTokenizerFast

from morer1_jax.errors import DataError

PAD = "<|endoftext|>"
IMAGE_PAD = "<|image_pad|>"
END_OF_TURN = "<|im_end|>"
SPECIAL_TOKENS = (
    PAD,
    "<|im_start|>",
    END_OF_TURN,
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    IMAGE_PAD,
    "<|video_pad|>",
)


@dataclasses.dataclass(frozen=True)
class SpecialIds:
    """Ids of the special tokens that the programs know."""

    pad: int
    end_of_turn: int
    image: int
    video: int
    vision_start: int
    vision_end: int
    vision_pad: int

    @property
    def never_sampled(self) -> tuple[int, ...]:
        """Ids of padding, image, vision and video: sampled, one would stand for a missing input."""
        return tuple(i for name, i in vars(self).items() if name != "end_of_turn")

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> SpecialIds:
        """Looks the ids up in a tokenizer.

        Raises:
            DataError: the tokenizer lacks a token, so is not of this family.
        """
        names = (
            PAD,
            END_OF_TURN,
            IMAGE_PAD,
            "<|video_pad|>",
            "<|vision_start|>",
            "<|vision_end|>",
            "<|vision_pad|>",
        )
        vocabulary = tokenizer.get_vocab()
        for name in names:
            if name not in vocabulary:
                raise DataError(
                    f"tokenizer {tokenizer.name_or_path!r}: expected a token {name}, found none; "
                    "take a tokenizer of the Qwen2.5-VL family"
                )
        return cls(*(vocabulary[name] for name in names))
