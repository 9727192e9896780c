"""Gradients that a backward pass adds to running sums are the whole batch's, whatever trains."""

import dataclasses

import jax
import numpy as np
import pytest

from morer1_jax.learn.sft import sft_gradients
from morer1_jax.learn.trainable import TrainableParts, split
from morer1_jax.model import language, running
from morer1_jax.model.config import LoRA
from morer1_jax.model.scorer import ScoreConfig
from morer1_jax.model.vlm import Qwen25VL, init_params

pytestmark = pytest.mark.usefixtures("quick_compiles")

SCORE = ScoreConfig(chunk=160)
PARTS = {
    "all": TrainableParts(),
    "decoder": TrainableParts(vision=0.0, merger=0.0),
    "no decoder": TrainableParts(language=0.0),
    "adapters": TrainableParts(vision=0.0, lora=LoRA(rank=2, alpha=4.0)),
}


def model_of(tiny, parts, remat):
    runtime = dataclasses.replace(tiny.model().runtime, remat=remat)
    return Qwen25VL(tiny.CONFIG, runtime, parts.adapters)


def gradients(tiny, parts, params, remat, micro_batches):
    model = model_of(tiny, parts, remat)
    batch = tiny.sequences(None, prompt=48, completion=32, windows=10)
    return tiny.jit(
        lambda trained, frozen: sft_gradients(model, trained, batch, SCORE, micro_batches, frozen)
    )(*split(params, parts))


@pytest.mark.parametrize("name", PARTS)
def test_sums_are_the_whole_batches(tiny, name, monkeypatch):
    parts = PARTS[name]
    model = Qwen25VL(tiny.CONFIG, tiny.model().runtime, parts.adapters)
    params = init_params(model, jax.random.key(0))
    # Adapters that are no longer 0 pass gradients on to both halves.
    params = jax.tree.map(lambda x: x + 0.01 * np.cos(np.arange(x.size).reshape(x.shape)), params)
    whole = gradients(tiny, parts, params, "none", 1)
    seen = []
    real = running.run_layers

    def run_layers(layer, params, sums, *rest):
        seen.append(jax.tree.structure(sums))
        return real(layer, params, sums, *rest)

    monkeypatch.setattr(language, "run_layers", run_layers)
    found = gradients(tiny, parts, params, "full", 4)
    tiny.assert_near(found, whole, 1e-5)
    trained = split(params, parts)[0].get("language", {}).get("layers")
    expected = [] if trained is None else [jax.tree.structure(trained)]
    assert expected == seen[:1]
    assert len(set(seen)) == len(expected)


def test_sums_hold_no_second_array_of_all_layers(tiny):
    """A layer's gradient is added in place: beside the sums there is nothing of their size."""
    layers, width = 64, 128

    def layer(params, x, inputs):
        return x + inputs * jax.numpy.tanh(x @ params["w"])

    def loss(sums, params, x):
        return jax.numpy.sum(running.run_layers(layer, params, sums, x, 0.5))

    stack = jax.ShapeDtypeStruct((layers, width, width), np.float32)
    given = {"w": stack}, {"w": stack}, jax.ShapeDtypeStruct((8, width), np.float32)
    compiled = jax.jit(jax.grad(loss), donate_argnums=0).lower(*given).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 0.5 * 4 * layers * width**2
