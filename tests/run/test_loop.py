"""The train loop on a toy state: resuming, logging each step once, keeping the best."""

import dataclasses
import errno
import functools
import json
import os
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from morer1_jax.config.settings import LoopSettings
from morer1_jax.errors import DataError, NotFiniteError, Stopped
from morer1_jax.hosts.stop import check_stop, stoppable
from morer1_jax.learn.state import OptimizerConfig, TrainState, apply_gradients, new_state
from morer1_jax.run import checkpoint
from morer1_jax.run.checkpoint import Checkpointer
from morer1_jax.run.hooks import Hooks, Validation
from morer1_jax.run.loop import train
from morer1_jax.run.phases import PhaseTimer
from morer1_jax.run.shelf import Shelf
from morer1_jax.run.store import Store
from morer1_jax.run.throughput import Work

CONFIG = LoopSettings(steps=11, eval_every=4, save_every=3, log_every=1, keep_checkpoints=2)
SHARDING = jax.sharding.SingleDeviceSharding(jax.devices()[0])


class KilledError(Exception):
    """Stands for whatever ends a process."""


class Toy:
    """w becomes 2 w + batch, modulo a prime: any step lost, doubled or swapped shows."""

    def __init__(self, die_at=None, f1=lambda step: float(step)):
        self.die_at, self.f1 = die_at, f1
        self.resumed, self.steps = [], []

    def batch(self, step):
        return np.int32(step * step + 1)

    def step(self, state, batch, step):
        if step == self.die_at:
            raise KilledError
        self.steps.append(step)
        w = (2 * state.params["w"] + batch) % 10007
        metrics = {"loss": w.astype(jnp.float32), "batch": float(batch), "axes": jnp.ones(3)}
        return TrainState(state.step + 1, {"w": w}, state.opt_state), metrics

    def work(self, batch, metrics):
        return Work(tokens=10.0, flops=float(batch))

    def validate(self, params):
        scores = {"micro_f1": self.f1(int(params["w"])), "accuracy": 1.0}
        return Validation(scores, decisive="micro_f1")

    def run(self, workdir, config=CONFIG, **options):
        zero = jnp.zeros((), jnp.int32)
        state = TrainState(zero, {"w": zero}, ())
        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=SHARDING), state
        )

        def begin():
            assert Checkpointer(workdir / "toy" / "checkpoints").latest() is None
            return state

        hooks = Hooks(
            batch=self.batch,
            begin=begin,
            like=like,
            step=self.step,
            validate=self.validate,
            work=self.work,
            timer=PhaseTimer(),
            resume=self.resumed.append,
        )
        return train("toy", Store(workdir), hooks, config, **options)


def values(steps):
    """w after each of the steps 1 … `steps`."""
    out, w = [], 0
    for step in range(steps):
        w = (2 * w + step * step + 1) % 10007
        out.append(w)
    return out


def lines(workdir):
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def heads(workdir):
    return [(record["step"], record["kind"]) for record in lines(workdir)]


def whole(config=CONFIG):
    """(step, kind) of every line that a run should have."""
    expected = []
    for step in range(1, config.steps + 1):
        last = step == config.steps
        if step % config.log_every == 0 or last:
            expected.append((step, "train"))
        if step % config.eval_every == 0 or last:
            expected.append((step, "valid"))
    return expected


def final(checkpoints, step):
    like = jax.ShapeDtypeStruct((), jnp.int32, sharding=SHARDING)
    return checkpoints.restore(step, TrainState(like, {"w": like}, ()))[0]


def test_a_run_does_every_step_and_logs_it(tmp_path):
    toy = Toy()
    checkpoints = toy.run(tmp_path)
    assert toy.resumed == [None]
    assert toy.steps == list(range(11))
    assert heads(tmp_path) == whole()
    assert [r["loss"] for r in lines(tmp_path) if r["kind"] == "train"] == values(11)
    for record in lines(tmp_path):
        if record["kind"] != "train":
            continue
        assert record["step_time"] > 0
        assert "axes" not in record
        # Ten tokens a step; on a CPU the peak, and so the MFU, is not known.
        speed = record["throughput/tokens_per_second_per_device"] * jax.device_count()
        assert speed == pytest.approx(10.0 / record["step_time"], rel=1e-3)
        assert "mfu" not in record
        assert record["time/host"] >= 0
    valid = [r for r in lines(tmp_path) if r["kind"] == "valid"]
    assert [r["validation/micro_f1"] for r in valid] == [
        values(11)[step - 1] for step in (4, 8, 11)
    ]
    assert checkpoints.latest() == 11  # The last step is saved, due or not.
    state = final(checkpoints, 11)
    assert (int(state.step), int(state.params["w"])) == (11, values(11)[-1])


@given(
    deaths=st.lists(st.integers(0, 10), max_size=3), save=st.integers(1, 6), log=st.integers(1, 4)
)
@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.too_slow])
def test_a_run_that_dies_and_is_started_again_is_the_run_that_never_did(
    tmp_path_factory, deaths, save, log
):
    workdir = tmp_path_factory.mktemp("toy")
    config = LoopSettings(
        steps=11, eval_every=4, save_every=save, log_every=log, keep_checkpoints=1
    )
    for death in deaths:
        toy = Toy(die_at=death)
        try:
            toy.run(workdir, config)
        except KilledError:
            # No line of a saved step may be missing: it will never be written again.
            saved = Checkpointer(workdir / "toy" / "checkpoints").latest() or 0
            there = heads(workdir)
            assert [h for h in whole(config) if h[0] <= saved] == [
                h for h in there if h[0] <= saved
            ]
    toy = Toy()
    checkpoints = toy.run(workdir, config)
    assert heads(workdir) == whole(config)
    train_lines = {r["step"]: r["loss"] for r in lines(workdir) if r["kind"] == "train"}
    assert train_lines == {s: values(11)[s - 1] for s, kind in whole(config) if kind == "train"}
    assert int(final(checkpoints, 11).params["w"]) == values(11)[-1]


def test_a_run_goes_on_from_its_last_checkpoint_and_says_so(tmp_path):
    with pytest.raises(KilledError):
        Toy(die_at=8).run(tmp_path)  # Steps 1 to 8 are done, 6 is saved.
    toy = Toy()
    toy.run(tmp_path)
    assert toy.resumed == [6]
    assert toy.steps == list(range(6, 11))
    again = Toy()
    again.run(tmp_path)
    assert (again.resumed, again.steps) == ([11], [])
    assert heads(tmp_path) == whole()


def test_the_best_by_validation_is_kept_the_earlier_of_equals(tmp_path):
    by_value = dict(zip(values(11), range(1, 12), strict=True))
    scores = {4: 30.0, 8: 50.0, 11: 50.0}
    checkpoints = Toy(f1=lambda w: scores[by_value[w]]).run(tmp_path)
    assert checkpoints.best() == (8, 50.0)
    like = {"w": jax.ShapeDtypeStruct((), jnp.int32, sharding=SHARDING)}
    params, extra = checkpoints.restore_best(like)
    assert int(params["w"]) == values(8)[-1]
    assert extra["metric"] == 50.0


def test_an_error_in_a_batch_comes_as_it_is(tmp_path):
    toy = Toy()

    def batch(step):
        if step == 5:
            raise DataError("train:7: no photo")
        return np.int32(0)

    toy.batch = batch
    with pytest.raises(DataError, match=r"^train:7: no photo$"):
        toy.run(tmp_path)
    assert toy.steps == [0, 1, 2, 3, 4]


class Slow(Toy):
    """Steps and validation that take a while on the device, while the host runs ahead."""

    STEP, VALIDATE = 0.02, 0.2

    def __init__(self):
        super().__init__()

        def slowly(w):
            time.sleep(self.STEP)
            return w

        self.slow = jax.jit(
            lambda w: jax.pure_callback(slowly, jax.ShapeDtypeStruct((), jnp.int32), w)
        )

    def step(self, state, batch, step):
        state, metrics = super().step(state, batch, step)
        w = self.slow(state.params["w"])
        metrics["loss"] = w.astype(jnp.float32)
        return TrainState(state.step, {"w": w}, ()), metrics

    def validate(self, params):
        time.sleep(self.VALIDATE)
        return super().validate(params)


@pytest.mark.parametrize(("log", "evaluate"), [(1, 100), (1, 1), (1, 3), (5, 4), (100, 2)])
def test_step_time_is_what_the_steps_took(tmp_path, log, evaluate):
    config = LoopSettings(
        steps=9, eval_every=evaluate, save_every=4, log_every=log, keep_checkpoints=1
    )
    start = time.perf_counter()
    Slow().run(tmp_path, config)
    wall = time.perf_counter() - start
    steps = [r["step"] for r in lines(tmp_path) if r["kind"] == "train"]
    times = [r["step_time"] for r in lines(tmp_path) if r["kind"] == "train"]
    counts = np.diff([0, *steps])
    # A step may be counted with the one before it, which the host goes on to before it waits.
    assert max(times) >= Slow.STEP
    if log == 1:
        assert np.median(times) >= Slow.STEP
    validations = sum(r["kind"] == "valid" for r in lines(tmp_path))
    assert Slow.STEP * 9 <= float(np.dot(counts, times)) <= wall - validations * Slow.VALIDATE


def test_a_trace_of_some_steps_changes_nothing_else(tmp_path):
    Toy().run(tmp_path, profile=(3, 4))
    traces = list((tmp_path / "profile" / "toy").rglob("perfetto_trace.json.gz"))
    assert len(traces) == 1
    assert heads(tmp_path) == whole()


def test_a_trace_of_what_is_left_of_a_resumed_run(tmp_path):
    with pytest.raises(KilledError):
        Toy(die_at=7).run(tmp_path)
    Toy().run(tmp_path, profile=(2, 99))
    assert len(list((tmp_path / "profile" / "toy").rglob("perfetto_trace.json.gz"))) == 1


@functools.cache
def descent(**optimizer):
    """A state as training begins, in NumPy, and the compiled step of `Descent`."""
    transform = OptimizerConfig(**optimizer).build(11)

    def program(state, scale):
        grads = {"w": 2 * (state.params["w"] - 3) * scale}
        params, opt_state, seen = apply_gradients(state, grads, transform)
        metrics = {"loss": jnp.sum((state.params["w"] - 3) ** 2) * scale, **seen}
        return TrainState(state.step + 1, params, opt_state), metrics

    start = jax.tree.map(np.asarray, new_state({"w": jnp.zeros(2)}, transform))
    return start, jax.jit(program, donate_argnums=0)


class Descent:
    """A step of AdamW on (w - 3)²; the gradients of the batches `bad` are not numbers."""

    LIKE = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=SHARDING)

    def __init__(self, bad=(), die_at=None, **optimizer):
        self.bad, self.die_at = set(bad), die_at
        self.start, self.program = descent(**{"lr": 0.1} | optimizer)
        self.made, self.updates = 0, 1

    def work(self, batch, metrics):
        return Work(1.0, 1.0)

    def step(self, state, batch, step):
        if step + 1 == self.die_at:
            raise KilledError
        self.made = step + 1
        return self.program(state, batch)

    def run(self, workdir, config=CONFIG):
        def begin():
            return jax.tree.map(jnp.array, self.start)

        like = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=SHARDING), self.start
        )
        hooks = Hooks(
            batch=lambda step: np.float32(np.nan if step + 1 in self.bad else 1.0),
            begin=begin,
            like=like,
            step=self.step,
            validate=lambda params: Validation({"micro_f1": float(params["w"][0])}, "micro_f1"),
            work=self.work,
            timer=PhaseTimer(),
            updates=self.updates,
            dtype="bfloat16",
        )
        return train("toy", Store(workdir), hooks, config)


def saved(workdir):
    return sorted(int(p.name[5:]) for p in (workdir / "toy" / "checkpoints").glob("step_*"))


def counts(workdir):
    return {r["step"]: r["skipped_updates"] for r in lines(workdir) if r["kind"] == "train"}


def params_of(workdir):
    checkpoints = Checkpointer(workdir / "toy" / "checkpoints")
    return checkpoints.restore_best({"w": Descent.LIKE})


@pytest.mark.parametrize("log", [1, 4])
def test_an_update_that_is_skipped_is_logged_and_the_rest_is_trained(tmp_path, log, capsys):
    config = LoopSettings(steps=11, eval_every=4, save_every=3, log_every=log, keep_checkpoints=9)
    Descent(bad=[2, 3, 7]).run(tmp_path, config)
    expected = {1: 0, 2: 1, 3: 1, 4: 0, 5: 0, 6: 0, 7: 1, 8: 0, 9: 0, 10: 0, 11: 0}
    if log == 4:
        expected = {4: 2, 8: 1, 11: 0}
    assert counts(tmp_path) == expected
    shown = capsys.readouterr()
    for step in (2, 3, 7):
        assert f"toy step {step}: expected a finite loss, found nan; its" in shown.out + shown.err
    # Due at 3, while updates were skipped in a row: saved when that was over.
    assert saved(tmp_path) == [4, 6, 9, 11]
    # Eight updates, whatever was between them.
    (tmp_path / "other").mkdir()
    short = LoopSettings(steps=8, eval_every=8, save_every=8, log_every=1, keep_checkpoints=1)
    Descent().run(tmp_path / "other", short)
    assert params_of(tmp_path)[0]["w"].tolist() == params_of(tmp_path / "other")[0]["w"].tolist()


@pytest.mark.parametrize("log", [1, 4, 100])
@pytest.mark.parametrize("save", [1, 3])
def test_too_many_skipped_in_a_row_end_the_run_and_keep_what_is_good(tmp_path, log, save):
    config = LoopSettings(
        steps=40, eval_every=4, save_every=save, log_every=log, keep_checkpoints=1
    )
    with pytest.raises(NotFiniteError) as error:
        Descent(bad=range(5, 40)).run(tmp_path, config)
    good = 4 if save == 1 else 3
    message = str(error.value)
    assert message.startswith(
        "toy step 9: expected a finite loss, found nan, as in each of 5 steps in a row; "
    )
    assert f"; the last finite checkpoint: of step {good}; " in message
    assert "lower the stage's optimizer.lr" in message
    assert "\n" not in message
    assert saved(tmp_path) == [good]
    assert np.isfinite(params_of(tmp_path)[0]["w"]).all()
    # The same command does not get further by being repeated.
    again = Descent(bad=range(5, 40))
    with pytest.raises(NotFiniteError, match=r"^toy step 9: "):
        again.run(tmp_path, config)
    assert again.made < 9 + 2 * 5
    assert saved(tmp_path) == [good]


@pytest.mark.parametrize("die", range(2, 12))
def test_a_killed_run_counts_what_it_skipped_as_one_that_was_not(tmp_path, die):
    config = LoopSettings(steps=11, eval_every=4, save_every=3, log_every=4, keep_checkpoints=2)
    bad = [2, 5, 6, 10]
    with pytest.raises(KilledError):
        Descent(bad, die_at=die).run(tmp_path, config)
    Descent(bad).run(tmp_path, config)
    assert counts(tmp_path) == {4: 1, 8: 2, 11: 1}
    assert saved(tmp_path) == [9, 11]


def test_a_last_step_that_is_skipped_is_remembered_by_its_checkpoint(tmp_path):
    config = LoopSettings(steps=6, eval_every=6, save_every=6, log_every=6, keep_checkpoints=1)
    Descent(bad=range(3, 99)).run(tmp_path, config)
    assert saved(tmp_path) == [6]
    longer = LoopSettings(steps=40, eval_every=40, save_every=40, log_every=40, keep_checkpoints=1)
    with pytest.raises(NotFiniteError, match=r"^toy step 7: .* each of 5 steps in a row"):
        Descent(bad=range(3, 99)).run(tmp_path, longer)


@pytest.mark.parametrize("save", [1, 100])
def test_a_huge_learning_rate_ends_in_one_line(tmp_path, save):
    config = LoopSettings(
        steps=40, eval_every=100, save_every=save, log_every=100, keep_checkpoints=1
    )
    with pytest.raises(NotFiniteError) as error:
        Descent(lr=1e22).run(tmp_path, config)
    assert str(error.value).startswith("toy step 1: expected a finite param_norm, found inf; ")
    assert "the last finite checkpoint: none; " in str(error.value)
    assert "or compute in float32" in str(error.value)
    assert not saved(tmp_path)


@pytest.mark.parametrize("log", [1, 2, 100])
def test_lost_parameters_are_told_before_what_the_next_step_makes_of_them(tmp_path, log):
    """The next step's work, too, finds numbers that are not finite, in a fact that has no part."""
    descent = Descent(lr=1e22)

    def work(batch, metrics):
        if not np.isfinite(float(metrics["loss"])):
            raise NotFiniteError("fact train:0")
        return Work(1.0, 1.0)

    descent.work = work
    config = LoopSettings(steps=9, eval_every=9, save_every=9, log_every=log, keep_checkpoints=1)
    with pytest.raises(NotFiniteError, match=r"^toy step 1: .* param_norm, found inf; "):
        descent.run(tmp_path, config)
    # Where no step before is at fault the fact is named.
    descent = Descent(bad=[3])
    descent.work = work
    with pytest.raises(NotFiniteError, match=r"^toy step 3: fact train:0$"):
        descent.run(tmp_path / "fact", config)


def test_a_step_that_took_one_of_its_updates_is_not_skipped(tmp_path):
    descent = Descent(bad=range(2, 12))
    descent.updates = 2
    descent.run(tmp_path)
    assert sum(counts(tmp_path).values()) == 10
    assert saved(tmp_path) == [9, 11]


def test_a_score_that_is_not_finite_is_never_the_best(tmp_path):
    with pytest.raises(NotFiniteError, match=r"^toy step 4: validation/micro_f1: .* found nan"):
        Toy(f1=lambda w: float("nan")).run(tmp_path)
    assert Checkpointer(tmp_path / "toy" / "checkpoints").best() is None


class Stopping(Toy):
    """Is told to stop in a step, or in a validation, as a scheduler does it."""

    def __init__(self, step=None, validation=None):
        super().__init__()
        self._stop_at, self._stop_in, self._validations = step, validation, 0

    def step(self, state, batch, step):
        if step == self._stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().step(state, batch, step)

    def validate(self, params):
        self._validations += 1
        if self._validations == self._stop_in:
            os.kill(os.getpid(), signal.SIGTERM)
            check_stop()  # As a sampler asks between its batches.
        return super().validate(params)


@pytest.fixture
def plain_signal():
    """As a process begins, whatever runs the tests has made of it."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


# Steps begin at 0: the fourth, after which a validation is due, and the last one's validation.
STOPS = [{"step": 0}, {"step": 3}, {"step": 4}, {"validation": 1}, {"validation": 3}, {"step": 10}]


@pytest.mark.usefixtures("plain_signal")
@pytest.mark.parametrize("stop", STOPS, ids=str)
@pytest.mark.parametrize("every", [3, 100])
def test_a_run_that_is_told_to_stop_saves_and_goes_on_as_if_it_never_was(tmp_path, stop, every):
    config = dataclasses.replace(CONFIG, save_every=every)
    toy = Stopping(**stop)
    with stoppable(), pytest.raises(Stopped, match=r"^stopped by SIGTERM: toy is saved as of step"):
        toy.run(tmp_path, config)
    # The step that it was in is saved, and none is lost.
    assert Checkpointer(tmp_path / "toy" / "checkpoints").latest() == len(toy.steps)
    again = Toy()
    checkpoints = again.run(tmp_path, config)
    assert toy.steps + again.steps == list(range(11))
    assert sorted(heads(tmp_path)) == sorted(whole(config))
    best = max((values(11)[step - 1], step) for step in (4, 8, 11))
    assert checkpoints.best() == (best[1], float(best[0]))
    assert int(final(checkpoints, 11).params["w"]) == values(11)[-1]


def test_a_damaged_checkpoint_is_passed_over_with_a_warning_and_made_anew(tmp_path, caplog):
    config = dataclasses.replace(CONFIG, keep_checkpoints=3)
    with pytest.raises(KilledError):
        Toy(die_at=10).run(tmp_path, config)  # 3, 6 and 9 are saved.
    folder = tmp_path / "toy" / "checkpoints"
    for step, damage in ((9, lambda data: data[:-1]), (6, lambda data: b"?" + data[1:])):
        file = max((folder / f"step_{step:08d}" / "arrays").rglob("d/*"))
        file.write_bytes(damage(file.read_bytes()))
    toy = Toy()
    checkpoints = toy.run(tmp_path, config)
    warnings = [
        record.getMessage() for record in caplog.records if "SHA-256" in record.getMessage()
    ]
    assert [warning.count("training goes on from step 3") for warning in warnings] == [1, 1]
    assert "step_00000009/arrays/" in warnings[0]
    assert "step_00000006/arrays/" in warnings[1]
    assert toy.resumed == [3]
    assert heads(tmp_path) == whole(config)
    assert checkpoints.shelf.whole() == [11, 9, 6]
    assert int(final(checkpoints, 11).params["w"]) == values(11)[-1]


def test_training_does_not_begin_anew_because_all_its_checkpoints_are_damaged(tmp_path):
    with pytest.raises(KilledError):
        Toy(die_at=7).run(tmp_path)
    folder = tmp_path / "toy" / "checkpoints"
    for path in folder.glob("step_*/arrays/d/*"):
        path.write_bytes(b"")
    for path in folder.glob("step_*/arrays/ocdbt.process_0/d/*"):
        path.write_bytes(b"")
    message = (
        r"toy/checkpoints: expected a checkpoint as it was saved, found all 2 damaged \(.*step"
    )
    with pytest.raises(DataError, match=message):
        Toy().run(tmp_path)
    assert Checkpointer(folder).shelf.whole() == [6, 3]


def test_steps_go_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """And a state does not count before the best parameters that were saved before it."""
    go_on, order = threading.Event(), []
    write = checkpoint.write_manifest

    def slowly(folder, body, digests):
        assert go_on.wait(60)
        order.append((folder.parent.name, body["step"]))
        write(folder, body, digests)

    class Watched(Toy):
        def step(self, state, batch, step):
            if step == 5:
                # Step 4 is validated and saved, and not yet whole.
                assert Shelf(tmp_path / "toy" / "checkpoints").latest() is None
                go_on.set()
            return super().step(state, batch, step)

    monkeypatch.setattr(checkpoint, "write_manifest", slowly)
    config = dataclasses.replace(CONFIG, save_every=4)
    Watched().run(tmp_path, config)
    assert order[:2] == [("best", 4), ("checkpoints", 4)]
    assert len(order) == len(set(order)) == 6


def test_a_save_that_fails_in_the_background_ends_the_run(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    monkeypatch.setattr(checkpoint, "write_manifest", full)
    toy = Toy()
    with pytest.raises(OSError, match="No space left"):
        toy.run(tmp_path, dataclasses.replace(CONFIG, save_every=2, eval_every=100))
    assert len(toy.steps) < 11
    assert not list((tmp_path / "toy" / "checkpoints").iterdir())


@pytest.mark.usefixtures("plain_signal")
def test_a_validation_that_was_made_up_for_and_lost_is_made_again(tmp_path):
    """Stopped in a validation, then killed after it, before the next state was saved."""
    config = dataclasses.replace(CONFIG, save_every=100)
    with stoppable(), pytest.raises(Stopped):
        Stopping(validation=1).run(tmp_path, config)
    for _ in range(2):
        with pytest.raises(KilledError):
            Toy(die_at=5).run(tmp_path, config)
        assert heads(tmp_path).count((4, "valid")) == 1
    Toy().run(tmp_path, config)
    assert sorted(heads(tmp_path)) == sorted(whole(config))
