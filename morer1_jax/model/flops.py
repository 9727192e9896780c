"""Floating-point operations (FLOPs) of the model as published, whatever a program spends on it.

What counts is the products of matrices that the published model defines, 2·m·k·n each: linear maps
of tower, merger and decoder, logits where a token's probability is asked for, and attention between
tokens that see each other (queries with keys, weights with values). What does not count: looking up
embeddings, norms and other element-wise work, padding, and whatever is computed a second time
(rematerialisation). Thus of two programs which compute the same the faster one has the higher model
FLOPs utilisation (MFU; PaLM, arXiv 2204.02311, appendix B, with vision and without the look-up).

For a sample of n tokens whose images have windows of p and images of q patches,

    text     2·n·l·(2·d·h·e + 2·d·k·e + 3·d·f) + 4·l·h·e·n(n+1)/2 + 2·d·v·targets
    vision   2·Σq·(c·d' + l'·(4·d'² + 3·d'·f')) + 4·d'·(windowed·Σp² + full·Σq²)
             + 2·(Σq/m²)·(m²d')·(m²d' + d)

with l layers, d width, h heads, k key-value heads of size e, f feed-forward, v vocabulary; the same
primed for the tower, c numbers a patch, m the merge size. A backward pass is twice its forward
pass where parameters train, once where only the gradient passes through.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from morer1_jax.batch import EncodedBatch, FeatureBatch, Images
from morer1_jax.model.config import ModelConfig, TextConfig, VisionConfig


def linear_flops(text: TextConfig) -> int:
    """Returns the FLOPs of the decoder's linear maps for one token."""
    d, kv = text.hidden_size, text.num_key_value_heads * text.head_dim
    return 2 * text.num_hidden_layers * (2 * d * d + 2 * d * kv + 3 * d * text.intermediate_size)


def attention_flops(text: TextConfig) -> int:
    """Returns the FLOPs of the decoder's attention for one pair of a token and one that it sees."""
    return 4 * text.num_hidden_layers * text.hidden_size


def logit_flops(text: TextConfig) -> int:
    """Returns the FLOPs of one token's logits."""
    return 2 * text.hidden_size * text.vocab_size


def patch_flops(vision: VisionConfig) -> int:
    """Returns the FLOPs of the tower's linear maps for one patch."""
    d, f = vision.hidden_size, vision.intermediate_size
    return 2 * (vision.patch_dim * d + vision.depth * (4 * d * d + 3 * d * f))


def text_flops(text: TextConfig, tokens: float, pairs: float, logits: float) -> float:
    """Returns the FLOPs of the decoder's forward pass.

    Args:
        tokens: number of tokens.
        pairs: number of pairs of a token and one that it sees, itself included.
        logits: number of tokens whose logits are computed.
    """
    of_tokens = tokens * linear_flops(text) + logits * logit_flops(text)
    return of_tokens + pairs * attention_flops(text)


def vision_flops(
    vision: VisionConfig, patches: float, window_pairs: float, image_pairs: float
) -> float:
    """Returns the FLOPs of the tower's and the merger's forward pass.

    Args:
        patches: number of patches.
        window_pairs: number of pairs of patches in the same window, each with itself included.
        image_pairs: number of pairs of patches in the same image, each with itself included.
    """
    full = len(vision.fullatt_block_indexes)
    pairs = full * image_pairs + (vision.depth - full) * window_pairs
    unit = vision.spatial_merge_size**2
    merged = unit * vision.hidden_size
    merger = 2 * merged * (merged + vision.out_hidden_size) / unit
    return patches * (patch_flops(vision) + merger) + 4 * vision.hidden_size * pairs


def batch_vision_flops(vision: VisionConfig, images: Images) -> float:
    """Returns the FLOPs of encoding a batch's images once, padding left out.

    It is 0 for features, and where the tower has run; its merger alone is too small to count.
    """
    if isinstance(images, EncodedBatch | FeatureBatch):
        return 0.0
    image_sizes, window_sizes = (_count_slots(ids) for ids in (images.image_ids, images.part_ids))
    return vision_flops(
        vision,
        patches=image_sizes.sum(),
        window_pairs=(window_sizes**2).sum(),
        image_pairs=(image_sizes**2).sum(),
    )


def _count_slots(ids: Int[np.ndarray, "b w p"]) -> Int[np.ndarray, " ids"]:
    """Returns the number of slots of each id of each row; -1 is padding."""
    rows = np.asarray(ids).reshape(len(ids), -1)
    return np.concatenate([np.bincount(row[row >= 0]) for row in rows]).astype(np.int64)


def row_flops(config: ModelConfig, length: int, slots: int) -> float:
    """Returns the FLOPs of a forward pass over a row of a batch, padding included.

    It serves to compare the shapes of batches: logits, the merger and attention within windows,
    which hardly differ between shapes, are left out.

    Args:
        length: tokens of the row.
        slots: of its images, counted as in `ImageCost`.
    """
    text, vision = config.text, config.vision
    patches = slots * vision.window_patches
    pairs = 4 * vision.hidden_size * len(vision.fullatt_block_indexes)
    of_text = length * linear_flops(text) + length**2 / 2 * attention_flops(text)
    return of_text + patches * patch_flops(vision) + pairs * patches**2
