"""`report.html`: one page about a run, which opens without a network."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from morer1_jax.data.images import ImageReader
from morer1_jax.data.ratings import FILE as RATINGS
from morer1_jax.data.ratings import read_ratings
from morer1_jax.errors import DataError
from morer1_jax.files import atomic_write, read_text
from morer1_jax.model.config import ImageConfig
from morer1_jax.report.curves import Metrics, curriculum, learning_curves, pass_rates, read_metrics
from morer1_jax.report.gallery import Pair, choose, is_right, read_answers, show
from morer1_jax.report.page import Html, join, page, remark, section, tag
from morer1_jax.report.tables import (
    BLIND,
    FINAL,
    NAMES,
    Scores,
    get,
    name_of,
    number_in,
    score_section,
)
from morer1_jax.task import more

FILE = "report.html"
_ANSWERS = ".answers.jsonl"
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
    """Writes `<workdir>/report.html` from whatever the workdir holds.

    What is missing or cannot be read is said in its place. The same files and seed give the same
    page.

    Args:
      data: the dataset's folder.
      split: which one the scores are of.
      sections: of `SECTIONS`, which the page has.
      images: how photos are cropped; None: as the run's config says.
      gallery: how many test facts are shown with their photos.
      seed: of their choice.

    Returns:
      The page's path.
    """
    workdir, data = Path(workdir), epath.Path(data)
    problems: list[str] = []
    trained = "curves" in sections
    config = _read_json(workdir / "config.json", problems) if trained else {}
    scores = _read_scores(workdir / "eval", problems)
    metrics = read_metrics(workdir / "metrics.jsonl")
    parts = {
        "scores": (f"{split.title()} scores", lambda: score_section(scores)),
        "curves": ("Learning curves", lambda: learning_curves(metrics, NAMES)),
        "curriculum": ("Curriculum", lambda: _curriculum_section(workdir, metrics)),
        "gallery": (
            "Gallery",
            lambda: _gallery_section(
                workdir, data, split, images or _images(config), gallery, seed
            ),
        ),
    }
    parts = {anchor: parts[anchor] for anchor in sections}
    body = [section(anchor, title, _guard(build)) for anchor, (title, build) in parts.items()]
    links = [tag("a", title, href=f"#{anchor}") for anchor, (title, _) in parts.items()]
    title = f"MORE-R1 {'run' if trained else 'scores'} “{workdir.resolve().name}”"
    head = tag(
        "header",
        tag("h1", title),
        tag(
            "p",
            "A vision-language model that says how an object in a photo relates to an entity in a "
            "title: supervised fine-tuning (SFT), then GRPO with progressive sample-mixing.",
        ),
        tag("nav", *links),
        *map(remark, problems),
        _tiles(scores),
        _run(workdir, data, config),
    )
    out = workdir / FILE
    # A completion may hold half of a surrogate pair, which UTF-8 cannot.
    atomic_write(out, page(title, head, tag("main", *body)).encode(errors="replace"))
    return out


def _guard(build: Callable[[], Html]) -> Html:
    try:
        return build()
    except DataError as error:
        return remark(error)


def _read_json(path: Path, problems: list[str]) -> dict[str, Any]:
    """A JSON object, or an empty one and a problem."""
    try:
        value = json.loads(read_text(path))
    except OSError:
        problems.append(f"{path.name}: not in this workdir.")
        return {}
    except ValueError:
        value = None
    if not isinstance(value, dict):
        problems.append(f"{path.name}: not a JSON object, left out.")
        return {}
    return value


def _read_scores(folder: Path, problems: list[str]) -> Scores:
    """Score files by system, in the order of the tables; unknown systems come first."""
    found = {path.stem: _read_json(path, problems) for path in sorted(folder.glob("*.json"))}
    order = list(NAMES)
    names = sorted(found, key=lambda name: order.index(name) if name in NAMES else -1)
    return {name: found[name] for name in names if found[name]}


def _tiles(scores: Scores) -> Html:
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
    shown = [
        tag("div", tag("b", f"{value:.1f}"), tag("span", f"micro F1, {text}"), class_="tile")
        for value, text in tiles
    ]
    return tag("div", *shown, class_="tiles") if shown else Html("")


def _run(workdir: Path, data: Path, config: Mapping[str, Any]) -> Html:
    """What the run is: its seed, data, sizes and stages."""
    rows: list[tuple[str, str]] = []

    def add(name: str, template: str, *keys: str) -> None:
        values = [get(config, key) for key in keys]
        if all(value is not None for value in values):
            shown = (f"{v:,}" if type(v) is int else str(v) for v in values)
            rows.append((name, template.format(*shown)))

    add("Seed", "{}", "seed")
    if get(config, "data.folder") is None:
        facts = ("world.train", "world.valid", "world.test")
        add("Data", "synthetic world, {} training, {} validation and {} test facts", *facts)
    else:
        rows.append(("Data", str(data)))
    text, vision = "model.text.", "model.vision."
    heads = (f"{text}num_attention_heads", f"{text}num_key_value_heads")
    size = (f"{text}num_hidden_layers", f"{text}hidden_size", f"{text}intermediate_size")
    add("Language model", "{} layers, width {} / {}, {} heads, {} key-value heads", *size, *heads)
    size = (f"{vision}depth", f"{vision}hidden_size", f"{vision}intermediate_size")
    add("Vision tower", "{} blocks, width {} / {}, {} heads", *size, f"{vision}num_heads")
    add("Numbers", "parameters {}, computation {}", "runtime.param_dtype", "runtime.dtype")
    add("SFT", "{} steps of {} samples", "sft.steps", "sft.batch")
    add("GRPO", "{} steps of {} facts × {} samples", "grpo.steps", "grpo.prompts", "grpo.group")
    if isinstance(stages := config.get("stages"), str):
        rows.append(("Stages", ", ".join(_timed(workdir, s) for s in stages.split(","))))
    whole = ""
    if config:
        shown = json.dumps(config, indent=1, ensure_ascii=False)
        whole = tag("details", tag("summary", "The whole config"), tag("pre", shown))
    entries = [part for name, value in rows for part in (tag("dt", name), tag("dd", value))]
    return join([tag("dl", *entries, class_="run"), whole])


def _timed(workdir: Path, stage: str) -> str:
    """A stage's name, and how long it took if it is done."""
    seconds = number_in(_read_json(workdir / stage / "DONE.json", []), "results.seconds")
    if seconds is None:
        return stage
    minutes, rest = divmod(round(seconds), 60)
    return f"{stage} ({minutes} min {rest:02d} s)" if minutes else f"{stage} ({rest} s)"


def _curriculum_section(workdir: Path, metrics: Metrics) -> Html:
    return tag(
        "div",
        curriculum(metrics),
        _guard(lambda: pass_rates(read_ratings(workdir / "rate" / RATINGS))),
        class_="charts",
    )


def _gallery_section(
    workdir: Path, data: Path, split: str, images: ImageConfig, count: int, seed: int
) -> Html:
    found = {p.name.removesuffix(_ANSWERS): p for p in (workdir / "eval").glob(f"*{_ANSWERS}")}
    # What a run trained last; or else a model that no run of ours trained.
    candidates = (*FINAL, *sorted(found.keys() - NAMES))
    system = next((name for name in candidates if name in found), None)
    if system is None:
        raise DataError("No answers of a trained model in this workdir; run the stage `evaluate`.")
    facts = more.read_split(data, split, more.read_ontology(data))
    pairs = read_answers(found[system], facts)
    chosen = choose(pairs, count, seed)
    (rights, wrongs), (some, others) = map(_count, (pairs, chosen))
    note = (
        f"{name_of(system)} on the {split} facts: {rights:,} right, {wrongs:,} wrong. Shown are "
        f"{some} and {others} of them, spread over the gold labels. The frame is the object's "
        "box; the asked entity is marked in the title."
    )
    return join([tag("p", note, class_="note"), show(chosen, ImageReader(data, images))])


def _images(config: Mapping[str, Any]) -> ImageConfig:
    crop = {
        key: value
        for key in ("crop_margin", "crop_least")
        if (value := number_in(config, f"data.{key}")) is not None
    }
    return ImageConfig(**crop)


def _count(pairs: Sequence[Pair]) -> tuple[int, int]:
    """How many are right, and how many wrong."""
    rights = sum(map(is_right, pairs))
    return rights, len(pairs) - rights
