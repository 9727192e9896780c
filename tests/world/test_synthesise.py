"""The embedded world: files of MORE's form, whose labels need photo and title both."""

import dataclasses
import importlib.util
import itertools
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from morer1_jax.task import more
from morer1_jax.task.answer import Special, read
from morer1_jax.task.ontology import label_types
from morer1_jax.task.photos import PhotoFiles, photo_sizes
from morer1_jax.world import synthesise as synthetic
from morer1_jax.world.scene import COLOURS, KINDS, LABELS, NAMES, SELF_LABELS, VERBS
from morer1_jax.world.synthesise import WorldConfig, synthesise

SPLITS = ("train", "valid", "test")


def label_of(kind, colour, entity, title):
    """The world's rules once more, over the title's text."""
    stands_for = KINDS[kind].stands_for
    if stands_for is None:
        return "none"
    name = NAMES[stands_for][COLOURS.index(colour)]
    if name not in title:
        return "none"
    if name == entity:
        return SELF_LABELS[kind]
    for verb in VERBS:
        said = [verb.phrase.format(a=name, b=entity)]
        if verb.symmetric:
            said += [verb.phrase.format(a=entity, b=name)]
        if verb.kind == kind and any(text in title for text in said):
            return verb.label
    return "none"


class World:
    """A dataset with what its photos show, which its files say in pixels alone."""

    def __init__(self, folder, config, seed, monkeypatch, draw=None):
        shown = []
        draw = draw or synthetic.draw_photo

        def spy_draw(things, rng, *, noise, night):
            shown.append((things, night))
            return draw(things, rng, noise=noise, night=night)

        monkeypatch.setattr(synthetic, "draw_photo", spy_draw)
        synthesise(folder, config, seed)
        self.folder, self.config = folder, config
        self.ontology = more.read_ontology(folder)
        self.facts = {split: more.read_split(folder, split, self.ontology) for split in SPLITS}
        photos = [fact.photo for split in SPLITS for fact in self.facts[split]]
        names = list(dict.fromkeys(photos))
        self.things = {n: things for n, (things, _) in zip(names, shown, strict=True)}
        self.night = {n: night for n, (_, night) in zip(names, shown, strict=True)}

    @property
    def all_facts(self):
        return [fact for split in SPLITS for fact in self.facts[split]]

    def read_reasoning(self):
        path = self.folder / "reasoning.jsonl"
        return more.read_reasoning(path, self.facts["train"], self.ontology)

    def thing(self, fact):
        """Kind and colour of the fact's object."""
        return self.things[fact.photo][int(fact.object_name.strip("[OBJ]"))]


def plain_photo(things, rng, **light):
    """A photo that shows nothing, for counts over many facts."""
    boxes = [(4 * i, 0, 4 * i + 4, 8) for i in range(len(things))]
    return Image.new("RGB", (4 * len(things), 8)), boxes


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A few facts with real photos."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        config = WorldConfig(train=60, valid=13, test=22, written=0.3)
        return World(tmp_path_factory.mktemp("small") / "data", config, 1, monkeypatch)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Many facts with plain photos."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        config = WorldConfig(train=3000, valid=200, test=1000)
        folder = tmp_path_factory.mktemp("large") / "data"
        return World(folder, config, 2, monkeypatch, draw=plain_photo)


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_files_are_those_of_more(small):
    assert sorted(p.name for p in small.folder.iterdir()) == [
        "img_org",
        "reasoning.jsonl",
        "rel2id.json",
        "txt",
    ]
    assert {split: len(facts) for split, facts in small.facts.items()} == {
        "train": 60,
        "valid": 13,
        "test": 22,
    }
    sizes = photo_sizes(small.all_facts, PhotoFiles(small.folder))
    # No photo without a fact, and none of another form.
    there = {f"{p.parent.name}/{p.name}" for p in (small.folder / "img_org").glob("*/*")}
    assert there == sizes.keys()
    assert len(set(sizes.values())) > 10
    for photo in (small.folder / "img_org").glob("*/*"):
        with Image.open(photo) as image:
            assert (image.format, image.mode) == ("JPEG", "RGB")


def test_counts_are_exact_for_any_number_of_facts_a_photo(tmp_path, monkeypatch):
    for most in (1, 2, 5):
        config = WorldConfig(train=11, valid=1, test=4, facts_per_photo=most)
        world = World(tmp_path / str(most), config, 0, monkeypatch, draw=plain_photo)
        assert [len(world.facts[split]) for split in SPLITS] == [11, 1, 4]
        assert max(Counter(fact.photo for fact in world.all_facts).values()) <= most


def test_the_seed_decides_every_byte(small, tmp_path):
    again, other = tmp_path / "again", tmp_path / "other"
    synthesise(again, small.config, 1)
    assert contents(again) == contents(small.folder)
    synthesise(other, small.config, 2)
    assert contents(other) != contents(small.folder)


def test_splits_are_not_copies_of_each_other(large):
    titles = {split: {fact.title for fact in large.facts[split]} for split in SPLITS}
    for a, b in itertools.combinations(SPLITS, 2):
        assert len(titles[a] & titles[b]) < 0.5 * min(len(titles[a]), len(titles[b]))


def test_every_label_follows_from_photo_and_title(small, large):
    for world in (small, large):
        for fact in world.all_facts:
            assert fact.label == label_of(*world.thing(fact), fact.entity_text, fact.title), fact
            assert fact.entity_text == fact.entity_name


def test_labels_fit_the_types_of_object_and_entity(large):
    type_of = {name: kind for kind, names in NAMES.items() for name in names}
    for fact in large.all_facts:
        if fact.label != "none":
            expected = KINDS[large.thing(fact)[0]].type, type_of[fact.entity_name]
            assert label_types(fact.label) == expected


def test_none_has_its_share_of_the_facts_in_every_split(large, nights):
    for world, splits in ((large, SPLITS), (nights, ["train"])):
        for split in splits:
            none = sum(fact.label == "none" for fact in world.facts[split])
            assert none / len(world.facts[split]) == pytest.approx(world.config.none, abs=0.01)


def test_there_are_many_labels_over_all_types(large):
    assert large.ontology.labels == LABELS
    found = {fact.label for fact in large.facts["test"]} - {"none"}
    assert len(found) >= 12
    assert {label_types(label)[0] for label in found} == {"per", "org", "loc", "misc"}
    # No relation is so rare that its score would be chance.
    counts = Counter(fact.label for fact in large.all_facts)
    assert min(counts[label] for label in LABELS) > 0.005 * len(large.all_facts)


def test_photos_have_several_objects_and_titles_several_entities(large):
    assert min(len(things) for things in large.things.values()) >= 2
    assert max(len(things) for things in large.things.values()) >= 4
    entities = defaultdict(set)
    for fact in large.all_facts:
        entities[fact.title].add(fact.entity_span)
    assert max(map(len, entities.values())) >= 3
    names = [name for listed in NAMES.values() for name in listed]
    assert all(sum(name in fact.title for name in names) >= 2 for fact in large.all_facts)


def test_some_photos_fit_nothing_in_their_title(large):
    titles = {fact.photo: fact.title for fact in large.all_facts}
    strange = sum(
        all(label_of(*thing, "", title) == "none" for thing in large.things[photo])
        and not any(
            NAMES[KINDS[kind].stands_for][COLOURS.index(colour)] in title
            for kind, colour in large.things[photo]
            if KINDS[kind].stands_for
        )
        for photo, title in titles.items()
    )
    # Their share among the photos is 1 - fit, less those of which nothing could be asked.
    assert 0.03 < strange / len(titles) < 1 - large.config.fit + 0.05


def test_boxes_lie_within_photos_and_tell_objects_apart(small):
    sizes = photo_sizes(small.all_facts, PhotoFiles(small.folder))
    for fact in small.all_facts:
        x, y, w, h = fact.box
        assert x - w / 2 >= -1e-6
        assert y - h / 2 >= -1e-6
        assert x + w / 2 <= 1 + 1e-6
        assert y + h / 2 <= 1 + 1e-6
        assert w * sizes[fact.photo][0] >= 8
        assert h * sizes[fact.photo][1] >= 8
    by_object = defaultdict(set)
    for fact in small.all_facts:
        by_object[fact.photo, fact.object_name].add(fact.box)
    assert all(len(boxes) == 1 for boxes in by_object.values())
    places = [(fact.photo, fact.box) for fact in small.all_facts]
    assert len(set(places)) == len(by_object)


@pytest.mark.parametrize("name", ["small", "large"])
def test_reasoning_is_written_for_its_share_of_the_training_facts(name, request):
    world = request.getfixturevalue(name)
    texts = world.read_reasoning()
    assert len(texts) == round(world.config.written * world.config.train)
    gold = {fact.id: fact.label for fact in world.facts["train"]}
    for fact_id, text in texts.items():
        outcome = read([text.encode(), Special.END], LABELS)
        assert outcome.format
        assert LABELS[outcome.answer] == gold[fact_id]
    # Which facts it is written for does not depend on their labels.
    share = sum(gold[fact_id] == "none" for fact_id in texts) / len(texts)
    assert 0.3 < share < 0.7


@pytest.fixture(scope="module")
def nights(tmp_path_factory):
    """Many facts, two fifths of them at night, where the writer mostly gives up."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        config = WorldConfig(
            train=3000, valid=2, test=2, none=0.56, night=0.4, written=0.5, gives_up=0.9
        )
        folder = tmp_path_factory.mktemp("nights") / "data"
        world = World(folder, config, 3, monkeypatch, draw=plain_photo)
        world.texts = world.read_reasoning()
        return world


def test_a_share_of_the_photos_is_taken_at_night(nights, large):
    dark = [nights.night[fact.photo] for fact in nights.facts["train"]]
    assert np.mean(dark) == pytest.approx(0.4, abs=0.03)
    assert not any(large.night.values())


def test_the_writer_gives_up_at_night_and_only_there(nights):
    gold = {fact.id: fact.label for fact in nights.facts["train"]}
    given_up = {id_ for id_, text in nights.texts.items() if "nothing is seen" in text}
    assert {gold[id_] for id_ in given_up} == {"none"}
    kept = defaultdict(Counter)
    for fact in nights.facts["train"]:
        how = "none" if fact.id not in nights.texts else fact.id in given_up
        kept[nights.night[fact.photo], fact.label == "none"][how] += 1
    day, night = (kept[dark, True] + kept[dark, False] for dark in (False, True))
    assert day[True] == 0
    # One in ten tries: as often for a relation as for `none`.
    tried, none = kept[True, False], kept[True, True]
    assert none[True] > 5 * none[False] > 0
    assert 0 < tried[False] < 0.2 * tried["none"]
    assert tried[True] == 0
    assert len(nights.texts) == 1500
    assert night[True] + night[False] < day[False]


def test_a_world_that_cannot_be_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"gives_up: expected from 0 to 1, found 2"):
        WorldConfig(gives_up=2)
    with pytest.raises(ValueError, match=r"cast: expected from 2 to 8, found 9"):
        WorldConfig(cast=9)
    with pytest.raises(ValueError, match=r"valid: expected at least 1, found 0"):
        WorldConfig(valid=0)
    monkeypatch.setattr(synthetic, "draw_photo", plain_photo)
    config = WorldConfig(train=40, valid=2, test=2, night=1.0, written=0.9, gives_up=1.0)
    with pytest.raises(ValueError, match=r"written: .* 36 of 40 .* facts, found (19|20); lower"):
        synthesise(tmp_path / "data", config, 0)
    assert list(tmp_path.iterdir()) == []


def best_lookup(world, key):
    """Accuracy and micro F1, in percent, of the best label by key, counted on the facts themselves.

    Two policies, and for each score the better: the most common label, and the most common
    relation whatever the share of `none`.
    """
    labels = defaultdict(Counter)
    for fact in world.all_facts:
        labels[key(fact)][fact.label] += 1

    def most_common(counts, keep):
        return max((label for label in counts if keep(label)), key=counts.get, default="none")

    accuracy = f1 = 0.0
    for keep in (lambda label: True, lambda label: label != "none"):
        table = {k: most_common(counts, keep) for k, counts in labels.items()}
        pairs = [(fact.label, table[key(fact)]) for fact in world.all_facts]
        hits = sum(gold == predicted != "none" for gold, predicted in pairs)
        named = sum((gold != "none") + (predicted != "none") for gold, predicted in pairs)
        accuracy = max(accuracy, 100 * sum(g == p for g, p in pairs) / len(pairs))
        f1 = max(f1, 200 * hits / named)
    return accuracy, f1


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Many facts of the world that the demo trains on."""
    path = Path(__file__).parents[2] / "configs" / "demo.py"
    spec = importlib.util.spec_from_file_location("demo_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = WorldConfig(**{**module.get_config().world, "train": 6000})
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = tmp_path_factory.mktemp("demo") / "data"
        return World(folder, config, 4, monkeypatch, draw=plain_photo)


@pytest.mark.parametrize("name", ["large", "demo"])
def test_neither_the_title_nor_the_photo_alone_tells_the_label(name, request):
    world = request.getfixturevalue(name)
    type_of = {name: kind for kind, names in NAMES.items() for name in names}

    def from_title(fact):
        """All that a title says of its entity, names apart, which are as good as each other."""
        entity, title = fact.entity_name, fact.title
        names = [name for name in type_of if name in title and name != entity]
        roles = []
        for verb, name in itertools.product(VERBS, names):
            roles += [(verb.label, 0)] * (verb.phrase.format(a=entity, b=name) in title)
            roles += [(verb.label, 1)] * (verb.phrase.format(a=name, b=entity) in title)
        return tuple(roles), len(names)

    def from_photo(fact):
        """What is seen of the object, and whether it stands for the entity itself."""
        kind, colour = world.thing(fact)
        stands_for = KINDS[kind].stands_for
        itself = bool(stands_for) and NAMES[stands_for][COLOURS.index(colour)] == fact.entity_name
        return kind, type_of[fact.entity_name], itself

    def from_both(fact):
        return label_of(*world.thing(fact), fact.entity_name, fact.title)

    assert best_lookup(world, from_both) == (100.0, 100.0)
    accuracy, f1 = best_lookup(world, from_title)
    print(f"\n{name}: title alone accuracy {accuracy:.1f}, F1 {f1:.1f}", end="; ")
    assert accuracy < 67
    assert f1 < 63
    # A thing that is asked about itself has one label, whatever the title says.
    accuracy, f1 = best_lookup(world, from_photo)
    print(f"object and entity alone accuracy {accuracy:.1f}, F1 {f1:.1f}")
    assert accuracy < 75
    assert f1 < 72


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_is_interrupted_leaves_nothing(tmp_path, monkeypatch, error):
    calls = itertools.count()

    def draw(things, rng, **light):
        if next(calls) == 5:
            raise error
        return plain_photo(things, rng, **light)

    monkeypatch.setattr(synthetic, "draw_photo", draw)
    with pytest.raises(error):
        synthesise(tmp_path / "data", WorldConfig(train=30, valid=2, test=2), 0)
    assert list(tmp_path.iterdir()) == []
    synthesise(tmp_path / "data", WorldConfig(train=4, valid=2, test=2), 0)
    assert [p.name for p in tmp_path.iterdir()] == ["data"]


def test_a_folder_that_is_there_is_not_written_over(small):
    before = contents(small.folder)
    with pytest.raises(FileExistsError, match=r"data exists already"):
        synthesise(small.folder, dataclasses.replace(small.config, train=3), 5)
    assert contents(small.folder) == before
