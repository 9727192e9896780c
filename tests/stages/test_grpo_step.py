"""A step of GRPO as a whole: what its programs share, and whose numbers they compare."""

import types

import jax
import numpy as np
import optax
import pytest

from morer1_jax.batch import EncodedBatch, VisionBatch
from morer1_jax.config.settings import GRPOSettings
from morer1_jax.learn.grpo import LossConfig
from morer1_jax.learn.state import new_state
from morer1_jax.learn.trainable import TrainableParts, join, split
from morer1_jax.model.config import Runtime
from morer1_jax.model.scorer import ScoreConfig
from morer1_jax.run.phases import PhaseTimer
from morer1_jax.run.placed import place
from morer1_jax.stages.grpo_step import make_grpo_step, make_programs


@pytest.fixture(scope="module")
def run(tiny):
    """`run(parts)`: the metrics and the rollout of a step, and which images its programs took."""

    def run(parts, params, reference):
        placed = place(tiny.CONFIG, Runtime(), tiny.mesh(data=1, fsdp=1, tensor=1), parts)
        settings = GRPOSettings(
            prompts=tiny.PROMPTS, group=tiny.GROUP, micro_batches=2, loss=LossConfig(beta=0.1)
        )
        transform = optax.sgd(1e-3)
        programs = make_programs(
            placed,
            settings,
            transform,
            tiny.sample_config(),
            score_config=ScoreConfig(chunk=192),
            seed=0,
        )
        taken = {}

        def noted(name, place_of_prompts):
            def call(*given):
                prompts = place_of_prompts(given)
                taken.setdefault(name, []).append(type(prompts.vision))
                return getattr(programs, name)(*given)

            return call

        noting = programs._replace(
            rollout=noted("rollout", lambda given: given[1]),
            score=noted("score", lambda given: given[1]),
            update=noted("update", lambda given: given[2].prompts),
        )
        trained, frozen = split(params, parts)
        policy = types.SimpleNamespace(placed=placed, grammar=tiny.GRAMMAR, allowed=tiny.ALLOWED)
        with PhaseTimer() as timer:
            step = make_grpo_step(
                noting, policy, settings, frozen, split(reference, parts)[0], timer
            )
            # A copy, since the update takes the state's place.
            state = jax.device_put(new_state(jax.tree.map(np.array, trained), transform))
            _, metrics, scored = step(state, tiny.prompts(), 0)
        return metrics, scored.rollout, taken

    return run


@pytest.mark.parametrize(
    ("parts", "images"),
    [(TrainableParts(vision=0.0), EncodedBatch), (TrainableParts(), VisionBatch)],
    ids=["tower frozen", "tower trains"],
)
def test_a_frozen_tower_runs_once_and_the_kl_is_to_the_reference_s_own_model(
    tiny, run, parts, images
):
    params = tiny.params()
    trained, _ = split(tiny.params(seed=7), parts)
    # Near enough for the KL to be small; a tower that trains is another one in the reference.
    near = jax.tree.map(lambda a, b: a + 0.02 * b, split(params, parts)[0], trained)
    reference = join(near, split(params, parts)[1])
    metrics, rollout, taken = run(parts, params, reference)
    assert taken == {"rollout": [EncodedBatch], "score": [images], "update": [images]}
    # Log-probabilities of whole models that encode the patches themselves.
    score, mask = tiny.scorer(), np.asarray(rollout.mask)
    new, old = (
        np.asarray(score(p, tiny.prompts(), rollout.tokens, rollout.mask, tiny.ALLOWED)[0])
        for p in (params, reference)
    )
    ratio = (old - new)[mask].astype(np.float64)
    expected = np.mean(np.exp(ratio) - ratio - 1)
    assert expected > 1e-3
    np.testing.assert_allclose(metrics["kl"], expected, rtol=1e-3)
    np.testing.assert_allclose(metrics["sampling/sampling_logp_difference/max"], 0.0, atol=1e-4)
