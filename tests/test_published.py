"""A published checkpoint through every stage, by its adapters alone; in soak with Qwen's tokens."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from morer1_jax.config.binding import read_config
from morer1_jax.config.settings import settings
from morer1_jax.data.ratings import read_ratings
from morer1_jax.errors import DataError
from morer1_jax.learn.state import abstract_params
from morer1_jax.learn.trainable import split
from morer1_jax.model.config import ModelConfig, Runtime
from morer1_jax.model.family import published_sizes
from morer1_jax.model.special import SpecialIds
from morer1_jax.model.vlm import Qwen25VL, init_params
from morer1_jax.serve.loaded import open_model
from morer1_jax.train import train
from morer1_jax.weights import published as weights

pytestmark = pytest.mark.usefixtures("quick_compiles", "two_devices")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def two_devices(devices):
    """Enough for a model in parts."""
    with devices(2):
        yield


@pytest.fixture(scope="module")
def parquet(small_world, tmp_path_factory):
    """The written reasoning as a Parquet file, and the dataset without it."""
    folder = tmp_path_factory.mktemp("parquet")
    for name in ("txt", "img_org", "rel2id.json"):
        (folder / name).symlink_to(small_world / name)
    lines = (small_world / "reasoning.jsonl").read_text().splitlines()
    path = folder / "written.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist([json.loads(line) for line in lines]), path)
    return path


# Rows of the embedding by tokenizer; Qwen's are those published.
ROWS = {"small_tokenizer": 576, "qwen_tokenizer": 151_936}


@pytest.fixture(
    scope="module",
    params=["small_tokenizer", pytest.param("qwen_tokenizer", marks=pytest.mark.soak)],
)
def config(parquet, request, tmp_path_factory):
    """Of a run on a tiny checkpoint of bfloat16 in the published form."""
    rows, tokenizer = ROWS[request.param], request.getfixturevalue(request.param)
    config = read_config(ROOT / "tests" / "configs" / "tiny.py")
    config.mesh.update(data=1, fsdp=2, tensor=-1)
    config.model.text.update(vocab_size=rows, hidden_size=16, mrope_section=(1, 1, 2))
    folder = tmp_path_factory.mktemp("published")
    sizes, special = settings(config).model, SpecialIds.of(tokenizer)
    shapes = ModelConfig(
        text=sizes.text,
        vision=dataclasses.replace(sizes.vision, out_hidden_size=sizes.text.hidden_size),
        image_token_id=special.image,
        video_token_id=special.video,
        vision_start_token_id=special.vision_start,
        vision_end_token_id=special.vision_end,
    )
    params = jax.jit(lambda key: init_params(Qwen25VL(shapes, Runtime()), key))(jax.random.key(0))
    tokenizer.save_pretrained(folder)
    weights.save_tensors(folder, params, shapes, dtype="bfloat16")
    (folder / weights.CONFIG).write_text(json.dumps(shapes.to_hf() | {"dtype": "bfloat16"}))

    config.stages = "sft,rate,grpo,evaluate"
    config.model.path = str(folder)
    config.data.update(folder=str(parquet.parent), reasoning=str(parquet), keep_features=True)
    # Room for a vocabulary of 512.
    config.data.update(prompt_length=256, completion_length=168)
    config.tune.update(vision=0.0, merger=0.0, frozen_dtype="bfloat16")
    config.tune.lora.rank = 2
    config.sft.update(steps=2, eval_every=2, save_every=2)
    config.grpo.update(steps=2, eval_every=2, save_every=2)
    # Such a model earns nothing, so that only decay shows that the adapters were updated.
    config.grpo.optimizer.weight_decay = 0.1
    config.rate.update(samples=1, batch=48)
    config.evaluate.batch = 16
    return config


def test_every_stage(config, tmp_path):
    train(config, tmp_path)
    base = open_model(config.model.path, labels=Path(config.data.folder) / "rel2id.json")
    trained = {name: open_model(str(tmp_path / name)) for name in ("sft", "grpo")}
    for loaded in trained.values():
        assert loaded.policy.grammar.token_class.shape == (config.model.text.vocab_size,)
        for path, value in jax.tree_util.tree_leaves_with_path(base.params):
            ours = loaded.params
            for key in path:
                ours = ours[key.key]
            assert ours.dtype == value.dtype == np.dtype("bfloat16")
            np.testing.assert_array_equal(ours, value)
    first, second = (
        loaded.params["language"]["layers"]["q"]["lora_b"] for loaded in trained.values()
    )
    assert np.abs(first).max() > 0
    assert np.abs(first - second).max() > 0
    assert len(read_ratings(tmp_path / "rate" / "ratings.jsonl")) == 48
    assert json.loads((tmp_path / "eval" / "grpo.json").read_text())["facts"] == 16
    # Going on with other reasoning is refused, though its place is the same.
    changed = config.copy_and_resolve_references()
    changed.stages = "baselines"
    rows = pyarrow.parquet.read_table(config.data.reasoning)
    pyarrow.parquet.write_table(rows.slice(1), config.data.reasoning)
    try:
        with pytest.raises(DataError, match=r"written\.parquet changed since the run began"):
            train(changed, tmp_path)
    finally:
        pyarrow.parquet.write_table(rows, config.data.reasoning)


def test_grpo_alone_needs_no_reasoning(config, tmp_path):
    alone = config.copy_and_resolve_references()
    alone.stages = "rate"
    alone.data.update(reasoning=None, keep_features=False)
    alone.rate.update(batch=48, begin="checkpoint")
    train(alone, tmp_path)
    assert len(read_ratings(tmp_path / "rate" / "ratings.jsonl")) == 48
    alone.stages = "sft"
    with pytest.raises(DataError, match=r"reasoning\.jsonl: no such file.*data\.reasoning"):
        train(alone, tmp_path)


def test_what_grpo_of_the_3b_holds_leaves_room_on_an_h100():
    """README's figure: of what trains the parameters, AdamW's two moments and the sum of the
    gradients in float32, the reference in bfloat16; before any activation."""
    made = settings(read_config(ROOT / "configs" / "qwen2_5_vl_3b_grpo.py"))
    shapes = published_sizes(made.model.path)
    runtime = Runtime(param_dtype=made.runtime.param_dtype, dtype=made.runtime.dtype)
    trained, frozen = split(abstract_params(Qwen25VL(shapes, runtime)), made.tune)
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {np.dtype("float32")}
    assert made.grpo.loss.beta > 0
    assert made.grpo.micro_batches > 1
    held = (4 * 4 + 2) * sum(leaf.size for leaf in jax.tree.leaves(trained))
    held += sum(leaf.size for leaf in jax.tree.leaves(frozen)) * 2
    print(f"{held / 1e9:.1f} GB")
    assert 56e9 < held < 58e9
