"""Static description of a Qwen2.5-VL model, and how a run computes with it.

The architecture (`ModelConfig`) carries Hugging Face's field names, so that a published
`config.json` reads one to one.  What a run may choose freely without changing the model
(`Runtime`: dtypes, rematerialisation, unrolling, kernels) is kept apart from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from morer1_jax.errors import ConfigError
from morer1_jax.model import windows
from morer1_jax.model.attention import XLA, Kernels

_DTYPES = ("float32", "bfloat16")  # In float16 activations overflow.
_REMATS = ("none", "full", "dots")
AttentionChoice = Literal["auto", "xla", "splash", "cudnn"]
# What `transformers` takes where a config leaves them out.
DEFAULT_IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower.  Sizes are in patches' pixels (`patch_size`, `window_size`) or channels."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    fullatt_block_indexes: tuple[int, ...]
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112
    rope_theta: float = 10_000.0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        _divides("vision_config.hidden_size", self.hidden_size, "num_heads", self.num_heads)
        _divides("vision head size", self.head_dim, "4 (two axes, two halves)", 4)
        unit = self.patch_size * self.spatial_merge_size
        _divides("vision_config.window_size", self.window_size, "patch_size*merge", unit)
        outside = [i for i in self.fullatt_block_indexes if not 0 <= i < self.depth]
        if outside or list(self.fullatt_block_indexes) != sorted(set(self.fullatt_block_indexes)):
            raise ConfigError(
                f"vision_config.fullatt_block_indexes: found {self.fullatt_block_indexes}, "
                f"expected increasing block numbers below depth {self.depth}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Numbers in one flattened patch: channel, frame, row, column in the processor's order."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def window_patches(self) -> int:
        """Patches in one whole attention window."""
        return (self.window_size // self.patch_size) ** 2

    @property
    def period(self) -> int | None:
        """Blocks in the repeating group that ends in its one full block; None if aperiodic."""
        if not self.fullatt_block_indexes:
            return None
        period = self.fullatt_block_indexes[0] + 1
        regular = tuple(range(period - 1, self.depth, period)) == self.fullatt_block_indexes
        return period if regular and self.depth % period == 0 else None

    def image_cost(self, grids: Sequence[windows.Grid]) -> windows.ImageCost:
        """Returns the room that the images of one sample take in a batch and in the text.

        Host code asks this before it reads a pixel; nothing is traced.

        Args:
            grids: (1, rows, columns) in patches of each image; none for a sample without images.

        Raises:
            LayoutError: a grid is a video or not divisible by `spatial_merge_size`.
        """
        merge = self.spatial_merge_size
        return windows.ImageCost(
            slots=windows.count_windows(grids, **self._window_sizes),
            tokens=sum(windows.count_image_tokens(grid, merge_size=merge) for grid in grids),
        )

    def layout(
        self,
        grids: Sequence[windows.Grid],
        *,
        samples: Sequence[int] | None = None,
        slots: int | None = None,
    ) -> windows.VisionLayout:
        """Returns where the patches of a row's images go in its batch.

        Args:
            grids: (1, rows, columns) in patches of each image of the row, in the text's order.
            samples: number of images of each sample of the row; None: all are one sample's.
            slots: of the row, padding included, counted as in `ImageCost`; None for just those
                needed.

        Raises:
            LayoutError: as in `image_cost`, or the images fill more than `slots`.
        """
        return windows.vision_layout(
            grids, **self._window_sizes, samples=samples, pad_to_windows=slots
        )

    @property
    def _window_sizes(self) -> dict[str, int]:
        return {
            "patch_size": self.patch_size,
            "merge_size": self.spatial_merge_size,
            "window_size": self.window_size,
        }


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The decoder.  `mrope_section` counts rotary frequencies for time, height and width."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    mrope_section: tuple[int, int, int]
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    max_position_embeddings: int = 128_000

    def __post_init__(self) -> None:
        heads = self.num_attention_heads
        _divides("hidden_size", self.hidden_size, "num_attention_heads", heads)
        _divides("num_attention_heads", heads, "num_key_value_heads", self.num_key_value_heads)
        _divides("text head size", self.head_dim, "2 (rotary halves)", 2)
        if len(self.mrope_section) != 3 or 2 * sum(self.mrope_section) != self.head_dim:
            raise ConfigError(
                f"mrope_section: found {self.mrope_section}, expected three counts that sum to "
                f"half the head size, {self.head_dim // 2}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A whole Qwen2.5-VL model: tower, decoder, head, and the ids that stand for images."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise ConfigError(
                f"vision_config.out_hidden_size: found {self.vision.out_hidden_size}, expected "
                f"the decoder's hidden_size {self.text.hidden_size}"
            )

    @property
    def head_sizes(self) -> tuple[int, int]:
        """Elements of a head of the decoder and of the vision tower."""
        return self.text.head_dim, self.vision.head_dim

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Reads a parsed `config.json`, flat (published) or with a nested `text_config`.

        Raises:
            ConfigError: a key is missing, or asks for what is not implemented (named).
        """
        if config.get("model_type", "qwen2_5_vl") != "qwen2_5_vl":
            raise ConfigError(f"model_type: found {config['model_type']!r}, expected 'qwen2_5_vl'")
        text = dict(config.get("text_config") or config)
        # Saves of transformers 4.5x keep this key inside text_config only.
        tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        return cls(
            text=_text_from_hf(text),
            vision=_vision_from_hf(_need(config, "vision_config")),
            **DEFAULT_IDS | _given(config, *DEFAULT_IDS),
            tie_word_embeddings=bool(tied),
        )

    def to_hf(self) -> dict[str, Any]:
        """The published flat form, JSON-ready; `from_hf` of it gives an equal config."""
        text = dataclasses.asdict(self.text)
        section = list(text.pop("mrope_section"))
        vision = dataclasses.asdict(self.vision)
        theta = vision.pop("rope_theta")
        vision["fullatt_block_indexes"] = list(self.vision.fullatt_block_indexes)
        if theta != VisionConfig.rope_theta:  # The published form does not say it.
            vision["rope_parameters"] = {"rope_type": "axial", "rope_theta": theta}
        vision |= {
            # Older releases of transformers read `in_chans`, newer ones `in_channels`.
            "in_chans": self.vision.in_channels,
            "hidden_act": "silu",
            "model_type": "qwen2_5_vl",
        }
        return text | {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "hidden_act": "silu",
            "use_sliding_window": False,
            "rope_scaling": {"type": "mrope", "mrope_section": section},
            "tie_word_embeddings": self.tie_word_embeddings,
            "image_token_id": self.image_token_id,
            "video_token_id": self.video_token_id,
            "vision_start_token_id": self.vision_start_token_id,
            "vision_end_token_id": self.vision_end_token_id,
            "vision_config": vision,
        }


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Low-rank adapters beside linear maps of every decoder layer (arXiv 2106.09685, 4.1).

    Attributes:
        rank: of an adapter.
        alpha: what an adapter adds is scaled by alpha / rank.
        targets: the maps that have one, of `LORA_TARGETS`.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = LORA_TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"rank: found {self.rank}, expected at least 1")
        if self.alpha <= 0:
            raise ConfigError(f"alpha: found {self.alpha:g}, expected above 0")
        if not self.targets:
            raise ConfigError(f"targets: none found, expected some of {', '.join(LORA_TARGETS)}")
        for target in self.targets:
            _one_of("targets", target, LORA_TARGETS)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class Runtime:
    """How a run computes; none of it changes the model beyond rounding.

    Attributes:
        param_dtype: dtype the parameters are held in.
        dtype: dtype of activations and matrix products; norms, rotary and softmax use float32.
            Float32 products are so on every platform (`model.products`), which on accelerators
            takes several times as long as bfloat16's.
        remat: what the backward pass recomputes per layer: "none" keeps all activations, "full"
            keeps only each layer's input, "dots" also keeps the results of linear maps, each
            with its bias and adapter.
        scan_unroll: layers a step of the forward scan (at least the layer count: no scan at all);
            1 where layers are computed again: of layers that share a step, or stand outside of the
            loop, XLA merges what is computed again with the first time, and little is saved.
        decode_unroll: whether one-token decoding is a plain loop over layers whose parameters are
            copied apart beforehand, not a scan. On a CPU it is the faster by far; elsewhere
            kernels read a layer's slice where it lies, and the copy is a second model in memory.
        kernels: what computes attention over whole sequences.
    """

    param_dtype: str = "float32"
    dtype: str = "float32"
    remat: Literal["none", "full", "dots"] = "none"
    scan_unroll: int = 1
    decode_unroll: bool = False
    kernels: Kernels = dataclasses.field(default_factory=XLA)

    def __post_init__(self) -> None:
        for key in ("param_dtype", "dtype"):
            _one_of(key, getattr(self, key), _DTYPES)
        _one_of("remat", self.remat, _REMATS)
        if self.scan_unroll < 1:
            raise ConfigError(f"scan_unroll: found {self.scan_unroll}, expected at least 1")
        if self.remat != "none" and self.scan_unroll != 1:
            raise ConfigError(
                f"scan_unroll: found {self.scan_unroll} with remat = {self.remat!r}, expected 1 "
                "there: of layers that share a step of the scan what is computed again is merged "
                "with the first time, and little memory is saved"
            )


def _text_from_hf(text: Mapping[str, Any]) -> TextConfig:
    _only_silu("hidden_act", text)
    if text.get("use_sliding_window") or "sliding_attention" in (text.get("layer_types") or ()):
        raise ConfigError("use_sliding_window: sliding-window attention is not implemented")
    if text.get("attention_dropout"):
        raise ConfigError(f"attention_dropout: found {text['attention_dropout']}, only 0 is done")
    rope = text.get("rope_scaling") or text.get("rope_parameters")
    if not rope:
        raise ConfigError("rope_parameters: missing; expected one with an mrope_section")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise ConfigError(f"rope_type: found {kind!r}, only 'default' and 'mrope' are implemented")
    heads = _need(text, "num_attention_heads")
    if text.get("head_dim") not in (None, _need(text, "hidden_size") // heads):
        raise ConfigError(
            f"head_dim: found {text['head_dim']}, only hidden_size/num_attention_heads is done"
        )
    return TextConfig(
        vocab_size=_need(text, "vocab_size"),
        hidden_size=text["hidden_size"],
        intermediate_size=_need(text, "intermediate_size"),
        num_hidden_layers=_need(text, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=text.get("num_key_value_heads") or heads,
        mrope_section=tuple(_need(rope, "mrope_section")),
        **_given(rope, "rope_theta"),
        **({} if "rope_theta" in rope else _given(text, "rope_theta")),
        rms_norm_eps=_need(text, "rms_norm_eps"),
        **_given(text, "initializer_range", "max_position_embeddings"),
    )


def _vision_from_hf(vision: Mapping[str, Any]) -> VisionConfig:
    _only_silu("vision_config.hidden_act", vision)
    rope = vision.get("rope_parameters") or {}
    if rope.get("rope_type", "axial") != "axial":
        raise ConfigError(
            f"vision_config.rope_type: found {rope['rope_type']!r}, only 'axial' is implemented"
        )
    channels = vision.get("in_channels", vision.get("in_chans", 3))
    needed = ("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size")
    optional = ("temporal_patch_size", "spatial_merge_size", "window_size", "initializer_range")
    return VisionConfig(
        **{key: _need(vision, key, "vision_config.") for key in needed},
        fullatt_block_indexes=tuple(_need(vision, "fullatt_block_indexes", "vision_config.")),
        in_channels=channels,
        **_given(rope, "rope_theta"),
        **_given(vision, "patch_size", *optional),
    )


def _need(config: Mapping[str, Any], key: str, prefix: str = "") -> Any:
    if config.get(key) is None:
        raise ConfigError(f"{prefix}{key}: missing from the model's config")
    return config[key]


def _given(config: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: config[key] for key in keys if config.get(key) is not None}


def _only_silu(name: str, config: Mapping[str, Any]) -> None:
    _one_of(name, config.get("hidden_act", "silu"), ("silu",))


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name}: found {value!r}, expected one of {', '.join(allowed)}")


def _divides(name: str, value: int, by_name: str, by: int) -> None:
    if by < 1 or value < 1 or value % by:
        raise ConfigError(f"{name}: found {value}, expected a multiple of {by_name} = {by}")


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """How pixels become patches.

    Attributes:
      min_pixels, max_pixels: an image is scaled to lie between, keeping its shape nearly.
      crop_margin: how much of the box's width and height is added on each side of the crop.
      crop_least: least width and height of the crop in the photo's pixels; a smaller box grows
        around its centre.
      patch_size, merge_size, temporal_patch_size: the vision tower's.
      image_mean, image_std: of each channel, with levels from 0 to 1; by default CLIP's.
    """

    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    crop_margin: float = 0.1
    crop_least: int = 28
    patch_size: int = 14
    merge_size: int = 2
    temporal_patch_size: int = 2
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
