import dataclasses
import hashlib
import json
import time
from unicodedata import normalize

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from morer1_jax.errors import DataError
from morer1_jax.task.answer import format_answer
from morer1_jax.task.fact import Fact, composed
from morer1_jax.task.more import (
    check_reasoning,
    digests,
    photo_path,
    read_ontology,
    read_reasoning,
    read_split,
    split_path,
    write_ontology,
    write_reasoning,
    write_split,
)
from morer1_jax.task.ontology import Ontology
from morer1_jax.task.photos import (
    PhotoFiles,
    check_photos,
    photo_digests,
    photo_sizes,
    read_photo,
)

ONTOLOGY = Ontology(("none", "/per/org/opposed_to", "/per/misc/party"))
GOOD = {
    "token": ["Heat", "and", "Celtics", "Are", "Tied", "Up", "."],
    "h": {"name": "Heat", "pos": [0, 1]},
    "t": {"name": "[OBJ0]", "box": (0.5, 0.4, 0.25, 0.5)},
    "img_id": "1.jpg",
    "relation": "/per/org/opposed_to",
}
FACT = Fact(
    id="train:1",
    tokens=tuple(GOOD["token"]),
    entity_name="Heat",
    entity_span=(0, 1),
    object_name="[OBJ0]",
    box=(0.5, 0.4, 0.25, 0.5),
    image="1.jpg",
    label="/per/org/opposed_to",
)


@pytest.fixture
def folder(tmp_path):
    photos = tmp_path / "img_org" / "train"
    photos.mkdir(parents=True)
    for name, size in (("1.jpg", (40, 30)), ("2.jpg", (64, 48))):
        Image.effect_noise(size, 50).convert("RGB").save(photos / name)
    write_ontology(tmp_path, ONTOLOGY)
    write_split(tmp_path, "train", [FACT])
    return tmp_path


def put(folder, *lines):
    path = split_path(folder, "train")
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def changed(**changes):
    """GOOD with dotted keys replaced (`h__pos=…`), or removed where the value is `...`."""
    line = {k: dict(v) if isinstance(v, dict) else v for k, v in GOOD.items()}
    for key, value in changes.items():
        *outer, last = key.split("__")
        part = line[outer[0]] if outer else line
        if value is ...:
            del part[last]
        else:
            part[last] = value
    return repr(line)


def test_reads_the_released_form(folder):
    put(folder, repr(GOOD), changed(t__box=[0.5, 0.5, 1, 1]))
    assert read_ontology(folder) == ONTOLOGY
    facts = read_split(folder, "train", ONTOLOGY)
    assert facts == [FACT, dataclasses.replace(FACT, id="train:2", box=(0.5, 0.5, 1.0, 1.0))]
    assert photo_path(folder, facts[0]) == folder / "img_org" / "train" / "1.jpg"


def test_writes_the_released_form(folder):
    assert split_path(folder, "train").read_text() == repr(GOOD) + "\n"
    assert sorted(p.name for p in (folder / "txt").iterdir()) == ["train.txt"]


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).map(composed)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_round_trip(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("round")
    (folder / "img_org" / "test").mkdir(parents=True)
    (folder / "img_org" / "test" / "ü 1.jpg").touch()
    facts = []
    for i in range(data.draw(st.integers(1, 3))):
        tokens = data.draw(st.lists(words, min_size=1, max_size=5))
        start = data.draw(st.integers(0, len(tokens) - 1))
        w, h = data.draw(st.tuples(*[st.floats(1e-3, 1.0)] * 2))
        x, y = data.draw(st.tuples(st.floats(w / 2, 1 - w / 2), st.floats(h / 2, 1 - h / 2)))
        facts.append(
            Fact(
                id=f"test:{i + 1}",
                tokens=tuple(tokens),
                entity_name=data.draw(words.filter(str.strip)),
                entity_span=(start, data.draw(st.integers(start + 1, len(tokens)))),
                object_name="[OBJ1]",
                box=(x, y, w, h),
                image="ü 1.jpg",
                label=data.draw(st.sampled_from(ONTOLOGY.labels)),
            )
        )
    write_split(folder, "test", facts)
    assert read_split(folder, "test", ONTOLOGY) == facts


NAMES = {form: normalize(form, "\xe9quipe \xfc.jpg") for form in ("NFC", "NFD")}
# Half composed: one letter in each form.
HALF = "\xe9quipe u\u0308.jpg"


@pytest.mark.parametrize(
    ("there", "written", "found"),
    [
        (["NFC"], "NFC", "NFC"),
        (["NFD"], "NFC", "NFD"),
        (["NFC"], "NFD", "NFC"),
        # Two photos, told apart by their bytes alone.
        (["NFC", "NFD"], "NFC", "NFC"),
        (["NFC", "NFD"], "NFD", "NFD"),
    ],
)
def test_a_photo_is_found_in_whichever_form_of_unicode_its_name_is(folder, there, written, found):
    for number, form in enumerate(there):
        photo = folder / "img_org" / "train" / NAMES[form]
        Image.new("RGB", (50 + number, 40)).save(photo)
    put(folder, changed(img_id=NAMES[written]))
    (fact,) = read_split(folder, "train", ONTOLOGY)
    assert fact.image == NAMES[found]
    seen = check_photos([fact], PhotoFiles(folder))
    assert seen[fact.photo].size == (50 + there.index(found), 40)
    # A copy of the folder on another system is the same dataset.
    assert photo_digests(seen).keys() == {f"img_org/train/{NAMES['NFC']}"}


def test_of_two_photos_whose_names_read_alike_both_have_a_part_in_the_digest(folder):
    photos = {form: folder / "img_org" / "train" / NAMES[form] for form in ("NFC", "NFD")}
    put(folder, *(changed(img_id=NAMES[form]) for form in photos))

    def found(first, second):
        for path, colour in zip(photos.values(), (first, second), strict=True):
            Image.new("RGB", (50, 40), colour).save(path)
        facts = read_split(folder, "train", ONTOLOGY)
        assert [fact.image for fact in facts] == [NAMES[form] for form in photos]
        there = photo_digests(check_photos(facts, PhotoFiles(folder)))
        assert there == photo_digests(check_photos(facts[::-1], PhotoFiles(folder)))
        assert there.keys() == {f"img_org/train/{NAMES['NFC']}"}
        return there

    begun = found("red", "blue")
    assert begun == found("red", "blue")
    for other in (("red", "red"), ("blue", "blue"), ("blue", "red")):
        assert found(*other) != begun


def test_a_photo_of_two_names_that_read_alike_is_refused(folder):
    for name in NAMES.values():
        (folder / "img_org" / "train" / name).touch()
    path = put(folder, changed(img_id=HALF))
    with pytest.raises(DataError) as error:
        read_split(folder, "train", ONTOLOGY)
    assert str(error.value).startswith(f"{path}:1: img_id: expected ")
    assert f"found {HALF!a}, the same name" in str(error.value)
    assert all(ascii(name) in str(error.value) for name in NAMES.values())


def test_text_is_composed(folder):
    line = changed(
        token=["L'", "e\u0301quipe"],
        h__name="e\u0301quipe",
        h__pos=[1, 2],
        relation="/per/org/e\u0301lu",
    )
    put(folder, line)
    ontology = Ontology((*ONTOLOGY.labels, "/per/org/\xe9lu"))
    (fact,) = read_split(folder, "train", ontology)
    assert (fact.tokens[1], fact.entity_name, fact.label) == (*["\xe9quipe"] * 2, "/per/org/\xe9lu")
    texts = check_reasoning(
        [("here", {"fact": "train:1", "text": reasoned("/per/org/e\u0301lu")})], [fact], ontology
    )
    assert texts == {"train:1": reasoned("/per/org/\xe9lu")}


def test_a_byte_order_mark_is_no_part_of_the_first_word(folder):
    write_reasoning(folder / "reasoning.jsonl", {"train:1": reasoned()})
    paths = [folder / name for name in ("rel2id.json", "txt/train.txt", "reasoning.jsonl")]
    for path in paths:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_ontology(folder) == ONTOLOGY
    assert read_split(folder, "train", ONTOLOGY) == [FACT]
    assert read_reasoning(paths[2], [FACT], ONTOLOGY) == {"train:1": reasoned()}
    for path in paths[1:]:
        path.write_text(path.read_text(encoding="utf-8-sig"), encoding="utf-16")
    for read_again in (
        lambda: read_split(folder, "train", ONTOLOGY),
        lambda: read_reasoning(paths[2], [FACT], ONTOLOGY),
    ):
        with pytest.raises(DataError, match=r": expected UTF-8 text, found UTF-16 or no text;"):
            read_again()


def test_entity_name_may_differ_from_the_title(folder):
    put(folder, changed(h__name="HEAT"))
    (fact,) = read_split(folder, "train", ONTOLOGY)
    assert (fact.entity_name, fact.entity_text) == ("HEAT", "Heat")


def test_slop_of_detectors_is_clipped(folder):
    put(folder, changed(t__box=(0.1, 0.5, 0.2016, 1.0016)))
    (fact,) = read_split(folder, "train", ONTOLOGY)
    x, y, w, h = fact.box
    assert x - w / 2 == 0
    assert x + w / 2 == pytest.approx(0.2008)
    assert (y, h) == (0.5, 1.0)


def test_boxes_that_touch_the_edge_and_unusual_titles_are_kept_as_written(folder):
    # 5e-11 beyond the photo, as rounded fractions of pixels may be.
    box = (0.9, 0.5, 0.2000000001, 1.0)
    put(folder, changed(t__box=box), changed(token=["a"]).replace("'a'", "'a\u2028\\d'"))
    first, second = read_split(folder, "train", ONTOLOGY)
    assert first.box == box
    assert second.tokens == ("a\u2028\\d",)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'token': ['a'", "expected one Python dict literal a line, found"),
        ("", "expected one Python dict literal a line, found"),
        ("__import__('os').getcwd()", "found something else"),
        ("{'token': [open('x')]}", "found something else"),
        ("(" * 100_000, "expected one Python dict literal a line, found"),
        ("\0", "expected one Python dict literal a line, found"),
        ("['a']", "the line: expected a dict of token, h, t, img_id, relation, found list"),
        (repr(GOOD)[:-1] + ", 'img_id': '2.jpg'}", "expected each key of a dict once"),
        (repr(GOOD).replace("'pos'", "'pos': [1, 2], 'pos'"), "expected each key of a dict once"),
        (changed(token=...), "found no key 'token'"),
        (changed(h=...), "found no key 'h'"),
        (changed(h__pos=...), "h: expected name, pos, found no key 'pos'"),
        (changed(t__box=...), "t: expected name, box, found no key 'box'"),
        (changed(img_id=...), "found no key 'img_id'"),
        (changed(relation=...), "found no key 'relation'"),
        (changed(extra=1), "relation, found key 'extra'"),
        (changed(t__pos=[0, 1]), "t: expected name, box, found key 'pos'"),
        (changed(token="Heat"), "token: expected list, found str"),
        (changed(h=None), "h: expected dict, found NoneType"),
        (changed(h__name=3), "h: name: expected str, found int"),
        (changed(img_id=1), "img_id: expected str, found int"),
        (changed(relation=["none"]), "relation: expected str, found list"),
        (changed(token=[]), "token: expected one or more words"),
        (changed(token=["a", ""]), "token: expected one or more words"),
        (changed(token=["a", 1]), "token: expected one or more words"),
        (changed(token=["a", "\ud800"]), "lone surrogate"),
        (changed(h__name=" "), "h.name: expected a name"),
        (changed(t__name=""), "t.name: expected a name"),
        (
            changed(h__pos=[0, 8]),
            "h.pos: expected 0 <= start < end <= 7, the title's words, found [0, 8]",
        ),
        (changed(h__pos=[-1, 1]), "found [-1, 1]"),
        (changed(h__pos=[2, 2]), "found [2, 2]"),
        (changed(h__pos=[3, 2]), "found [3, 2]"),
        (changed(h__pos=[0]), "h.pos: expected two integers, start and end, found [0]"),
        (changed(h__pos=[0.0, 1.0]), "expected two integers"),
        (changed(h__pos=[False, True]), "expected two integers"),
        (
            changed(relation="/per/org/friend_of"),
            "relation: expected one of the 3 labels of rel2id.json, found '/per/org/friend_of'",
        ),
        (changed(img_id="9.jpg"), "found none '9.jpg'"),
        (changed(img_id="../train/1.jpg"), "found none '../train/1.jpg'"),
        (changed(img_id="1\n.jpg"), "found none '1\\n.jpg'"),
        (changed(t__box=(0.5, 0.5, 0.0, 0.5)), "expected a width and height above 0"),
        (changed(t__box=(0.5, 0.5, 0.5, -0.5)), "expected a width and height above 0"),
        (changed(t__box=(0.5, 0.5, 0.5)), "expected four numbers"),
        (changed(t__box=(0.5, 0.5, 0.5, "1")), "expected four numbers"),
        (changed(t__box=(0.5, 0.5, 0.5, True)), "expected four numbers"),
        (changed(t__box=(0.1, 0.5, 0.21, 0.5)), "expected fractions within 0 to 1"),
        (changed(t__box=(0.5, 0.95, 0.2, 0.2)), "expected fractions within 0 to 1"),
        (changed(t__box=(210, 140, 50, 60)), "expected fractions within 0 to 1"),
        (changed(t__box=(0.5, 10**400, 0.2, 0.2)), "expected fractions within 0 to 1"),
        (changed(t__box=(1.0005, 0.5, 0.001, 0.2)), "expected a box inside the photo"),
        (changed().replace("0.25", "1e999"), "expected fractions within 0 to 1"),
    ],
)
def test_bad_lines_are_named_in_one_line(folder, line, message):
    path = put(folder, repr(GOOD), line, repr(GOOD))
    with pytest.raises(DataError) as error:
        read_split(folder, "train", ONTOLOGY)
    assert str(error.value).startswith(f"{path}:2: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_all_bad_lines_are_named_at_once_up_to_twenty(folder):
    bad = [changed(relation="/no/such"), changed(img_id="9.jpg"), "", changed(t__box=(1, 1, 0, 1))]
    path = put(folder, repr(GOOD), *bad, repr(GOOD))
    with pytest.raises(DataError) as error:
        read_split(folder, "train", ONTOLOGY)
    assert str(error.value).startswith(f"4 faults: (1) {path}:2: relation: ")
    for number, what in (
        (3, "img_id: expected a photo in the split's folder"),
        (4, "expected one Python dict literal a line, found"),
        (5, "t.box: "),
    ):
        assert f"({number - 1}) {path}:{number}: {what}" in str(error.value)
    assert "\n" not in str(error.value)
    put(folder, *["x"] * 50)
    with pytest.raises(DataError, match=r"^20 faults or more: .*train\.txt:20: ") as error:
        read_split(folder, "train", ONTOLOGY)
    assert "txt:21" not in str(error.value)


def test_bad_files_are_named(folder):
    with pytest.raises(DataError, match=r"valid\.txt.*No such file"):
        read_split(folder, "valid", ONTOLOGY)
    path = put(folder)
    with pytest.raises(DataError, match=r"train\.txt:1: expected a fact a line, found none"):
        read_split(folder, "train", ONTOLOGY)
    path.write_bytes(repr(GOOD).encode() + b"\n{'token': ['\xff']}\n")
    with pytest.raises(DataError, match=r"train\.txt:2: expected UTF-8"):
        read_split(folder, "train", ONTOLOGY)
    put(folder, repr(GOOD))
    (folder / "img_org" / "train").rename(folder / "img_org" / "elsewhere")
    with pytest.raises(
        DataError, match=r"expected the folder of its photos, found .*img_org/train"
    ):
        read_split(folder, "train", ONTOLOGY)


def test_a_split_of_the_released_size_is_read_in_seconds(folder):
    write_split(
        folder,
        "train",
        [
            dataclasses.replace(FACT, id=f"train:{i}", tokens=FACT.tokens * 3)
            for i in range(1, 5001)
        ],
    )
    began = time.process_time()
    assert len(read_split(folder, "train", ONTOLOGY)) == 5000
    # 20,264 lines in well under 20 s; measured at 1.6 s.
    assert time.process_time() - began < 5000 / 20264 * 20


def test_only_facts_in_their_own_lines_are_written(folder):
    before = split_path(folder, "train").read_bytes()
    with pytest.raises(ValueError, match="train:2: expected the fact of this id, found train:3"):
        write_split(folder, "train", [FACT, dataclasses.replace(FACT, id="train:3")])
    assert split_path(folder, "train").read_bytes() == before


def test_photos_are_decoded_once_each(folder):
    opened = []

    class Counted(PhotoFiles):
        def photo(self, fact):
            opened.append(fact.image)
            return super().photo(fact)

    second = dataclasses.replace(FACT, id="train:2", image="2.jpg")
    assert photo_sizes([FACT, second, FACT], Counted(folder)) == {
        "train/1.jpg": (40, 30),
        "train/2.jpg": (64, 48),
    }
    assert sorted(opened) == ["1.jpg", "2.jpg"]


def test_a_photos_digest_is_that_of_its_file(folder):
    before = check_photos([FACT], PhotoFiles(folder))["train/1.jpg"]
    path = folder / "img_org" / "train" / "1.jpg"
    assert before == ((40, 30), hashlib.sha256(path.read_bytes()).hexdigest())
    Image.effect_noise((40, 30), 60).convert("RGB").save(path)
    after = check_photos([FACT], PhotoFiles(folder))
    assert after["train/1.jpg"].size == before.size
    assert after["train/1.jpg"].digest != before.digest
    assert photo_digests(after) == {"img_org/train/1.jpg": after["train/1.jpg"].digest}


def test_sizes_are_those_of_photos_upright(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(folder / "img_org" / "train" / "1.jpg", exif=exif)
    assert photo_sizes([FACT], PhotoFiles(folder)) == {"train/1.jpg": (48, 64)}
    assert read_photo(PhotoFiles(folder), FACT).size == (48, 64)


def test_a_folder_in_a_bucket_is_read_as_a_local_one(folder, monkeypatch):
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    bucket = MemoryFileSystem()
    monkeypatch.setattr(fsspec, "filesystem", lambda *args, **options: bucket)
    monkeypatch.setattr(
        bucket, "_strip_protocol", lambda path: "/" + path.removeprefix("az://").strip("/")
    )
    write_reasoning(folder / "reasoning.jsonl", {"train:1": reasoned()})
    for path in folder.rglob("*"):
        if path.is_file():
            name = f"az://team/more/{path.relative_to(folder)}"
            bucket.pipe_file(name, path.read_bytes())
    found = "az://team/more"
    ontology = read_ontology(found)
    assert ontology == read_ontology(folder)
    facts = read_split(found, "train", ontology)
    assert facts == read_split(folder, "train", ontology)
    assert photo_sizes(facts, PhotoFiles(found)) == photo_sizes(facts, PhotoFiles(folder))
    assert digests(found) == digests(folder)
    texts = read_reasoning(f"{found}/reasoning.jsonl", facts, ontology)
    assert texts == read_reasoning(folder / "reasoning.jsonl", facts, ontology)
    with pytest.raises(DataError, match=r"^az://team/more/txt/test\.txt: expected a text file, .*"):
        read_split(found, "test", ontology)


def test_all_damaged_photos_are_named_at_once_up_to_twenty(folder):
    whole = (folder / "img_org" / "train" / "1.jpg").read_bytes()

    def facts(count):
        for number in range(10, 10 + count):
            data = whole if number % 2 else whole[: 300 + number]
            (folder / "img_org" / "train" / f"{number}.jpg").write_bytes(data)
            yield dataclasses.replace(FACT, id=f"train:{number}", image=f"{number}.jpg")

    with pytest.raises(DataError, match=r"^3 faults: \(1\) ") as error:
        photo_sizes(list(facts(6)), PhotoFiles(folder))
    for number in (10, 12, 14):
        assert f"{number}.jpg (fact train:{number}): cannot be read" in str(error.value)
    for number in (11, 13, 15):
        assert f"{number}.jpg" not in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"^20 faults or more: ") as error:
        photo_sizes(list(facts(60)), PhotoFiles(folder))
    assert str(error.value).count("cannot be read") == 20


@pytest.mark.parametrize("damage", ["truncated", "no image", "empty", "gone"])
def test_bad_photos_are_named_with_their_first_fact(folder, damage):
    path = folder / "img_org" / "train" / "2.jpg"
    whole = path.read_bytes()
    path.write_bytes(
        {"truncated": whole[: len(whole) // 2], "no image": b"<html>"}.get(damage, b"")
    )
    if damage == "gone":
        path.unlink()
    facts = [FACT, *(dataclasses.replace(FACT, id=f"train:{i}", image="2.jpg") for i in (4, 5))]
    with pytest.raises(DataError) as error:
        photo_sizes(facts, PhotoFiles(folder))
    assert str(error.value).startswith(f"{path} (fact train:4): ")
    assert "\n" not in str(error.value)


def reasoned(label=FACT.label, first="See."):
    return format_answer([first, *("On.",) * 5], label)


def text_line(text, fact="train:1"):
    return json.dumps({"fact": fact, "text": text})


def test_reasoning_round_trip(tmp_path):
    texts = {"train:2": reasoned(first="é\u2028…"), "train:1": reasoned()}
    facts = [dataclasses.replace(FACT, id=f"train:{i}") for i in (1, 2, 3)]
    path = tmp_path / "reasoning.jsonl"
    write_reasoning(path, texts)
    assert list(read_reasoning(path, facts, ONTOLOGY).items()) == list(texts.items())
    assert [json.loads(line)["fact"] for line in path.read_text().splitlines()] == list(texts)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "expected written reasoning {"),
        ("[]", "the record: expected a dict of fact, text, found list"),
        ('{"fact": "train:1"}', "the record: expected fact, text, found no key 'text'"),
        ('{"fact": "train:1", "text": "a", "x": 1}', "found key 'x'"),
        ('{"fact": 1, "text": "a"}', "fact: expected str, found int"),
        ('{"fact": "train:9", "text": "a"}', "fact 'train:9': expected a known fact"),
        ('{"fact": "train:2", "text": "a"}', "fact 'train:2': expected one text a fact"),
        ('{"fact": "train:1", "text": " \\n"}', "fact 'train:1': expected written reasoning"),
        ('{"fact": "train:1", "text": "\\ud800"}', "fact 'train:1': expected Unicode text"),
        (
            '{"fact": "train:1", "text": "So none."}',
            "fact 'train:1': expected '<think>', steps 1",
        ),
        (text_line(reasoned("none")), "at the end, found 'none'"),
        (text_line(reasoned("/per/misc/race")), "expected '<think>', steps 1"),
        (
            text_line(reasoned(first="<|im_end|>")),
            "special tokens of the model, found '<|im_end|>'",
        ),
        (text_line(reasoned(first="<|image_pad|>")), "found '<|image_pad|>'"),
    ],
)
def test_bad_reasoning_is_named_in_one_line(tmp_path, line, message):
    facts = [FACT, dataclasses.replace(FACT, id="train:2")]
    path = tmp_path / "reasoning.jsonl"
    path.write_text(text_line(reasoned(), "train:2") + "\n" + line + "\n")
    with pytest.raises(DataError) as error:
        read_reasoning(path, facts, ONTOLOGY)
    assert str(error.value).startswith(f"{path}:2: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bucket_without_its_client_says_what_to_install(monkeypatch):
    def no_client(*args, **kwargs):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", no_client)
    with pytest.raises(DataError, match=r"rel2id\.json: Install s3fs.*; pip install 'morer1-jax\["):
        read_ontology("s3://here")
    with pytest.raises(
        DataError, match=r"train\.txt: Install s3fs.*; pip install 'morer1-jax\[gcs"
    ):
        read_split("s3://here", "train", ONTOLOGY)


def test_digests_tell_changed_files_from_others(folder):
    before = digests(folder)
    assert set(before) == {"rel2id.json", "txt/train.txt"}
    write_reasoning(folder / "reasoning.jsonl", {"train:1": reasoned()})
    split_path(folder, "train").write_text(split_path(folder, "train").read_text() + "\n")
    after = digests(folder)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"reasoning.jsonl", "txt/train.txt"}
