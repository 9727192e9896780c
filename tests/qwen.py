"""Qwen2.5's tokenizer, rebuilt from the byte pairs that another package ships; no network."""

import base64
import functools
import importlib.util
import itertools
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = 151_643
# In id order from there on; those in the second list are text to a reader, not special.
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
PLAIN = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
_CUTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def words():
    """The bytes of each id below `WORDS`."""
    package = importlib.util.find_spec("dashscope").submodule_search_locations[0]
    lines = (Path(package) / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    found = [base64.b64decode(line.split()[0]) for line in lines]
    assert len(found) == WORDS
    return found


def build(folder):
    """Saves the tokenizer as published ones are; returns it."""
    ranks = {word: i for i, word in enumerate(words())}
    shown = _characters()
    text = {word: "".join(shown[b] for b in word) for word in ranks}
    pairs = [_parts(word, ranks) for word in words() if len(word) > 1]
    merges = [(text[left], text[right]) for left, right in pairs]
    inner = Tokenizer(models.BPE({text[word]: i for word, i in ranks.items()}, merges))
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CUTS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    inner.add_tokens([AddedToken(t, special=False, normalized=False) for t in PLAIN])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    fast.save_pretrained(folder)
    return fast


def _parts(word, ranks):
    """The two words whose merge made this one: what the earlier merges leave of its bytes."""
    parts = [bytes([b]) for b in word]
    own = ranks[word]
    while len(parts) > 2:
        joined = [ranks.get(a + b, own) for a, b in itertools.pairwise(parts)]
        best = min(range(len(joined)), key=joined.__getitem__)
        assert joined[best] < own, word
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts


def _characters():
    """The character that stands for each byte in a byte-level vocabulary."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0x100)} - {0xAD}
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + n) for n, b in enumerate(hidden)}
