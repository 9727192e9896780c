"""The synthetic world's rules: who looks like what, what a title says, which label follows.

A world is a small cast, each member known by its look, and a table of the clauses of titles.
Whether an object and an entity are related, and how, follows from three things that no single
modality shows: what the object is (the photo), whom its look belongs to (knowledge of the cast),
and what the title says of the two (the text). It is the chain of the benchmark's own example: a
player in green, a title about Heat and Celtics, the entity 'Heat'; green is the Celtics', they play
against the Heat, so `/per/org/opposed_to`.
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
        name: the kind's name in the drawing's table and in reasoning.
        type: the entity type of the object.
        stands_for: the type of the cast member its colour points to (a player in red points to an
            organisation), or None for an object that cannot be recognised, which is grey.
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
    """A clause of a title without its two names.

    Attributes:
        types: entity types of the first and the second cast member.
        phrase: the wording; `{a}` and `{b}` are the two names.
        label: the relation of an object that stands for the first member to the second, if any.
        kind: the kind of object the label needs; empty where there is no label.
        symmetric: whether the label also holds with the two exchanged.
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

# Clauses without a label, so that two names in a title do not imply one.
REMARKS = (
    Verb(("per", "org"), "{a} sues {b}"),
    Verb(("per", "per"), "{a} sues {b}"),
    Verb(("per", "loc"), "{a} leaves {b}"),
    Verb(("per", "misc"), "{a} misses {b}"),
    Verb(("org", "org"), "{a} praise {b}"),
    Verb(("org", "loc"), "{a} leave {b}"),
    Verb(("misc", "loc"), "{a} leaves {b}"),
)

# The label between an object and the entity that it stands for.
SELF_LABELS = {
    "player": "/per/org/member_of",
    "person": "/per/per/self",
    "badge": "/org/org/self",
    "tower": "/loc/loc/self",
    "cup": "/misc/misc/self",
}

LABELS = ("none", *dict.fromkeys([*(verb.label for verb in VERBS), *SELF_LABELS.values()]))


@dataclasses.dataclass(frozen=True)
class CastMember:
    """A member of the cast: an entity type and the index of its name and colour."""

    type: str
    index: int

    @property
    def name(self) -> str:
        """The name in titles."""
        return NAMES[self.type][self.index]


@dataclasses.dataclass(frozen=True)
class PhotoObject:
    """An object in a photo: its kind and its colour's index, which a grey kind ignores."""

    kind: str
    index: int

    @property
    def type(self) -> str:
        """The entity type of the object."""
        return KINDS[self.kind].type

    @property
    def stands_for(self) -> CastMember | None:
        """The cast member that the look points to."""
        type_ = KINDS[self.kind].stands_for
        return None if type_ is None else CastMember(type_, self.index)


@dataclasses.dataclass(frozen=True)
class Clause:
    """A verb and the two cast members that it is said of."""

    verb: Verb
    a: CastMember
    b: CastMember

    @property
    def text(self) -> str:
        """The clause's words in a title."""
        return self.verb.phrase.format(a=self.a.name, b=self.b.name)

    def links(self, first: CastMember, second: CastMember) -> bool:
        """Returns whether the clause says its verb of the two, in this direction."""
        forward = (first, second) == (self.a, self.b)
        return forward or (self.verb.symmetric and (first, second) == (self.b, self.a))


def relation(
    object_: PhotoObject, entity: CastMember, clauses: Sequence[Clause]
) -> tuple[str, Clause | None]:
    """Returns the label between an object and an entity of the title, and the clause it is from.

    The clause is None for a label that needs none (the object stands for the entity itself) and for
    the label `none`.
    """
    member = object_.stands_for
    if member is None or member not in members(clauses):
        return "none", None
    if member == entity:
        return SELF_LABELS[object_.kind], None
    for clause in clauses:
        if clause.verb.kind == object_.kind and clause.links(member, entity):
            return clause.verb.label, clause
    return "none", None


def members(clauses: Sequence[Clause]) -> tuple[CastMember, ...]:
    """Returns the cast members of a title, in order of its clauses."""
    return tuple(member for clause in clauses for member in (clause.a, clause.b))


def span(title: Sequence[str], member: CastMember) -> tuple[int, int]:
    """Returns the indices of a name's first word in a title, and of the word after its last."""
    name, title = tuple(member.name.split()), tuple(title)
    start = next(i for i in range(len(title)) if title[i : i + len(name)] == name)
    return start, start + len(name)
