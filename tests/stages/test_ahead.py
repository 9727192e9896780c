"""Programs compiled ahead are those that a run then calls; they change no bit of what it makes."""

import json
import threading
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax import monitoring

from morer1_jax import train as command
from morer1_jax.config.binding import read_config
from morer1_jax.run.shelf import Shelf
from morer1_jax.stages.ahead import Program, compile_programs, in_threads

TINY = Path(__file__).parents[1] / "configs" / "tiny.py"
COMPILATION = "/jax/core/compile/backend_compile_duration"
# All but the start of parameters and optimizer, the count at a step's end, checks of what is saved,
# and single operations, which JAX compiles by themselves.
LARGE = {"sft": {"step", "run", "rollout"}, "grpo": {"score", "update"}}
# What depends on the machine's mood.
TIMED = ("step_time", "time/", "throughput/", "mfu", "compilations")


class Watch:
    """The names of programs that are compiled, or read from the cache: ahead, and when called."""

    def __init__(self):
        self.ahead, self.called = [], []

    def __call__(self, event, seconds, fun_name="", **_):
        if event == COMPILATION:
            thread = threading.current_thread().name
            names = self.ahead if thread.startswith("compile") else self.called
            names.append(fun_name.removeprefix("jit(").removesuffix(")"))


@pytest.fixture
def watch():
    watch = Watch()
    monitoring.register_event_duration_secs_listener(watch)
    yield watch
    monitoring.unregister_event_duration_listener(watch)


def made_by(workdir):
    """What a run has made: records, ratings, completions, answers, and parameters by name."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [
        {key: value for key, value in line.items() if not key.startswith(TIMED)}
        for line in map(json.loads, lines)
    ]
    names = ("rate/ratings.jsonl", "rollouts.jsonl", "eval/grpo.answers.jsonl")
    shelf = Shelf(workdir / "grpo" / "checkpoints")
    best = shelf.best_parameters(shelf.best()[0]) / "arrays"
    found = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(best)
    return records, [(workdir / name).read_text() for name in names], found


@pytest.mark.usefixtures("quick_compiles")
@pytest.mark.parametrize(
    ("stages", "count", "changes"),
    [
        ("sft", 1, {}),
        pytest.param("sft,rate,grpo,evaluate", 1, {}, marks=pytest.mark.soak),
        # Where parameters are moved to the sampler's layout; a second update has other arguments.
        pytest.param(
            "sft,rate,grpo,evaluate",
            2,
            {"runtime.dtype": "bfloat16", "grpo.updates": 2, "mesh.fsdp": 2},
            marks=pytest.mark.soak,
        ),
    ],
)
def test_a_run_calls_what_was_compiled_ahead(
    small_world, tmp_path, devices, watch, stages, count, changes
):
    config = read_config(TINY)
    config.stages, config.data.folder = stages, str(small_world)
    config.sft.steps, config.grpo.steps, config.runtime.decode_unroll = 1, 1, False
    config.update_from_flattened_dict(changes)
    large = set().union(*(names for stage, names in LARGE.items() if stage in stages))
    config.compile.threads = 2
    with devices(count):
        command.train(config, tmp_path / "ahead")
        assert large <= set(watch.ahead)
        assert not {*large, "move"} & set(watch.called)
        if "grpo" in stages:
            watch.ahead.clear()
            config.compile.threads = 0
            command.train(config, tmp_path / "called")
            assert not watch.ahead
            assert large <= set(watch.called)
            *ours, params = made_by(tmp_path / "ahead")
            *theirs, expected = made_by(tmp_path / "called")
            assert ours == theirs
            jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_calls_begin_in_their_order():
    begun = []
    calls = [lambda n=n: begun.append(n) or n * n for n in range(20)]
    assert sorted(in_threads(calls, threads=1)) == [(n, n * n) for n in range(20)]
    assert begun == list(range(20))


def test_two_at_once():
    both = threading.Barrier(2, timeout=20)
    places = [place for place, _ in in_threads([both.wait, both.wait], threads=2)]
    assert sorted(places) == [0, 1]


def test_a_program_that_does_not_compile_is_named_and_those_after_it_are_dropped(capsys):
    begun = []

    def compile_(number):
        begun.append(number)
        if number == 1:
            raise ValueError("Used 20G of 16G\nhbm")
        time.sleep(0.02)

    programs = [Program(f"number {n}", lambda n=n: compile_(n)) for n in range(50)]
    with pytest.raises(RuntimeError, match=r"^compiling number 1: Used 20G of 16G hbm$"):
        compile_programs(programs, threads=1)
    assert len(begun) < 50
    assert "compiled number 0: 0.0 s" in capsys.readouterr().out


def test_a_name_is_compiled_once_and_then_not_at_all(watch):
    jitted = jax.jit(lambda x: x * 3 + 1)
    like = jax.ShapeDtypeStruct((3,), "float32")
    compile_programs([Program.of("small", jitted, like)] * 2, threads=2)
    assert len(watch.ahead) == 1
    np.testing.assert_array_equal(jitted(np.ones(3, np.float32)), 4)
    assert not watch.called
