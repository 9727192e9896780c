"""Trains small byte-level BPE tokenizers of the Qwen family, and loads any of them.

A tokenizer is a folder as `transformers` saves it; a trained one differs from a published one in
its merges alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import tokenizers
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from morer1_jax.errors import DataError, one_line
from morer1_jax.files import atomic_dir
from morer1_jax.model.special import END_OF_TURN, PAD, SPECIAL_TOKENS

# The pieces that Qwen's tokenizers split text into before merging: contractions, words with the
# mark or space before them, single digits, runs of punctuation, line ends, spaces.
_CUTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# A tokenizer's folder has one of these.
_FILES = ("tokenizer.json", "vocab.json")


def check_labels(tokenizer: PreTrainedTokenizerFast, labels: Iterable[str]) -> None:
    """Checks that the tokenizer writes every label unchanged: else no answer could be that label.

    Raises:
        DataError: the tokenizer changes a label; the message names the first.
    """
    for label in labels:
        ids = tokenizer(label, add_special_tokens=False)["input_ids"]
        decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if decoded != label:
            raise DataError(
                f"label {label!r}: the tokenizer {tokenizer.name_or_path!r} writes it as "
                f"{decoded!a}, expected {label!a}; rename it in rel2id.json and in the data"
            )


def train_tokenizer(
    texts: Iterable[str], vocabulary: int, folder: str | Path
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer with Qwen's special tokens, and saves it.

    Args:
        texts: the text to learn merges from; special tokens in it are cut out.
        vocabulary: the number of tokens, the 256 bytes and the special ones included.
        folder: the folder to write, which must not exist.
    """
    # Normalise and split text as Qwen's tokenizers do.
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CUTS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # Learn the merges; special tokens take the ids after them.
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (part for text in texts for part in _without_special(text))
    tokenizer.train_from_iterator(pieces, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END_OF_TURN)
    with atomic_dir(Path(folder)) as partial:
        fast.save_pretrained(partial)
    return load_tokenizer(folder)


def _without_special(text: str) -> list[str]:
    for token in SPECIAL_TOKENS:
        text = text.replace(token, "\x00")
    return [part for part in text.split("\x00") if part]


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """Loads a tokenizer folder.

    Raises:
        DataError: the folder has no tokenizer, or it cannot be read.
    """
    if not any((Path(path) / name).exists() for name in _FILES):  # transformers would make one up.
        raise DataError(f"{path}: no tokenizer: none of {', '.join(_FILES)} found; copy it anew")
    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # tokenizers has no class of its own for a file of another release.
        versions = f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}"
        raise DataError(
            f"{path}: no tokenizer could be loaded: {one_line(error)}; expected files that "
            f"{versions} can read: update them, or save it anew with what made it"
        ) from None
