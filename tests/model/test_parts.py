"""A batch's rows in parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from morer1_jax.model.parts import join_rows, map_rows, split_rows
from morer1_jax.run.mesh import make_mesh

BATCH = {"x": jnp.arange(24.0).reshape(8, 3), "empty": jnp.zeros((8, 0, 2)), "none": None}


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_parts_are_joined_in_the_order_of_the_rows(parts):
    split = split_rows(BATCH, parts)
    assert split["x"].shape == (parts, 8 // parts, 3)
    jax.tree.map(np.testing.assert_array_equal, join_rows(split, 8), BATCH)


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_what_is_computed_of_parts_is_what_is_computed_of_all(parts):
    sizes = []

    def function(batch):
        sizes.append(len(batch["x"]))
        return batch["x"] ** 2, jnp.sum(batch["x"], axis=1)

    ours = map_rows(function, BATCH, parts)
    assert set(sizes) == {8 // parts}
    jax.tree.map(np.testing.assert_array_equal, ours, function(BATCH))


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_rows_that_share_a_row_are_in_one_part(parts):
    batch = {"rows": jnp.arange(8), "shared": jnp.arange(4)}
    split = split_rows(batch, parts)
    assert split["rows"].shape == (parts, 8 // parts)
    for part in range(parts):
        np.testing.assert_array_equal(
            split["rows"][part].reshape(-1, 2) // 2, np.tile(split["shared"][part][:, None], 2)
        )
    jax.tree.map(np.testing.assert_array_equal, join_rows(split, 4), batch)

    def function(batch):
        return batch["rows"] + 10 * jnp.repeat(batch["shared"], 2)

    np.testing.assert_array_equal(map_rows(function, batch, parts), function(batch))
    with pytest.raises(ValueError, match=r"parts: expected .* 4 rows, found 8"):
        split_rows(batch, 8)


def test_no_row_changes_its_device():
    """The compiled program moves nothing between the four devices."""
    mesh = make_mesh({"fsdp": 4}, jax.devices()[:4])
    rows = NamedSharding(mesh, P("fsdp"))
    run = jax.jit(lambda x: map_rows(jnp.sin, x, 2), in_shardings=rows, out_shardings=rows)
    x = jnp.arange(24.0).reshape(8, 3)
    text = run.lower(x).compile().as_text()
    assert "while" in text
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))
    np.testing.assert_array_equal(run(x), jnp.sin(x))


def test_no_row_of_images_changes_its_device(tiny):
    """Nor do the tokens that share it: each finds its own on its device, in each part."""
    mesh = make_mesh({"fsdp": 4}, jax.devices()[:4])
    rows = NamedSharding(mesh, P("fsdp"))
    model, params = tiny.model(), tiny.params()
    tokens = jnp.full((16, 6), tiny.IMAGE)
    index = jnp.arange(96).reshape(16, 6) % 10
    features = jnp.arange(8 * 10 * 32.0).reshape(8, 10, 32)

    def embed(part):
        given = part["tokens"], part["features"], part["index"]
        return model.apply({"params": params}, *given, method="embed")

    run = jax.jit(lambda batch: map_rows(embed, batch, 2), in_shardings=rows, out_shardings=rows)
    batch = {"tokens": tokens, "features": features, "index": index}
    text = run.lower(batch).compile().as_text()
    assert "while" in text
    assert not any(f"{word}(" in text for word in ("all-gather", "all-to-all", "all-reduce"))
    assert "collective-permute(" not in text
    expected = [features[row // 2][index[row]] for row in range(16)]
    np.testing.assert_array_equal(run(batch), np.stack(expected))


@pytest.mark.parametrize("parts", [0, 3, 16, -1])
def test_parts_must_divide_the_batch(parts):
    with pytest.raises(ValueError, match=f"parts: expected .* 8 rows, found {parts}"):
        split_rows(BATCH, parts)
