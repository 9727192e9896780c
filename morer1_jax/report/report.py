"""Assembles `report.html`: one page about a run, which opens without a network."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath
from markupsafe import Markup

from morer1_jax.data.ratings import FILE as RATINGS
from morer1_jax.errors import DataError
from morer1_jax.files import atomic_write, read_json
from morer1_jax.model.config import ImageConfig
from morer1_jax.report.curves import curriculum, learning_curves, read_metrics
from morer1_jax.report.gallery import gallery_section
from morer1_jax.report.page import render
from morer1_jax.report.tables import BLIND, NAMES, Scores, get, name_of, number_in, score_section

FILE = "report.html"
SECTIONS = ("scores", "curves", "curriculum", "gallery")


def write_report(
    workdir: Path,
    data: Path,
    *,
    split: str = "test",
    sections: Sequence[str] = SECTIONS,
    images: ImageConfig | None = None,
    gallery: int = 24,
    seed: int = 0,
) -> Path:
    """Writes `<workdir>/report.html` from whatever the workdir holds, and returns its path.

    Where something is missing or cannot be read, the page says so. The same files and seed give
    the same page.

    Args:
        data: the dataset's folder.
        split: the one that was scored.
        sections: those of `SECTIONS` that the page has.
        images: how photos are cropped; None: as the run's config says.
        gallery: maximum number of facts shown with their photos.
        seed: of the choice of these facts.
    """
    # What the workdir holds; what cannot be read is listed on the page.
    workdir, data = Path(workdir), epath.Path(data)
    problems: list[str] = []
    is_run = "curves" in sections
    config = _read_json(workdir / "config.json", problems) if is_run else {}
    scores = _read_scores(workdir / "eval", problems)
    metrics = read_metrics(workdir / "metrics.jsonl")
    images = images or _images(config)
    # Each section is built by itself, so that one without data leaves the others.
    parts = {
        "scores": (f"{split.title()} scores", lambda: score_section(scores)),
        "curves": ("Learning curves", lambda: learning_curves(metrics, NAMES)),
        "curriculum": ("Curriculum", lambda: curriculum(metrics, workdir / "rate" / RATINGS)),
        "gallery": (
            "Gallery",
            lambda: gallery_section(workdir, data, split, images, gallery, seed),
        ),
    }
    page = render(
        "page.html",
        title=f"MORE-R1 {'run' if is_run else 'scores'} “{workdir.resolve().name}”",
        problems=problems,
        tiles=_tiles(scores),
        filled=functools.partial(_filled, config),
        data=data if get(config, "data.folder") is not None else "",
        stages=_stages(workdir, config),
        config=json.dumps(config, indent=1, ensure_ascii=False) if config else "",
        sections=[_section(anchor, *parts[anchor]) for anchor in sections],
    )
    out = workdir / FILE
    # A completion may hold half of a surrogate pair, which UTF-8 cannot.
    atomic_write(out, page.encode(errors="replace"))
    return out


def _section(anchor: str, title: str, build: Callable[[], Markup]) -> dict[str, Any]:
    """Returns a section with its body, or with the problem in place of it."""
    body, problem = None, None
    try:
        body = build()
    except DataError as error:
        problem = error
    return {"anchor": anchor, "title": title, "body": body, "problem": problem}


def _read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    """Reads a JSON object; returns an empty one and adds a problem if there is none."""
    try:
        return read_json(path, "left out of this page")
    except DataError as error:
        problems.append(str(error))
        return {}


def _read_scores(folder: Path, problems: list[str]) -> Scores:
    """Reads score files by system, in the order of the tables; unknown systems come first."""
    scores = {path.stem: _read_json(path, problems) for path in sorted(folder.glob("*.json"))}
    order = list(NAMES)
    names = sorted(scores, key=lambda name: order.index(name) if name in NAMES else -1)
    return {name: scores[name] for name in names if scores[name]}


def _tiles(scores: Scores) -> list[tuple[float, str]]:
    """Returns the micro F1 scores that sum up a run, and what each is of."""
    f1 = {name: number_in(scores[name], "micro_f1") for name in scores}
    f1 = {name: value for name, value in f1.items() if value is not None}
    tiles = []
    if blind := [name for name in BLIND if name in f1]:
        best = max(blind, key=f1.__getitem__)
        tiles.append((f1[best], f"best blind baseline: {name_of(best).lower()}"))
    if "sft" in f1:
        tiles.append((f1["sft"], "SFT"))
    if "grpo" in f1:
        gain = f", {f1['grpo'] - f1['sft']:+.1f} over SFT" if "sft" in f1 else ""
        tiles.append((f1["grpo"], f"GRPO{gain}"))
    return tiles


def _filled(config: Mapping[str, Any], template: str, *keys: str) -> str:
    """Returns a template filled with values of a config; nothing if the config lacks one."""
    values = [get(config, key) for key in keys]
    shown = (f"{value:,}" if type(value) is int else str(value) for value in values)
    return "" if None in values else template.format(*shown)


def _stages(workdir: Path, config: Mapping[str, Any]) -> str:
    """Returns the names of a run's stages, with the time that those that are done took."""
    stages = config.get("stages")
    names = stages.split(",") if isinstance(stages, str) else []
    return ", ".join(_timed(workdir, name) for name in names)


def _timed(workdir: Path, stage: str) -> str:
    """Returns a stage's name, and how long it took if it is done."""
    seconds = number_in(_read_json(workdir / stage / "DONE.json", []), "results.seconds")
    if seconds is None:
        return stage
    minutes, rest = divmod(round(seconds), 60)
    return f"{stage} ({minutes} min {rest:02d} s)" if minutes else f"{stage} ({rest} s)"


def _images(config: Mapping[str, Any]) -> ImageConfig:
    """Returns how the config crops photos."""
    keys = ("crop_margin", "crop_least")
    values = {key: number_in(config, f"data.{key}") for key in keys}
    return ImageConfig(**{key: value for key, value in values.items() if value is not None})
