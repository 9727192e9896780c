"""Written reasoning from files and from the hub: as the direct reader gives it, and as strict."""

import builtins
import gzip
import json
from pathlib import Path

import datasets
import pytest

from morer1_jax.data.reasoning import read_reasoning_dataset
from morer1_jax.errors import DataError
from morer1_jax.task import more


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.fixture
def world(small_world):
    """Facts, their ontology, and the reasoning there is."""
    ontology = more.read_ontology(small_world)
    facts = more.read_split(small_world, "train", ontology)
    return facts, ontology, more.read_reasoning(small_world / "reasoning.jsonl", facts, ontology)


def rows_of(texts):
    return [{"fact": fact, "text": text} for fact, text in texts.items()]


def write(path, rows):
    """Rows as the suffix says."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text(lines)
    return str(path)


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz", "r.json", "r.parquet"])
def test_files_give_what_the_direct_reader_gives(world, tmp_path, name):
    facts, ontology, texts = world
    source = write(tmp_path / name, rows_of(texts))
    assert list(read_reasoning_dataset(source, facts, ontology).items()) == list(texts.items())


ODD = (
    "r[1].jsonl",
    "[a] b/r.parquet",
    "x::y/r.jsonl.gz",
    "?.jsonl",
    "~/r.json",
    "back\\slash.jsonl",
)


@pytest.mark.parametrize("name", ODD)
def test_a_file_may_have_any_name_and_no_other_is_read(world, tmp_path, monkeypatch, name):
    facts, ontology, texts = world
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = Path(name).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, rows_of(texts))
    write(Path("x.jsonl"), rows_of(texts))  # Which `?.jsonl` matches.
    assert read_reasoning_dataset(name, facts, ontology) == texts


def test_a_folder_may_have_any_name_and_several_files_one_glob(world, tmp_path):
    facts, ontology, texts = world
    folder = tmp_path / "lr=[1e-5]"
    folder.mkdir()
    write(folder / "train.jsonl", rows_of(texts))
    assert read_reasoning_dataset(str(folder), facts, ontology) == texts
    rows = rows_of(texts)
    write(tmp_path / "part-0.jsonl", rows[:3])
    write(tmp_path / "part-1.jsonl", rows[3:])
    assert read_reasoning_dataset(str(tmp_path / "part-*.jsonl"), facts, ontology) == texts


def test_a_folder_has_splits(world, tmp_path):
    facts, ontology, texts = world
    rows = rows_of(texts)
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.parquet", rows[3:])
    write(tmp_path / "data" / "validation.parquet", rows[:3])
    for split, part in (("train", rows[3:]), ("validation", rows[:3])):
        found = read_reasoning_dataset(str(tmp_path / "data"), facts, ontology, split)
        assert rows_of(found) == part


def test_a_name_is_looked_up_on_the_hub(world, monkeypatch):
    facts, ontology, texts = world
    hub = {("team/more-reasoning", "gold"): datasets.Dataset.from_list(rows_of(texts))}
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: hub[name, split])
    assert read_reasoning_dataset("team/more-reasoning", facts, ontology, "gold") == texts


def error_of(*args):
    with pytest.raises(DataError) as error:
        read_reasoning_dataset(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["r.jsonl", "r.parquet"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row | {"fact": "train:999"}, "fact 'train:999': expected a known fact"),
        (lambda row: row | {"text": row["text"] + "."}, "expected '<think>', steps 1"),
        (lambda row: row | {"text": None}, "the record: text: expected str, found NoneType"),
        (lambda row: {"text": row["text"]}, "the record: fact: expected str, found NoneType"),
    ],
)
def test_bad_rows_are_named(world, tmp_path, name, change, message):
    facts, ontology, texts = world
    rows = rows_of(texts)
    rows[2] = change(rows[2])
    source = write(tmp_path / name, rows)
    found = error_of(source, facts, ontology)
    assert found.startswith(f"{source}: train row 2: ")
    assert message in found


@pytest.mark.parametrize("name", ["r.jsonl", "r.parquet"])
def test_rows_are_of_fact_and_text_alone(world, tmp_path, name):
    facts, ontology, texts = world
    rows = rows_of(texts)
    source = write(tmp_path / name, [row | {"score": 1} for row in rows])
    assert "row 0: the record: expected fact, text, found key 'score'" in error_of(
        source, facts, ontology
    )
    source = write(tmp_path / f"names.{name}", [{"id": r["fact"], "text": r["text"]} for r in rows])
    assert "row 0: the record: expected fact, text, found no key 'fact'" in error_of(
        source, facts, ontology
    )


def test_bad_sources_are_named(world, tmp_path):
    facts, ontology, texts = world
    good = write(tmp_path / "good.jsonl", rows_of(texts))
    (tmp_path / "cut.jsonl").write_text((tmp_path / "good.jsonl").read_text()[:-9])
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "no.parquet").write_bytes(b"PAR1 and no more")
    write(tmp_path / "none.json", [])
    for source, split, message in (
        (str(tmp_path / "cut.jsonl"), "train", "JSON parse error"),
        (str(tmp_path / "empty.jsonl"), "train", "is empty"),
        (str(tmp_path / "none.json"), "train", "no data"),
        (str(tmp_path / "no.parquet"), "train", "Parquet magic bytes not found"),
        (good, "valid", 'Unknown split "valid"'),
        ("team/absent", "train", "Couldn't reach 'team/absent' on the Hub"),
    ):
        found = error_of(source, facts, ontology, split)
        assert found.startswith(f"{source}: split {split!r} "), found
        assert message in found
        assert "expected rows of fact and text" in found


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./texts", "no such file; expected rows"),
        ("texts/written.csv", "no such file; expected rows"),
        ("texts/written.jsonl", "no such file; expected rows"),
        ("made/wirtten", "no such file; is it made/written?; expected rows"),
        ("mode/written", "no such file; is it made/written?; expected rows"),
        ("/nowhere/texts", "no such file; expected rows"),
        ("texts", "no such file; expected rows"),
        ("made/texts.txt", "not named as what it holds; expected .jsonl, .json or .parquet"),
    ],
)
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(
    world, tmp_path, monkeypatch, source, message
):
    def looked(*args, **_):
        raise AssertionError(f"looked for {args}")

    monkeypatch.setattr(datasets, "load_dataset", looked)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made" / "written").mkdir(parents=True)
    (tmp_path / "made" / "texts.txt").write_text("")
    found = error_of(source, *world[:2])
    assert found.startswith(f"{source}: {message}")
    # What might be a name there can be had all the same.
    way = f"is on this machine; if it is meant, hf download --repo-type=dataset {source}, and"
    assert (way in found) == (source in ("made/wirtten", "mode/written"))


def test_a_file_that_is_not_there_is_named_before_a_library_that_is_not(
    world, tmp_path, monkeypatch
):
    real = builtins.__import__

    def without(name, *args, **options):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "pip install 'morer1-jax[datasets]'" in error_of(
        write(tmp_path / "r.jsonl", []), *world[:2]
    )
    for source in (str(tmp_path / "absent.jsonl"), str(tmp_path / "*.parquet")):
        assert error_of(source, *world[:2]).startswith(f"{source}: no such file; expected rows of")
    assert "[datasets]" in error_of(str(tmp_path / "*.jsonl"), *world[:2])
