"""Makes what is measured: models of a few sizes, and the inputs that every side gets.

A prompt is a conversation with a photo and a crop, as in the task, of random pixels and of words
that are one token each, so that it has exactly the required length in tokens. Images have sides
that no processor has to scale.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image
from transformers import PreTrainedTokenizerFast

from morer1_jax.data.tokenizer import train_tokenizer
from morer1_jax.model.config import TextConfig, VisionConfig
from morer1_jax.model.special import IMAGE_PAD

# Labels for our own sampler, which reads answers while it samples them.
LABELS = (
    "none",
    *(
        f"/{a}/{b}/relation_{n}"
        for n in range(3)
        for a, b in itertools.product(("per", "org"), repeat=2)
    ),
)
# Most tokens of the completions by which sides are compared before they are timed.
COMPARED = 64
_PATCH, _MERGE = 14, 2
_UNIT = _PATCH * _MERGE
_SYSTEM = "You are a helpful assistant."


@dataclasses.dataclass(frozen=True)
class Tail:
    """Completions of unequal length, of random weights of which each token is about as likely.

    One token of `mean` ends a completion, so that lengths are geometric.

    Attributes:
        batch: number of prompts.
        limit: most tokens of a completion.
    """

    batch: int = 32
    mean: int = 100
    limit: int = 512

    def ends(self, allowed: Iterable[int]) -> list[int]:
        """Returns the ids that end a completion, of those that are sampled."""
        return sorted(allowed)[:: self.mean]

    def lengths(self, count: int) -> Int[np.ndarray, " n"]:
        """Returns lengths as completions have them."""
        return np.minimum(np.random.default_rng(4).geometric(1 / self.mean, count), self.limit)


@dataclasses.dataclass(frozen=True)
class Preset:
    """A model and the sizes it is measured at.

    Attributes:
        text, vision: the model.
        tokenizer: number of the tokenizer's tokens, at most the embedding's rows.
        batch: number of samples of an SFT step, of prompts of a GRPO step.
        prompt, target: length in tokens of an SFT sample's prompt and target.
        prompts: lengths in tokens of the prompts of sampling and GRPO.
        group, completion: number of samples of each prompt, and length in tokens of each.
        mixed: number of samples of an SFT step with samples of different lengths.
        micro: number of samples that PyTorch pads to one length and computes at a time.
        dtype: of both sides' activations and products; parameters are float32.
        remat: see `model.config.Runtime`; our side's.
        micro_batches: number of micro-batches of our GRPO update.
        unroll: `scan_unroll` of `model.config.Runtime`; our side's.
        tail: where completions end when they end.
    """

    text: TextConfig
    vision: VisionConfig
    tokenizer: int
    batch: int = 8
    prompt: int = 128
    target: int = 128
    prompts: tuple[int, ...] = (128, 512)
    group: int = 8
    completion: int = 128
    mixed: int = 32
    micro: int = 8
    dtype: str = "float32"
    remat: str = "none"
    micro_batches: int = 1
    unroll: int = 1
    tail: Tail = Tail()


def _vision(text: TextConfig, depth: int, hidden: int, intermediate: int, heads: int, full: tuple):
    return VisionConfig(
        depth=depth,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_heads=heads,
        out_hidden_size=text.hidden_size,
        fullatt_block_indexes=full,
        patch_size=_PATCH,
        spatial_merge_size=_MERGE,
    )


_TINY = TextConfig(
    vocab_size=2048,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    mrope_section=(4, 6, 6),
)
_SMALL = TextConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    mrope_section=(8, 12, 12),
)
_3B = TextConfig(
    vocab_size=151_936,
    hidden_size=2048,
    intermediate_size=11_008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    mrope_section=(16, 24, 24),
)
PRESETS = MappingProxyType(
    {
        "tiny": Preset(
            _TINY,
            _vision(_TINY, 2, 64, 176, 2, (1,)),
            2048,
            prompts=(128,),
            group=4,
            tail=Tail(batch=4, mean=10, limit=32),
        ),
        "small": Preset(
            _SMALL,
            _vision(_SMALL, 4, 256, 688, 4, (1, 3)),
            8192,
            micro_batches=4,
            unroll=8,
        ),
        "3b": Preset(
            _3B,
            _vision(_3B, 32, 1280, 3420, 16, (7, 15, 23, 31)),
            8192,
            prompts=(512,),
            completion=512,
            prompt=512,
            target=512,
            dtype="bfloat16",
            remat="full",
            micro_batches=8,
            tail=Tail(batch=64, mean=300, limit=1024),
        ),
    }
)


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A question: two RGB images, and a text of `words`, each a token with a space before it."""

    images: tuple[UInt8[np.ndarray, "h w 3"], ...]
    words: str
    id: str = "prompt"
    label: str = LABELS[0]

    def pictures(self) -> list[Image.Image]:
        """Returns the images for a processor."""
        return [Image.fromarray(pixels) for pixels in self.images]

    def conversation(self) -> list[dict]:
        """Returns the messages for a chat template, without the pixels of the images."""
        content = [*({"type": "image"} for _ in self.images), {"type": "text", "text": self.words}]
        return [{"role": "user", "content": content}]

    def text(self, tokenizer: PreTrainedTokenizerFast) -> str:
        """Returns the conversation up to the assistant's turn, one `IMAGE_PAD` for each image."""
        return tokenizer.apply_chat_template(
            self.conversation(), tokenize=False, add_generation_prompt=True
        )


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt and the assistant's answer to it."""

    prompt: Prompt
    target: str


class Inputs:
    """Makes the inputs of a preset, the same in every process.

    Args:
        tokenizer: of `make_tokenizer`, with a chat template.
    """

    def __init__(self, preset: Preset, tokenizer: PreTrainedTokenizerFast) -> None:
        self.preset, self.tokenizer = preset, tokenizer
        tokens = {word: tokenizer(f" {word}")["input_ids"] for word in _words(preset.tokenizer)}
        self._words = [word for word, ids in tokens.items() if len(ids) == 1]

    def prompts(self, length: int, count: int, seed: int = 0) -> list[Prompt]:
        """Returns prompts of `length` tokens: two fifths photo, a tenth crop, the rest text."""
        rng = np.random.default_rng((seed, length))
        return [self._prompt(length, rng) for _ in range(count)]

    def examples(self) -> list[Example]:
        """Returns an SFT step's samples, all of the same length."""
        rng = np.random.default_rng(1)
        preset = self.preset
        return [self._example(preset.prompt, preset.target, rng) for _ in range(preset.batch)]

    def mixed(self) -> list[Example]:
        """Returns an SFT step's samples, of different lengths.

        The longest has four times the tokens of the shortest; the logarithms of the lengths are
        spread evenly.
        """
        rng = np.random.default_rng(2)
        preset = self.preset
        longest = preset.prompt + preset.target
        shares = np.linspace(0.0, 1.0, preset.mixed)
        examples = []
        for share in rng.permutation(shares):
            total = round(longest / 4 * 4**share)
            # A prompt has a minimum length, so targets differ more than prompts do.
            prompt = round(preset.prompt * (7 / 16 + 9 / 16 * (4 * total / longest - 1) / 3))
            examples.append(self._example(prompt, total - prompt, rng))
        return examples

    def rollout(self, group: int) -> tuple[Int[np.ndarray, "b g t"], Float[np.ndarray, "b g"]]:
        """Returns random completions of each prompt, int64 ids, and random float32 advantages."""
        rng, preset = np.random.default_rng(3), self.preset
        shape = (preset.batch, group, preset.completion)
        tokens = rng.integers(0, preset.tokenizer // 2, shape)
        return tokens, rng.standard_normal(shape[:2]).astype(np.float32)

    def _example(self, prompt: int, target: int, rng: np.random.Generator) -> Example:
        # End-of-turn is the target's last token.
        return Example(self._prompt(prompt, rng), self._text(target - 1, rng))

    def _prompt(self, length: int, rng: np.random.Generator) -> Prompt:
        side = int(math.sqrt(0.4 * length))
        images = tuple(
            rng.integers(0, 256, (n * _UNIT, n * _UNIT, 3)).astype(np.uint8)
            for n in (side, side // 2)
        )
        image_tokens = side**2 + (side // 2) ** 2
        frame = Prompt(images, "").text(self.tokenizer).replace(IMAGE_PAD, "")
        words = length - image_tokens - len(self.tokenizer(frame)["input_ids"])
        if words < 1:
            raise ValueError(
                f"length: expected more than the {length - words} tokens of images and chat "
                f"template, found {length}"
            )
        return Prompt(images, self._text(words, rng))

    def _text(self, count: int, rng: np.random.Generator) -> str:
        return "".join(f" {word}" for word in rng.choice(self._words, count))


def _words(count: int) -> list[str]:
    """Returns words of two syllables."""
    syllables = ["".join(s) for s in itertools.product("bdfgklmnprstvz", "aeiou")]
    return ["".join(pair) for pair in itertools.product(syllables, repeat=2)][:count]


def make_tokenizer(preset: Preset, folder: Path) -> PreTrainedTokenizerFast:
    """Trains a tokenizer whose most frequent tokens are whole words."""
    words = _words(preset.tokenizer)
    lines: Sequence[str] = [" " + " ".join(words), f"system\n{_SYSTEM}", "user\n", "assistant\n"]
    return train_tokenizer(itertools.chain(*itertools.repeat(lines, 8)), preset.tokenizer, folder)
