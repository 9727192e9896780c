"""What binds a workdir to a config: which keys each stage's output depends on.

A key may change until a stage that depends on it has begun. Then another value is refused, but of
keys on which no number depends beyond rounding (`OPERATIONAL`), and of a stage's own steps
where its learning rate is constant: more of them go on from where it ended.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from morer1_jax.config.binding import FILE, OPERATIONAL, flatten, identity, matches
from morer1_jax.errors import ConfigError, DataError
from morer1_jax.files import read_json, write_json
from morer1_jax.run.checkpoint import Checkpointer
from morer1_jax.stages.marker import MARKER, Stage, read_marker

_DATA = ("seed", "world", "data")
_MODEL = ("model", "tune", "runtime", "score")
_SFT = (*_DATA, *_MODEL, "sft")
# What each stage's output depends on: with these keys equal it may serve another run. `evaluate`
# takes whatever is there, and runs each time.
DEPENDS = {
    "synthesise": _DATA,
    "features": (*_DATA, *_MODEL),
    "sft": _SFT,
    "baselines": (*_DATA, *_MODEL, "baselines"),
    "rate": (*_SFT, "rate"),
    "grpo": (*_SFT, "rate", "grpo"),
    "control": (*_SFT, "rate", "grpo", "control"),
    "evaluate": (),
}
TRAINED = ("sft", "baselines", "grpo", "control")
# Pools follow from the pass rates that are kept, so that rating does not depend on them.
_POOLS = ("rate.easy_from", "rate.never")
# Those of earlier versions have no suffix of the file's.
_BEGUN_RATINGS = ("rate/ratings.jsonl.unfinished", "rate/ratings.unfinished")
# What of a stage is there as soon as it has output that is gone on with.
_SIGNS = {
    "synthesise": ("synthesise", "data", "tokenizer", "data.json"),
    "features": ("features",),
    "rate": (f"rate/{MARKER}", "rate/ratings.jsonl", *_BEGUN_RATINGS),
}
# Operational keys when markers held a digest; a later change must not change that digest.
_OPERATIONAL_BEFORE = (
    "mesh",
    "stages",
    "profile",
    "model.path",
    "runtime.attention",
    "data.round_to",
    "data.shapes",
    "*.workers",
    "*.worker_kind",
    "*.save_every",
    "*.log_every",
    "*.eval_every",
    "*.rollouts_every",
    "*.keep_checkpoints",
)

Flat = Mapping[str, Any]


def stage_of(config: Any, workdir: Path, name: str) -> Stage:
    """A stage under a config."""
    flat = flatten(config)
    return Stage(workdir, name, depends(flat, name), grows=growing(flat, name))


def depends(flat: Flat, name: str) -> dict[str, Any]:
    """The keys that a stage's output depends on, its own steps among them."""
    return identity(flat, DEPENDS[name], _free(name))


def growing(flat: Flat, name: str) -> str | None:
    """The key of a stage's steps where each step is the same however many there are, or None."""
    key = f"{name}.steps"
    schedule = "constant" if name == "control" else flat.get(f"{name}.optimizer.schedule")
    return key if schedule == "constant" and flat.get(key) is not None else None


def why_bound(config: Any, workdir: Path, key: str) -> str | None:
    """Which stages that have begun depend on a key, in words; None if it may change."""
    flat = flatten(config)
    names = [name for name in _dependants(flat, key) if begun(workdir, name)]
    if not names:
        return None
    verb = "depends" if len(names) == 1 else "depend"
    cosine = key == f"{names[0]}.steps" and key != "control.steps"
    return f"{', '.join(names)} {verb} on it" + (
        ": the learning rate's cosine ends with the last step" if cosine else ""
    )


def _dependants(flat: Flat, key: str) -> list[str]:
    """The stages that depend on a key."""
    return [
        name
        for name, keys in DEPENDS.items()
        if matches(key, keys) and not matches(key, _free(name)) and key != growing(flat, name)
    ]


def begun(workdir: Path, name: str) -> bool:
    """Whether a stage has made something that it, or a later one, would go on with."""
    if name in _SIGNS:
        return any((workdir / sign).exists() for sign in _SIGNS[name])
    whole = any(c.latest() is not None or c.best() is not None for c in saved(workdir, name))
    return whole or (workdir / name / MARKER).exists()


def saved(workdir: Path, name: str) -> list[Checkpointer]:
    """The checkpoints of a stage that trains; of the baselines there are several."""
    folder = workdir / name
    folders = [folder, *sorted(folder.iterdir())] if folder.is_dir() else []
    return [Checkpointer(one / "checkpoints") for one in folders if (one / "checkpoints").is_dir()]


def check_steps(config: Any, workdir: Path) -> None:
    """Finds out whether no stage is to end before where it is, or to go on from what is gone.

    Raises:
      ConfigError: one is.
    """
    flat = flatten(config)
    for name in TRAINED:
        if (key := growing(flat, name)) is None:
            continue
        wanted, kept = flat[key], saved(workdir, name)
        marker = read_marker(workdir / name)
        made = marker["config"] if marker else {}
        ended = made.get(key) if isinstance(made, dict) else None
        steps = [(found.latest(), found) for found in kept]
        # Of what was trained since, a validation may have been kept without its state.
        bests = [best[0] for _, found in steps if (best := found.best()) is not None]
        reached = max([*bests, *(step for step, _ in steps if step is not None)], default=0)
        if (least := max(reached, ended or 0)) > wanted:
            raise ConfigError(
                f"config.{key}: {wanted} found, but {workdir / name} is at step {least}; at least "
                f"{least} expected, or a new --workdir"
            )
        if ended is not None and wanted > ended and any(step is None for step, _ in steps):
            raise ConfigError(
                f"config.{key}: {wanted} found, but {workdir / name} ended at step {ended} and its "
                f"optimizer's state is gone; set it back to {ended}, or use a new --workdir"
            )
        if reached == wanted and marker is None and any(c.best() is None for _, c in steps):
            raise ConfigError(
                f"config.{key}: {wanted} found, but {workdir / name} has passed that step without "
                f"a validation; at least {wanted + 1} expected"
            )


def drop_states(config: Any, workdir: Path, goes_on: Collection[str] = ()) -> None:
    """Deletes what no stage can go on from any more: the states of stages that are done.

    The best parameters stay; of states `kept_when_done`.

    Args:
      goes_on: stages that are not done and will go on: of them states beyond those to keep go.
    """
    for checkpoints, keep in _kept(config, workdir, goes_on):
        checkpoints.drop(keep)


def surplus(config: Any, workdir: Path, goes_on: Collection[str] = ()) -> list[Path]:
    """What `drop_states` would delete."""
    return [path for one, keep in _kept(config, workdir, goes_on) for path in one.surplus(keep)]


def kept_when_done(config: Any, workdir: Path, name: str, later: Collection[str] = ()) -> int:
    """How many states stay of a stage that is done: one where more steps may be asked for.

    That is until a later stage has begun with what was trained.

    Args:
      later: stages to be taken as begun, beside those that have.
    """
    flat = flatten(config)
    key = growing(flat, name)
    dependants = [] if key is None else _dependants(flat, key)
    used = any(one in later or begun(workdir, one) for one in dependants)
    return int(key is not None and not used)


def kept_while_training(config: Any, name: str) -> int:
    """How many states stay of a stage that is not done."""
    of = "sft" if name == "control" else name
    return 1 if name == "baselines" else flatten(config)[f"{of}.keep_checkpoints"]


def is_done(config: Any, workdir: Path, name: str) -> bool:
    """Whether a stage is done, under this config."""
    try:
        return stage_of(config, workdir, name).done()
    except ConfigError:  # Another config's, which has been said if it matters.
        return False


def _kept(
    config: Any, workdir: Path, goes_on: Collection[str]
) -> Iterator[tuple[Checkpointer, int]]:
    """Checkpoints of which no more than so many states are to stay."""
    for name in TRAINED:
        done = is_done(config, workdir, name)
        for checkpoints in saved(workdir, name):
            if done and checkpoints.best() is not None:
                yield checkpoints, kept_when_done(config, workdir, name)
            elif not done and name in goes_on:
                yield checkpoints, kept_while_training(config, name)


def upgrade_markers(config: Any, workdir: Path) -> None:
    """Has markers of earlier versions, which hold a digest of keys, hold the keys.

    They are those of the workdir's config, or of the given one where it has none, if the digest is
    theirs; else the marker stays, and its stage was made under another config.
    """
    path = workdir / FILE
    try:
        there = flatten(read_json(path, "") if path.exists() else config)
    except DataError:
        return  # The check of the config reports it.
    for name in DEPENDS.keys() - {"features", "evaluate"}:
        marker = read_marker(workdir / name)
        if marker is None or not isinstance(marker["config"], str):
            continue
        keys = identity(there, DEPENDS[name], _OPERATIONAL_BEFORE)
        canonical = json.dumps(keys, sort_keys=True, allow_nan=False)
        if hashlib.sha256(canonical.encode()).hexdigest() == marker["config"]:
            marker["config"] = depends(there, name)
            write_json(workdir / name / MARKER, marker)


def _free(name: str) -> Sequence[str]:
    """Patterns of the keys that a stage does not depend on."""
    return (*OPERATIONAL, *_POOLS) if name == "rate" else OPERATIONAL
