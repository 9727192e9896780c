"""Measures our steps beside PyTorch's: the same shapes, the same weights, in turns.

python tools/bench.py --preset=small --out=bench

What an earlier run has left in that folder is kept, so that tasks can be measured one by one. Every
timed thing is first checked to compute the same numbers on both sides. PyTorch runs as it comes and
in the faster forms of `morer1_jax/bench/peers_model.py`; the fastest is the one to beat.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from absl import flags

from morer1_jax.bench import compare
from morer1_jax.bench.cases import PRESETS
from morer1_jax.files import check_writable
from morer1_jax.run.config import ConfigError, run_main

_PRESET = flags.DEFINE_enum("preset", "small", sorted(PRESETS), "Sizes.")
_TASKS = flags.DEFINE_list("tasks", [], "Of ours, such as sft,grpo/128; by default all.")
_FORMS = flags.DEFINE_list("forms", [], "Of PyTorch, such as default,onednn; by default all.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Turns that each side has.", 1)
_OUT = flags.DEFINE_string("out", None, "A folder for bench.md, .json and .png.")


def main(argv: list[str]) -> None:
    """The command line's entry."""
    del argv
    try:
        from morer1_jax.bench.peers import Peer
    except ImportError as error:
        raise ConfigError(f"{error}; pip install 'morer1-jax[bench]'") from None
    from morer1_jax.bench.growth import Growth, draw
    from morer1_jax.bench.model import device_name, write_model

    preset = PRESETS[_PRESET.value]
    everything = compare.comparisons(preset)
    known = [comparison.task for comparison in everything]
    if unknown := [task for task in _TASKS.value if task not in known]:
        raise ConfigError(f"--tasks: {unknown[0]!r} found, some of {', '.join(known)} expected")
    chosen = [c for c in everything if not _TASKS.value or c.task in _TASKS.value]

    def forms(task: str) -> list[str]:
        return [f for f in Peer.forms(task) if not _FORMS.value or f in _FORMS.value]

    results = compare.Results(_PRESET.value, device_name(), {})
    out = None if _OUT.value is None else Path(_OUT.value)
    if out is not None:
        check_writable(out, folder=True)
        out.mkdir(parents=True, exist_ok=True)
        results = compare.Results.read(out / "bench.json", _PRESET.value, device_name())
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model(preset, model)
        runs = compare.run(_PRESET.value, preset, model, chosen, forms, _ROUNDS.value)
        for comparison, timings in runs:
            results.tasks[comparison.task] = comparison.name, timings
            print(compare.table(comparison.name, timings), flush=True)
            if out is not None:
                # In their own order, whatever was measured first.
                results = results.sorted(known)
                results.save(out / "bench.json")
    growth = Growth.of(results, preset).tables(preset)
    print(growth)
    if out is not None:
        (out / "bench.md").write_text("\n".join([*results.tables(), growth]))
        draw(results, preset, out / "bench.png")


if __name__ == "__main__":
    run_main(main)
