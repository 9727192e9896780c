"""Bounds beside fields: what holds, what is named, and what no config has as a key."""

import dataclasses
import math
from typing import Literal

import pytest

from morer1_jax.bounds import above, at_least, between, check_bounds, derived, is_derived, one_of
from morer1_jax.errors import FieldError

Colour = Literal["red", "blue"]


@dataclasses.dataclass(frozen=True)
class Sizes:
    rows: int = at_least(1, 2)
    rate: float | None = above(0, None)
    share: float = between(0, 1, 0.5)
    colour: Colour = one_of(Colour, "red")
    total: int = derived(3)

    def __post_init__(self):
        check_bounds(self)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"rows": 1},
        {"rate": 1e-9},
        {"share": 0},
        {"share": 1},
        {"colour": "blue"},
        {"total": -1},
    ],
)
def test_what_is_within_its_bounds_is_kept(values):
    sizes = Sizes(**values)
    for name, value in values.items():
        assert getattr(sizes, name) == value


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("rows", 0, "expected at least 1, found 0"),
        ("rows", math.inf, "expected a finite number at least 1, found inf"),
        ("rate", 0.0, "expected above 0, found 0.0"),
        ("rate", math.nan, "expected a finite number above 0, found nan"),
        ("share", 1.5, "expected from 0 to 1, found 1.5"),
        ("share", math.nan, "expected a finite number from 0 to 1, found nan"),
        ("colour", "green", "expected one of red, blue, found 'green'"),
    ],
)
def test_what_is_not_is_named_by_its_field(name, value, problem):
    with pytest.raises(FieldError) as error:
        Sizes(**{name: value})
    assert (error.value.field, error.value.problem) == (name, problem)
    assert str(error.value) == f"{name}: {problem}"


def test_derived_fields_are_told_from_keys():
    assert [f.name for f in dataclasses.fields(Sizes) if is_derived(f)] == ["total"]
