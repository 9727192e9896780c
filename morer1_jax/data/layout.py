"""Where patches and tokens go: everything about images whose size depends on the data.

The vision tower works on windows of a fixed number of patch slots, so that windowed attention
is a dense batch of windows.  An image's edge cuts windows short, and such parts share a window's
slots where they fit.  This module computes, on the host, which patch sits in which slot, its rotary
position, which image and which part it belongs to, and which merged slot feeds which image token of
the text; and the three-axis positions (M-RoPE) of the text itself.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

Grid = tuple[int, int, int]
"""Frames, rows and columns of an image in patches; frames is 1."""


class LayoutError(ValueError):
    """Image grids and token ids that do not fit each other, or that are not supported."""


@dataclasses.dataclass(frozen=True)
class VisionLayout:
    """Window slots of one row: `w` windows of `p` slots.

    Attributes:
        source: the patch in each slot, counted over the processor's concatenated output of the
            row's images; -1 in padding.
        positions: row and column of the patch in its image; 0 in padding.
        image_ids: the image of each slot, counted from 0 in the row; -1 in padding.
        part_ids: the window of its image that a slot belongs to, counted from 0 through the row
            image by image, each line by line; -1 in padding.
        token_slots: for the i-th image token of the row, the merged slot (slot // merge²) that
            holds its feature.
    """

    source: Int[np.ndarray, "w p"]
    positions: Int[np.ndarray, "w p 2"]
    image_ids: Int[np.ndarray, "w p"]
    part_ids: Int[np.ndarray, "w p"]
    token_slots: Int[np.ndarray, " m"]


def count_windows(
    grids: Sequence[Grid], *, patch_size: int, merge_size: int, window_size: int
) -> int:
    """Windows that the images of one sample fill."""
    side = window_size // patch_size // merge_size
    parts = [_parts(grid, merge_size, side)[0] for grid in grids]
    return _first_fit(np.concatenate([_NONE, *map(np.bincount, parts)]), side * side)[2]


def count_image_tokens(grid: Grid, *, merge_size: int) -> int:
    """Image tokens that stand for one image in the text."""
    rows, columns = _checked(grid, merge_size)
    return rows * columns // merge_size**2


def vision_layout(
    grids: Sequence[Grid],
    *,
    patch_size: int,
    merge_size: int,
    window_size: int,
    samples: Sequence[int] | None = None,
    pad_to_windows: int | None = None,
) -> VisionLayout:
    """Lays the patches of a row's images out in window slots.

    Inside a part come its merge units row by row, each of merge² consecutive patches as the
    processor emits them.  Parts that are cut short by their image's edge lie one after another in
    windows that a sample's parts share, the largest first (first-fit decreasing); a window ends in
    padding.

    Args:
        grids: (1, rows, columns) in patches of each image of the row, in the text's order.
        patch_size, window_size: in pixels.
        merge_size: patches merged along each axis into one image token.
        samples: how many of the images each sample of the row has; None: all are one sample's.
        pad_to_windows: total number of windows wanted; None for just those needed.

    Raises:
        LayoutError: a grid is a video or not divisible by `merge_size`, or the bucket is small.
    """
    unit = merge_size**2
    side = window_size // patch_size // merge_size  # merge units along a window's edge
    # Of each merge unit of the row: its part, its rank in it, its image and its place there.
    part, rank, image, place = ([_NONE] for _ in range(4))
    sizes: list[np.ndarray] = []
    for number, grid in enumerate(grids):
        parts, columns = _parts(grid, merge_size, side)
        counts = np.bincount(parts)
        # A stable sort keeps rows before columns.
        order = np.argsort(parts, kind="stable")
        ranks = np.empty_like(order)
        ranks[order] = np.arange(order.size) - np.repeat(np.cumsum(counts) - counts, counts)
        part.append(parts + sum(map(len, sizes)))
        rank.append(ranks)
        image.append(np.full(order.size, number))
        place.append(np.stack(np.divmod(np.arange(order.size), columns), axis=-1).reshape(-1))
        sizes.append(counts)
    part, rank, image = (np.concatenate(values) for values in (part, rank, image))
    counts = [len(grids)] if samples is None else samples
    window_of, start_of, needed = _windows(sizes, counts, side * side)
    windows = needed if pad_to_windows is None else pad_to_windows
    if windows < needed:
        raise LayoutError(
            f"images {list(grids)} fill {needed} windows, more than the bucket of {windows}; "
            f"use a larger bucket or smaller images"
        )
    slot = window_of[part] * side * side + start_of[part] + rank
    inside = np.arange(unit)
    corner = np.concatenate(place).reshape(-1, 1, 2) * merge_size
    within = np.stack(np.divmod(inside, merge_size), axis=-1)

    def slots(values: np.ndarray, padding: int) -> np.ndarray:
        placed = np.full((windows * side * side, unit, *values.shape[2:]), padding, np.int32)
        placed[slot] = values
        return placed.reshape(windows, side * side * unit, *values.shape[2:])

    return VisionLayout(
        source=slots(np.arange(slot.size)[:, None] * unit + inside, -1),
        positions=slots(corner + within, 0),
        image_ids=slots(image[:, None], -1),
        part_ids=slots(part[:, None], -1),
        token_slots=slot.astype(np.int32),
    )


def place_patches(
    layout: VisionLayout, patches: Float[np.ndarray, "n c"]
) -> Float[np.ndarray, "w p c"]:
    """Moves the processor's concatenated patches into their slots; padding is zero.

    Raises:
        LayoutError: the number of patches is not the layout's.
    """
    expected = int((layout.source >= 0).sum())
    if len(patches) != expected:
        raise LayoutError(f"found {len(patches)} patches, the images' grids expect {expected}")
    placed = np.zeros((*layout.source.shape, patches.shape[-1]), patches.dtype)
    filled = layout.source >= 0
    placed[filled] = patches[layout.source[filled]]
    return placed


def vision_index(
    token_ids: Int[np.ndarray, " s"], layout: VisionLayout, *, image_token_id: int
) -> Int[np.ndarray, " s"]:
    """Merged slot whose feature replaces the embedding at each place of the row; -1 elsewhere.

    Raises:
        LayoutError: the row's image tokens are not as many as the layout's.
    """
    places = np.flatnonzero(token_ids == image_token_id)
    if len(places) != len(layout.token_slots):
        raise LayoutError(
            f"found {len(places)} image tokens in the text, the images need "
            f"{len(layout.token_slots)}; was the text cut or an image left out?"
        )
    index = np.full(token_ids.shape, -1, np.int32)
    index[places] = layout.token_slots
    return index


def mrope_positions(
    token_ids: Int[np.ndarray, " s"],
    grids: Sequence[Grid],
    *,
    merge_size: int,
    image_token_id: int,
    video_token_id: int,
    segment_ids: Int[np.ndarray, " s"] | None = None,
) -> Int[np.ndarray, "3 s"]:
    """Time, height and width positions of every token (M-RoPE of Qwen2-VL, arXiv 2409.12191, 2.1).

    Text advances all three by one a token.  An image's tokens share one time; their height and
    width count its merged rows and columns from there; the text after it goes on from the
    largest position so far plus one.

    Args:
        token_ids: a row, with image tokens already expanded to one per merged unit.
        grids: of the row's images, in order.
        segment_ids: sample of each token in a packed row; positions restart where it changes,
            and 0 marks padding, which gets position 0.  None: the row is one sample.

    Raises:
        LayoutError: an unbroken run of image tokens is not exactly one image, an image has no
            run, or the row holds a video.
    """
    if (token_ids == video_token_id).any():
        raise LayoutError("found a video token; videos are not supported, only images")
    segments = np.ones_like(token_ids) if segment_ids is None else segment_ids
    positions = np.zeros((3, len(token_ids)), np.int32)
    is_image = token_ids == image_token_id
    pending = iter(grids)
    changes = (np.diff(segments) != 0) | (np.diff(is_image) != 0)
    bounds = np.flatnonzero(np.concatenate([[True], changes, [True]])) if len(token_ids) else []
    following, previous = 0, None
    for start, stop in itertools.pairwise(bounds):
        if segments[start] != previous:
            following, previous = 0, segments[start]
        if previous == 0:
            continue
        if not is_image[start]:
            positions[:, start:stop] = following + np.arange(stop - start)
            following += stop - start
            continue
        grid = next(pending, None)
        if grid is None:
            raise LayoutError(f"image tokens at {start}, after the last of {len(grids)} images")
        rows, columns = (n // merge_size for n in _checked(grid, merge_size))
        if stop - start != rows * columns:
            raise LayoutError(
                f"found {stop - start} image tokens at {start}, the image of {grid} patches "
                f"needs {rows * columns}"
            )
        positions[0, start:stop] = following
        positions[1:, start:stop] = following + np.indices((rows, columns)).reshape(2, -1)
        following += max(rows, columns)
    unused = len(list(pending))
    if unused:
        raise LayoutError(f"{unused} of {len(grids)} images have no image tokens in the text")
    return positions


def _checked(grid: Grid, merge_size: int) -> tuple[int, int]:
    frames, rows, columns = (int(n) for n in grid)
    if frames != 1:
        raise LayoutError(f"grid {(frames, rows, columns)} is a video; only images are supported")
    if rows < 1 or columns < 1 or rows % merge_size or columns % merge_size:
        raise LayoutError(
            f"grid {(frames, rows, columns)}: expected positive multiples of {merge_size} patches"
        )
    return rows, columns


# Of units or parts, where there are no images.
_NONE = np.zeros(0, np.int64)


def _parts(grid: Grid, merge_size: int, side: int) -> tuple[Int[np.ndarray, " m"], int]:
    """Which window of its image each merge unit is in, both line by line; and units in a line."""
    rows, columns = (n // merge_size for n in _checked(grid, merge_size))
    row, column = np.divmod(np.arange(rows * columns), columns)
    return row // side * -(-columns // side) + column // side, columns


def _windows(
    sizes: Sequence[Int[np.ndarray, " parts"]], samples: Sequence[int], room: int
) -> tuple[Int[np.ndarray, " parts"], Int[np.ndarray, " parts"], int]:
    """As `_first_fit`, for a row: samples share no window, so that they fill as many as apart.

    Args:
        sizes: of the parts of each image.
        samples: how many of the images each sample has.
    """
    window, start, used = [_NONE], [_NONE], 0
    for first, last in itertools.pairwise(np.cumsum([0, *samples])):
        own, places, count = _first_fit(np.concatenate([_NONE, *sizes[first:last]]), room)
        window.append(own + used)
        start.append(places)
        used += count
    return np.concatenate(window), np.concatenate(start), used


def _first_fit(
    sizes: Int[np.ndarray, " parts"], room: int
) -> tuple[Int[np.ndarray, " parts"], Int[np.ndarray, " parts"], int]:
    """Window and first place of each part, the largest first where there is room; and how many
    windows that makes."""
    window, start = np.zeros_like(sizes), np.zeros_like(sizes)
    order = np.argsort(-sizes, kind="stable")
    whole = int((sizes == room).sum())
    window[order[:whole]] = np.arange(whole)
    filled: list[int] = []
    for part in order[whole:]:
        size = int(sizes[part])
        place = next((i for i, used in enumerate(filled) if used + size <= room), len(filled))
        if place == len(filled):
            filled.append(0)
        window[part], start[part] = whole + place, filled[place]
        filled[place] += size
    return window, start, whole + len(filled)
