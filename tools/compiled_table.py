"""Writes the figures of `python -m morer1_jax.compile --json=…` as a table in Markdown.

    python -m morer1_jax.compile --config=configs/qwen2_5_vl_3b_sft.py:v5e:4x4 \\
        --topology=v5e:4x4 --json=sft.json
    python tools/compiled_table.py --figures=sft.json,grpo.json

A row is a config on a topology; its programs may come from several files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from absl import flags

from morer1_jax.cli import run_main
from morer1_jax.paths import local_path

_FIGURES = flags.DEFINE_list("figures", None, "Files that the command wrote by --json.")

_HEAD = (
    "| config | topology | fullest program | SFT step | update | a token |",
    "|---|---|---|---|---|---|",
)


def main(argv: list[str]) -> None:
    """Runs the command line."""
    del argv
    files = [local_path(name, "--figures") for name in _FIGURES.value]
    print("\n".join((*_HEAD, *rows([json.loads(file.read_text()) for file in files]))))


def rows(figures: Iterable[dict[str, Any]]) -> list[str]:
    """Returns the table's rows, in the order of the first figures of each."""
    programs: dict[tuple[str, ...], dict[str, Any]] = {}
    chips: dict[tuple[str, ...], dict[str, Any]] = {}
    for one in figures:
        changes = ", ".join(f"`{key}={value}`" for key, value in one["changes"].items())
        slices = f"{one['slices']} × " if one["slices"] > 1 else ""
        name = Path(one["config"].rpartition(".py")[0]).name
        key = f"{name}{changes and ' with '}{changes}", f"{slices}{one['topology']}"
        chips[key] = one["chip"]
        programs.setdefault(key, {}).update(one["programs"])
    return [f"| {' | '.join((*key, *_cells(programs[key], chips[key])))} |" for key in programs]


def _cells(programs: dict[str, Any], chip: dict[str, Any]) -> tuple[str, ...]:
    failing = [name for name, program in programs.items() if program["estimate"] is None]
    if failing:
        fullest = f"{' and '.join(failing)}: does not compile"
    else:
        sizes = {name: _live(program["estimate"]["memory"]) for name, program in programs.items()}
        name = max(sizes, key=sizes.__getitem__)
        fullest = f"{name}: {sizes[name] / 1e9:.1f} of {chip['hbm'] / 1e9:.1f} GB"
    steps = (_step(programs.get(name), chip) for name in ("SFT step", "update"))
    return fullest, *steps, _token(programs.get("rollout"), chip)


def _live(memory: dict[str, Any]) -> int:
    return memory["arguments"] + memory["temporary"] + sum(memory["beside"].values())


def _step(program: dict[str, Any] | None, chip: dict[str, Any]) -> str:
    """Returns a step's estimated time and MFU."""
    if program is None or program["estimate"] is None:
        return ""
    seconds = _seconds(program["estimate"]["once"], chip)
    if seconds is None:
        return ""
    return f"{seconds:.1f} s, MFU {program['flops'] / chip['flops'] / seconds:.0%}"


def _token(program: dict[str, Any] | None, chip: dict[str, Any]) -> str:
    """Returns the estimated time of a token with the smallest and the largest cache."""
    if program is None or program["estimate"] is None:
        return ""
    times = [_seconds(loop, chip) for loop in program["estimate"]["loops"]]
    if None in times:
        return ""
    return f"{1e3 * times[0]:.1f} to {1e3 * times[-1]:.1f} ms"


def _seconds(part: dict[str, Any], chip: dict[str, Any]) -> float | None:
    """Returns the estimated time, with nothing sent while computing; None where there is none."""
    rates = {True: chip["network_bytes"], False: chip["link_bytes"]}
    sent = sum(one["bytes"] / rates[one["across_slices"]] for one in part["sent"])
    return None if part["compute"] is None else part["compute"] + sent


if __name__ == "__main__":
    flags.mark_flag_as_required("figures")
    run_main(main)
