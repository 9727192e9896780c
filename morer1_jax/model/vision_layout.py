"""Lays images out in the vision tower's attention windows, on the host and in NumPy alone.

The tower works on windows of a fixed number of patch slots, so that windowed attention is a dense
batch of windows (Qwen2.5-VL, arXiv 2502.13923, 2.1.1). The edge of an image cuts windows short;
such partial windows of one sample share a window's slots where they fit. Which patch sits in which
slot, its rotary position, its image and its partial window are computed here, and which merged slot
feeds which image token of the text.

Host code calls `VisionConfig.image_cost` and `VisionConfig.layout`: only this module,
`model.vision` and `model.flops` know of windows.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Shaped

Grid = tuple[int, int, int]
"""Frames, rows and columns of an image in patches; frames is 1."""


class LayoutError(ValueError):
    """Image grids and token ids that do not fit each other, or that are not supported."""


@dataclasses.dataclass(frozen=True)
class ImageCost:
    """Room that the images of one sample take.

    Attributes:
        slots: entries of the slot axis of a row of `batch.VisionBatch` (`w`: attention windows).
            Samples share none, so the slots of a row are the sum over its samples.
        tokens: image tokens in the text, one for each merge² patches.
    """

    slots: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class VisionLayout:
    """Window slots of one row: `w` windows of `p` slots, all int32.

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

    def place(self, patches: Shaped[np.ndarray, "n c"]) -> Shaped[np.ndarray, "w p c"]:
        """Moves the processor's concatenated patches into their slots; padding is zero.

        Raises:
            LayoutError: the number of patches is not the layout's.
        """
        filled = self.source >= 0
        expected = int(filled.sum())
        if len(patches) != expected:
            raise LayoutError(
                f"patches: expected {expected} by the images' grids, found {len(patches)}"
            )
        placed = np.zeros((*self.source.shape, patches.shape[-1]), patches.dtype)
        placed[filled] = patches[self.source[filled]]
        return placed

    def feature_index(
        self, token_ids: Int[np.ndarray, " s"], *, image_token_id: int
    ) -> Int[np.ndarray, " s"]:
        """Returns the merged slot whose feature replaces each token's embedding, int32; -1: none.

        Raises:
            LayoutError: the row's image tokens are not as many as the layout's.
        """
        places = np.flatnonzero(token_ids == image_token_id)
        if len(places) != len(self.token_slots):
            raise LayoutError(
                f"image tokens in the text: expected {len(self.token_slots)} by the images' grids, "
                f"found {len(places)}; was the text cut or an image left out?"
            )
        index = np.full(token_ids.shape, -1, np.int32)
        index[places] = self.token_slots
        return index


def count_windows(
    grids: Sequence[Grid], *, patch_size: int, merge_size: int, window_size: int
) -> int:
    """Returns how many attention windows the images of one sample fill.

    Args:
        patch_size: in pixels.
        merge_size: patches merged along each axis into one image token.
        window_size: in pixels.

    Raises:
        LayoutError: a grid is a video or not divisible by `merge_size`.
    """
    side = window_size // patch_size // merge_size
    parts = [_part_of_units(grid, merge_size, side)[0] for grid in grids]
    return _first_fit(np.concatenate([_EMPTY, *map(np.bincount, parts)]), side * side)[2]


def count_image_tokens(grid: Grid, *, merge_size: int) -> int:
    """Returns how many image tokens stand for one image in the text.

    Raises:
        LayoutError: the grid is a video or not divisible by `merge_size`.
    """
    rows, columns = merged_grid(grid, merge_size)
    return rows * columns


def merged_grid(grid: Grid, merge_size: int) -> tuple[int, int]:
    """Returns the rows and columns of an image in merge units, each one image token.

    Raises:
        LayoutError: the grid is a video or not divisible by `merge_size`.
    """
    frames, rows, columns = (int(n) for n in grid)
    if frames != 1:
        raise LayoutError(f"grid {(frames, rows, columns)}: expected an image, found a video")
    if rows < 1 or columns < 1 or rows % merge_size or columns % merge_size:
        raise LayoutError(
            f"grid {(frames, rows, columns)}: expected rows and columns in positive multiples of "
            f"{merge_size} patches"
        )
    return rows // merge_size, columns // merge_size


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
        patch_size: in pixels.
        merge_size: patches merged along each axis into one image token.
        window_size: in pixels.
        samples: number of images of each sample of the row; None: all are one sample's.
        pad_to_windows: total number of windows; None for just those needed.

    Raises:
        LayoutError: a grid is a video or not divisible by `merge_size`, or `pad_to_windows` is
            fewer than the images fill.
    """
    side = window_size // patch_size // merge_size
    units = _units(grids, merge_size, side)
    # The merged slot of each unit: its part's window and first slot there, and its rank.
    images = [len(grids)] if samples is None else samples
    window_of, start_of, filled = _place_parts(units.part_sizes, images, side * side)
    windows = filled if pad_to_windows is None else pad_to_windows
    if windows < filled:
        raise LayoutError(
            f"images {list(grids)}: expected at most the bucket's {windows} windows, found "
            f"{filled}; use a larger bucket or smaller images"
        )
    slot = window_of[units.part] * side * side + start_of[units.part] + units.rank

    # From units to their patches, in the processor's order too.
    inside = np.arange(merge_size**2)
    corner = units.place[:, None] * merge_size
    within = np.stack(np.divmod(inside, merge_size), axis=-1)

    def in_slots(values: np.ndarray, padding: int) -> np.ndarray:
        """Moves [units, patches of a unit, …] (or one value a unit) to [w, p, …]."""
        shape = (windows * side * side, inside.size, *values.shape[2:])
        slots = np.full(shape, padding, np.int32)
        slots[slot] = values
        return slots.reshape(windows, side * side * inside.size, *values.shape[2:])

    return VisionLayout(
        source=in_slots(np.arange(slot.size)[:, None] * inside.size + inside, -1),
        positions=in_slots(corner + within, 0),
        image_ids=in_slots(units.image[:, None], -1),
        part_ids=in_slots(units.part[:, None], -1),
        token_slots=slot.astype(np.int32),
    )


# Begins concatenations, so that those over no images have a dtype.
_EMPTY = np.zeros(0, np.int64)


@dataclasses.dataclass(frozen=True)
class _Units:
    """The merge units of a row, in the processor's order.

    Attributes:
        part: the unit's part, counted through the row.
        rank: the unit's place in its part.
        image: the unit's image, counted through the row.
        place: row and column of the unit in its image.
        part_sizes: units of each part, image by image.
    """

    part: Int[np.ndarray, " m"]
    rank: Int[np.ndarray, " m"]
    image: Int[np.ndarray, " m"]
    place: Int[np.ndarray, "m 2"]
    part_sizes: list[Int[np.ndarray, " parts"]]


def _units(grids: Sequence[Grid], merge_size: int, side: int) -> _Units:
    part, rank, image, place = ([_EMPTY] for _ in range(4))
    part_sizes: list[np.ndarray] = []
    for number, grid in enumerate(grids):
        parts, columns = _part_of_units(grid, merge_size, side)
        counts = np.bincount(parts)
        # A stable sort keeps rows before columns.
        order = np.argsort(parts, kind="stable")
        ranks = np.empty_like(order)
        ranks[order] = np.arange(order.size) - np.repeat(np.cumsum(counts) - counts, counts)
        part.append(parts + sum(map(len, part_sizes)))
        rank.append(ranks)
        image.append(np.full(order.size, number))
        place.append(np.stack(np.divmod(np.arange(order.size), columns), axis=-1).reshape(-1))
        part_sizes.append(counts)
    part, rank, image, place = (np.concatenate(values) for values in (part, rank, image, place))
    return _Units(part, rank, image, place.reshape(-1, 2), part_sizes)


def _part_of_units(grid: Grid, merge_size: int, side: int) -> tuple[Int[np.ndarray, " m"], int]:
    """Returns the part of each merge unit, both counted line by line, and the units of a line.

    Args:
        merge_size: patches along a unit's edge.
        side: units along a window's edge.
    """
    rows, columns = merged_grid(grid, merge_size)
    row, column = np.divmod(np.arange(rows * columns), columns)
    return row // side * -(-columns // side) + column // side, columns


def _place_parts(
    sizes: Sequence[Int[np.ndarray, " parts"]], samples: Sequence[int], capacity: int
) -> tuple[Int[np.ndarray, " parts"], Int[np.ndarray, " parts"], int]:
    """Places a row's parts in windows by `_first_fit`, sample by sample.

    Samples share no window, so that each fills as many as when it is counted alone.

    Args:
        sizes: of the parts of each image, in units.
        samples: number of images of each sample.
        capacity: units of a window.

    Returns:
        Window and first place of each part, and the number of windows.
    """
    windows, starts, total = [_EMPTY], [_EMPTY], 0
    for first, last in itertools.pairwise(np.cumsum([0, *samples])):
        window, start, count = _first_fit(np.concatenate([_EMPTY, *sizes[first:last]]), capacity)
        windows.append(window + total)
        starts.append(start)
        total += count
    return np.concatenate(windows), np.concatenate(starts), total


def _first_fit(
    sizes: Int[np.ndarray, " parts"], capacity: int
) -> tuple[Int[np.ndarray, " parts"], Int[np.ndarray, " parts"], int]:
    """Places one sample's parts in windows of `capacity` units by first-fit decreasing.

    Whole windows come first, then the largest part, each in the first window with room.

    Returns:
        Window and first place of each part, and the number of windows.
    """
    window, start = np.zeros_like(sizes), np.zeros_like(sizes)
    order = np.argsort(-sizes, kind="stable")
    whole = int((sizes == capacity).sum())
    window[order[:whole]] = np.arange(whole)
    filled: list[int] = []
    for part in order[whole:]:
        size = int(sizes[part])
        place = next((i for i, used in enumerate(filled) if used + size <= capacity), len(filled))
        if place == len(filled):
            filled.append(0)
        window[part], start[part] = whole + place, filled[place]
        filled[place] += size
    return window, start, whole + len(filled)
