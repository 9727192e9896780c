"""Windows of a layout are the reference's; what an image costs is what its layout fills."""

import beartype
import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import vision_utils

from morer1_jax.model.config import VisionConfig
from morer1_jax.model.vision_layout import (
    ImageCost,
    LayoutError,
    VisionLayout,
    count_image_tokens,
    count_windows,
    vision_layout,
)

IMAGE = 7
SIZES = {"patch_size": 4, "merge_size": 2, "window_size": 16}


def grids_of(merge):
    side = st.integers(1, 7).map(lambda n: n * merge)
    return st.lists(st.tuples(st.just(1), side, side), max_size=4)


@st.composite
def layouts(draw):
    """Sizes with windows of 1 to 3 merge units a side, and grids that fit them."""
    merge, patch = draw(st.integers(1, 3)), draw(st.integers(1, 14))
    window = draw(st.integers(1, 3)) * merge * patch
    return draw(grids_of(merge)), {"patch_size": patch, "merge_size": merge, "window_size": window}


@settings(deadline=None, max_examples=60)
@given(layouts(), st.integers(0, 3), st.data())
def test_parts_are_the_reference_windows(drawn, extra, data):
    """Each part holds what a window of the reference holds, in its order; some share a window."""
    grids, sizes = drawn
    cut = data.draw(st.integers(0, len(grids)))
    samples = [grids[:cut], grids[cut:]]
    windows = sum(count_windows(sample, **sizes) for sample in samples)
    layout = vision_layout(
        grids, **sizes, samples=[len(sample) for sample in samples], pad_to_windows=windows + extra
    )
    unit, room = sizes["merge_size"] ** 2, (sizes["window_size"] // sizes["patch_size"]) ** 2
    assert layout.source.shape == (windows + extra, room)
    filled = layout.source >= 0
    np.testing.assert_array_equal(filled, layout.image_ids >= 0)
    np.testing.assert_array_equal(filled, layout.part_ids >= 0)
    assert filled[:windows].any(axis=1).all()
    assert not filled[windows:].any()
    if not grids:
        assert layout.token_slots.shape == (0,)
        return
    grid = torch.tensor(grids)
    order, bounds = vision_utils.get_vision_window_index(
        grid, sizes["merge_size"], sizes["window_size"], sizes["patch_size"]
    )
    patches = (order[:, None] * unit + torch.arange(unit)).flatten().numpy()
    expected = np.split(patches, bounds.numpy()[1:-1])
    assert layout.part_ids.max() + 1 == len(expected)
    for number, part in enumerate(expected):
        window, slots = np.nonzero(layout.part_ids == number)
        assert len(set(window)) == 1
        assert (np.diff(slots) == 1).all()
        np.testing.assert_array_equal(layout.source[window, slots], part)
    positions = vision_utils.get_vision_position_ids(grid, sizes["merge_size"]).numpy()
    np.testing.assert_array_equal(layout.positions[filled], positions[layout.source[filled]])
    image = np.repeat(np.arange(len(grids)), [rows * columns for _, rows, columns in grids])
    np.testing.assert_array_equal(layout.image_ids[filled], image[layout.source[filled]])
    # No window is shared by two samples, and none could take in the next one's parts.
    first = np.isin(layout.image_ids, range(cut))
    assert not (first.any(axis=1) & (filled & ~first).any(axis=1)).any()
    for windows_of in (layout.source[first.any(axis=1)], layout.source[(filled & ~first).any(1)]):
        fill = (windows_of >= 0).sum(axis=1)
        assert (fill <= room / 2).sum() <= 1


def test_small_images_share_windows():
    """A photo of 3 x 3 windows, five of them cut short to 21 units with the crop's 4."""
    sizes = {"patch_size": 14, "merge_size": 2, "window_size": 112}
    grids = [(1, 18, 18), (1, 4, 4)]
    filled = (vision_layout(grids, **sizes).source >= 0).sum(axis=1)
    assert filled.tolist() == [64, 64, 64, 64, 64, 20]
    assert count_windows(grids, **sizes) == 6


def tower(patch_size, merge_size, window_size):
    return VisionConfig(
        depth=1,
        hidden_size=4,
        intermediate_size=4,
        num_heads=1,
        out_hidden_size=4,
        fullatt_block_indexes=(0,),
        patch_size=patch_size,
        spatial_merge_size=merge_size,
        window_size=window_size,
    )


@settings(deadline=None, max_examples=60)
@given(layouts(), st.integers(0, 3), st.data())
def test_the_tower_says_what_images_cost(drawn, extra, data):
    grids, sizes = drawn
    config, merge = tower(**sizes), sizes["merge_size"]
    cost = config.image_cost(grids)
    assert cost.slots == count_windows(grids, **sizes)
    assert cost.tokens == sum(count_image_tokens(grid, merge_size=merge) for grid in grids)
    assert cost.slots == len(config.layout(grids).source)
    # A row's slots are the sum of its samples'.
    cut = data.draw(st.integers(0, len(grids)))
    slots = sum(config.image_cost(part).slots for part in (grids[:cut], grids[cut:]))
    samples = [cut, len(grids) - cut]
    assert len(config.layout(grids, samples=samples).source) == slots
    row = config.layout(grids, samples=samples, slots=slots + extra)
    expected = vision_layout(grids, **sizes, samples=samples, pad_to_windows=slots + extra)
    for name, value in vars(expected).items():
        np.testing.assert_array_equal(getattr(row, name), value)


def test_no_image_costs_nothing():
    assert tower(**SIZES).image_cost(()) == ImageCost(slots=0, tokens=0)


@settings(deadline=None, max_examples=30)
@given(layouts())
def test_token_slots_hold_the_merge_units_in_order(drawn):
    grids, sizes = drawn
    layout = vision_layout(grids, **sizes)
    units = layout.source.reshape(-1, sizes["merge_size"] ** 2)[layout.token_slots]
    np.testing.assert_array_equal(units.ravel(), np.arange(units.size))
    tokens = sum(count_image_tokens(g, merge_size=sizes["merge_size"]) for g in grids)
    assert len(layout.token_slots) == tokens


def test_patches_go_to_their_slots_and_features_to_their_tokens():
    grids = [(1, 6, 4), (1, 2, 2)]
    layout = vision_layout(grids, **SIZES, pad_to_windows=5)
    patches = np.arange(1, 29, dtype=np.float32)[:, None]
    placed = layout.place(patches)
    np.testing.assert_array_equal(placed[..., 0], layout.source + 1)
    tokens = np.array([1, *[IMAGE] * 6, 2, IMAGE, 3])
    index = layout.feature_index(tokens, image_token_id=IMAGE)
    np.testing.assert_array_equal(index >= 0, tokens == IMAGE)
    # Merged slot n holds the merge unit whose first patch is 4·n-th in the processor's order.
    np.testing.assert_array_equal(
        layout.source.reshape(-1, 4)[index[index >= 0], 0], np.arange(7) * 4
    )


def test_layout_refuses():
    with pytest.raises(LayoutError, match=r"expected at most the bucket's 2 windows, found 3"):
        vision_layout([(1, 6, 6)], **SIZES, pad_to_windows=2)
    with pytest.raises(LayoutError, match="expected an image, found a video"):
        vision_layout([(3, 6, 6)], **SIZES)
    layout = vision_layout([(1, 4, 4)], **SIZES)
    with pytest.raises(LayoutError, match=r"expected 16 .* found 15"):
        layout.place(np.zeros((15, 3), np.float32))
    with pytest.raises(LayoutError, match=r"expected 4 .* found 3"):
        layout.feature_index(np.array([IMAGE] * 3), image_token_id=IMAGE)


def test_annotations_hold():
    checked = jaxtyping.jaxtyped(typechecker=beartype.beartype)
    layout = checked(vision_layout)([(1, 6, 4)], **SIZES)
    tokens = np.array([IMAGE] * 6)
    patches = np.zeros((24, 3), np.uint8)
    assert checked(VisionLayout.place)(layout, patches).dtype == np.uint8
    assert (
        checked(VisionLayout.feature_index)(layout, tokens, image_token_id=IMAGE).dtype == np.int32
    )
