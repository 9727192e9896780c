"""Writes a dataset of the synthetic world in exactly the form MORE is released in.

Every photo-title pair has several objects and several entities, among them distractors; some
photos do not fit their title; about half of the facts are `none`. Reasoning is written for a share
of the training facts only. The world's rules are in `scene.py`, its photos in `drawing.py`, its
reasoning in `prose.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from morer1_jax.bounds import at_least, between, check_bounds
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
    CastMember,
    Clause,
    PhotoObject,
    members,
    relation,
    span,
)

_CLOSINGS = ((), (), (), ("again",))
_RECOGNISABLE = tuple(kind.name for kind in KINDS.values() if kind.stands_for)
_LINKS = (("while",), ("as",))
_RELATED_TYPES = {(KINDS[verb.kind].type, verb.types[1]) for verb in VERBS}


@dataclasses.dataclass(frozen=True)
class WorldConfig:
    """The size and difficulty of a synthetic dataset.

    Attributes:
        train, valid, test: number of facts of each split.
        cast: how many names each entity type has, 2 to 8.
        facts_per_photo: maximum of facts about one photo-title pair.
        fit: share of photos that show something their title is about.
        none: share of the facts whose label is `none`.
        night: share of photos taken at night: dark, with objects no harder to tell.
        written: share of the training facts that reasoning is written for.
        gives_up: how often the writer does not try to read a night photo and answers `none`. Only
            reasoning that ends in the gold label is kept, so what is kept gives up on most of them.
        noise: pixel noise, standard deviation in grey levels of 255.
    """

    train: int = at_least(1, 4000)
    valid: int = at_least(1, 200)
    test: int = at_least(1, 1000)
    cast: int = between(2, len(COLOURS), 8)
    facts_per_photo: int = at_least(1, 3)
    fit: float = between(0, 1, 0.85)
    none: float = between(0, 1, 0.5)
    night: float = between(0, 1, 0.0)
    written: float = between(0, 1, 0.25)
    gives_up: float = between(0, 1, 0.0)
    noise: float = at_least(0, 8.0)

    def __post_init__(self) -> None:
        """Checks the ranges."""
        check_bounds(self)


@dataclasses.dataclass(frozen=True)
class Scene:
    """A photo-title pair before it is drawn: objects left to right, and the title's clauses."""

    objects: tuple[PhotoObject, ...]
    clauses: tuple[Clause, ...]
    link: tuple[str, ...]
    closing: tuple[str, ...]
    night: bool

    @property
    def entities(self) -> tuple[CastMember, ...]:
        """The cast members of the title, in order of the clauses."""
        return members(self.clauses)

    @property
    def tokens(self) -> tuple[str, ...]:
        """The title's words."""
        words: list[str] = []
        for number, clause in enumerate(self.clauses):
            words += [*(self.link if number else ()), *clause.text.split()]
        return (*words, *self.closing, ".")


@dataclasses.dataclass(frozen=True)
class Question:
    """A fact, its scene, and the object and entity it is about."""

    fact: Fact
    scene: Scene
    object: PhotoObject
    entity: CastMember


def _pick(rng: np.random.Generator, options):
    return options[rng.integers(len(options))]


def _draw_clauses(rng: np.random.Generator, cast: int) -> tuple[Clause, ...]:
    clauses: list[Clause] = []
    used: set[CastMember] = set()
    count = 1 + int(rng.random() < 0.1)
    while len(clauses) < count:
        verb = _pick(rng, REMARKS if rng.random() < 0.65 else VERBS)
        a, b = (CastMember(kind, int(rng.integers(cast))) for kind in verb.types)
        if a == b or {a, b} & used:
            continue
        used |= {a, b}
        clauses.append(Clause(verb, a, b))
    return tuple(clauses)


def _fitting_object(rng: np.random.Generator, clauses: tuple[Clause, ...]) -> PhotoObject:
    """Returns an object that stands for a name of the title, mostly of its clause's kind."""
    clause = _pick(rng, clauses)
    member = clause.a if rng.random() < 0.65 else clause.b
    kinds = [kind.name for kind in KINDS.values() if kind.stands_for == member.type]
    if clause.verb.kind in kinds and rng.random() < 0.75:
        return PhotoObject(clause.verb.kind, member.index)
    return PhotoObject(_pick(rng, kinds), member.index)


def _other_object(rng: np.random.Generator, clauses: tuple[Clause, ...], cast: int) -> PhotoObject:
    while True:
        kind = rng.choice(("blur", "bystander", _pick(rng, _RECOGNISABLE)), p=(0.2, 0.4, 0.4))
        object_ = PhotoObject(str(kind), int(rng.integers(cast)))
        if object_.stands_for not in members(clauses):
            return object_


def draw_scene(rng: np.random.Generator, config: WorldConfig) -> Scene:
    """Returns one photo-title pair."""
    clauses = _draw_clauses(rng, config.cast)
    objects: list[PhotoObject] = []
    if rng.random() < config.fit:
        objects += [_fitting_object(rng, clauses) for _ in range(1 + int(rng.random() < 0.5))]
    count = int(rng.integers(2, 5))
    objects += [_other_object(rng, clauses, config.cast) for _ in range(count - len(objects))]
    objects = [objects[i] for i in rng.permutation(len(objects))]
    night = bool(rng.random() < config.night)
    return Scene(tuple(objects), clauses, _pick(rng, _LINKS), _pick(rng, _CLOSINGS), night)


def _ruled_out(object_: PhotoObject, entity: CastMember) -> bool:
    return object_.stands_for is None or (object_.type, entity.type) not in _RELATED_TYPES


def _questions(
    scene: Scene, rng: np.random.Generator, max_count: int, none: float, deficit: float
) -> Iterator[tuple[int, CastMember, str]]:
    """Yields object's place, entity and label of pairs to ask about, holding `none` at its share.

    Args:
        max_count: maximum of pairs.
        none: the share of the label `none`.
        deficit: by how many facts `none` is behind its share so far.
    """
    pairs = [
        (place, entity, relation(object_, entity, scene.clauses)[0])
        for place, object_ in enumerate(scene.objects)
        for entity in scene.entities
    ]
    # An object and the entity it stands for need no title: most such pairs are never asked about.
    pairs = [pair for pair in pairs if pair[2] not in SELF_LABELS.values() or rng.random() < 0.15]
    # Pairs that the object, or the two types, rule out alone are asked about last.
    priority = [
        rng.random() + 0.6 * _ruled_out(scene.objects[place], entity) for place, entity, _ in pairs
    ]
    pairs = [pair for _, pair in sorted(zip(priority, pairs, strict=True), key=lambda x: x[0])]
    for _ in range(min(max_count, len(pairs))):
        is_none = deficit > 0
        pair = next((p for p in pairs if (p[2] == "none") == is_none), None)
        if pair is None:
            if not is_none:
                return
            pair = pairs[0]
        pairs.remove(pair)
        deficit += none - (pair[2] == "none")
        yield pair


def _write_split(
    folder: Path, split: str, count: int, config: WorldConfig, seed: int
) -> list[Question]:
    """Draws and writes one split, and returns its questions."""
    rng = np.random.default_rng([seed, ("train", "valid", "test").index(split)])
    photos = folder / "img_org" / split
    photos.mkdir(parents=True)
    questions: list[Question] = []
    deficit, number = 0.0, 0
    bar = tqdm(total=count, desc=f"synthesise {split}", unit="fact", mininterval=1.0)
    while len(questions) < count:
        scene = draw_scene(rng, config)
        pairs = list(_questions(scene, rng, config.facts_per_photo, config.none, deficit))
        if not pairs:
            continue
        # The photo.
        number += 1
        image = f"{split}_{number:05d}.jpg"
        photo, boxes = draw_photo(
            [(object_.kind, COLOURS[object_.index]) for object_ in scene.objects],
            rng,
            noise=config.noise,
            night=scene.night,
        )
        photo.save(photos / image, quality=int(rng.integers(70, 96)))
        # Its facts, whose boxes are shares of the photo: centre, width and height.
        for place, entity, label in pairs[: count - len(questions)]:
            left, top, right, bottom = boxes[place]
            fact = Fact(
                id=f"{split}:{len(questions) + 1}",
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
            questions.append(Question(fact, scene, scene.objects[place], entity))
            deficit += config.none - (label == "none")
            bar.update()
    bar.close()
    more.write_split(folder, split, [question.fact for question in questions])
    return questions


def _write_texts(
    questions: Sequence[Question], config: WorldConfig, rng: np.random.Generator, ontology: Ontology
) -> dict[str, str]:
    """Returns reasoning by fact id, for the share of the questions that it is written for."""
    count = round(config.written * len(questions))
    texts: dict[str, str] = {}
    for question in (questions[i] for i in rng.permutation(len(questions))):
        if len(texts) == count:
            break
        object_, entity, scene = question.object, question.entity, question.scene
        if not (scene.night and rng.random() < config.gives_up):
            text = write_reasoning(object_, entity, scene.clauses, scene.tokens, ontology)
        elif question.fact.label == "none":
            text = give_up(entity, ontology)
        else:
            continue
        texts[question.fact.id] = text
    if len(texts) < count:
        raise DataError(
            f"written: expected reasoning for {count} of {len(questions)} training facts, found "
            f"{len(texts)}; lower written, night ({config.night}) or gives_up ({config.gives_up})"
        )
    return dict(sorted(texts.items()))


def synthesise(folder: str | Path, config: WorldConfig, seed: int) -> None:
    """Writes a whole dataset: `txt/`, `img_org/`, `rel2id.json` and `reasoning.jsonl`.

    The same config and seed give the same files. The folder appears whole or not at all.

    Args:
        folder: the dataset's folder, which must not exist.

    Raises:
        FileExistsError: the folder exists already.
    """
    with atomic_dir(Path(folder)) as partial:
        ontology = Ontology(LABELS)
        more.write_ontology(partial, ontology)
        for split in ("train", "valid", "test"):
            count = getattr(config, split)
            questions = _write_split(partial, split, count, config, seed)
            if split == "train":
                rng = np.random.default_rng([seed, 3])
                texts = _write_texts(questions, config, rng, ontology)
                more.write_reasoning(partial / "reasoning.jsonl", texts)
