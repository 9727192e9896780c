"""The vision tower: patches in window slots to image tokens (Qwen2.5-VL, arXiv 2502.13923, 2.1.1).

Most blocks attend within windows, a dense batch of [windows, slots]; a few attend over whole
images.  The host decides which patch sits in which slot (`morer1_jax.model.vision_layout`).
Axes: b rows, w windows of a row, p slots of a window, n = w·p, d tower width.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float, Int, UInt8

from morer1_jax.batch import VisionBatch
from morer1_jax.model.attention import XLA
from morer1_jax.model.config import Runtime, VisionConfig
from morer1_jax.model.cpu import cos_sin
from morer1_jax.model.layers import (
    SwiGLU,
    dense,
    rematerialised,
    rms_norm,
    scanned,
)
from morer1_jax.model.rotary import Rotary

# Fixed by the architecture: no config of the family carries it.
_NORM_EPSILON = 1e-6


@struct.dataclass
class VisionInputs:
    """The images of `b` rows in window slots, as `model.vision_layout` places them.

    Attributes:
        patches: flattened patches, c = channels · frames · patch_size² in the processor's order.
        positions: row and column of each patch in its image.
        image_ids: image of each slot, counted within the row; -1 is padding.
        part_ids: window of its image, counted within the row; -1 is padding. Windows that an
            image's edge cuts short may share a batch's window.
    """

    patches: Float[Array, "b w p c"]
    positions: Int[Array, "b w p 2"]
    image_ids: Int[Array, "b w p"]
    part_ids: Int[Array, "b w p"]

    @classmethod
    def of(cls, batch: VisionBatch, frames: int) -> VisionInputs:
        """Returns a batch's images as the tower's inputs, normalised, in float32.

        Args:
            frames: the tower's `temporal_patch_size`.
        """
        patches = normalised(batch.patches, batch.mean, batch.inverse_std, frames)
        return cls(patches, batch.positions, batch.image_ids, batch.part_ids)


def normalised(
    patches: UInt8[Array, "b w p c"],
    mean: Float[Array, "b k"],
    inverse_std: Float[Array, "b k"],
    frames: int,
) -> Float[Array, "b w p {frames}*c"]:
    """Returns (level / 255 - mean) / std, each channel repeated for each of `frames`.

    Within one unit in the last place of the processor's own numbers, bit for bit those of its
    division by 255.
    """
    b, w, p, c = patches.shape
    k = mean.shape[1]
    levels = patches.reshape(b, w, p, k, 1, c // k).astype(jnp.float32)
    # Near the mean the difference magnifies any error of level / 255, and compilers replace a
    # division by 255 with an inexact product. The first of these terms is exact, the second's error
    # too small to change their rounded sum.
    shares = levels / 256 + levels * np.float32(1 / (255 * 256))
    mean, inverse_std = (a.reshape(b, 1, 1, k, 1, 1) for a in (mean, inverse_std))
    values = (shares - mean) * inverse_std
    return jnp.broadcast_to(values, (b, w, p, k, frames, c // k)).reshape(b, w, p, frames * c)


class VisionAttention(nn.Module):
    """Attention among slots of the same id: within each window, or over the whole row if `full`."""

    config: VisionConfig
    runtime: Runtime
    full: bool

    @nn.compact
    def __call__(
        self, x: Float[Array, "b w p d"], rotary: Rotary, ids: Int[Array, "b w p"]
    ) -> Float[Array, "b w p d"]:
        """Attends from each slot to those with its id."""
        cfg, run = self.config, self.runtime
        qkv = dense(
            (3, cfg.num_heads, cfg.head_dim), run, cfg.initializer_range, name="qkv", bias=True
        )(x)
        q, k, v = jnp.moveaxis(qkv, -3, 0)
        q, k = (run.kernels.rotate(x, rotary) for x in (q, k))
        b, w, p = ids.shape
        rows, length = (b, w * p) if self.full else (b * w, p)
        ids = ids.reshape(rows, length)
        heads = (rows, length, cfg.num_heads, cfg.head_dim)
        # A window is smaller than any kernel's block.
        kernels = run.kernels if self.full else XLA()
        out = kernels.full(*(a.reshape(heads) for a in (q, k, v)), ids)
        out = out.reshape(b, w, p, cfg.num_heads, cfg.head_dim)
        return dense(
            cfg.hidden_size, run, cfg.initializer_range, name="proj", axis=(-2, -1), bias=True
        )(out)


class VisionBlock(nn.Module):
    """Pre-norm attention and SwiGLU, in the form that `layers.scanned` repeats."""

    config: VisionConfig
    runtime: Runtime
    full: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b w p d"],
        rotary: Rotary,
        image_ids: Int[Array, "b w p"],
        part_ids: Int[Array, "b w p"],
    ) -> tuple[Float[Array, "b w p d"], None]:
        """Runs the block, over images if `full`, else within windows."""
        cfg, run = self.config, self.runtime
        attend = VisionAttention(cfg, run, self.full, name="attn")
        ids = image_ids if self.full else part_ids
        x = run.layout.rows(x)
        x = x + attend(rms_norm(_NORM_EPSILON, run, name="norm1")(x), rotary, ids)
        mlp = SwiGLU(
            cfg.hidden_size, cfg.intermediate_size, cfg.initializer_range, run, True, name="mlp"
        )
        x = x + mlp(rms_norm(_NORM_EPSILON, run, name="norm2")(x))
        return run.layout.rows(x), None


class VisionGroup(nn.Module):
    """The repeating group: windowed blocks, then one full block."""

    config: VisionConfig
    runtime: Runtime

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b w p d"],
        rotary: Rotary,
        image_ids: Int[Array, "b w p"],
        part_ids: Int[Array, "b w p"],
    ) -> tuple[Float[Array, "b w p d"], None]:
        """Runs the group's blocks in turn."""
        cfg, run = self.config, self.runtime
        windowed, repeated = cfg.period - 1, cfg.depth > cfg.period
        if windowed:
            block = rematerialised(VisionBlock, run, in_scan=repeated or windowed > 1)
            blocks = scanned(block, windowed, inputs=3)(cfg, run, False, name="windowed")
            x, _ = blocks(x, rotary, image_ids, part_ids)
        block = rematerialised(VisionBlock, run, in_scan=repeated)
        return block(cfg, run, True, name="full")(x, rotary, image_ids, part_ids)


class VisionTower(nn.Module):
    """Patch embedding, blocks, and the merger of merge² neighbouring patches into one token.

    Where full blocks recur with a period the parameters are stacked by group (and, inside, by
    windowed block); otherwise each block has its own entry, `block_<i>`.
    """

    config: VisionConfig
    runtime: Runtime

    @nn.compact
    def __call__(
        self, images: VisionInputs | Float[Array, "b n d"], merge: bool = True
    ) -> Float[Array, "b m d"] | Float[Array, "b n d"]:
        """Returns image tokens in slot order, m = w·p / merge²; those of padding are finite.

        Args:
            images: or what the blocks gave for them, from which the merger goes on.
            merge: False: what the blocks give is returned.
        """
        x = self._blocks(images) if isinstance(images, VisionInputs) else images
        return self._merger(x) if merge else x

    def _blocks(self, inputs: VisionInputs) -> Float[Array, "b n d"]:
        cfg, run = self.config, self.runtime
        std = cfg.initializer_range
        # The reference's convolution has a stride as large as its kernel, so is linear in patches.
        x = dense(cfg.hidden_size, run, std, name="patch_embed")(inputs.patches)
        slots = axial_rotary(inputs.positions, cfg), inputs.image_ids, inputs.part_ids
        # A scan over groups compiles one group; an irregular tower is unrolled.
        if cfg.period:
            groups = scanned(VisionGroup, cfg.depth // cfg.period, inputs=3)
            x, _ = groups(cfg, run, name="groups")(x, *slots)
        else:
            block = rematerialised(VisionBlock, run, in_scan=False)
            for i in range(cfg.depth):
                full = i in cfg.fullatt_block_indexes
                x, _ = block(cfg, run, full, name=f"block_{i}")(x, *slots)
        return x.reshape(x.shape[0], -1, cfg.hidden_size)

    def _merger(self, x: Float[Array, "b n d"]) -> Float[Array, "b m d"]:
        cfg, run = self.config, self.runtime
        std = cfg.initializer_range
        # A merged slot's patches lie one after another.
        x = rms_norm(_NORM_EPSILON, run, name="merger_norm")(x)
        merged = cfg.hidden_size * cfg.spatial_merge_size**2
        x = x.reshape(x.shape[0], -1, merged)
        x = nn.gelu(dense(merged, run, std, name="merger_in", bias=True)(x), approximate=False)
        return dense(cfg.out_hidden_size, run, std, name="merger_out", bias=True)(x)


def is_merger(name: str) -> bool:
    """Returns whether an entry of the tower's parameters is of its merger."""
    return name.startswith("merger")


def axial_rotary(positions: Int[Array, "b w p 2"], config: VisionConfig) -> Rotary:
    """Returns cosines and sines of angles whose halves follow the patch's row and its column."""
    # Rows and columns share the frequencies, half of a head's pairs each.
    half = config.head_dim // 2
    exponents = np.arange(0, half, 2, dtype=np.float32) / half
    frequencies = 1 / config.rope_theta**exponents
    angles = positions[..., None].astype(jnp.float32) * frequencies
    angles = angles.reshape(*positions.shape[:-1], half)
    return cos_sin(angles)
