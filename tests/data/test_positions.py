import beartype
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from morer1_jax.data.positions import mrope_positions
from morer1_jax.model.vision_layout import LayoutError, count_image_tokens

IMAGE, VIDEO = 7, 8
SIZES = {"patch_size": 4, "merge_size": 2, "window_size": 16}


def grids_of(merge):
    side = st.integers(1, 7).map(lambda n: n * merge)
    return st.lists(st.tuples(st.just(1), side, side), max_size=4)


def test_positions_of_an_image_between_texts():
    tokens = np.array([1, 2, *[IMAGE] * 6, 3, 4])
    options = {"merge_size": 2, "image_token_id": IMAGE, "video_token_id": VIDEO}
    positions = mrope_positions(tokens, [(1, 4, 6)], **options)
    np.testing.assert_array_equal(
        positions,
        [
            [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
            [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
            [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
        ],
    )


@settings(deadline=None, max_examples=40)
@given(st.lists(grids_of(2), min_size=1, max_size=4), st.integers(0, 5))
def test_packed_positions_restart_for_each_sample(samples, pad):
    options = {"merge_size": 2, "image_token_id": IMAGE, "video_token_id": VIDEO}
    rows, alone = [], []
    for grids in samples:
        parts = [[1, 2]]
        for grid in grids:
            parts += [[IMAGE] * count_image_tokens(grid, merge_size=2), [3]]
        rows.append(np.concatenate(parts).astype(np.int64))
        alone.append(mrope_positions(rows[-1], grids, **options))
    tokens = np.concatenate([*rows, np.full(pad, 9)])
    segments = np.repeat([*range(1, len(rows) + 1), 0], [*map(len, rows), pad])
    every = [grid for grids in samples for grid in grids]
    packed = mrope_positions(tokens, every, **options, segment_ids=segments)
    np.testing.assert_array_equal(packed, np.concatenate([*alone, np.zeros((3, pad))], axis=1))


def test_images_on_both_sides_of_a_boundary_between_samples():
    tokens = np.array([1, IMAGE, IMAGE, 2])
    options = {"merge_size": 1, "image_token_id": IMAGE, "video_token_id": VIDEO}
    segments = np.array([1, 1, 2, 2])
    positions = mrope_positions(tokens, [(1, 1, 1)] * 2, **options, segment_ids=segments)
    np.testing.assert_array_equal(positions, [[0, 1, 0, 1]] * 3)


@pytest.mark.parametrize(
    ("tokens", "grids", "message"),
    [
        ([IMAGE] * 4, [(2, 4, 4)], r"\(2, 4, 4\): expected an image, found a video"),
        ([1, VIDEO], [], "expected those of text and images, found a video token"),
        ([IMAGE] * 4, [(1, 4, 5)], "multiples of 2 patches"),
        ([IMAGE] * 3, [(1, 4, 4)], "token 0: expected 4 image tokens .* found 3"),
        ([IMAGE] * 4, [], "token 0: expected text after the last of 0"),
        ([IMAGE] * 4, [(1, 4, 4)] * 2, "expected those of 2 images, found none for 1"),
    ],
)
def test_positions_refuse(tokens, grids, message):
    with pytest.raises(LayoutError, match=message):
        mrope_positions(
            np.array(tokens), grids, merge_size=2, image_token_id=IMAGE, video_token_id=VIDEO
        )


def test_annotations_hold():
    checked = jaxtyping.jaxtyped(typechecker=beartype.beartype)
    positions = checked(mrope_positions)(
        np.array([IMAGE] * 6),
        [(1, 6, 4)],
        merge_size=2,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    assert positions.dtype == np.int32
