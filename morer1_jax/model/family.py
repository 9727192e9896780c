"""Sizes of the published models of the family, for what needs no weights."""

from __future__ import annotations

from morer1_jax.model.config import DEFAULT_IDS, ModelConfig, TextConfig, VisionConfig

# By the last part of the name on the hub.
_TEXT = {
    # The defaults of `TextConfig`.
    "Qwen2.5-VL-3B-Instruct": TextConfig(tie_word_embeddings=True),
    "Qwen2.5-VL-7B-Instruct": TextConfig(
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    ),
}


def published_sizes(name: str) -> ModelConfig | None:
    """Returns the sizes of a model by its name on the hub; None if it is not of the family."""
    last = name.rpartition("/")[2]
    if last not in _TEXT:
        return None
    text = _TEXT[last]
    vision = VisionConfig(out_hidden_size=text.hidden_size)
    return ModelConfig(text=text, vision=vision, **DEFAULT_IDS)
