"""Float32 is float32 on every platform: what each program asks of its products.

Read off the programs as they are lowered for a TPU, which needs none. Asked for nothing, a TPU
rounds float32 operands to bfloat16, and a GPU to TF32.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from morer1_jax.learn.grpo import GroupBatch, LossConfig, make_grpo_update
from morer1_jax.learn.sft import make_sft_step
from morer1_jax.learn.state import OptimizerConfig, abstract_params, new_state
from morer1_jax.model.config import LoRA
from morer1_jax.model.layers import merged_kernel
from morer1_jax.model.scorer import ScoreConfig, group_logprobs
from morer1_jax.model.splash import Splash
from morer1_jax.model.vision import VisionInputs, VisionTower
from morer1_jax.model.vlm import Qwen25VL
from morer1_jax.rollout.program import make_rollout
from morer1_jax.rollout.reward import RewardConfig

PRODUCT = re.compile(r"stablehlo\.(?:dot_general|dot|convolution)\b.*: \((tensor<.*>)\) -> ")
SCORE = ScoreConfig(chunk=192)


@dataclasses.dataclass(frozen=True)
class Programs:
    """Each of a run's programs over the tiny model, with its arguments."""

    tiny: object
    model: Qwen25VL

    @property
    def params(self):
        return abstract_params(self.model)

    def sft_step(self):
        optimizer = OptimizerConfig(lr=1e-3, weight_decay=0.1).build(3)
        state = jax.eval_shape(lambda params: new_state(params, optimizer), self.params)
        return make_sft_step(self.model, optimizer, SCORE, 2), (state, {}, self.tiny.sequences())

    def grpo_update(self):
        optimizer = OptimizerConfig(lr=1e-3).build(3)
        state = jax.eval_shape(lambda params: new_state(params, optimizer), self.params)
        tokens, mask, _ = self.tiny.completions()
        numbers = np.zeros(mask.shape, np.float32)
        given = dict.fromkeys(("weights", "sampler", "old", "reference"), numbers)
        batch = GroupBatch(
            prompts=self.tiny.prompts(),
            tokens=tokens,
            mask=mask,
            advantages=numbers[..., 0],
            **given,
        )
        update = make_grpo_update(self.model, optimizer, LossConfig(beta=0.1), SCORE)
        return update, (state, {}, batch, self.tiny.ALLOWED)

    def rollout(self):
        config, reward = self.tiny.sample_config(), RewardConfig()
        run = make_rollout(self.model, config, reward, "group", seed=0)
        given = self.tiny.prompts(), self.tiny.GRAMMAR, self.tiny.ALLOWED, np.int32(0)
        return run, (self.params, *given)

    def score(self):
        tokens, mask, _ = self.tiny.completions()
        given = self.tiny.prompts(), tokens, mask, self.tiny.ALLOWED
        return lambda *args: group_logprobs(self.model, *args, SCORE), (self.params, *given)

    def encode_images(self):
        tower = VisionTower(self.model.config.vision, self.model.runtime)
        frames = self.model.config.vision.temporal_patch_size
        images = VisionInputs.of(self.tiny.prompts().vision, frames)
        return lambda params, images: tower.apply({"params": params}, images), (
            self.params["vision"],
            images,
        )

    def merge(self):
        layer = self.params["language"]["layers"]["q"]
        return lambda layer: merged_kernel(layer, self.model.lora), (layer,)


def products(run, args):
    """The operands' dtypes of each product, as a set, and whether it asks for the highest
    precision."""
    text = jax.jit(run).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
    found = []
    for line in text.splitlines():
        if match := PRODUCT.search(line):
            dtypes = set(re.findall(r"x([a-z]\w*)>", match[1]))
            found.append((dtypes, line.count("HIGHEST") == 2))
    assert text.count("stablehlo.dot") + text.count("stablehlo.convolution") == len(found)
    return found


# A decoder's layer has seven products with weights, twice that with adapters.
LEAST = {
    "sft_step": 60,
    "grpo_update": 60,
    "rollout": 40,
    "score": 20,
    "encode_images": 10,
    "merge": 1,
}


# Of those in bfloat16 daily the update, in which scoring and images are, and the merge.
@pytest.mark.parametrize(
    ("program", "dtype"),
    [
        *((program, "float32") for program in LEAST),
        ("grpo_update", "bfloat16"),
        ("merge", "bfloat16"),
        *(
            pytest.param(program, "bfloat16", marks=pytest.mark.soak)
            for program in ("sft_step", "rollout", "score", "encode_images")
        ),
    ],
)
def test_products_of_float32_ask_for_the_highest_precision(tiny, program, dtype):
    plain = tiny.model(dtype)
    runtime = dataclasses.replace(plain.runtime, param_dtype="float32", remat="dots")
    model = Qwen25VL(plain.config, runtime, LoRA(rank=2, alpha=4.0))
    found = products(*getattr(Programs(tiny, model), program)())
    assert len(found) >= LEAST[program]
    for dtypes, highest in found:
        # The update's own sums, and a merge, are in float32 where the rest is in bfloat16.
        assert highest == (dtypes == {"f32"}), dtypes
    if program != "merge":
        assert any(highest for _, highest in found) == (dtype == "float32")


def precisions(jaxpr):
    """Those of all products, inside of kernels too."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(equation.params["precision"])
        for inner in jaxprs_in_params(equation.params):
            found += precisions(inner)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_splash_attention_does_so_too(dtype):
    """In its kernels, backward as well, under rematerialisation."""
    arrays = [jax.ShapeDtypeStruct((1, 128, heads, 128), dtype) for heads in (4, 2, 2)]
    ids = jnp.ones((1, 128), jnp.int32)

    @jax.checkpoint
    def attend(arrays):
        return jnp.sum(Splash().causal(*arrays, ids).astype(jnp.float32))

    traced = jax.jit(jax.grad(attend)).trace(arrays)
    # Two forward, and again; backward these twice again, and four of their own.
    found = precisions(traced.jaxpr.jaxpr)
    assert len(found) >= 9
    highest = jax.lax.Precision.HIGHEST
    assert {*found} == ({(highest, highest)} if dtype == "float32" else {None})
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 3
