"""Reads a published `config.json` of Qwen2.5-VL as the fields of `model.config`'s classes.

What is not implemented is refused, by the key that asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from morer1_jax.errors import ConfigError


def text_fields(text: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `TextConfig`'s fields from the decoder's part of a config.

    Raises:
        ConfigError: a key, which the error names, is missing or asks for what is not implemented.
    """
    _only_silu("hidden_act", text)
    # Refuse what the decoder does not implement.
    if text.get("use_sliding_window") or "sliding_attention" in (text.get("layer_types") or ()):
        raise ConfigError("use_sliding_window: sliding-window attention is not implemented")
    if text.get("attention_dropout"):
        raise ConfigError(f"attention_dropout: expected 0, found {text['attention_dropout']}")
    rope = text.get("rope_scaling") or text.get("rope_parameters")
    if not rope:
        raise ConfigError("rope_parameters: missing; expected one with an mrope_section")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise ConfigError(f"rope_type: expected 'default' or 'mrope', found {kind!r}")
    # Sizes, and the rotary base where either release of transformers writes it.
    heads = _required(text, "num_attention_heads")
    if text.get("head_dim") not in (None, _required(text, "hidden_size") // heads):
        raise ConfigError(
            f"head_dim: expected hidden_size / num_attention_heads, found {text['head_dim']}"
        )
    return dict(
        vocab_size=_required(text, "vocab_size"),
        hidden_size=text["hidden_size"],
        intermediate_size=_required(text, "intermediate_size"),
        num_hidden_layers=_required(text, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=text.get("num_key_value_heads") or heads,
        mrope_section=tuple(_required(rope, "mrope_section")),
        **present(rope, "rope_theta"),
        **({} if "rope_theta" in rope else present(text, "rope_theta")),
        rms_norm_eps=_required(text, "rms_norm_eps"),
        **present(text, "initializer_range", "max_position_embeddings"),
    )


def vision_fields(vision: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns `VisionConfig`'s fields from a config's `vision_config`.

    Raises:
        ConfigError: a key, which the error names, is missing or asks for what is not implemented.
    """
    if vision is None:
        raise ConfigError("vision_config: missing from the model's config")
    _only_silu("vision_config.hidden_act", vision)
    rope = vision.get("rope_parameters") or {}
    if rope.get("rope_type", "axial") != "axial":
        raise ConfigError(f"vision_config.rope_type: expected 'axial', found {rope['rope_type']!r}")
    channels = vision.get("in_channels", vision.get("in_chans", 3))
    needed = ("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size")
    optional = ("temporal_patch_size", "spatial_merge_size", "window_size", "initializer_range")
    return dict(
        **{key: _required(vision, key, "vision_config.") for key in needed},
        fullatt_block_indexes=tuple(_required(vision, "fullatt_block_indexes", "vision_config.")),
        in_channels=channels,
        **present(rope, "rope_theta"),
        **present(vision, "patch_size", *optional),
    )


def _required(config: Mapping[str, Any], key: str, prefix: str = "") -> Any:
    if config.get(key) is None:
        raise ConfigError(f"{prefix}{key}: missing from the model's config")
    return config[key]


def present(config: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Returns those of the keys that the config has, with their values."""
    return {key: config[key] for key in keys if config.get(key) is not None}


def _only_silu(name: str, config: Mapping[str, Any]) -> None:
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise ConfigError(f"{name}: expected silu, found {activation!r}")
