"""Runs the main job and its controls over several seeds; tabulates means and deviations.

For each seed: the whole job; `control`, SFT that goes on for as long as rating and GRPO took; and
GRPO without mixing, from the same SFT checkpoint and ratings.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from morer1_jax.errors import ConfigError
from morer1_jax.files import atomic_dir, atomic_write, write_json
from morer1_jax.report.tables import NAMES
from morer1_jax.stages.evaluate import read_scores

# Exit codes of a command; see `cli.run_main`.
_USER, _INTERRUPTED = 2, 130
MAIN_STAGES = "synthesise,sft,rate,grpo,control,baselines,evaluate"
# Folders that GRPO without mixing takes over from the main run of its seed.
_SHARED = ("data", "tokenizer", "sft", "rate")
COLUMNS = ("accuracy", "micro_precision", "micro_recall", "micro_f1", "macro_f1", "unreadable")


def run_study(config: str, folder: Path, seeds: Sequence[int], overrides: Sequence[str]) -> None:
    """Runs what is not done yet, one process for each run; writes `study.json` and `study.md`.

    Both files are written after each seed. A run that fails for want of memory or by a fault of the
    program does not end the other seeds; one that ends with an error that the user can put right
    (exit code 2) or is interrupted does.

    Args:
        config: path of a config file.
        folder: the runs' workdirs are in it; an interrupted study, started again, goes on from
            there.
        seeds: one run of the whole job and its controls for each.
        overrides: further `--config.key=value` arguments for every run.

    Raises:
        ConfigError: runs failed; names them. Their own messages are on stderr.
    """
    done, failures = [], []
    for seed in seeds:
        # The seed's runs; those that are done already end at once.
        try:
            _run_seed(config, folder, seed, overrides)
        except _RunFailed as error:
            failures.append(str(error))
            print(f"{error}; the other seeds go on", file=sys.stderr, flush=True)
            continue
        # The scores of all seeds so far.
        done.append(seed)
        results = collect(folder, done)
        write_json(folder / "study.json", results)
        atomic_write(folder / "study.md", table(results))
    if done:
        print(table(results))
    if failures:
        raise ConfigError(
            f"{'; '.join(failures)}; put that right and start again, what is done stays"
        )


class _RunFailed(Exception):
    """A run failed by no fault of the config or the data."""


def _run_seed(config: str, folder: Path, seed: int, overrides: Sequence[str]) -> None:
    main, no_mixing = folder / f"seed{seed}", folder / f"seed{seed}-no-mixing"
    overrides = [f"--config.seed={seed}", *overrides]
    _train(config, main, MAIN_STAGES, overrides)
    for name in _SHARED:
        if not (no_mixing / name).exists():
            with atomic_dir(no_mixing / name) as partial:
                shutil.copytree(main / name, partial, dirs_exist_ok=True)
    _train(config, no_mixing, "grpo,evaluate", [*overrides, "--config.grpo.mixing=False"])


def _train(config: str, workdir: Path, stages: str, overrides: Sequence[str]) -> None:
    command = [sys.executable, "-m", "morer1_jax.train", f"--config={config}"]
    command += [f"--workdir={workdir}", f"--config.stages={stages}", *overrides]
    print("$", " ".join(command), flush=True)
    code = subprocess.run(command, check=False).returncode
    problem = f"{workdir}: this run ended with exit code {code}, as said above"
    if code in (_USER, _INTERRUPTED):
        raise ConfigError(f"{problem}; put that right and start again, what is done stays")
    if code:
        raise _RunFailed(problem)


def collect(folder: Path, seeds: Sequence[int]) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns test scores by seed, system and column."""
    results = {}
    for seed in seeds:
        scores = read_scores(folder / f"seed{seed}")
        scores["no_mixing"] = read_scores(folder / f"seed{seed}-no-mixing")["grpo"]
        results[str(seed)] = {
            name: {column: scores[name][column] for column in COLUMNS} for name in NAMES
        }
    return results


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Returns means ± sample standard deviations over seeds, and GRPO's gains, as Markdown."""
    lines = [
        "| system | " + " | ".join(column.replace("_", " ") for column in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    for name, title in NAMES.items():
        cells = [_spread([run[name][column] for run in results.values()]) for column in COLUMNS]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    heading = f"Micro F1 of {NAMES['grpo']} minus that of these, over {len(results)} seeds:"
    lines += ["", heading, ""]
    for name in ("sft", "control", "no_mixing"):
        gains = [run["grpo"]["micro_f1"] - run[name]["micro_f1"] for run in results.values()]
        by_seed = ", ".join(f"{gain:+.1f}" for gain in gains)
        lines.append(f"- {NAMES[name]}: {_spread(gains)} ({by_seed})")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} ± {deviation:.1f}"
