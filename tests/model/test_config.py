import copy
import json

import pytest
import transformers

from morer1_jax.errors import ConfigError
from morer1_jax.model.config import ModelConfig, Runtime, TextConfig, VisionConfig

# The parts of the published 3B model's config.json that describe the model.
PUBLISHED = {
    "model_type": "qwen2_5_vl",
    "attention_dropout": 0.0,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "max_window_layers": 70,
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}


def changed(path, value):
    config = copy.deepcopy(PUBLISHED)
    *parents, last = path.split(".")
    branch = config
    for key in parents:
        branch = branch[key]
    if value is None:
        del branch[last]
    else:
        branch[last] = value
    return config


def test_published_flat_form():
    config = ModelConfig.from_hf(PUBLISHED)
    assert config.text.head_dim == 128
    assert config.text.mrope_section == (16, 24, 24)
    assert config.vision.period == 8
    assert config.vision.window_patches == 64
    assert config.vision.patch_dim == 1176
    assert config.tie_word_embeddings


def test_nested_form_of_transformers_reads_alike():
    nested = transformers.Qwen2_5_VLConfig(**copy.deepcopy(PUBLISHED)).to_dict()
    assert "text_config" in nested
    assert ModelConfig.from_hf(nested) == ModelConfig.from_hf(PUBLISHED)
    # Some saves keep the tie inside text_config alone.
    nested["text_config"]["tie_word_embeddings"] = nested.pop("tie_word_embeddings")
    assert ModelConfig.from_hf(nested).tie_word_embeddings


def test_written_form_reads_back_here_and_in_transformers():
    config = ModelConfig.from_hf(PUBLISHED)
    written = json.loads(json.dumps(config.to_hf()))
    assert ModelConfig.from_hf(written) == config
    theirs = transformers.Qwen2_5_VLConfig(**written)
    assert ModelConfig.from_hf(theirs.to_dict()) == config
    for key in ("hidden_size", "num_key_value_heads", "vocab_size", "rms_norm_eps"):
        assert getattr(theirs.text_config, key) == PUBLISHED[key]
    assert theirs.vision_config.intermediate_size == 3420


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("model_type", "qwen3_vl", "model_type: expected one of qwen2_5_vl, found 'qwen3_vl'"),
        ("hidden_act", "gelu", "hidden_act: expected silu, found 'gelu'"),
        (
            "vision_config.hidden_act",
            "gelu",
            "^vision_config.hidden_act: expected silu",
        ),
        ("use_sliding_window", True, "sliding-window attention is not implemented"),
        ("attention_dropout", 0.1, "attention_dropout: expected 0, found 0.1"),
        ("rope_scaling.type", "yarn", "rope_type: expected 'default' or 'mrope', found 'yarn'"),
        ("rope_scaling", None, "rope_parameters: missing"),
        ("rope_scaling.mrope_section", [16, 24, 16], r"sum to half the head size, 64"),
        ("head_dim", 64, "head_dim: expected .* found 64"),
        ("rms_norm_eps", None, "rms_norm_eps: missing"),
        ("num_hidden_layers", None, "num_hidden_layers: missing"),
        ("vision_config.depth", None, "vision_config.depth: missing"),
        ("vision_config.depth", 31, "increasing block numbers below depth 31"),
        ("vision_config.out_hidden_size", 1024, "expected the decoder's hidden_size 2048"),
        ("vision_config.window_size", 100, "window_size: expected a multiple .* found 100"),
        ("num_key_value_heads", 3, "multiple of num_key_value_heads = 3"),
    ],
)
def test_refuses_by_name(path, value, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf(changed(path, value))


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: [c.pop(k) for k in list(c) if k.endswith("_token_id")],
        lambda c: c.update(tie_word_embeddings=False),
        lambda c: c.update(text_config=_nested(tie_word_embeddings=True)),
        lambda c: c.update(text_config=_nested(tie_word_embeddings=False)),
        lambda c: [
            c.pop("tie_word_embeddings"),
            c.update(text_config=_nested(tie_word_embeddings=True)),
        ],
        lambda c: c.update(
            rope_parameters={"rope_type": "default", "mrope_section": [8, 28, 28], "rope_theta": 5}
        ),
        lambda c: [
            c.pop("rope_scaling"),
            c.update(rope_parameters={"mrope_section": [8, 28, 28], "rope_theta": 5.0}),
        ],
    ],
)
def test_what_a_config_says_twice_or_leaves_out_is_read_as_transformers_does(edit):
    config = copy.deepcopy(PUBLISHED)
    edit(config)
    theirs = transformers.Qwen2_5_VLConfig(**copy.deepcopy(config))
    ours = ModelConfig.from_hf(config)
    for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        assert getattr(ours, key) == getattr(theirs, key)
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    rope = theirs.text_config.rope_parameters
    assert list(ours.text.mrope_section) == rope["mrope_section"]
    assert ours.text.rope_theta == rope["rope_theta"]


def _nested(**changes):
    return {k: v for k, v in PUBLISHED.items() if k != "vision_config"} | changes


def test_a_head_that_the_root_keeps_apart_is_kept_whatever_its_text_config_says():
    config = PUBLISHED | {"tie_word_embeddings": False, "text_config": _nested()}
    assert config["text_config"]["tie_word_embeddings"]
    assert not ModelConfig.from_hf(config).tie_word_embeddings


def test_layer_types_may_not_slide():
    with pytest.raises(ConfigError, match="sliding-window"):
        ModelConfig.from_hf(PUBLISHED | {"layer_types": ["full_attention", "sliding_attention"]})


@pytest.mark.parametrize(
    ("depth", "full", "period"),
    [
        (4, (1, 3), 2),
        (4, (3,), 4),
        (2, (0, 1), 1),
        (4, (0, 2), None),
        (5, (1, 3), None),
        (3, (), None),
    ],
)
def test_period(depth, full, period):
    vision = VisionConfig(
        depth=depth, hidden_size=8, intermediate_size=8, num_heads=1, out_hidden_size=8,
        fullatt_block_indexes=full,
    )  # fmt: skip
    assert vision.period == period


def test_head_sizes_are_checked():
    with pytest.raises(
        ConfigError, match=r"^num_heads: expected heads .* multiple of 4 .* found 6"
    ):
        VisionConfig(
            depth=1, hidden_size=12, intermediate_size=8, num_heads=2, out_hidden_size=8,
            fullatt_block_indexes=(),
        )  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"^num_attention_heads: expected heads .* multiple of 2 .* found 5"
    ):
        TextConfig(
            vocab_size=9, hidden_size=10, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, mrope_section=(1, 1, 0),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dtype", "float8", "dtype: expected one of float32, bfloat16, found 'float8'"),
        ("dtype", "float16", "dtype: expected one of float32, bfloat16, found 'float16'"),
        ("param_dtype", "float16", "param_dtype: expected one of .* found 'float16'"),
        ("remat", "some", "remat: expected one of .* found 'some'"),
        ("attention", "flash", "attention: expected one of .* found 'flash'"),
        ("scan_unroll", 0, "scan_unroll: expected at least 1, found 0"),
    ],
)
def test_runtime_refuses(field, value, message):
    with pytest.raises(ConfigError, match=message):
        Runtime(**{field: value})


@pytest.mark.parametrize("unroll", [2, 99])
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_layers_that_are_computed_again_are_not_unrolled(remat, unroll):
    with pytest.raises(
        ConfigError, match=f"^scan_unroll: expected 1 with .*'{remat}', found {unroll};"
    ) as error:
        Runtime(remat=remat, scan_unroll=unroll)
    assert "\n" not in str(error.value)
    assert Runtime(scan_unroll=unroll).scan_unroll == unroll
    assert Runtime(remat=remat, scan_unroll=1).remat == remat
