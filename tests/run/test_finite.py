"""What is not finite is found: in arrays, in answers, in updates, in a run and what it leaves."""

import dataclasses
import json
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from morer1_jax.config.binding import read_config
from morer1_jax.config.settings import settings
from morer1_jax.data.feed import SequenceFeed
from morer1_jax.data.ratings import Rating
from morer1_jax.errors import DataError, NotFiniteError
from morer1_jax.run.checkpoint import Checkpointer
from morer1_jax.run.finite import (
    PATIENCE,
    SkippedUpdates,
    check_drawn,
    check_scores,
    first_not_finite,
)
from morer1_jax.run.setup import open_run, open_setup
from morer1_jax.stages import grpo, grpo_step
from morer1_jax.train import train
from morer1_jax.weights.finite import count_not_finite

TINY = Path(__file__).parents[1] / "configs" / "tiny.py"


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
def test_values_that_are_not_finite_are_counted(dtype):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((3, 70_000)).astype(dtype)  # several chunks
    values[0, :4] = (ml_dtypes.finfo(dtype).max, -ml_dtypes.finfo(dtype).max, 0.0, -0.0)
    assert count_not_finite(values) == 0
    for at, value in (((0, 9), np.nan), ((1, 65_536), np.inf), ((2, 69_999), -np.inf)):
        values[at] = value
    values[0, 10:12] = -np.asarray([np.nan, np.nan], dtype)
    assert count_not_finite(values) == 5
    assert count_not_finite(values[:, ::-1]) == 5
    assert count_not_finite(values[:0]) == 0


def test_the_first_leaf_that_is_not_finite_is_named(tiny):
    mesh = tiny.mesh(data=2, fsdp=4, tensor=1)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    leaves = {
        "count": jnp.int32(2**31 - 1),
        "key": jax.random.key(0),
        "split": jax.device_put(jnp.ones((8, 3)), split),
        "short": jnp.ones(3, jnp.bfloat16),
        "large": jnp.full((2, 500), jnp.finfo(jnp.float32).max) * jnp.array([[1.0], [-1.0]]),
    }
    assert first_not_finite(leaves) is None
    assert first_not_finite({}) is None
    assert first_not_finite(leaves | {"short": leaves["short"].at[1].set(jnp.inf)}) == "short"
    bad = {name: leaves[name].at[2].set(jnp.nan) for name in ("split", "short")}
    assert first_not_finite(leaves | bad) == "split"
    for place, value in ((0, jnp.nan), (3, -jnp.inf), (7, jnp.inf)):
        one = jax.device_put(leaves["split"].at[place, 1].set(value), split)
        assert first_not_finite(leaves | {"split": one}) == "split"


def drawn(value, counted):
    logprobs, mask = np.full((2, 4), -0.5, np.float32), np.ones((2, 4), bool)
    logprobs[1, 2], mask[1, 2] = value, counted
    return types.SimpleNamespace(logprobs=logprobs, mask=mask)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_token_drawn_from_no_probabilities_is_named(value, dtype):
    check_drawn("test:3", drawn(value, False), dtype)  # Padding may hold anything.
    named = rf"^fact test:3: .* token 3 of answer 2, found {value}:.* overflow in {dtype}; "
    with pytest.raises(NotFiniteError, match=named) as error:
        check_drawn("test:3", drawn(value, True), dtype)
    # What computes in float32 is not told to.
    assert ("--dtype=float32" in str(error.value)) == (dtype == "bfloat16")


def test_a_score_that_is_not_finite_is_named():
    check_scores("sft", 4, {"micro_f1": 0.0})
    with pytest.raises(DataError, match=r"^sft step 4: validation/macro_f1: .* found nan; "):
        check_scores("sft", 4, {"micro_f1": 0.0, "macro_f1": float("nan")})


class Training:
    """Skipped updates of made-up steps."""

    def __init__(self, steps=100, extra=None, **given):
        self.lines = []
        self.skipped = SkippedUpdates(
            "sft", steps, lambda: 7, self.lines.append, extra or {}, **given
        )
        self.step = 0

    def go(self, *skips, norm=1.0):
        for skip in skips:
            self.step += 1
            loss = jnp.float32(np.nan if skip else 0.5)
            self.skipped.add(
                self.step,
                {"axes": np.full(2, np.nan), "loss": loss, "skipped_updates": jnp.int32(skip)}
                | {"param_norm": jnp.float32(norm)},
            )
        self.skipped.read(self.step)


def test_skipped_updates_are_counted_until_they_are_asked_for():
    training = Training()
    training.go(0, 1, 0, 3, 1)
    training.skipped.check()
    assert training.skipped.row == 2
    assert training.skipped.extra() == {"skipped_updates": 5, "skipped_in_a_row": 2}
    assert (training.skipped.take(), training.skipped.take()) == (5, 0)
    assert training.lines == [
        f"sft step {n}: expected a finite loss, found nan; its update is skipped" for n in (2, 4, 5)
    ]
    training.go(0)
    assert training.skipped.row == 0


def test_only_what_is_asked_for_is_waited_for():
    skipped = SkippedUpdates("sft", 100, lambda: 7, print, {})

    class Promised:
        def __float__(self):
            raise AssertionError("not computed yet")

    skipped.add(1, {"loss": 0.5})
    skipped.add(2, {"skipped_updates": Promised()})
    skipped.read(1)
    with pytest.raises(AssertionError, match="not computed yet"):
        skipped.read(2)


def test_too_many_in_a_row_end_training_wherever_it_was_taken_up():
    training = Training()
    training.go(*[1] * (PATIENCE - 1))
    training.skipped.check()
    again = Training(extra=training.skipped.extra())
    again.go(1)
    with pytest.raises(NotFiniteError) as error:
        again.skipped.check()
    message = str(error.value)
    assert message.startswith(
        "sft step 1: expected a finite loss, found nan, as in each of 5 steps in a row; "
    )
    assert "; the last finite checkpoint: of step 7; " in message
    assert "\n" not in message


def test_a_training_shorter_than_its_patience_does_not_end_well_without_an_update():
    training = Training(steps=2)
    training.go(1, 1)
    with pytest.raises(NotFiniteError, match="2 steps in a row"):
        training.skipped.check()


def test_a_step_counts_as_skipped_where_all_its_updates_were():
    training = Training(updates=2)
    training.go(2, 1, *[2] * (PATIENCE - 1), 1)
    training.skipped.check()
    assert training.skipped.row == 0
    assert training.skipped.take() == 2 + 1 + 2 * (PATIENCE - 1) + 1
    counts = [2, 1, *[2] * (PATIENCE - 1), 1]
    assert training.lines == [
        f"sft step {n}: expected a finite loss, found nan; {count} of its 2 updates are skipped"
        for n, count in enumerate(counts, start=1)
    ]
    training.go(*[2] * PATIENCE)
    with pytest.raises(
        NotFiniteError, match=r"^sft step 12: .* loss, found nan, as in each of 5 steps"
    ):
        training.skipped.check()


@pytest.mark.parametrize("skip", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_that_are_lost_end_training_at_once(skip, dtype):
    """Whether or not a later update of the step found its loss not finite and was skipped."""
    training = Training(updates=2, dtype=dtype)
    training.go(skip, norm=np.inf)
    with pytest.raises(
        NotFiniteError, match=r"^sft step 1: .* param_norm, found inf; .* step 7"
    ) as error:
        training.skipped.check()
    assert training.lines == []
    assert ("compute in float32" in str(error.value)) == (dtype == "bfloat16")


@pytest.mark.usefixtures("quick_compiles", "one_device")
def test_a_run_of_batches_that_are_not_finite_ends_and_keeps_its_checkpoints(
    small_world, tmp_path, monkeypatch
):
    """Photos are spoilt from the fifth batch on; the run's last good checkpoint is of step 4."""
    config = read_config(TINY)
    config.stages, config.data.folder = "sft", str(small_world)
    config.mesh.update(data=1, fsdp=1, tensor=1)
    config.data.shapes = 1
    config.model.vision.update(depth=1, fullatt_block_indexes=(0,))  # Compiles faster.
    config.sft.update(steps=40, eval_every=99, save_every=2, log_every=3, keep_checkpoints=1)
    made = SequenceFeed.__call__

    def spoilt(feed, step):
        batch = made(feed, step)
        mean = batch.vision.mean.copy()
        mean[0, 0] = np.nan
        return batch if step < 4 else batch._replace(vision=batch.vision._replace(mean=mean))

    monkeypatch.setattr(SequenceFeed, "__call__", spoilt)
    with pytest.raises(NotFiniteError) as error:
        train(config, tmp_path)
    assert str(error.value).startswith(
        "sft step 9: expected a finite loss, found nan, as in each of 5 steps in a row"
    )
    assert Checkpointer(tmp_path / "sft" / "checkpoints").latest() == 4
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    trained = {r["step"]: r["skipped_updates"] for r in records if r["kind"] == "train"}
    assert trained == {3: 0, 6: 2, 9: 3}
    assert not (tmp_path / "sft" / "DONE.json").exists()


@pytest.mark.usefixtures("quick_compiles", "one_device")
def test_a_rollout_that_is_not_finite_ends_the_run_by_its_facts_name(
    small_world, tmp_path, monkeypatch
):
    """One log-probability of the third step's last group, whose fact the step has twice."""
    config = read_config(TINY)
    config.data.folder, config.data.shapes = str(small_world), 1
    config.mesh.update(data=1, fsdp=1, tensor=1)
    config.grpo.loss.beta = 0.0  # Compiles no reference.
    config.model.vision.update(depth=1, fullatt_block_indexes=(0,))
    config.grpo.update(steps=8, prompts=6, mixing=False, save_every=1, log_every=2)
    run = open_run(open_setup(settings(config), tmp_path), reasoning_needed=True)
    monkeypatch.setattr(grpo, "starting_params", lambda run: run.trainee.init_params(0))
    lines = [Rating(fact.id, 0.5, "hard") for fact in run.dataset.splits["train"][:4]]
    (tmp_path / "rate").mkdir()
    (tmp_path / "rate" / "ratings.jsonl").write_text(
        "".join(json.dumps(dataclasses.asdict(line)) + "\n" for line in lines)
    )
    make_rollout = grpo_step.make_rollout

    def make_spoilt_rollout(*args):
        """As the stage has it, but for a NaN that the sampler gives in the third step."""
        rollout = make_rollout(*args)

        def spoilt(params, prompts, grammar, allowed, step):
            scored, metrics = rollout(params, prompts, grammar, allowed, step)
            drawn = scored.rollout
            nan = jnp.where(step == 2, jnp.nan, drawn.logprobs[5, 0, 0])
            bad = drawn.replace(logprobs=drawn.logprobs.at[5, 0, 0].set(nan))
            return scored.replace(rollout=bad), metrics

        return spoilt

    monkeypatch.setattr(grpo_step, "make_rollout", make_spoilt_rollout)
    with pytest.raises(NotFiniteError) as error:
        grpo.run_grpo(run)
    drawn = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").open()]
    facts = [r["fact"] for r in drawn if r["step"] == 3 and r["sample"] == 0]
    assert facts[5] in facts[:5]
    assert str(error.value).startswith(f"grpo step 3: fact {facts[5]}: ")
    assert "(by the sampler, the old parameters or the reference)" in str(error.value)
    assert "\n" not in str(error.value)
    assert "float32" not in str(error.value)  # What it computes in.
    assert Checkpointer(tmp_path / "grpo" / "checkpoints").latest() == 2
    # Of what there is no reference for nothing is logged, not 0.
    trained = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [r["step"] for r in trained] == [2]
    assert "kl" not in trained[0]
