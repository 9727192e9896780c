"""Measures our steps beside PyTorch's: the same shapes, the same weights, in turns.

python tools/bench.py --preset=small --out=bench

What an earlier run has left in that folder is kept, so that tasks can be measured one by one. Each
is written as soon as it is measured; one that fails does not end the others, and the same command
then measures what is missing.
Before it is timed, a step's loss, gradient and entropy, or a sampler's greedy tokens, are checked
to be the same on both sides. PyTorch runs as it comes and in the faster forms of
`tools/bench/peers_model.py`; the fastest is the one to beat.
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
from bench.sitting import check_needs, sit
from bench.turns import Timing
from morer1_jax.cli import needs_extra, run_main
from morer1_jax.errors import ConfigError
from morer1_jax.files import check_writable
from morer1_jax.paths import local_path
from morer1_jax.processes import check_alone
from morer1_jax.run.lock import hold

_PRESET = flags.DEFINE_enum("preset", "small", sorted(PRESETS), "Sizes.")
_TASKS = flags.DEFINE_list("tasks", [], "Of ours, such as sft,grpo/128; by default all.")
_FORMS = flags.DEFINE_list("forms", [], "Of PyTorch, such as default,onednn; by default all.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns that each side has.", 1)
_OUT = flags.DEFINE_string("out", None, "A folder for bench.md, .json and .png.")


def main(argv: list[str]) -> None:
    """The command line's entry."""
    del argv
    check_alone()
    with needs_extra("bench"):
        from bench.peers import Peer
    preset = PRESETS[_PRESET.value]
    everything = compare.comparisons(preset)
    _check_known("tasks", _TASKS.value, [comparison.task for comparison in everything])
    _check_known("forms", _FORMS.value, Peer.FORMS)
    chosen = [c for c in everything if not _TASKS.value or c.task in _TASKS.value]

    def forms(task: str) -> list[str]:
        return [f for f in Peer.forms(task) if not _FORMS.value or f in _FORMS.value]

    sides = {
        one.task: [f"{peer}, {form}" for peer, task in one.peers.items() for form in forms(task)]
        for one in chosen
    }
    for task in sides:
        if not sides[task]:
            raise ConfigError(f"--forms: none of them can do {task}; leave it out of --tasks")
    check_needs(chosen, forms)
    results = compare.Results(preset, device_name())
    out = None if _OUT.value is None else local_path(_OUT.value, "--out")
    held = contextlib.nullcontext()
    if out is not None:
        check_writable(out, folder=True)
        held = hold(out, folder=True)
    with held, tempfile.TemporaryDirectory() as folder:
        if out is not None:
            results = compare.Results.read(out / "bench.json", preset, device_name())
        for task in sides:
            results.check_replaceable(task, sides[task])
        model = Path(folder) / "model"
        write_model(preset, model)
        given = [f"--folder={model}", f"--preset={_PRESET.value}"]
        rounds, tolerance = _ROUNDS.value, compare.TOLERANCE[preset.dtype]

        def measure(one: compare.Comparison) -> dict[str, Timing]:
            return compare.measure(one, given, forms, rounds, tolerance)

        for one in sit(results, chosen, measure, {"sides": sides, "rounds": rounds}, out):
            print(one.table(), flush=True)
    print(Growth.of(results).tables())


def _check_known(flag: str, given: Sequence[str], known: Sequence[str]) -> None:
    for one in given:
        if one not in known:
            raise ConfigError(f"--{flag}: {one!r} found, some of {', '.join(known)} expected")


if __name__ == "__main__":
    run_main(main)
