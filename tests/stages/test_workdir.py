"""What binds a workdir to its config: each key on purpose, and from when on."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from morer1_jax.config.binding import OPERATIONAL, flatten, identity, matches, read_config
from morer1_jax.config.settings import settings
from morer1_jax.errors import ConfigError
from morer1_jax.run.checkpoint import Checkpointer
from morer1_jax.run.shelf import Shelf
from morer1_jax.run.store import Store
from morer1_jax.stages.marker import write_marker
from morer1_jax.stages.table import BY_NAME, STAGES
from morer1_jax.stages.workdir import WorkdirStatus

TINY = Path(__file__).parents[1] / "configs" / "tiny.py"


def keys(text):
    """Of lines `branch: keys`, whole keys where no branch is named."""
    out = []
    for line in text.strip().splitlines():
        branch, colon, names = line.rpartition(": ")
        out += [f"{branch}.{name}" if colon else name for name in names.split()]
    return out


# Keys that change no number beyond rounding, or only which step is validated, kept or written.
FREE = keys("""
stages profile.steps compile.threads model.path score.chunk sampling.stages sampling.cache
evaluate.batch rate.batch
data: keep_features prompt_length windows round_to shapes workers worker_kind
mesh: data fsdp tensor sampling_tensor
runtime: attention remat scan_unroll decode_unroll
sft: micro_batches eval_every eval_facts save_every log_every keep_checkpoints
baselines: eval_every eval_facts
grpo: micro_batches rollout_parts eval_every eval_facts save_every log_every rollouts_every
grpo: keep_checkpoints
""")
# Keys that some number depends on. A new key is put here or above.
BINDING = keys("""
seed control.steps
world: train valid test cast facts_per_photo fit none night written gives_up noise
data: folder reasoning vocabulary completion_length min_pixels max_pixels crop_margin crop_least
model.text: vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
model.text: num_key_value_heads mrope_section rope_theta initializer_range tie_word_embeddings
model.vision: depth hidden_size intermediate_size num_heads fullatt_block_indexes patch_size
model.vision: temporal_patch_size spatial_merge_size window_size initializer_range
tune: vision merger language frozen_dtype lora.rank lora.alpha lora.targets
runtime: param_dtype dtype gradient_sums
sft: steps batch
baselines: facts steps batch
rate: begin file samples temperature easy_from never
grpo: steps prompts group updates temperature scale_rewards mixing
grpo.mix: start end until shape
grpo.reward: format effort accuracy effort_from effort_to
grpo.loss: clip_low clip_high beta normalisation importance_cap mask_truncated
sft.optimizer: lr schedule warmup final b1 b2 eps weight_decay clip_norm moments
baselines.optimizer: lr schedule warmup final b1 b2 eps weight_decay clip_norm moments
grpo.optimizer: lr schedule warmup final b1 b2 eps weight_decay clip_norm moments
""")


@pytest.fixture
def config():
    return read_config(TINY)


def status(config, workdir):
    return WorkdirStatus.of(settings(config), Store(workdir))


def test_each_key_binds_or_is_free_on_purpose(config, tmp_path):
    there = set(flatten(config))
    assert set(FREE).isdisjoint(BINDING)
    assert there == {*FREE, *BINDING}
    assert {key for key in there if matches(key, OPERATIONAL)} == set(FREE)
    # What binds binds some stage: else a change of it would go unnoticed.
    under = status(config, tmp_path)
    assert set(BINDING) == {key for stage in STAGES for key in under.depends(stage)}


def save(workdir, name, step=4, best=True):
    """As a training leaves it."""
    checkpoints = Checkpointer(workdir / name / "checkpoints")
    state = {"w": jnp.ones(3)}
    checkpoints.save(step, state)
    if best:
        checkpoints.save_best(step, state, 1.0)
    return checkpoints


def finish(config, workdir, name):
    save(workdir, name, config[name].steps)
    status(config, workdir).finish(BY_NAME[name], {"seconds": 1.0})


def rated(config, workdir):
    (workdir / "rate").mkdir()
    (workdir / "rate" / "ratings.jsonl").write_text("")
    status(config, workdir).finish(BY_NAME["rate"], {"seconds": 1.0})


def test_a_key_binds_from_when_a_stage_that_depends_on_it_has_begun(config, tmp_path):
    def why(key):
        return status(config, tmp_path).why_bound(key)

    assert why("seed") is why("sft.batch") is None
    (tmp_path / "data.json").write_text("{}")
    assert why("seed") == "synthesise depends on it"
    assert why("sft.batch") is None
    save(tmp_path, "sft")
    assert why("seed") == "synthesise, sft depend on it"
    assert why("sft.batch") == "sft depends on it"
    assert why("rate.samples") is None
    rated(config, tmp_path)
    assert why("sft.batch") == "sft, rate depend on it"
    assert why("rate.samples") == "rate depends on it"
    # An empty pool is corrected without rating again.
    for key in ("rate.easy_from", "rate.never", "grpo.mixing", "grpo.mix.start", "grpo.prompts"):
        assert why(key) is None
    save(tmp_path, "grpo")
    for key in ("rate.easy_from", "rate.never", "grpo.mixing", "grpo.mix.start", "grpo.prompts"):
        assert why(key) == "grpo depends on it"
    assert why("grpo.micro_batches") is None


def test_a_rating_that_was_begun_binds_what_it_depends_on(config, tmp_path):
    (tmp_path / "rate").mkdir()
    (tmp_path / "rate" / "ratings.jsonl.unfinished").write_text('{"batch": 8}\n')
    assert status(config, tmp_path).why_bound("rate.temperature") == "rate depends on it"
    assert status(config, tmp_path).why_bound("rate.batch") is None
    assert status(config, tmp_path).why_bound("rate.easy_from") is None


@pytest.mark.parametrize("name", ["sft", "grpo", "baselines"])
def test_steps_may_change_where_the_learning_rate_is_constant(config, tmp_path, name):
    key = f"{name}.steps"
    save(tmp_path, f"{name}/photo_hidden" if name == "baselines" else name)
    config[name].optimizer.schedule = "cosine"
    assert status(config, tmp_path).why_bound(key) == (
        f"{name} depends on it: the learning rate's cosine ends with the last step"
    )
    config[name].optimizer.schedule = "constant"
    assert status(config, tmp_path).why_bound(key) is None
    assert status(config, tmp_path).why_bound(f"{name}.optimizer.schedule")


def test_steps_that_a_later_stage_has_used_stay(config, tmp_path):
    config.sft.optimizer.schedule = "constant"
    save(tmp_path, "sft")
    rated(config, tmp_path)
    assert status(config, tmp_path).why_bound("sft.steps") == "rate depends on it"


def test_a_stage_that_is_done_goes_on_when_its_steps_are_raised(config, tmp_path):
    config.grpo.optimizer.schedule = "constant"
    finish(config, tmp_path, "grpo")
    assert status(config, tmp_path).done(BY_NAME["grpo"])
    status(config, tmp_path).check_steps()
    config.grpo.steps += 2
    assert not status(config, tmp_path).done(BY_NAME["grpo"])
    status(config, tmp_path).check_steps()
    config.grpo.steps -= 3
    with pytest.raises(
        ConfigError, match=r"config\.grpo\.steps: expected at least 8, .* found 7; "
    ):
        status(config, tmp_path).check_steps()


def test_steps_are_not_lowered_below_the_best(config, tmp_path):
    """Whose step is beyond the newest state where a run was killed between the two."""
    config.sft.optimizer.schedule = "constant"
    config.sft.steps = 20
    finish(config, tmp_path, "sft")
    state = {"w": jnp.ones(3)}
    Checkpointer(tmp_path / "sft" / "checkpoints").save_best(30, state, 2.0)
    for steps in (20, 29):
        config.sft.steps = steps
        with pytest.raises(ConfigError, match=rf"steps: expected at least 30, .* found {steps}; "):
            status(config, tmp_path).check_steps()
    config.sft.steps = 30
    status(config, tmp_path).check_steps()
    assert not status(config, tmp_path).done(BY_NAME["sft"])


def test_steps_of_a_stage_that_was_killed_are_not_lowered_below_its_best(config, tmp_path):
    config.baselines.optimizer.schedule = "constant"
    save(tmp_path, "baselines/photo_hidden", step=24)
    checkpoints = save(tmp_path, "baselines/title_hidden", step=24, best=False)
    checkpoints.save_best(30, {"w": jnp.ones(3)}, 2.0)
    config.baselines.steps = 26
    with pytest.raises(ConfigError, match=r"baselines\.steps: expected at least 30, .* found 26; "):
        status(config, tmp_path).check_steps()
    config.baselines.steps = 31
    status(config, tmp_path).check_steps()


def test_steps_are_not_raised_from_a_state_that_is_gone(config, tmp_path):
    config.grpo.optimizer.schedule = "constant"
    finish(config, tmp_path, "grpo")
    Shelf(tmp_path / "grpo" / "checkpoints").drop(keep=0)
    status(config, tmp_path).check_steps()
    config.grpo.steps += 2
    with pytest.raises(ConfigError, match=r"expected 8, .* left no optimizer's state, found 10;"):
        status(config, tmp_path).check_steps()


def test_steps_are_not_lowered_to_one_that_was_not_validated(config, tmp_path):
    config.sft.optimizer.schedule = "constant"
    save(tmp_path, "sft", step=6, best=False)
    config.sft.steps = 6
    with pytest.raises(
        ConfigError, match=r"expected at least 7, .* without a validation, found 6;"
    ):
        status(config, tmp_path).check_steps()
    config.sft.steps = 7
    status(config, tmp_path).check_steps()


def states(workdir, name):
    return sorted(path.name for path in (workdir / name / "checkpoints").glob("step_*"))


def test_states_go_when_nothing_can_go_on_from_them(config, tmp_path):
    config.sft.optimizer.schedule = "cosine"
    config.baselines.optimizer.schedule = config.grpo.optimizer.schedule = "constant"
    save(tmp_path, "sft", 36)
    status(config, tmp_path).drop_states()  # Not done yet.
    assert states(tmp_path, "sft") == ["step_00000036"]
    finish(config, tmp_path, "sft")
    # What a killed deletion leaves.
    (tmp_path / "sft/checkpoints/.step_00000030.tmp/arrays").mkdir(parents=True)
    status(config, tmp_path).drop_states()
    assert [path.name for path in (tmp_path / "sft/checkpoints").iterdir()] == ["best"]
    checkpoints = Checkpointer(tmp_path / "sft" / "checkpoints")
    like = {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}
    assert checkpoints.restore_best(like)[0]["w"].tolist() == [1, 1, 1]
    save(tmp_path, "grpo", 6)
    finish(config, tmp_path, "grpo")
    status(config, tmp_path).drop_states()
    # More steps may be asked for.
    assert states(tmp_path, "grpo") == ["step_00000008"]
    save(tmp_path, "control", 3)
    status(config, tmp_path).drop_states()
    assert states(tmp_path, "grpo") == []
    assert states(tmp_path, "control") == ["step_00000003"]


def test_a_marker_of_an_earlier_version_is_refused_in_one_line(config, tmp_path):
    """It held a digest of the keys in their place."""
    marker = {"stage": "sft", "config": "0" * 64, "results": {"seconds": 2.0}}
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "DONE.json").write_text(json.dumps(marker))
    with pytest.raises(
        ConfigError, match=r"DONE\.json: .*another version.* new --workdir"
    ) as error:
        status(config, tmp_path).done(BY_NAME["sft"])
    assert "\n" not in str(error.value)


def test_a_marker_passes_over_keys_that_bind_no_more(config, tmp_path):
    """Keys that have become free, and keys that the stage depended on before."""
    there = status(config, tmp_path).depends(BY_NAME["sft"])
    write_marker(tmp_path / "sft", there | {"sft.micro_batches": 3, "grpo.steps": 1}, {})
    assert status(config, tmp_path).done(BY_NAME["sft"])


def test_a_stage_made_under_another_config_is_an_error(config, tmp_path):
    finish(config, tmp_path, "sft")
    config.sft.optimizer.lr = 0.5
    with pytest.raises(
        ConfigError, match=r"of another \(sft\.optimizer\.lr: expected .*, found 0\.01"
    ):
        status(config, tmp_path).done(BY_NAME["sft"])
    assert not status(config, tmp_path).is_done(BY_NAME["sft"])


def test_a_control_of_its_own_length_depends_on_nothing_of_grpo(config, tmp_path):
    config.control.steps = None
    save(tmp_path, "control")
    assert status(config, tmp_path).why_bound("grpo.group") == "control depends on it"
    config.control.steps = 8
    assert status(config, tmp_path).why_bound("grpo.group") is None
    assert status(config, tmp_path).why_bound("sft.batch") == "control depends on it"


def test_a_control_done_before_that_was_so_is_still_done(config, tmp_path):
    """Its marker has keys of rating and GRPO, too."""
    config.control.steps = 8
    keys = identity(status(config, tmp_path).config, ("seed", "world", "data", "model", "tune"))
    keys |= identity(status(config, tmp_path).config, ("runtime", "score", "sft", "control"))
    keys |= identity(status(config, tmp_path).config, ("rate", "grpo"))
    write_marker(tmp_path / "control", keys, {"seconds": 1.0})
    config.grpo.group = 4
    assert status(config, tmp_path).done(BY_NAME["control"])
