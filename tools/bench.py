"""Measures our steps and PyTorch's: the same shapes, the same weights, in turns.

python tools/bench.py --preset=small --out=bench

Results of earlier runs in the folder are kept, so that tasks can be measured one by one. Each task
is written as soon as it is measured. A task that fails does not end the others; the same command,
started again, measures only what is missing.
Before a task is timed, both sides must compute the same: a step's loss, gradient and entropy, or a
sampler's greedy tokens. PyTorch runs in its libraries' default form and in the faster ones of
`tools/bench/peers_model.py`; the tables compare ours with each, the fastest first.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from bench import compare
from bench.cases import PRESETS
from bench.growth import Growth
from bench.model import device_name, write_model
from bench.runner import check_needs, measure_all
from bench.turns import Timing
from morer1_jax.cli import needs_extra, run_main
from morer1_jax.errors import ConfigError
from morer1_jax.files import check_writable
from morer1_jax.hosts.alone import check_alone
from morer1_jax.paths import local_path
from morer1_jax.run.lock import hold

_PRESET = flags.DEFINE_enum("preset", "small", sorted(PRESETS), "Sizes of model and inputs.")
_TASKS = flags.DEFINE_list("tasks", [], "Tasks to measure, such as sft,grpo/128; by default all.")
_FORMS = flags.DEFINE_list(
    "forms", [], "Ways to run PyTorch, such as default,onednn; by default all."
)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Number of timed runs of each side.", 1)
_OUT = flags.DEFINE_string("out", None, "Folder for bench.md, bench.json and bench.png.")


def main(argv: list[str]) -> None:
    """Runs the command line."""
    del argv
    check_alone()
    with needs_extra("bench"):
        from bench.peers import Peer
    preset = PRESETS[_PRESET.value]

    # What is measured: the flags' tasks, in the flags' forms, that can run here.
    all_comparisons = compare.comparisons(preset)
    _check_known("tasks", _TASKS.value, [comparison.task for comparison in all_comparisons])
    _check_known("forms", _FORMS.value, Peer.FORMS)
    comparisons = [c for c in all_comparisons if not _TASKS.value or c.task in _TASKS.value]

    def forms(task: str) -> list[str]:
        return [f for f in Peer.forms(task) if not _FORMS.value or f in _FORMS.value]

    sides = {
        comparison.task: [
            f"{peer}, {form}" for peer, task in comparison.peers.items() for form in forms(task)
        ]
        for comparison in comparisons
    }
    for task in sides:
        if not sides[task]:
            raise ConfigError(
                f"--forms: expected one that can do {task}, found {', '.join(_FORMS.value)}; leave "
                f"{task} out of --tasks"
            )
    check_needs(comparisons, forms)

    # Earlier results, which are read and kept under the folder's lock.
    results = compare.Results(preset, device_name())
    out = None if _OUT.value is None else local_path(_OUT.value, "--out")
    lock = contextlib.nullcontext()
    if out is not None:
        check_writable(out, folder=True)
        lock = hold(out, folder=True)
    with lock, tempfile.TemporaryDirectory() as folder:
        if out is not None:
            results = compare.Results.read(out / "bench.json", preset, device_name())
        for task in sides:
            results.check_replaceable(task, sides[task])
        # The measurements, on a model that all sides load.
        model = Path(folder) / "model"
        write_model(preset, model)
        arguments = [f"--folder={model}", f"--preset={_PRESET.value}"]
        rounds, tolerance = _ROUNDS.value, compare.TOLERANCE[preset.dtype]

        def measure(comparison: compare.Comparison) -> dict[str, Timing]:
            return compare.measure(comparison, arguments, forms, rounds, tolerance)

        run = {"sides": sides, "rounds": rounds}
        for outcome in measure_all(results, comparisons, measure, run, out):
            print(outcome.table(), flush=True)
    print(Growth.of(results).tables())


def _check_known(flag: str, names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--{flag}: expected names among {', '.join(known)}, found {name!r}; correct it"
            )


if __name__ == "__main__":
    run_main(main)
