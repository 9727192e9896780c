import jax
import numpy as np
import pytest

from morer1_jax.errors import WeightsError
from morer1_jax.model.config import ModelConfig, TextConfig, VisionConfig
from morer1_jax.model.vlm import init_params
from morer1_jax.weights import names
from morer1_jax.weights.names import canonical_name, from_hf, leaf_slices, to_hf


def test_tree_is_the_model_s_own(case):
    init = jax.eval_shape(lambda key: init_params(case.model, key), jax.random.key(0))
    shapes = jax.tree.map(lambda leaf: leaf.shape, init)
    assert jax.tree.map(lambda leaf: leaf.shape, case.params) == shapes


def test_round_trip_through_published_names(case):
    theirs = case.reference.tensors()
    written = to_hf(case.params, case.config)
    published = {canonical_name(name): tensor for name, tensor in theirs.items()}
    if case.config.tie_word_embeddings:
        published.pop("lm_head.weight")
    assert written.keys() == published.keys()
    for name, tensor in written.items():
        np.testing.assert_array_equal(tensor, published[name])
        assert tensor.flags.c_contiguous
    again = from_hf(written, case.config)
    jax.tree.map(np.testing.assert_array_equal, again, case.params)


def test_names_of_both_forms():
    pairs = {
        "model.language_model.layers.3.mlp.up_proj.weight": "model.layers.3.mlp.up_proj.weight",
        "model.visual.merger.ln_q.weight": "visual.merger.ln_q.weight",
        "lm_head.weight": "lm_head.weight",
    }
    for name, published in pairs.items():
        assert canonical_name(name) == published
        assert canonical_name(published) == published


def test_one_tensor_at_a_time(small_case):
    """What a streaming loader does: a slice of a leaf each, in any order."""
    specs = leaf_slices(small_case.config)
    params = names.empty_params(specs, "bfloat16")
    for name, tensor in reversed(to_hf(small_case.params, small_case.config).items()):
        spec, leaf = specs[name], params
        for key in spec.path:
            leaf = leaf[key]
        assert spec.to_ours(tensor).shape == spec.our_shape
        leaf[spec.index] = spec.to_ours(tensor)
    expected = jax.tree.map(lambda leaf: np.asarray(leaf).astype("bfloat16"), small_case.params)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_every_fault_is_named(small_case):
    tensors = to_hf(small_case.params, small_case.config)
    del tensors["model.norm.weight"]
    tensors["model.layers.9.mlp.up_proj.weight"] = np.zeros(3)
    tensors["visual.blocks.0.attn.qkv.bias"] = np.zeros(5)
    with pytest.raises(WeightsError) as error:
        from_hf(tensors, small_case.config)
    for fault in (
        "missing model.norm.weight (24,)",
        "unexpected model.layers.9.mlp.up_proj.weight",
        "visual.blocks.0.attn.qkv.bias: expected shape (72,), found (5,)",
    ):
        assert fault in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tied_head_must_be_the_embedding_and_another_must_be_there(case):
    tensors = to_hf(case.params, case.config)
    embedding = tensors["model.embed_tokens.weight"]
    if case.config.tie_word_embeddings:
        from_hf(tensors | {"lm_head.weight": embedding}, case.config)
        with pytest.raises(WeightsError, match=r"lm_head.weight: expected"):
            from_hf(tensors | {"lm_head.weight": embedding + 1}, case.config)
    else:
        del tensors["lm_head.weight"]
        with pytest.raises(WeightsError, match=r"missing lm_head.weight"):
            from_hf(tensors, case.config)


# As the 7B, which has 339 tensors of text and 390 of the tower: fewer than half are text's.
LIKE_7B = ModelConfig(
    text=TextConfig(64, 8, 8, 2, 2, 1, (1, 1, 0)),
    vision=VisionConfig(8, 8, 8, 2, 8, (3, 7), patch_size=4, window_size=16),
    image_token_id=1,
    video_token_id=2,
    vision_start_token_id=3,
    vision_end_token_id=4,
)


def newer(name):
    """The name of transformers 5's state dicts."""
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1)


@pytest.mark.parametrize(
    ("prefix", "form"),
    [
        ("model.", lambda name: f"model.{name}"),
        ("model.", lambda name: f"model.{newer(name)}"),
        ("language_model.", lambda n: n if n.startswith("visual.") else f"language_model.{n}"),
        ("llm.", lambda n: n if n.startswith("visual.") else f"llm.{n}"),
        ("model.language_model.", lambda n: newer(n).replace("language_", "language_model.", 1)),
        ("student.model.", lambda name: f"student.model.{newer(name)}"),
        ("module.", lambda name: f"module.{name}"),
    ],
)
def test_a_foreign_prefix_is_named_though_it_be_part_of_a_known_form(prefix, form):
    specs = names.leaf_slices(LIKE_7B)
    text = [name for name in specs if not name.startswith("visual.")]
    assert len(text) < len(specs) / 2
    tensors = {form(name): np.zeros(spec.shape) for name, spec in specs.items()}
    with pytest.raises(WeightsError, match="names of tensors: expected no prefix, found") as error:
        from_hf(tensors, LIKE_7B)
    assert f"found {prefix!r}, " in str(error.value)


@pytest.mark.parametrize("form", [str, newer])
def test_a_norm_alone_that_is_missing_is_no_prefix(form):
    tensors = {form(n): np.zeros(s.shape) for n, s in names.leaf_slices(LIKE_7B).items()}
    tensors["x.model.norm.weight"] = tensors.pop(form("model.norm.weight"))
    with pytest.raises(WeightsError, match=r"missing model\.norm.*unexpected x\.model\.norm"):
        from_hf(tensors, LIKE_7B)
