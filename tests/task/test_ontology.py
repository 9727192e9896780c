import json

import pytest

from morer1_jax.errors import DataError
from morer1_jax.task.ontology import Ontology, label_types, read_ontology_file, write_ontology_file

LABELS = (
    "/per/org/opposed_to",
    "none",
    "/per/loc/place_of_birth",
    "/per/org/leader_of",
    "/misc/misc/self",
    "/car/per/driven_by",
)


def test_reads_labels_in_id_order_whatever_the_order_of_the_file(tmp_path):
    path = tmp_path / "rel2id.json"
    ids = {label: i for i, label in enumerate(LABELS)}
    path.write_text(json.dumps(dict(reversed(ids.items()))))
    ontology = read_ontology_file(path)
    assert ontology.labels == LABELS
    assert ontology.ids == ids
    assert ontology.ids["none"] == 1


def test_writes_what_it_reads(tmp_path):
    path = tmp_path / "rel2id.json"
    write_ontology_file(path, (*LABELS, "/loc/loc/größer_als"))
    assert read_ontology_file(path).labels == (*LABELS, "/loc/loc/größer_als")
    assert [p.name for p in tmp_path.iterdir()] == ["rel2id.json"]


def test_types_are_the_four_then_new_ones():
    assert Ontology(LABELS).types == ("per", "org", "loc", "misc", "car")
    assert label_types("/per/loc/place_of_birth") == ("per", "loc")


def test_allowed_labels_of_an_ordered_pair_end_in_none():
    ontology = Ontology(LABELS)
    assert ontology.allowed("per", "org") == ("/per/org/opposed_to", "/per/org/leader_of", "none")
    assert ontology.allowed("org", "per") == ("none",)
    assert ontology.allowed("car", "per") == ("/car/per/driven_by", "none")
    with pytest.raises(
        ValueError, match="expected one of per, org, loc, misc, car, found 'person'"
    ):
        ontology.allowed("person", "org")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected a JSON object"),
        ('["none"]', "expected a JSON object, label to id, found list"),
        ('{"none": 0, "none": 1}', "key 'none': expected each label once, found it twice"),
        ('{"none": 0, "/a/b/c": 0}', "key '/a/b/c': expected an id of its own, found 0, 'none''s"),
        ('{"none": 0, "/a/b/c": 2}', "key '/a/b/c': expected ids 0 to 1 without a gap, found 2"),
        ('{"none": -1, "/a/b/c": 0}', "key 'none': expected ids 0 to 1 without a gap, found -1"),
        ('{"none": "0"}', "key 'none': expected an id 0, 1, 2, …, found "),
        ('{"none": true}', "key 'none': expected an id 0, 1, 2, …, found "),
        ('{"none": {"a": 1}}', "key 'none': expected an id 0, 1, 2, …, found "),
        ('{"none": 0, "": 1}', "key '': expected a label"),
        ('{"none": 0, "/a/b/c d": 1}', "key '/a/b/c d': expected no white space"),
        ('{"none": 0, "/a/b/c<": 1}', "key '/a/b/c<': expected no white space"),
        ('{"none": 0, "/a/b/c>": 1}', "key '/a/b/c>': expected no white space"),
        ('{"none": 0, "/a/b/\\ud800": 1}', "control character"),
        ('{"none": 0, "opposed_to": 1}', "key 'opposed_to': expected 'none' or '/object type/"),
        ('{"none": 0, "/per/opposed_to": 1}', "key '/per/opposed_to': expected 'none' or"),
        ('{"none": 0, "/per//opposed_to": 1}', "key '/per//opposed_to': expected 'none' or"),
        ('{"none": 0, "x/per/org/a": 1}', "key 'x/per/org/a': expected 'none' or"),
        ('{"/a/b/c": 0}', "label 'none': expected exactly once, found none"),
        ('{"none": 0}', "at least one relation"),
        ("{}", "label 'none': expected exactly once"),
        ("[" * 100_000, "expected a JSON object"),
        (
            '{"none": 0, "/a/b/\\u00e9": 1, "/a/b/e\\u0301": 2}',
            "found '/a/b/\\xe9' and '/a/b/e\\u0301'",
        ),
    ],
)
def test_bad_files_are_named_with_their_key_in_one_line(tmp_path, text, message):
    path = tmp_path / "rel2id.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(DataError) as error:
        read_ontology_file(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_of_another_encoding_is_named(tmp_path):
    path = tmp_path / "rel2id.json"
    path.write_bytes('{"none": 0,\n"/a/b/é": 1}'.encode("latin-1"))
    with pytest.raises(DataError, match=rf"^{path}:2: expected UTF-8 text, found other bytes;"):
        read_ontology_file(path)
    path.write_text('{"none": 0, "/a/b/c": 1}', encoding="utf-16")
    with pytest.raises(DataError, match=rf"^{path}: expected UTF-8 text, found UTF-16 or"):
        read_ontology_file(path)


def test_labels_are_composed_and_a_byte_order_mark_is_none_of_them(tmp_path):
    path = tmp_path / "rel2id.json"
    # As macOS types it: e and a mark; and the ångström sign, a letter's double.
    path.write_text(
        '{"none": 0, "/per/org/e\u0301quipe": 1, "/a/b/\u212b": 2}', encoding="utf-8-sig"
    )
    assert read_ontology_file(path).labels == ("none", "/per/org/\xe9quipe", "/a/b/\xc5")
    with pytest.raises(
        DataError, match=r"expected '/a/b/\\xe9', found its decomposed form '/a/b/e"
    ):
        Ontology(("none", "/a/b/e\u0301"))


def test_absent_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"rel2id\.json.*No such file"):
        read_ontology_file(tmp_path / "rel2id.json")


def test_labels_given_directly_are_checked_too():
    with pytest.raises(DataError, match="'none': expected each label once"):
        Ontology(("none", "/a/b/c", "none"))
