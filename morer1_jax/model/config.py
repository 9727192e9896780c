"""Static description of a Qwen2.5-VL model, and how a run computes with it.

The architecture (`ModelConfig`) carries Hugging Face's field names, so that a published
`config.json` reads one to one (`model.hf_config`).  What a run may choose without changing the
model is kept apart from it, in `Runtime`: dtypes, rematerialisation, unrolling, kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from morer1_jax.bounds import above, at_least, check_bounds, derived, one_of
from morer1_jax.errors import FieldError
from morer1_jax.model import hf_config, vision_layout
from morer1_jax.model.attention import XLA, Kernels
from morer1_jax.model.sharding import Layout

DType = Literal["float32", "bfloat16"]  # Not float16, in which activations overflow.
Remat = Literal["none", "full", "dots"]
AttentionChoice = Literal["auto", "xla", "splash", "cudnn"]
# `transformers`' defaults, for configs that leave them out.
DEFAULT_IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower; by default that of Qwen2.5-VL-3B.

    Names are those of Hugging Face's config. `patch_size` and `window_size` are in pixels, other
    sizes in channels; `out_hidden_size` is the decoder's `hidden_size`.

    Raises:
        FieldError: sizes that do not fit each other.
    """

    depth: int = at_least(1, 32)
    hidden_size: int = at_least(1, 1280)
    intermediate_size: int = at_least(1, 3420)
    num_heads: int = at_least(1, 16)
    out_hidden_size: int = derived(2048)
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    in_channels: int = derived(3)
    patch_size: int = at_least(1, 14)
    temporal_patch_size: int = at_least(1, 2)
    spatial_merge_size: int = at_least(1, 2)
    window_size: int = at_least(1, 112)
    rope_theta: float = derived(10_000.0)
    initializer_range: float = at_least(0, 0.02)

    def __post_init__(self) -> None:
        check_bounds(self)
        _divides("hidden_size", self.hidden_size, "num_heads", self.num_heads)
        _divides(
            "num_heads", self.head_dim, "4 (two axes, two halves)", 4, "heads of a size that is"
        )
        unit = self.patch_size * self.spatial_merge_size
        _divides("window_size", self.window_size, "patch_size * spatial_merge_size", unit)
        outside = [i for i in self.fullatt_block_indexes if not 0 <= i < self.depth]
        if outside or list(self.fullatt_block_indexes) != sorted(set(self.fullatt_block_indexes)):
            raise FieldError(
                "fullatt_block_indexes",
                f"expected increasing block numbers below depth {self.depth}, found "
                f"{self.fullatt_block_indexes}",
            )

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Numbers of one flattened patch: channel, frame, row, column in the processor's order."""
        return self.temporal_patch_size * self.frame_dim

    @property
    def frame_dim(self) -> int:
        """Numbers of one frame of a patch: channel, row, column."""
        return self.in_channels * self.patch_size**2

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

    def image_cost(self, grids: Sequence[vision_layout.Grid]) -> vision_layout.ImageCost:
        """Returns the room that the images of one sample take in a batch and in the text.

        Host code asks this before it reads a pixel; nothing is traced.

        Args:
            grids: (1, rows, columns) in patches of each image; empty for a sample without images.

        Raises:
            LayoutError: a grid is a video or not divisible by `spatial_merge_size`.
        """
        merge = self.spatial_merge_size
        return vision_layout.ImageCost(
            slots=vision_layout.count_windows(grids, **self._window_sizes),
            tokens=sum(vision_layout.count_image_tokens(grid, merge_size=merge) for grid in grids),
        )

    def layout(
        self,
        grids: Sequence[vision_layout.Grid],
        *,
        samples: Sequence[int] | None = None,
        slots: int | None = None,
    ) -> vision_layout.VisionLayout:
        """Returns where the patches of a row's images go in its batch.

        Args:
            grids: (1, rows, columns) in patches of each image of the row, in the text's order.
            samples: number of images of each sample of the row; None: all are one sample's.
            slots: of the row, padding included, counted as in `ImageCost`; None for just those
                needed.

        Raises:
            LayoutError: as in `image_cost`, or the images fill more than `slots`.
        """
        return vision_layout.vision_layout(
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
    """The decoder; by default that of Qwen2.5-VL-3B.

    Names are those of Hugging Face's config. `mrope_section` counts rotary frequencies for time,
    height and width. `vocab_size` None, of a model from scratch, is as many rows as its tokenizer
    needs.

    Raises:
        FieldError: sizes that do not fit each other.
    """

    vocab_size: int | None = at_least(1, 151_936)
    hidden_size: int = at_least(1, 2048)
    intermediate_size: int = at_least(1, 11_008)
    num_hidden_layers: int = at_least(1, 36)
    num_attention_heads: int = at_least(1, 16)
    num_key_value_heads: int = at_least(1, 2)
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    rope_theta: float = above(0, 1_000_000.0)
    rms_norm_eps: float = derived(1e-6)
    initializer_range: float = at_least(0, 0.02)
    max_position_embeddings: int = derived(128_000)
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        check_bounds(self)
        heads = self.num_attention_heads
        _divides("hidden_size", self.hidden_size, "num_attention_heads", heads)
        _divides("num_attention_heads", heads, "num_key_value_heads", self.num_key_value_heads)
        halves = "2 (rotary halves)"
        _divides("num_attention_heads", self.head_dim, halves, 2, "heads of a size that is")
        if len(self.mrope_section) != 3 or 2 * sum(self.mrope_section) != self.head_dim:
            raise FieldError(
                "mrope_section",
                f"expected three counts that sum to half the head size, {self.head_dim // 2}, "
                f"found {self.mrope_section}",
            )

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
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

    def __post_init__(self) -> None:
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise FieldError(
                "vision_config.out_hidden_size",
                f"expected the decoder's hidden_size {self.text.hidden_size}, found "
                f"{self.vision.out_hidden_size}",
            )

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the head is the embedding."""
        return self.text.tie_word_embeddings

    @property
    def head_sizes(self) -> tuple[int, int]:
        """Elements of a head of the decoder and of the vision tower."""
        return self.text.head_dim, self.vision.head_dim

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Reads a parsed `config.json`, flat (published) or with a nested `text_config`.

        Raises:
            ConfigError: a key, which the error names, is missing or asks for what is not
                implemented.
        """
        _one_of("model_type", config.get("model_type", "qwen2_5_vl"), ("qwen2_5_vl",))
        text = dict(config.get("text_config") or config)
        # Saves of transformers 4.5x keep this key inside text_config only.
        tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        try:
            vision = VisionConfig(**hf_config.vision_fields(config.get("vision_config")))
        except FieldError as error:
            raise FieldError(f"vision_config.{error.field}", error.problem) from None
        return cls(
            text=TextConfig(**hf_config.text_fields(text), tie_word_embeddings=bool(tied)),
            vision=vision,
            **DEFAULT_IDS | hf_config.present(config, *DEFAULT_IDS),
        )

    def to_hf(self) -> dict[str, Any]:
        """Returns the published flat form, JSON-ready; `from_hf` of it gives an equal config."""
        text = dataclasses.asdict(self.text)
        section, tied = list(text.pop("mrope_section")), text.pop("tie_word_embeddings")
        vision = dataclasses.asdict(self.vision)
        theta = vision.pop("rope_theta")
        vision["fullatt_block_indexes"] = list(self.vision.fullatt_block_indexes)
        if theta != VisionConfig.rope_theta:  # The published form leaves it out.
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
            "tie_word_embeddings": tied,
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
        rank: rank of each adapter; 0 means no adapters.
        alpha: an adapter's output is scaled by alpha / rank.
        targets: the maps that have an adapter, of `LORA_TARGETS`.

    Raises:
        FieldError: a number is out of its range, a target is unknown, or `targets` is empty.
    """

    rank: int = at_least(0, 0)
    alpha: float = at_least(0, 128.0)
    targets: tuple[str, ...] = LORA_TARGETS

    def __post_init__(self) -> None:
        check_bounds(self)
        if not self.rank:
            return
        if not self.alpha:
            raise FieldError("alpha", "expected above 0, found 0")
        if not self.targets:
            raise FieldError("targets", f"expected some of {', '.join(LORA_TARGETS)}, found none")
        for target in self.targets:
            _one_of("targets", target, LORA_TARGETS)

    @property
    def scale(self) -> float:
        """Factor of an adapter's output."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class Runtime:
    """How a run computes; none of it changes the model beyond rounding.

    Attributes:
        dtype: dtype of activations and matrix products; norms, rotary and softmax use float32.
            Float32 products are exact on every platform (`model.products`), and on accelerators
            take several times as long as bfloat16's.
        remat: what is saved of a layer for the backward pass, which computes the rest again:
            "none" saves all activations, "full" only the layer's input, "dots" also the results of
            linear maps, each with its bias and adapter.
        scan_unroll: layers in one step of the forward scan; at the layer count or above there is no
            scan. Must be 1 with rematerialisation: XLA merges the recomputation of layers that
            share a step with their first computation, which saves little memory.
        decode_unroll: whether sampling runs layers in a plain loop, with their parameters apart,
            not in a scan. It takes longer to compile. Decoding is much faster on a CPU, and on TPUs
            by the compiler's estimate: a scan copies each layer's part of the cache every token.
        gradient_sums: dtype in which a mesh sums parameters' gradients over its devices; "bfloat16"
            halves the bytes that are sent, and rounds every sum.
        attention: name of the kernels; "auto" chooses by device (see `run.kernels`).
        kernels: what computes attention over whole sequences.
        layout: where activations and gathered parameters lie on the mesh.

    Raises:
        FieldError: a value is out of its bounds, or `scan_unroll` is above 1 with `remat`.
    """

    param_dtype: DType = one_of(DType, "float32")
    dtype: DType = one_of(DType, "float32")
    remat: Remat = one_of(Remat, "none")
    scan_unroll: int = at_least(1, 1)
    decode_unroll: bool = False
    gradient_sums: DType = one_of(DType, "float32")
    attention: AttentionChoice = one_of(AttentionChoice, "auto")
    kernels: Kernels = derived(XLA())
    layout: Layout = derived(Layout())

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.remat != "none" and self.scan_unroll != 1:
            raise FieldError(
                "scan_unroll",
                f"expected 1 with remat = {self.remat!r}, found {self.scan_unroll}; layers that "
                "share a step of the scan save little memory, since XLA merges their recomputation "
                "with the first computation",
            )


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """How pixels become patches.

    Attributes:
        min_pixels: an image with fewer is scaled up to as many, its aspect ratio nearly kept.
        max_pixels: an image with more is scaled down to as many, its aspect ratio nearly kept.
        crop_margin: share of the box's width and height that is added on each side of the crop.
        crop_least: least width and height of the crop in the photo's pixels; a smaller box grows
            around its centre.
        patch_size: the vision tower's, in pixels.
        merge_size: the vision tower's `spatial_merge_size`.
        temporal_patch_size: the vision tower's, in frames.
        image_mean: mean of each channel, with levels from 0 to 1; by default CLIP's.
        image_std: standard deviation of each channel, with levels from 0 to 1; by default CLIP's.
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


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise FieldError(name, f"expected one of {', '.join(allowed)}, found {value!r}")


def _divides(name: str, value: int, by_name: str, by: int, what: str = "") -> None:
    if value % by:
        of = f"{what} " if what else ""
        raise FieldError(name, f"expected {of}a multiple of {by_name} = {by}, found {value}")
