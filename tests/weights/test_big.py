"""The published 3B shapes fit a machine with 24 GB: loading, a LoRA step, a rollout, on its CPU."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from morer1_jax.config.binding import read_config
from morer1_jax.config.settings import settings
from morer1_jax.model.config import ModelConfig
from morer1_jax.model.special import SpecialIds
from morer1_jax.weights.names import leaf_slices

ROOT = Path(__file__).parents[2]
# As the README says: without it XLA keeps a float32 copy of all layers' bfloat16 weights.
FLAGS = "--xla_disable_hlo_passes=while-loop-invariant-code-motion"


def model_config(tokenizer):
    sizes = settings(read_config(ROOT / "configs" / "qwen2_5_vl_3b_sft.py")).model
    special = SpecialIds.of(tokenizer)
    return ModelConfig(
        text=sizes.text,
        vision=sizes.vision,
        image_token_id=special.image,
        video_token_id=special.video,
        vision_start_token_id=special.vision_start,
        vision_end_token_id=special.vision_end,
    )


def write(folder, config):
    """Random weights of a trained model's sizes, bfloat16, in files of about 2 GB."""
    noise = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)
    files, index, held = {}, {}, 0
    for name, spec in leaf_slices(config).items():
        number = held // 2_000_000_000
        held += 2 * int(np.prod(spec.shape))
        files.setdefault(f"model-{number:05d}.safetensors", []).append((name, spec.shape))
    for file, names in files.items():
        tensors = {}
        for name, shape in names:
            scale = 0.02 if len(shape) > 1 else 0.1
            values = scale * noise + (1.0 if "norm" in name or "ln_q" in name else 0.0)
            tensors[name] = np.resize(values.astype(ml_dtypes.bfloat16), shape)
            index[name] = file
        save_file(tensors, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config.to_hf()))


@pytest.mark.soak
def test_three_billion_parameters(qwen_tokenizer, small_world, tmp_path, capsys):
    folder = tmp_path / "model"
    qwen_tokenizer.save_pretrained(folder)
    write(folder, model_config(qwen_tokenizer))
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert 7.3e9 < size < 7.8e9
    # The step's short completions have no room for written reasoning.
    data = tmp_path / "data"
    shutil.copytree(small_world, data, ignore=shutil.ignore_patterns("reasoning.jsonl"))
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "big.py", folder, data, tmp_path / "run"],
        env=os.environ | {"XLA_FLAGS": FLAGS},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(json.dumps(out, indent=1))
    assert size <= out["parameter_bytes"] < 1.02 * size
    assert out["load_peak_bytes"] <= 1.25 * out["parameter_bytes"]
    assert out["peak_bytes"] < 24e9
    spared = out["step_temporary_bytes_without_flag"] - out["step_temporary_bytes"]
    assert spared > 2 * out["parameter_bytes"] * 0.5
    assert np.isfinite(out["loss"])
    assert out["grad_norm"] > 0
    assert out["moved"] > 0
    assert all(0 < tokens <= 16 for tokens in out["rollout_tokens"])
