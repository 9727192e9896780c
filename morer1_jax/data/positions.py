"""Computes the rotary positions of a row's tokens, text and images."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from morer1_jax.model.vision_layout import Grid, LayoutError, merged_grid


def mrope_positions(
    token_ids: Int[np.ndarray, " s"],
    grids: Sequence[Grid],
    *,
    merge_size: int,
    image_token_id: int,
    video_token_id: int,
    segment_ids: Int[np.ndarray, " s"] | None = None,
) -> Int[np.ndarray, "3 s"]:
    """Computes time, height and width positions of every token (M-RoPE, arXiv 2409.12191, 2.1).

    Text advances all three by one a token.  An image's tokens share one time; their height and
    width count its merged rows and columns from there; the text after it goes on from the
    largest position so far plus one.

    Args:
        token_ids: a row, with image tokens already expanded to one per merged unit.
        grids: one for each of the row's images, in order.
        segment_ids: sample of each token in a packed row; positions restart where it changes,
            and 0 marks padding, which gets position 0.  None: the row is one sample.

    Raises:
        LayoutError: an unbroken run of image tokens is not exactly one image, an image has no
            run, or the row holds a video.
    """
    if (token_ids == video_token_id).any():
        raise LayoutError("tokens: expected those of text and images, found a video token")
    # Runs of tokens of one segment and one kind, text or image.
    segments = np.ones_like(token_ids) if segment_ids is None else segment_ids
    positions = np.zeros((3, len(token_ids)), np.int32)
    is_image = token_ids == image_token_id
    pending = iter(grids)
    changes = (np.diff(segments) != 0) | (np.diff(is_image) != 0)
    bounds = np.flatnonzero(np.concatenate([[True], changes, [True]])) if len(token_ids) else []
    # Positions run by run, counted on within a segment.
    next_position, previous_segment = 0, None
    for start, stop in itertools.pairwise(bounds):
        if segments[start] != previous_segment:
            next_position, previous_segment = 0, segments[start]
        if previous_segment == 0:
            continue
        if not is_image[start]:
            positions[:, start:stop] = next_position + np.arange(stop - start)
            next_position += stop - start
            continue
        grid = next(pending, None)
        if grid is None:
            raise LayoutError(
                f"token {start}: expected text after the last of {len(grids)} images, found image "
                "tokens"
            )
        rows, columns = merged_grid(grid, merge_size)
        if stop - start != rows * columns:
            raise LayoutError(
                f"token {start}: expected {rows * columns} image tokens for {grid} patches, found "
                f"{stop - start}"
            )
        positions[0, start:stop] = next_position
        positions[1:, start:stop] = next_position + np.indices((rows, columns)).reshape(2, -1)
        next_position += max(rows, columns)
    # Every image must have had its run.
    unused = len(list(pending))
    if unused:
        raise LayoutError(f"tokens: expected those of {len(grids)} images, found none for {unused}")
    return positions
