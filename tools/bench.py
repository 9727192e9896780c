"""Measures our steps beside PyTorch's: the same shapes, the same weights, in turns.

python tools/bench.py --preset=small --out=bench

What an earlier run has left in that folder is kept, so that tasks can be measured one by one.
Before it is timed, a step's loss, gradient and entropy, or a sampler's greedy tokens, are checked
to be the same on both sides. PyTorch runs as it comes and in the faster forms of
`morer1_jax/bench/peers_model.py`; the fastest is the one to beat.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from morer1_jax.bench import compare
from morer1_jax.bench.cases import PRESETS
from morer1_jax.files import check_writable
from morer1_jax.run.config import ConfigError, run_main
from morer1_jax.run.processes import check_alone

_PRESET = flags.DEFINE_enum("preset", "small", sorted(PRESETS), "Sizes.")
_TASKS = flags.DEFINE_list("tasks", [], "Of ours, such as sft,grpo/128; by default all.")
_FORMS = flags.DEFINE_list("forms", [], "Of PyTorch, such as default,onednn; by default all.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns that each side has.", 1)
_OUT = flags.DEFINE_string("out", None, "A folder for bench.md, .json and .png.")


def main(argv: list[str]) -> None:
    """The command line's entry."""
    del argv
    check_alone()
    try:
        import matplotlib  # noqa: F401  (not to be missed at the end of hours)

        from morer1_jax.bench.peers import Peer
    except ImportError as error:
        raise ConfigError(f"{error}; pip install 'morer1-jax[bench]'") from None
    from morer1_jax.bench.growth import Growth, draw
    from morer1_jax.bench.model import device_name, made_now, write_model

    preset = PRESETS[_PRESET.value]
    everything = compare.comparisons(preset)
    _check_known("tasks", _TASKS.value, [comparison.task for comparison in everything])
    _check_known("forms", _FORMS.value, Peer.FORMS)
    chosen = [c for c in everything if not _TASKS.value or c.task in _TASKS.value]

    def forms(task: str) -> list[str]:
        return [f for f in Peer.forms(task) if not _FORMS.value or f in _FORMS.value]

    results = compare.Results(preset, device_name())
    out = None if _OUT.value is None else Path(_OUT.value)
    if out is not None:
        check_writable(out, folder=True)
        out.mkdir(parents=True, exist_ok=True)
        results = compare.Results.read(out / "bench.json", preset, device_name())
    for one in chosen:
        sides = [f"{peer}, {form}" for peer, task in one.peers.items() for form in forms(task)]
        if not sides:
            raise ConfigError(f"--forms: none of them can do {one.task}; leave it out of --tasks")
        results.check_replaceable(one.task, sides)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model(preset, model)
        runs = compare.run(_PRESET.value, preset, model, chosen, forms, _ROUNDS.value)
        for comparison, timings in runs:
            measured = compare.Measured(comparison.name, made_now(), timings)
            results.tasks[comparison.task] = measured
            print(measured.table(), flush=True)
            if out is not None:
                results.save(out / "bench.json")
                tables = [one.table() for _, one in results.in_order()]
                growth = Growth.of(results).tables()
                (out / "bench.md").write_text("\n".join([*tables, growth]))
                draw(results, out / "bench.png")
    print(Growth.of(results).tables())


def _check_known(flag: str, given: Sequence[str], known: Sequence[str]) -> None:
    for one in given:
        if one not in known:
            raise ConfigError(f"--{flag}: {one!r} found, some of {', '.join(known)} expected")


if __name__ == "__main__":
    run_main(main)
