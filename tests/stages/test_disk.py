"""What a run writes at most, and a disk that has not as much."""

import math
import shutil
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from morer1_jax.config.binding import read_config
from morer1_jax.config.settings import settings
from morer1_jax.data.tokenizer import load_tokenizer
from morer1_jax.errors import ConfigError
from morer1_jax.run.checkpoint import Checkpointer
from morer1_jax.run.features import features_shape
from morer1_jax.run.setup import open_run, open_setup
from morer1_jax.run.store import Store
from morer1_jax.run.trainee import open_trainee
from morer1_jax.stages import disk
from morer1_jax.stages.table import BY_NAME
from morer1_jax.stages.workdir import WorkdirStatus
from morer1_jax.task import more

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(small_world):
    config = read_config(ROOT / "tests" / "configs" / "tiny.py")
    config.data.folder = str(small_world)
    config.mesh.update(data=2, fsdp=2, tensor=2)
    config.grpo.prompts = 4
    return config


class Case:
    """A run's model and its status under a config."""

    def __init__(self, config, workdir):
        self.settings = settings(config)
        data, tokenizer = Path(config.data.folder), load_tokenizer(TOKENIZER[0])
        self.trainee = open_trainee(self.settings, tokenizer, more.read_ontology(data), None)
        self.status = WorkdirStatus.of(self.settings, Store(workdir))


TOKENIZER = []


@pytest.fixture(autouse=True)
def _tokenizer(small_tokenizer):
    TOKENIZER[:] = [small_tokenizer.name_or_path]


def opened(config, workdir):
    return open_run(open_setup(settings(config), workdir), reasoning_needed=False)


def sizes(case):
    """Bytes of a state and of the best parameters, counted by hand: of float32, all that trains.

    A state has parameters, AdamW's two moments, and three counters.
    """
    numbers = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(case.trainee.placed.like))
    return 3 * 4 * numbers + 3 * 4, 4 * numbers


def needed(case, *names):
    return disk.needed_bytes(case.trainee, case.status, [BY_NAME[name] for name in names])


def put(workdir, name, steps, case=None, best=True):
    """Checkpoints as a training leaves them; with a case, as large as its own."""
    state, params = sizes(case) if case else (0, 0)
    checkpoints = Checkpointer(workdir / name / "checkpoints", keep=len(steps))
    for step in steps:
        checkpoints.save(step, {"w": jnp.ones(1)})
        (checkpoints.folder / f"step_{step:08d}" / "more").write_bytes(bytes(state))
    if best:
        checkpoints.save_best(steps[-1], {"w": jnp.ones(1)}, 1.0)
        (checkpoints.folder / "best" / f"step_{steps[-1]:08d}" / "more").write_bytes(bytes(params))
    return checkpoints


def test_what_is_new_is_whole_before_what_is_old_goes(config, tmp_path):
    config.grpo.optimizer.schedule = config.sft.optimizer.schedule = "constant"
    case = Case(config, tmp_path)
    state, best = sizes(case)
    assert needed(case, "sft") == 3 * state + best
    # SFT's states go once rating has begun, its best stays.
    assert needed(case, "sft", "rate", "grpo", "evaluate") == best + 3 * state + best
    # Its newest state stays until a stage that uses it is done: more steps might be asked for.
    assert needed(case, "sft", "baselines") == (best + state) + (best + state) + (state + 2 * best)
    # One after the other, of a save each: the second beside all of the first.
    assert needed(case, "baselines") == (best + state) + (state + 2 * best)
    assert needed(case, "evaluate") == 0


def test_fewer_checkpoints_take_less(config, tmp_path):
    config.sft.keep_checkpoints = 1
    state, best = sizes(case := Case(config, tmp_path))
    assert needed(case, "sft") == 2 * state + best
    config.sft.update(steps=40, save_every=100)
    case = Case(config, tmp_path)
    assert needed(case, "sft") == state + 2 * best


def test_what_is_there_already_and_will_be_replaced_counts(config, tmp_path):
    case = Case(config, tmp_path)
    alone = needed(case, "grpo")
    (folder := tmp_path / "grpo" / "checkpoints" / "step_00000002").mkdir(parents=True)
    (folder / "x").write_bytes(bytes(1000))
    assert needed(case, "grpo") == alone - 1000


def test_a_finished_stages_states_are_room(config, tmp_path, monkeypatch):
    """They go before anything is written, wherever the workdir is seen from."""
    config.sft.optimizer.schedule = "cosine"
    monkeypatch.chdir(tmp_path)
    case = Case(config, Path("run"))
    state, best = sizes(case)
    put(Path("run"), "sft", [1, 2, 3, 4, 5], case)
    case.status.finish(BY_NAME["sft"], {})
    there = disk.bytes_in(Path("run/sft"))
    assert there == pytest.approx(5 * state + best, rel=0.05)
    assert needed(case, "rate", "grpo") == 0
    config.grpo.keep_checkpoints = 7
    config.grpo.steps = 100
    case = Case(config, Path("run"))
    kept = disk.bytes_in(Path("run/sft/checkpoints/best"))
    expected = kept + 8 * state + best - there
    assert needed(case, "rate", "grpo") == pytest.approx(expected, abs=5000)  # The marker.
    assert case.status.surplus()
    case.status.drop_states()
    assert disk.bytes_in(Path("run/sft/checkpoints")) == kept


def test_fewer_checkpoints_than_are_there_make_room(config, tmp_path):
    """Those beyond go before the next is written, so that lowering their number is a way out."""
    config.sft.update(keep_checkpoints=5, steps=100, save_every=6)
    state, best = sizes(case := Case(config, tmp_path))
    checkpoints = put(tmp_path, "sft", [6, 12, 18, 24, 30], case)
    assert needed(case, "sft") == pytest.approx(state, rel=0.05)
    config.sft.keep_checkpoints = 2
    case = Case(config, tmp_path)
    # Three states go, and one is new.
    assert needed(case, "sft") == 0
    case.status.drop_states(goes_on=["sft"])
    assert checkpoints.latest() == 30
    assert disk.bytes_in(tmp_path / "sft") == pytest.approx(2 * state + best, rel=0.05)
    assert needed(case, "sft") == pytest.approx(state, rel=0.05)


def test_what_a_kill_left_beyond_what_is_kept_goes_first(config, tmp_path):
    """Between a save and what goes for it, or amid a save."""
    state, _ = sizes(case := Case(config, tmp_path))
    put(tmp_path, "sft", [6, 12, 18], case)
    (half := tmp_path / "sft" / "checkpoints" / ".step_00000024.tmp").mkdir()
    (half / "x").write_bytes(bytes(state // 2))
    assert needed(case, "sft") == 0
    case.status.drop_states(goes_on=["sft"])
    names = {path.name for path in half.parent.iterdir()}
    assert names == {"step_00000012", "step_00000018", "best"}
    assert needed(case, "sft") == pytest.approx(state, rel=0.05)
    # With rarer saves there still is one more, the last.
    config.sft.save_every = 1000
    case = Case(config, tmp_path)
    assert needed(case, "sft") == pytest.approx(state, rel=0.05)


def test_grpos_state_is_there_while_its_control_trains(config, tmp_path):
    """More steps of GRPO may be asked for until the control has trained."""
    config.grpo.optimizer.schedule = "constant"
    config.control.steps = None
    case = Case(config, tmp_path)
    state, best = sizes(case)
    assert needed(case, "grpo", "control") == (best + state) + 3 * state + best
    config.grpo.optimizer.schedule = "cosine"
    case = Case(config, tmp_path)
    assert needed(case, "grpo", "control") == best + 3 * state + best


def test_kept_features_are_counted(config, tmp_path):
    config.tune.update(vision=0.0, merger=0.0)
    assert disk._features_bytes(opened(config, tmp_path)) == 0
    config.data.keep_features = True
    run = opened(config, tmp_path)
    (tokens, width), dtype = features_shape(run.dataset, run.trainee, run.reader)
    assert width == config.model.text.hidden_size
    size = tokens * width * np.dtype(dtype).itemsize
    assert disk._features_bytes(run) == size > 10_000
    # What a killed encoding left goes before.
    (tmp_path / ".features.tmp").mkdir()
    (tmp_path / ".features.tmp" / "x").write_bytes(bytes(1000))
    assert disk._features_bytes(run) == size - 1000
    (tmp_path / "features").mkdir()
    assert disk._features_bytes(run) == 0


def test_7b_grpo_is_counted_as_large_as_it_is(tmp_path, small_world):
    """Parameters and both moments in float32, tower frozen; two checkpoints, a third, the best."""
    config = read_config(ROOT / "configs" / "qwen2_5_vl_7b_grpo.py")
    config.model.path = None
    config.data.update(folder=str(small_world), vocabulary=1024)
    case = Case(config, tmp_path)
    trained = disk.tree_bytes(case.trainee.placed.like)
    assert 30.0e9 < trained < 31.5e9
    assert needed(case, "grpo") == pytest.approx(10 * trained, rel=1e-6)


def test_too_little_room_is_named_before_the_first_step(config, tmp_path, monkeypatch):
    run = opened(config, tmp_path / "run")
    status = WorkdirStatus.of(run.settings, run.store)
    most = disk.needed_bytes(run.trainee, status, [BY_NAME["sft"]]) + disk._OTHERS

    def free(count):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=count))

    free(most)
    disk.check_room(run, status, [BY_NAME["sft"]])
    free(most - 1)
    with pytest.raises(ConfigError) as error:
        disk.check_room(run, status, [BY_NAME["sft"]])
    message = str(error.value)
    assert message.startswith(
        f"{tmp_path / 'run'}: expected {most / 1e6:,.1f} MB free, the most that will be "
    )
    assert message.endswith("; lower sft.keep_checkpoints, make room, or name another --workdir")
    assert "\n" not in message


def test_beside_a_bucket_the_copy_needs_room_without_checkpoints(config, tmp_path, monkeypatch):
    config.tune.update(vision=0.0, merger=0.0)
    config.data.keep_features = True
    run = opened(config, tmp_path / "run")
    in_bucket = types.SimpleNamespace(store=types.SimpleNamespace(is_bucket=True))
    most = disk._features_bytes(run) + disk._OTHERS

    def free(count):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=count))

    free(most)
    disk.check_room(run, in_bucket, [BY_NAME["sft"]])
    free(most - 1)
    with pytest.raises(ConfigError, match=r"on another disk in MORER1_WORKDIR_CACHE$"):
        disk.check_room(run, in_bucket, [BY_NAME["sft"]])


def test_what_is_written_is_what_was_counted(config, tmp_path):
    """By a state as a training saves it, of random bits, which orbax cannot compress.

    What it says of each array besides, which differs from save to save, is much beside a tiny one,
    and nothing beside a real one.
    """
    config.model.text.intermediate_size = 2048
    case = Case(config, tmp_path)
    trainee = case.trainee
    state = trainee.placed.like_state(
        case.settings.sft.optimizer.build(1, trainee.placed.trainable)
    )
    random = np.random.default_rng(0)

    def filled(leaf):
        if not leaf.shape:
            return jnp.zeros((), leaf.dtype)
        assert leaf.dtype == np.float32
        # But for one, which would make some of them not finite.
        bits = random.integers(2**32, size=leaf.shape, dtype=np.uint32) & 0xFF7FFFFF
        return jax.device_put(bits.view(np.float32))

    checkpoints = Checkpointer(tmp_path / "sft" / "checkpoints")
    checkpoints.save(1, jax.tree.map(filled, state))
    counted, _ = sizes(case)
    arrays = checkpoints.folder / "step_00000001" / "arrays"
    written = sum(disk.bytes_in(folder) for folder in arrays.rglob("d"))
    assert written == pytest.approx(counted, rel=0.03)
    training = BY_NAME["sft"].training(case.settings)
    space = disk._space(trainee, training, tmp_path / "none", 0, [])
    assert (space.state, space.best) == sizes(case)
