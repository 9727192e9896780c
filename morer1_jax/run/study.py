"""The main job over several seeds, with its controls, and the table of means and spreads.

For each seed: the whole job; `control`, SFT that goes on for as long as rating and GRPO
took; and GRPO without mixing, from the same SFT checkpoint and ratings.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from morer1_jax.files import atomic_dir, atomic_write
from morer1_jax.run.config import ConfigError
from morer1_jax.run.evaluate import read_scores

MAIN_STAGES = "synthesise,sft,rate,grpo,control,baselines,evaluate"
# What GRPO without mixing takes over from the main run of its seed.
_SHARED = ("data", "tokenizer", "sft", "rate")
SYSTEMS = {
    "majority": "majority label",
    "photo_hidden": "photo hidden",
    "title_hidden": "title hidden",
    "sft": "SFT",
    "control": "SFT, going on",
    "no_mixing": "GRPO without mixing",
    "grpo": "GRPO with mixing",
}
COLUMNS = ("accuracy", "micro_precision", "micro_recall", "micro_f1", "macro_f1", "unreadable")


def run_study(config: str, folder: Path, seeds: Sequence[int], overrides: Sequence[str]) -> None:
    """Runs what is not done yet, one process a run, and writes `study.json` and `study.md`.

    Args:
      config: path of a config file.
      folder: where the runs' workdirs go; a study that was cut off goes on where it was.
      overrides: further `--config.key=value` arguments for every run.

    Raises:
      ConfigError: a run failed; its own message is on stderr.
    """
    for seed in seeds:
        main, plain = folder / f"seed{seed}", folder / f"seed{seed}-no-mixing"
        given = [f"--config.seed={seed}", *overrides]
        _train(config, main, MAIN_STAGES, given)
        for name in _SHARED:
            if not (plain / name).exists():
                with atomic_dir(plain / name) as partial:
                    shutil.copytree(main / name, partial, dirs_exist_ok=True)
        _train(config, plain, "grpo,evaluate", [*given, "--config.grpo.mixing=False"])
    results = collect(folder, seeds)
    atomic_write(folder / "study.json", json.dumps(results, indent=1) + "\n")
    atomic_write(folder / "study.md", table(results))
    print(table(results))


def _train(config: str, workdir: Path, stages: str, given: Sequence[str]) -> None:
    command = [sys.executable, "-m", "morer1_jax.train", f"--config={config}"]
    command += [f"--workdir={workdir}", f"--config.stages={stages}", *given]
    print("$", " ".join(command), flush=True)
    if code := subprocess.run(command, check=False).returncode:
        raise ConfigError(
            f"{workdir}: this run ended with exit code {code}, as said above; put that right and "
            "start again, what is done stays"
        )


def collect(folder: Path, seeds: Sequence[int]) -> dict[str, dict[str, dict[str, Any]]]:
    """Test scores by seed and system."""
    results = {}
    for seed in seeds:
        scores = read_scores(folder / f"seed{seed}")
        scores["no_mixing"] = read_scores(folder / f"seed{seed}-no-mixing")["grpo"]
        results[str(seed)] = {
            name: {column: scores[name][column] for column in COLUMNS} for name in SYSTEMS
        }
    return results


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Means ± sample standard deviations over seeds, and GRPO's gains, in Markdown."""
    lines = [
        "| system | " + " | ".join(column.replace("_", " ") for column in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name, shown in SYSTEMS.items():
        cells = [_spread([run[name][column] for run in results.values()]) for column in COLUMNS]
        lines.append(f"| {shown} | " + " | ".join(cells) + " |")
    lines += ["", f"Micro F1 of GRPO with mixing less that of, over {len(results)} seeds:", ""]
    for name in ("sft", "control", "no_mixing"):
        gains = [run["grpo"]["micro_f1"] - run[name]["micro_f1"] for run in results.values()]
        each = ", ".join(f"{gain:+.1f}" for gain in gains)
        lines.append(f"- {SYSTEMS[name]}: {_spread(gains)} ({each})")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} ± {deviation:.1f}"
