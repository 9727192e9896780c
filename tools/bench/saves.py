"""Measures side by side what saving a training's state adds to its steps.

Rounds are taken in turns: steps alone, steps of which the first is followed by the state's copy to
the host, and steps of which the first is followed by a save in the background. What a save adds
beyond the copy is the difference of the last two.

On a CPU the copy is a view of the state, which takes no time, and keeps the step after it from
taking over the state's memory, as that of a save does. All that a save blocks then counts as added.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from morer1_jax.learn.state import OptimizerConfig, TrainState
from morer1_jax.run.checkpoint import Checkpointer
from morer1_jax.run.finite import first_not_finite

Step = Callable[[TrainState], TrainState]

_LAYERS = 16
_ROWS = 32  # Of inputs: enough for the layers' products to be half of a step on a CPU.
_OPTIMIZER = OptimizerConfig(lr=1e-4).build(1)


@dataclasses.dataclass(frozen=True)
class Round:
    """The seconds of steps one after another, with one save or copy or none.

    Attributes:
        steps: of each step.
        blocked: between the first step and the second.
        total: until all steps are done, and the save is whole.
    """

    steps: list[float]
    blocked: float
    total: float


def make_state(parameters: int) -> TrainState:
    """Returns a state of about `parameters` float32 numbers in square matrices, with its moments.

    The layers are random; AdamW's two moments are as large as they, and zero.
    """
    width = max(1, round((parameters / _LAYERS) ** 0.5))

    def begin() -> TrainState:
        keys = jax.random.split(jax.random.key(0), _LAYERS)
        params = {
            f"layer_{number:02}": jax.random.normal(key, (width, width)) * width**-0.5
            for number, key in enumerate(keys)
        }
        return TrainState(jnp.zeros((), jnp.int32), params, _OPTIMIZER.init(params))

    return jax.jit(begin)()


@functools.partial(jax.jit, donate_argnums=0)
def computing(state: TrainState) -> TrainState:
    """Trains a residual network of the state's matrices for a step, on random numbers.

    The state is donated, as in training.
    """
    width = len(state.params["layer_00"])
    x, y = jax.random.normal(jax.random.fold_in(jax.random.key(1), state.step), (2, _ROWS, width))

    def loss(params: Mapping[str, Float[Array, "d d"]]) -> Float[Array, ""]:
        out = x
        for kernel in params.values():
            out = out + jnp.tanh(out @ kernel)
        return jnp.mean((out - y) ** 2)

    grads = jax.grad(loss)(state.params)
    changes, opt_state = _OPTIMIZER.update(grads, state.opt_state, state.params)
    params = jax.tree.map(jnp.add, state.params, changes)
    return TrainState(state.step + 1, params, opt_state)


def waiting(seconds: float, state: TrainState) -> TrainState:
    """Sleeps for the seconds of a step, and returns the state as it is."""
    time.sleep(seconds)
    return state


def time_saves(
    folder: Path, parameters: int, every: int, rounds: int, wait: float
) -> dict[str, dict[str, Any]]:
    """Measures what a save adds to steps of one or two kinds.

    "computing" trains on this machine's devices. Where these are the processor itself, what writes
    and digests a save's files takes the step's cores and memory. So "waiting", a sleep, is measured
    there, too: as while a chip computes a step, the host has nothing else to do.

    Args:
        folder: for checkpoints: three of them, of 12 bytes for each parameter.
        parameters: number of the state's parameters.
        every: steps of a round.
        rounds: of steps alone, with a copy and with a save.
        wait: seconds of a step that waits.

    Returns:
        By kind of step: see `figures`; the seconds of a save's look for NaN and infinity, which it
        blocks for; and the seconds after which its files are written and digested (the median).
    """
    kinds: dict[str, Step] = {"computing": computing}
    if jax.default_backend() == "cpu":
        kinds["waiting"] = functools.partial(waiting, wait)
    results = {}
    for kind, step in kinds.items():
        state = make_state(parameters)
        check = _check_seconds(state)
        measured, written = _measure(folder / kind, step, state, every, rounds)
        results[kind] = figures(measured) | {
            "check": round(check, 3),
            "written_after": round(statistics.median(written), 2),
        }
    return results


def _check_seconds(state: TrainState, repeats: int = 3) -> float:
    """Returns the least seconds in which the devices look for NaN and infinity in the state."""
    leaves = {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(state))}
    seconds = []
    for _ in range(repeats):
        before = time.perf_counter()
        first_not_finite(leaves)
        seconds.append(time.perf_counter() - before)
    return min(seconds)


def _measure(
    folder: Path, step: Step, state: TrainState, every: int, rounds: int
) -> tuple[dict[str, list[Round]], list[float]]:
    """Measures rounds of steps alone, with a copy and with a save, in turns.

    Returns:
        The rounds by mode, and of each save the seconds after which its files were written and
        digested.
    """
    begun, ended = [], []

    def save(state: TrainState) -> None:
        begun.append(time.perf_counter())
        checkpoints.save(len(begun), state)

    with Checkpointer(
        folder, background=True, before_whole=lambda: ended.append(time.perf_counter())
    ) as checkpoints:
        modes = {
            "alone": (lambda state: None, lambda: None),
            "copy": (jax.device_get, lambda: None),
            "save": (save, checkpoints.wait),
        }
        measured: dict[str, list[Round]] = {mode: [] for mode in modes}
        # The first compile their programs, and have the file system find room.
        for begin, finish in modes.values():
            state, _ = _round(step, state, 2, begin, finish)
        for number in range(rounds):
            for mode in list(modes)[:: 1 if number % 2 == 0 else -1]:
                state, timed = _round(step, state, every, *modes[mode])
                measured[mode].append(timed)
    return measured, [end - begin for begin, end in zip(begun, ended, strict=True)][1:]


def _round(
    step: Step,
    state: TrainState,
    every: int,
    begin: Callable[[TrainState], Any],
    finish: Callable[[], None],
) -> tuple[TrainState, Round]:
    """Times steps, `begin` of the state after the first, and what `finish` still waits for.

    What `begin` returns is held until the last step is done.
    """
    steps, blocked, held, start = [], 0.0, None, time.perf_counter()
    for number in range(every):
        before = time.perf_counter()
        state = jax.block_until_ready(step(state))
        steps.append(time.perf_counter() - before)
        if number == 0:
            before = time.perf_counter()
            held = begin(state)
            blocked = time.perf_counter() - before
    finish()
    total = time.perf_counter() - start
    del held
    return state, Round(steps, blocked, total)


def figures(measured: Mapping[str, Sequence[Round]]) -> dict[str, float]:
    """Returns figures of rounds of steps alone, with a copy and with a save.

    Returns:
        Seconds of the median step, by mode; seconds of the mean step, for which each round's whole
        time is divided by its steps; seconds for which a copy and a save block (medians); and what
        a save adds to the mean step beyond a copy, in percent of the mean step alone: the median
        over the rounds, the least and the most.
    """
    steps = {
        mode: statistics.median(seconds for timed in rounds for seconds in timed.steps)
        for mode, rounds in measured.items()
    }
    means = {
        mode: [timed.total / len(timed.steps) for timed in rounds]
        for mode, rounds in measured.items()
    }
    blocked = {
        mode: statistics.median(timed.blocked for timed in measured[mode])
        for mode in ("copy", "save")
    }
    added = [
        100 * (save - copy) / alone
        for alone, copy, save in zip(means["alone"], means["copy"], means["save"], strict=True)
    ]
    return {
        **{f"{mode}_median_step": round(seconds, 3) for mode, seconds in steps.items()},
        **{f"{mode}_mean_step": round(statistics.mean(each), 3) for mode, each in means.items()},
        **{f"{mode}_blocks": round(seconds, 3) for mode, seconds in blocked.items()},
        "added_percent": round(statistics.median(added), 2),
        "added_least": round(min(added), 2),
        "added_most": round(max(added), 2),
    }
