"""The sizes of the published models."""

import math

import pytest

from morer1_jax.model.family import published_sizes
from morer1_jax.weights.names import leaf_slices


@pytest.mark.parametrize(
    ("name", "billions"),
    [("Qwen/Qwen2.5-VL-3B-Instruct", 3.755), ("Qwen2.5-VL-7B-Instruct", 8.292)],
)
def test_the_parameters_are_as_many_as_published(name, billions):
    """As the hub counts those of the tensors' files."""
    config = published_sizes(name)
    count = sum(math.prod(leaf.shape) for leaf in leaf_slices(config).values())
    assert round(count / 1e9, 3) == billions


def test_another_model_is_not_known():
    assert published_sizes("owner/Qwen2.5-VL-3B-Instruct-mine") is None
