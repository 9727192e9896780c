"""The embedded world's rules: who looks like what, what a title says, which label follows.

A world is a small cast of named things, each known by its look, and a table of clauses a title can
be made of. Whether an object and an entity are related, and how, follows from three things that
no single modality shows: what the object is (its look, photo), whom that look belongs to
(knowledge of the cast), and what the title says of the two (text). It is the chain of the
benchmark's own example: a player in green, a title about Heat and Celtics, the entity 'Heat';
green is the Celtics', they play against the Heat, so `/per/org/opposed_to`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "pink", "teal")

# The cast: the i-th name of a type is known by the i-th colour.
NAMES: dict[str, tuple[str, ...]] = {
    "org": ("Falcons", "Comets", "Rovers", "Lions", "Giants", "Pirates", "Wolves", "Rangers"),
    "per": ("Adler", "Brandt", "Castro", "Dumas", "Evans", "Fischer", "Garcia", "Hansen"),
    "loc": ("Arden", "Belmont", "Corvo", "Dorset", "Elmira", "Fairfax", "Granada", "Halden"),
    "misc": (
        "Aurora",
        "Beacon",
        "Crystal",
        "Delta",
        "Echo Medal",
        "Forum Week",
        "Gala Night",
        "Harvest Fair",
    ),
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of object a photo can show.

    Attributes:
      name: what the drawing routine is called, and what reasoning calls it.
      type: the entity type of the object.
      stands_for: the type of the named thing its colour points to (a player in red points to an
        organisation), or None for an object nobody could recognise, which is grey.
    """

    name: str
    type: str
    stands_for: str | None


KINDS = {
    kind.name: kind
    for kind in (
        Kind("player", "per", "org"),
        Kind("person", "per", "per"),
        Kind("badge", "org", "org"),
        Kind("tower", "loc", "loc"),
        Kind("cup", "misc", "misc"),
        Kind("bystander", "per", None),
        Kind("blur", "misc", None),
    )
}


@dataclasses.dataclass(frozen=True)
class Verb:
    """A clause of a title: two named things and what is said of them.

    Attributes:
      types: entity types of the first and the second named thing.
      phrase: the wording; `{a}` and `{b}` are the two names.
      label: the relation of an object that stands for the first thing to the second, if any.
      kind: the kind of object the label needs; empty where there is no label.
      symmetric: whether the same holds with the two exchanged.
    """

    types: tuple[str, str]
    phrase: str
    label: str = "none"
    kind: str = ""
    symmetric: bool = False

    @property
    def word(self) -> str:
        """The phrase without the names."""
        return self.phrase.format(a="", b="").strip()


VERBS = (
    Verb(("org", "org"), "{a} face {b}", "/per/org/opposed_to", "player", symmetric=True),
    Verb(("per", "org"), "{b} hire {a}", "/per/org/leader_of", "person"),
    Verb(("per", "per"), "{a} marries {b}", "/per/per/partner", "person", symmetric=True),
    Verb(("per", "per"), "{a} beats {b}", "/per/per/opponent", "person", symmetric=True),
    Verb(("per", "loc"), "{b} raised {a}", "/per/loc/place_of_birth", "person"),
    Verb(("per", "loc"), "{b} houses {a}", "/per/loc/place_of_residence", "person"),
    Verb(("per", "misc"), "{a} wins {b}", "/per/misc/awarded", "person"),
    Verb(("org", "org"), "{a} buy {b}", "/org/org/subsidiary", "badge"),
    Verb(("org", "loc"), "{b} welcomes {a}", "/org/loc/locate_at", "badge"),
    Verb(("misc", "loc"), "{b} hosts {a}", "/misc/loc/held_on", "cup"),
)

# What a title can also say: it relates nothing, so that names alone do not give a label.
REMARKS = (
    Verb(("per", "org"), "{a} sues {b}"),
    Verb(("per", "per"), "{a} sues {b}"),
    Verb(("per", "loc"), "{a} leaves {b}"),
    Verb(("per", "misc"), "{a} misses {b}"),
    Verb(("org", "org"), "{a} praise {b}"),
    Verb(("org", "loc"), "{a} leave {b}"),
    Verb(("misc", "loc"), "{a} leaves {b}"),
)

# An object that stands for the asked entity itself.
SELF_LABELS = {
    "player": "/per/org/member_of",
    "person": "/per/per/self",
    "badge": "/org/org/self",
    "tower": "/loc/loc/self",
    "cup": "/misc/misc/self",
}

LABELS = ("none", *dict.fromkeys([*(verb.label for verb in VERBS), *SELF_LABELS.values()]))


@dataclasses.dataclass(frozen=True)
class Named:
    """One of the cast: an entity type and an index into its names (and so its colour)."""

    type: str
    index: int

    @property
    def name(self) -> str:
        return NAMES[self.type][self.index]


@dataclasses.dataclass(frozen=True)
class Thing:
    """An object in a photo: its kind and, unless that is grey, its colour's index."""

    kind: str
    index: int

    @property
    def type(self) -> str:
        return KINDS[self.kind].type

    @property
    def named(self) -> Named | None:
        """Whom the look points to."""
        stands_for = KINDS[self.kind].stands_for
        return None if stands_for is None else Named(stands_for, self.index)


@dataclasses.dataclass(frozen=True)
class Clause:
    """`verb` said of `a` and `b`."""

    verb: Verb
    a: Named
    b: Named

    @property
    def text(self) -> str:
        return self.verb.phrase.format(a=self.a.name, b=self.b.name)

    def links(self, first: Named, second: Named) -> bool:
        """Whether the clause says its verb of the two, in this direction."""
        forward = (first, second) == (self.a, self.b)
        return forward or (self.verb.symmetric and (first, second) == (self.b, self.a))


def relation(thing: Thing, entity: Named, clauses: Sequence[Clause]) -> tuple[str, Clause | None]:
    """The label between an object and an entity of the title, and the clause it follows from.

    Args:
      thing: the object.
      entity: the asked entity.
      clauses: what the title says.

    Returns:
      `(label, clause)`; the clause is None for a label that needs none (the object stands for the
      asked entity itself) and for `none`.
    """
    named = thing.named
    mentioned = {one for clause in clauses for one in (clause.a, clause.b)}
    if named is None or named not in mentioned:
        return "none", None
    if named == entity:
        return SELF_LABELS[thing.kind], None
    for clause in clauses:
        if clause.verb.kind == thing.kind and clause.links(named, entity):
            return clause.verb.label, clause
    return "none", None


def span(title: Sequence[str], named: Named) -> tuple[int, int]:
    """Where a name stands in a title: its first word, and the word after its last."""
    name, title = tuple(named.name.split()), tuple(title)
    start = next(i for i in range(len(title)) if title[i : i + len(name)] == name)
    return start, start + len(name)
