"""Writes a dataset of the embedded world in exactly the form MORE is released in.

Every photo-title pair has several objects and several entities, among them distractors; some
photos do not fit their title; about half of the facts are `none`. Reasoning is written for a share
of the training facts only. The world's rules are in `world.py`, its photos in `drawing.py`, its
reasoning in `prose.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from morer1_jax.errors import DataError
from morer1_jax.files import atomic_dir
from morer1_jax.task import more
from morer1_jax.task.fact import Fact
from morer1_jax.task.ontology import Ontology
from morer1_jax.world.drawing import draw_photo
from morer1_jax.world.prose import give_up, write_reasoning
from morer1_jax.world.scene import (
    COLOURS,
    KINDS,
    LABELS,
    REMARKS,
    SELF_LABELS,
    VERBS,
    Clause,
    Named,
    Thing,
    relation,
    span,
)

_CLOSINGS = ((), (), (), ("again",))
_RECOGNISABLE = tuple(kind.name for kind in KINDS.values() if kind.stands_for)
_LINKS = (("while",), ("as",))
_RELATED_TYPES = {(KINDS[verb.kind].type, verb.types[1]) for verb in VERBS}


@dataclasses.dataclass(frozen=True)
class WorldConfig:
    """What a synthetic dataset is made of.

    Attributes:
      train, valid, test: number of facts of each split.
      cast: how many names each entity type has, 2 to 8.
      facts_per_photo: most facts asked about one photo-title pair.
      fit: share of photos that show something their title is about.
      none: share of the facts whose label is `none`.
      night: share of photos taken at night: dark, with objects no harder to tell.
      written: share of the training facts that reasoning is written for.
      gives_up: how often the writer does not try to read a night photo and answers `none`. Only
        reasoning that ends in the gold label is kept, so what is kept gives up on most of them.
      noise: pixel noise, standard deviation in grey levels of 255.
    """

    train: int = 4000
    valid: int = 200
    test: int = 1000
    cast: int = 8
    facts_per_photo: int = 3
    fit: float = 0.85
    none: float = 0.5
    night: float = 0.0
    written: float = 0.25
    gives_up: float = 0.0
    noise: float = 8.0

    def __post_init__(self) -> None:
        if not 2 <= self.cast <= len(COLOURS):
            raise ValueError(f"cast: {self.cast} found, 2 to {len(COLOURS)} names a type expected")
        for name in ("train", "valid", "test", "facts_per_photo"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} found, at least 1 expected")
        for name in ("fit", "none", "night", "written", "gives_up"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}: {getattr(self, name)} found, a share expected, 0 to 1")


@dataclasses.dataclass(frozen=True)
class Scene:
    """A photo-title pair before it is drawn: objects left to right, and the title's clauses."""

    things: tuple[Thing, ...]
    clauses: tuple[Clause, ...]
    link: tuple[str, ...]
    closing: tuple[str, ...]
    night: bool

    @property
    def entities(self) -> tuple[Named, ...]:
        """The named things of the title, in order of the clauses."""
        return tuple(one for clause in self.clauses for one in (clause.a, clause.b))

    @property
    def tokens(self) -> tuple[str, ...]:
        """The title's words."""
        words: list[str] = []
        for number, clause in enumerate(self.clauses):
            words += [*(self.link if number else ()), *clause.text.split()]
        return (*words, *self.closing, ".")


@dataclasses.dataclass(frozen=True)
class Question:
    """A fact and what it was made from."""

    fact: Fact
    scene: Scene
    thing: Thing
    entity: Named


def _pick(rng: np.random.Generator, options):
    return options[rng.integers(len(options))]


def _draw_clauses(rng: np.random.Generator, cast: int) -> tuple[Clause, ...]:
    clauses: list[Clause] = []
    used: set[Named] = set()
    wanted = 1 + int(rng.random() < 0.1)
    while len(clauses) < wanted:
        verb = _pick(rng, REMARKS if rng.random() < 0.65 else VERBS)
        a, b = (Named(kind, int(rng.integers(cast))) for kind in verb.types)
        if a == b or {a, b} & used:
            continue
        used |= {a, b}
        clauses.append(Clause(verb, a, b))
    return tuple(clauses)


def _fitting_thing(rng: np.random.Generator, clauses: tuple[Clause, ...]) -> Thing:
    """An object that stands for something in the title, mostly of the kind the clause needs."""
    clause = _pick(rng, clauses)
    named = clause.a if rng.random() < 0.65 else clause.b
    kinds = [kind.name for kind in KINDS.values() if kind.stands_for == named.type]
    if clause.verb.kind in kinds and rng.random() < 0.75:
        return Thing(clause.verb.kind, named.index)
    return Thing(_pick(rng, kinds), named.index)


def _other_thing(rng: np.random.Generator, clauses: tuple[Clause, ...], cast: int) -> Thing:
    mentioned = {one for clause in clauses for one in (clause.a, clause.b)}
    while True:
        kind = rng.choice(("blur", "bystander", _pick(rng, _RECOGNISABLE)), p=(0.2, 0.4, 0.4))
        thing = Thing(str(kind), int(rng.integers(cast)))
        if thing.named not in mentioned:
            return thing


def draw_scene(rng: np.random.Generator, config: WorldConfig) -> Scene:
    """One photo-title pair."""
    clauses = _draw_clauses(rng, config.cast)
    things: list[Thing] = []
    if rng.random() < config.fit:
        things += [_fitting_thing(rng, clauses) for _ in range(1 + int(rng.random() < 0.5))]
    wanted = int(rng.integers(2, 5))
    things += [_other_thing(rng, clauses, config.cast) for _ in range(wanted - len(things))]
    things = [things[i] for i in rng.permutation(len(things))]
    night = bool(rng.random() < config.night)
    return Scene(tuple(things), clauses, _pick(rng, _LINKS), _pick(rng, _CLOSINGS), night)


def _ruled_out(thing: Thing, entity: Named) -> bool:
    return thing.named is None or (thing.type, entity.type) not in _RELATED_TYPES


def _questions(
    scene: Scene, rng: np.random.Generator, most: int, none: float, surplus: float
) -> Iterator[tuple[int, Named, str]]:
    """Asks about up to `most` pairs of object and entity, holding `none` at its share.

    Args:
      none: the share.
      surplus: by how many facts `none` is behind its share so far.
    """
    pairs = [
        (place, entity, relation(thing, entity, scene.clauses)[0])
        for place, thing in enumerate(scene.things)
        for entity in scene.entities
    ]
    # What an object stands for itself needs no title: most of such pairs are never asked about.
    pairs = [pair for pair in pairs if pair[2] not in SELF_LABELS.values() or rng.random() < 0.15]
    # Pairs that the object, or the two types, rule out alone are asked about last.
    priority = [
        rng.random() + 0.6 * _ruled_out(scene.things[place], entity) for place, entity, _ in pairs
    ]
    pairs = [pair for _, pair in sorted(zip(priority, pairs, strict=True), key=lambda x: x[0])]
    for _ in range(min(most, len(pairs))):
        want_none = surplus > 0
        chosen = next((p for p in pairs if (p[2] == "none") == want_none), None)
        if chosen is None:
            if not want_none:
                return
            chosen = pairs[0]
        pairs.remove(chosen)
        surplus += none - (chosen[2] == "none")
        yield chosen


def _write_split(
    folder: Path, split: str, count: int, config: WorldConfig, seed: int, ontology: Ontology
) -> list[Question]:
    """Draws and writes one split."""
    rng = np.random.default_rng([seed, ("train", "valid", "test").index(split)])
    photos = folder / "img_org" / split
    photos.mkdir(parents=True)
    asked: list[Question] = []
    surplus, number = 0.0, 0
    bar = tqdm(total=count, desc=f"synthesise {split}", unit="fact", mininterval=1.0)
    while len(asked) < count:
        scene = draw_scene(rng, config)
        questions = list(_questions(scene, rng, config.facts_per_photo, config.none, surplus))
        if not questions:
            continue
        number += 1
        image = f"{split}_{number:05d}.jpg"
        photo, boxes = draw_photo(
            [(thing.kind, COLOURS[thing.index]) for thing in scene.things],
            rng,
            noise=config.noise,
            night=scene.night,
        )
        photo.save(photos / image, quality=int(rng.integers(70, 96)))
        for place, entity, label in questions[: count - len(asked)]:
            left, top, right, bottom = boxes[place]
            fact = Fact(
                id=f"{split}:{len(asked) + 1}",
                tokens=scene.tokens,
                entity_name=entity.name,
                entity_span=span(scene.tokens, entity),
                object_name=f"[OBJ{place}]",
                box=(
                    round((left + right) / 2 / photo.width, 6),
                    round((top + bottom) / 2 / photo.height, 6),
                    round((right - left) / photo.width, 6),
                    round((bottom - top) / photo.height, 6),
                ),
                image=image,
                label=label,
            )
            asked.append(Question(fact, scene, scene.things[place], entity))
            surplus += config.none - (label == "none")
            bar.update()
    bar.close()
    more.write_split(folder, split, [question.fact for question in asked])
    return asked


def _written(
    asked: Sequence[Question], config: WorldConfig, rng: np.random.Generator, ontology: Ontology
) -> dict[str, str]:
    """Reasoning by fact id, for the share of the questions that it is written for."""
    wanted = round(config.written * len(asked))
    texts: dict[str, str] = {}
    for question in (asked[i] for i in rng.permutation(len(asked))):
        if len(texts) == wanted:
            break
        thing, entity, scene = question.thing, question.entity, question.scene
        if not (scene.night and rng.random() < config.gives_up):
            text = write_reasoning(thing, entity, scene.clauses, scene.tokens, ontology)
        elif question.fact.label == "none":
            text = give_up(entity, ontology)
        else:
            continue
        texts[question.fact.id] = text
    if len(texts) < wanted:
        raise DataError(
            f"written: reasoning for {wanted} of {len(asked)} training facts wanted, {len(texts)} "
            f"found; lower written, night ({config.night}) or gives_up ({config.gives_up})"
        )
    return dict(sorted(texts.items()))


def synthesise(folder: str | Path, config: WorldConfig, seed: int) -> None:
    """Writes a whole dataset: `txt/`, `img_org/`, `rel2id.json` and `reasoning.jsonl`.

    The same config and seed give the same files. The folder appears whole or not at all.

    Args:
      folder: where to; must not exist.
      config: what the world is like.
      seed: of every choice.

    Raises:
      FileExistsError: the folder is there already.
    """
    with atomic_dir(Path(folder)) as partial:
        ontology = Ontology(LABELS)
        more.write_ontology(partial, ontology)
        for split in ("train", "valid", "test"):
            count = getattr(config, split)
            asked = _write_split(partial, split, count, config, seed, ontology)
            if split == "train":
                rng = np.random.default_rng([seed, 3])
                texts = _written(asked, config, rng, ontology)
                more.write_reasoning(partial / "reasoning.jsonl", texts)
