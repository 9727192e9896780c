"""Finds NaN and infinity in arrays, answers and updates, and raises errors that name them.

NaN and infinity spread to whatever is computed from them: a checkpoint that has them is useless,
and tokens sampled from them still look like an answer. So arrays are checked wherever numbers are
read, saved, or become a label.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from morer1_jax.errors import NotFiniteError
from morer1_jax.rollout.sampler import Rollout
from morer1_jax.run.mesh import fetch

# Steps in a row with a skipped update after which a run ends.
PATIENCE = 5

SKIPPED, IN_A_ROW = "skipped_updates", "skipped_in_a_row"


def first_not_finite(leaves: Mapping[str, jax.Array]) -> str | None:
    """Returns the name of the first array with a value that is not finite, or None.

    Integers and random keys are skipped. In a run of several processes all must call it at once.
    """
    # One program takes only arrays that are on the same devices.
    groups: dict[Any, list[str]] = {}
    for name, leaf in leaves.items():
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            groups.setdefault(frozenset(leaf.sharding.device_set), []).append(name)
    bad = []
    for names in groups.values():
        finite = fetch(_all_finite([leaves[name] for name in names]))
        bad += [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]
    return next((name for name in leaves if name in bad), None)


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> list[jax.Array]:
    # A sum, of zeros or a NaN, takes a CPU half the time of `all`, which is not vectorised there; a
    # maximum over devices may lose a NaN.
    return [jnp.isfinite(jnp.sum(leaf * 0)) for leaf in leaves]


def ways(dtype: str, *others: str) -> str:
    """Returns what a user can do about numbers that are not finite, for an error.

    Args:
        dtype: that they were computed in; unless it is float32, float32 is suggested.
        others: further suggestions, which come first.
    """
    wider = "compute in float32 (runtime.dtype; of a folder, tools/convert.py --dtype=float32)"
    return ", or ".join((*others, *(() if dtype == "float32" else (wider,))))


def check_drawn(fact: str, rollout: Rollout, dtype: str) -> None:
    """Checks that every token of a fact's answers was sampled from finite probabilities.

    Sampling returns a token even where no probability is finite, and it may well be a label's.

    Args:
        fact: the fact's id.
        rollout: the fact's answers, NumPy arrays without the batch axis.
        dtype: that the model computed in.

    Raises:
        NotFiniteError: a log-probability is not finite.
    """
    bad = np.argwhere(~np.isfinite(rollout.logprobs) & rollout.mask)
    if len(bad):
        sample, place = bad[0]
        raise NotFiniteError(
            f"fact {fact}: expected a finite log-probability of token {place + 1} of answer "
            f"{sample + 1}, found {rollout.logprobs[sample, place]}: the model's numbers overflow "
            f"in {dtype}; {ways(dtype, 'ask another checkpoint')}"
        )


def check_scores(stage: str, step: int, scores: Mapping[str, float]) -> None:
    """Checks that a validation's scores are finite, so that the best can be chosen.

    Raises:
        NotFiniteError: one is not finite.
    """
    for name, value in scores.items():
        if not math.isfinite(value):
            raise NotFiniteError(
                f"{stage} step {step}: validation/{name}: expected a finite number, found {value}; "
                "look at the validation split"
            )


class SkippedUpdates:
    """Counts a training's skipped updates, and ends it when too many are skipped in a row.

    The host is steps ahead of the device: `add` takes metrics that may still be being computed, and
    `read` looks at them later.

    Attributes:
        row: number of steps in a row, up to the last one read, whose updates were all skipped.
    """

    def __init__(
        self,
        stage: str,
        steps: int,
        latest: Callable[[], int | None],
        write: Callable[[str], None],
        extra: Mapping[str, Any],
        *,
        updates: int = 1,
        dtype: str = "float32",
    ) -> None:
        """Starts counting, or goes on from a checkpoint.

        Args:
            stage: name for messages.
            steps: number of steps of the whole training.
            latest: returns the step of the newest checkpoint.
            write: shows a line to the user.
            extra: result of `extra` in the checkpoint that training goes on from; {} at the start.
            updates: number of updates in a step.
            dtype: that updates are computed in.
        """
        self._updates, self._dtype = updates, dtype
        self._stage, self._latest, self._write = stage, latest, write
        self._patience = min(PATIENCE, steps)
        self._unread: collections.deque[tuple[int, Mapping[str, Any]]] = collections.deque()
        self._count, self.row = extra.get(SKIPPED, 0), extra.get(IN_A_ROW, 0)
        self._error: NotFiniteError | None = None

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Adds the metrics of a step, which may still be being computed."""
        self._unread.append((step, metrics))

    def read(self, step: int) -> None:
        """Reads the metrics of all steps up to this one; waits for those not yet computed."""
        while self._unread and self._unread[0][0] <= step:
            # Count what was skipped; after an error the count alone goes on.
            at, metrics = self._unread.popleft()
            skipped, norm = (float(metrics.get(name, 0)) for name in (SKIPPED, "param_norm"))
            self._count += int(skipped)
            self.row = self.row + 1 if skipped >= self._updates else 0
            broken = not math.isfinite(norm)
            if self._error is not None or not (skipped or broken):
                continue
            # Warn of a skipped update; keep the error, for `check`, where training must end.
            problem = f"{self._stage} step {at}: {_not_finite_metric(metrics)}"
            if not broken:
                several = f"{skipped:.0f} of its {self._updates} updates are"
                updates = "its update is" if self._updates == 1 else several
                self._write(f"{problem}; {updates} skipped")
            if broken or self.row >= self._patience:
                repeated = "" if broken else f", as in each of {self.row} steps in a row"
                saved = self._latest()
                checkpoint = "none" if saved is None else f"of step {saved}"
                self._error = NotFiniteError(
                    f"{problem}{repeated}; the last finite checkpoint: {checkpoint}; with a new "
                    "--workdir, "
                    + ways(self._dtype, "lower the stage's optimizer.lr or lengthen its warmup")
                )

    def take(self) -> int:
        """Returns the number of updates skipped since the last call."""
        count, self._count = self._count, 0
        return count

    def check(self) -> None:
        """Ends a training that has skipped too many updates in a row, or has lost its parameters.

        Raises:
            NotFiniteError: naming step, metric and last finite checkpoint.
        """
        if self._error is not None:
            raise self._error

    def extra(self) -> dict[str, int]:
        """Returns the counts, for a checkpoint, so that a resumed run goes on counting."""
        return {SKIPPED: self._count, IN_A_ROW: self.row}


def _not_finite_metric(metrics: Mapping[str, Any]) -> str:
    """Describes the first metric that is not finite: norm of the parameters, loss, then others."""
    numbers = {name: float(value) for name, value in metrics.items() if np.ndim(value) == 0}
    first = dict.fromkeys(("param_norm", "loss", "grad_norm")) | numbers
    for name in first:
        if name in numbers and not math.isfinite(numbers[name]):
            return f"expected a finite {name}, found {numbers[name]}"
    return "expected finite numbers, found others"
