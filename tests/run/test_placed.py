"""Where a model's parameters lie for training and for sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from morer1_jax.batch import EncodedBatch
from morer1_jax.data.shapes import Shape
from morer1_jax.errors import ConfigError
from morer1_jax.learn.trainable import TrainableParts
from morer1_jax.model import parts
from morer1_jax.model.config import Runtime
from morer1_jax.model.decoding import separate_layers
from morer1_jax.model.scorer import embed_prompts
from morer1_jax.run.placed import place


def put(params, placed):
    """The parameters as training holds them."""
    return jax.device_put(jax.device_get(params), placed.param_shardings)


def sampled(params):
    """What sampling needs of a tree: all but the tower, of which it has the merger."""
    vision = {name: params["vision"][name] for name in ("merger_norm", "merger_in", "merger_out")}
    return params | {"vision": vision}


def specs(like):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (leaf.sharding.spec, leaf.dtype)
        for path, leaf in jax.tree_util.tree_leaves_with_path(like)
    }


def test_sampling_has_the_products_dtype_and_splits_by_heads_alone(tiny):
    mesh = tiny.mesh(data=1, fsdp=4, tensor=2)
    placed = place(tiny.CONFIG, Runtime(dtype="bfloat16"), mesh)
    found = specs(placed.sampling.like)
    assert found["language/layers/q/kernel"] == (P(None, None, "tensor", None), jnp.bfloat16)
    assert found["language/layers/q/bias"] == (P(None, "tensor", None), jnp.bfloat16)
    assert found["language/layers/input_norm/scale"] == (P(None, None), jnp.float32)
    assert found["embedding"] == (P("tensor", None), jnp.bfloat16)
    assert dict(placed.sampling_mesh.shape) == {"data": 4, "tensor": 2}
    assert list(placed.sampling_mesh.devices.flat) == list(mesh.devices.flat)
    # Training's own stay as they were.
    assert specs(placed.like)["language/layers/q/kernel"] == (
        P(None, "fsdp", "tensor", None),
        jnp.float32,
    )


def test_what_is_moved_is_cast_and_whole(tiny):
    mesh = tiny.mesh(data=2, fsdp=4, tensor=1)
    placed = place(tiny.CONFIG, Runtime(dtype="bfloat16"), mesh)
    params = put(tiny.params(), placed)
    moved = placed.sampling.params(params)

    def check(leaf, like, before):
        assert (leaf.dtype, leaf.sharding.spec) == (like.dtype, like.sharding.spec)
        np.testing.assert_array_equal(leaf, np.asarray(before).astype(like.dtype))

    jax.tree.map(check, moved, placed.sampling.like, sampled(tiny.params()))


def test_layers_come_apart_for_a_plain_loop(tiny):
    mesh = tiny.mesh(data=1, fsdp=2, tensor=2)
    placed = place(tiny.CONFIG, Runtime(dtype="bfloat16", decode_unroll=True), mesh)
    moved = placed.sampling.params(put(tiny.params(), placed))
    expected = separate_layers(sampled(tiny.params()))

    def check(leaf, like, before):
        assert (leaf.dtype, leaf.sharding.spec) == (like.dtype, like.sharding.spec)
        np.testing.assert_array_equal(leaf, np.asarray(before).astype(like.dtype))

    jax.tree.map(check, moved, placed.sampling.like, expected)
    found = specs(placed.sampling.like)
    assert found["language/layer_1/mlp/down/kernel"] == (P("tensor", None), jnp.bfloat16)
    # What is not of the decoder's layers is moved only where it must be.
    placed = place(tiny.CONFIG, Runtime(decode_unroll=True), tiny.mesh(data=1, fsdp=1, tensor=1))
    params = put(tiny.params(), placed)
    moved = placed.sampling.params(params)
    assert moved["head"] is params["head"]
    jax.tree.map(np.testing.assert_array_equal, moved, expected)


def test_what_lies_ready_is_not_copied(tiny):
    one = tiny.mesh(data=1, fsdp=1, tensor=1)
    placed = place(tiny.CONFIG, Runtime(), one)
    params = put(tiny.params(), placed)
    moved = placed.sampling.params(params)
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, moved, sampled(params)))
    # With frozen parameters in the products' dtype only those that train are cast.
    trainable = TrainableParts(vision=0.0, merger=0.0, frozen_dtype="bfloat16")
    placed = place(tiny.CONFIG, Runtime(dtype="bfloat16"), one, trainable)
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, placed.like | placed.like_frozen)
    params = jax.tree.map(lambda x, dtype: jnp.asarray(x, dtype), tiny.params(), dtypes)
    moved = placed.sampling.params(params)
    kernel = lambda tree: tree["merger_out"]["kernel"]  # noqa: E731
    assert kernel(moved["vision"]) is kernel(params["vision"])
    assert moved["embedding"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(moved["embedding"], params["embedding"].astype(jnp.bfloat16))


@pytest.mark.parametrize("sharing", [1, 2])
def test_images_encoded_beforehand_give_the_same_embeddings_and_gradients(tiny, sharing):
    """Each row has its own then, also where rows shared those of their images."""
    placed = place(tiny.CONFIG, Runtime(), tiny.mesh(data=1, fsdp=2, tensor=1))
    params, prompts = put(tiny.params(), placed), placed.put(tiny.prompts(sharing=sharing))
    assert len(prompts.vision.patches) == tiny.PROMPTS // sharing
    encoded = placed.encode(params, prompts)
    assert isinstance(encoded.vision, EncodedBatch)
    # Of 32 places, for each the four patches of its token.
    assert encoded.vision.hidden.shape == (tiny.PROMPTS, 32 * 4, tiny.CONFIG.vision.hidden_size)
    assert encoded.vision.hidden.sharding.is_equivalent_to(placed.rows, 3)

    def total(params, prompts):
        x = placed.model.apply({"params": params}, prompts, method=embed_prompts)
        return jnp.sum(jnp.sin(x)), x

    run = tiny.jit(jax.value_and_grad(total, has_aux=True))
    ((_, ours), grads), ((_, theirs), expected) = run(params, encoded), run(params, prompts)
    tiny.assert_near(ours, theirs, 1e-6)
    # The tower has none, the merger the same.
    tiny.assert_near(sampled(grads), sampled(expected), 1e-5)
    assert not np.any(grads["vision"]["patch_embed"]["kernel"])
    # What has no patches stays as it is.
    blind = [sample for sample in tiny.samples() if not sample.images.grids]
    for batch in (encoded, tiny.COLLATOR.prompts(blind, range(len(blind)), Shape(32, 0))):
        assert placed.encode(params, batch) is batch


def test_a_tower_runs_in_parts_that_fit(tiny, monkeypatch):
    placed = place(tiny.CONFIG, Runtime(), tiny.mesh(data=1, fsdp=2, tensor=1))
    params, prompts = put(tiny.params(), placed), placed.put(tiny.prompts())
    whole = placed.encode(params, prompts).vision.hidden
    monkeypatch.setattr(parts, "_AT_ONCE", prompts.vision.image_ids[0].size)
    again = place(tiny.CONFIG, Runtime(), tiny.mesh(data=1, fsdp=2, tensor=1))
    assert parts.fitting_parts(again.model.runtime.layout, tiny.PROMPTS, 80) == tiny.PROMPTS // 2
    tiny.assert_near(again.encode(params, prompts).vision.hidden, whole, 1e-6)


def test_a_reference_is_in_the_products_dtype(tiny):
    mesh = tiny.mesh(data=1, fsdp=2, tensor=1)
    for dtype in ("float32", "bfloat16"):
        placed = place(tiny.CONFIG, Runtime(dtype=dtype), mesh)
        params = put(tiny.params(), placed)
        reference = placed.reference(params)
        assert (reference is params) == (dtype == "float32")
        head = reference["head"]
        assert (head.dtype, head.sharding.spec) == (dtype, P("tensor", "fsdp"))
        np.testing.assert_array_equal(head, np.asarray(params["head"]).astype(dtype))


def test_a_mesh_that_does_not_fit_the_model_is_refused(tiny):
    """Training's, and sampling's by the setting's own name; see `test_fit.py`."""
    mesh = tiny.mesh(data=1, fsdp=1, tensor=8)
    with pytest.raises(ConfigError, match=r"^mesh\.tensor: expected a divisor .*, found 8; use 1"):
        place(tiny.CONFIG, Runtime(), mesh)
    mesh = tiny.mesh(data=1, fsdp=8, tensor=1)
    with pytest.raises(ConfigError, match=r"^mesh\.sampling_tensor: .*, found 8; use 1, 2 or 4$"):
        place(tiny.CONFIG, Runtime(), mesh, sampling_tensor=8)


@pytest.mark.parametrize(
    ("rows", "most", "expected"),
    [(8, 4, 1), (16, 4, 2), (48, 4, 3), (64, 4, 4), (64, 1, 1), (40, 4, 1)],
)
def test_every_micro_batch_fills_the_mesh(tiny, rows, most, expected):
    placed = place(tiny.CONFIG, Runtime(), tiny.mesh(data=2, fsdp=4, tensor=1))
    assert placed.micro_batches(rows, most) == expected
