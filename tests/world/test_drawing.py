"""The world's photos: boxes inside, colours that can be told, all else at random."""

import itertools

import numpy as np
import pytest

from morer1_jax.world.drawing import RGB, draw_photo
from morer1_jax.world.scene import COLOURS, KINDS

NAMED = [name for name, kind in KINDS.items() if kind.stands_for]
THINGS = [(kind, colour) for kind in NAMED for colour in COLOURS]


def draw(things, seed, noise=8.0):
    return draw_photo(things, np.random.default_rng(seed), noise=noise)


def test_every_colour_can_be_drawn():
    assert RGB.keys() == set(COLOURS)


@pytest.mark.parametrize("seed", range(20))
def test_boxes_lie_within_the_photo_side_by_side(seed):
    rng = np.random.default_rng(seed)
    kinds = [*THINGS, ("blur", "red"), ("bystander", "red")]
    things = [kinds[i] for i in rng.integers(len(kinds), size=1 + seed % 5)]
    photo, boxes = draw(things, seed)
    assert photo.mode == "RGB"
    assert len(boxes) == len(things)
    for left, top, right, bottom in boxes:
        assert 0 <= left < right < photo.width
        assert 0 <= top < bottom < photo.height
        assert right - left >= 14
        assert bottom - top >= 14
    assert all(a[2] <= b[0] + 1 for a, b in itertools.pairwise(boxes))


def test_the_generator_decides_every_pixel():
    things = [("player", "red"), ("cup", "teal")]
    (first, boxes), (again, same) = draw(things, 3), draw(things, 3)
    assert boxes == same
    np.testing.assert_array_equal(first, again)
    sizes = {draw(things, seed)[0].size for seed in range(12)}
    assert len(sizes) > 6


def test_a_night_photo_is_dark_around_objects_as_bright_as_by_day():
    things = [("player", "red"), ("cup", "yellow")]
    for seed in range(6):
        day, boxes = draw(things, seed)
        rng = np.random.default_rng(seed)
        night, same = draw_photo(things, rng, noise=8.0, night=True)
        assert boxes == same
        around = np.ones(np.asarray(day).shape[:2], bool)
        inside = ~around
        for left, top, right, bottom in boxes:
            around[top : bottom + 2, max(left - 1, 0) : right + 2] = False
            inside[top + (bottom - top) // 3 : top + (bottom - top) // 2, left:right] = True
        day, night = (np.asarray(photo, float).max(-1) for photo in (day, night))
        assert np.percentile(day[around], 1) > 70 > np.percentile(night[around], 99)
        assert np.percentile(night[inside], 90) > 120


def hue(pixels):
    """Direction of a colour: what light and shade leave of it."""
    centred = pixels - pixels.mean(-1, keepdims=True)
    return centred / np.maximum(np.linalg.norm(centred, axis=-1, keepdims=True), 1e-6)


@pytest.mark.parametrize(("kind", "colour"), THINGS)
def test_an_object_shows_its_colour(kind, colour):
    """More of the crop has the object's hue than has any other of the palette."""
    palette = hue(np.array([RGB[name] for name in COLOURS], float))
    skin = hue(np.array([[220.0, 175.0, 135.0]]))
    shares = np.zeros(len(COLOURS))
    for seed in range(6):
        photo, (box,) = draw([(kind, colour)], seed, noise=4.0)
        pixels = np.asarray(photo.crop(box), float).reshape(-1, 3)
        bright = pixels[pixels.max(-1) - pixels.min(-1) > 55]
        nearest = np.argmax(hue(bright) @ np.concatenate([palette, skin]).T, axis=-1)
        shares += [np.mean(nearest == i) * len(bright) / len(pixels) for i in range(len(COLOURS))]
    assert shares[COLOURS.index(colour)] / 6 > 0.05
    # Skin and orange are neighbours, so a hat need only beat the other colours.
    rivals = [c for c in COLOURS if c not in (colour, "orange")]
    assert shares[COLOURS.index(colour)] > max(shares[COLOURS.index(c)] for c in rivals)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in NAMED])
def test_what_stands_for_nobody_shows_no_colour(kind):
    a, b = (draw([(kind, colour)], 5, noise=0.0)[0] for colour in ("red", "blue"))
    np.testing.assert_array_equal(a, b)
