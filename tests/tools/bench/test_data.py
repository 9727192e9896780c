"""The bench's folder has MORE's form, and what is measured is right, small and at MORE's size."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

from bench import data as bench_data
from morer1_jax.config.settings import settings
from morer1_jax.errors import DataError
from morer1_jax.task import more

TINY = Path(__file__).parents[2] / "configs" / "tiny.py"
SPLITS = ("train", "valid", "test")


@pytest.fixture
def config(one_device):
    spec = importlib.util.spec_from_file_location("tiny_config", TINY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.mesh.update(data=1, fsdp=1, tensor=-1)
    return config


def check(results, facts, photos):
    assert results["reading"]["facts"] == sum(facts.values())
    assert results["reading"]["photos"] == sum(photos.values())
    assert results["tfds"]["equal"]
    assert results["loading"]["samples_per_second"] > 0
    assert len(results["loading"]["megabytes"]) == 3


def test_a_small_bench_measures_everything(config, tmp_path):
    facts = {"train": 31, "valid": 7, "test": 5}
    photos = {"train": 6, "valid": 7, "test": 1}
    results = bench_data.run_bench(settings(config), tmp_path, facts, photos)
    check(results, facts, photos)
    assert results["loading"]["samples_an_epoch"] == 12
    # Facts of a photo share its title, and every photo has one.
    folder = tmp_path / "released"
    read = more.read_split(folder, "train", more.read_ontology(folder))
    assert len({fact.image for fact in read}) == len({(f.image, f.tokens) for f in read}) == 6
    sizes = [path.stat().st_size for path in folder.rglob("*.jpg")]
    assert 50_000 < min(sizes) <= max(sizes) < 70_000


def test_what_was_measured_before_it_was_cut_off_is_kept(config, tmp_path, monkeypatch):
    few = {"train": 4, "valid": 1, "test": 1}
    out, measured = tmp_path / "figures.json", []

    def stub(name):
        def measure(*_):
            measured.append(name)
            if name == broken:
                raise KeyboardInterrupt
            return {"of": name}

        monkeypatch.setattr(bench_data, f"time_{name}", measure)

    def run(number, out=out, **changes):
        measured.clear()
        given = dataclasses.replace(settings(config), **changes)
        return bench_data.run_bench(given, tmp_path / str(number), few, few, out=out)

    names = ("reading", "tfds", "loading")
    for name in names:
        stub(name)
    broken = "loading"
    with pytest.raises(KeyboardInterrupt):
        run(1)
    assert not out.exists()
    broken = None
    results = run(2)
    assert measured == ["loading"]
    assert results == json.loads(out.read_text()) == {name: {"of": name} for name in names}
    assert not list(tmp_path.glob("*.unfinished"))
    # What has come to its end is measured anew; so is what another config began.
    run(3)
    assert measured == list(names)
    broken = "tfds"
    with pytest.raises(KeyboardInterrupt):
        run(4)
    broken = None
    run(5, seed=9)
    assert measured == list(names)
    # Two files have each their own; that of an earlier version is taken if it is of the same.
    broken = "loading"
    other = tmp_path / "figures.7b"
    for number, path in enumerate((other, out), start=6):
        with pytest.raises(KeyboardInterrupt):
            run(number, path)
        assert measured == list(names)
    begun = json.loads((tmp_path / "figures.json.unfinished").read_text())
    del begun["out"]
    (tmp_path / "figures.json.unfinished").unlink()
    (tmp_path / "figures.unfinished").write_text(json.dumps(begun))
    broken = None
    for number, path in enumerate((other, out), start=8):
        run(number, path)
        assert measured == ["loading"]
    assert not list(tmp_path.glob("*.unfinished"))


def test_data_that_is_wrong_is_named_before_anything_is_measured(config, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_data, "write_released", None)
    config.data.folder = str(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"nothing/rel2id\.json"):
        bench_data.run_bench(settings(config), tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["thread", "process"])
def test_at_mores_size_facts_are_equal_and_memory_is_flat(config, tmp_path, kind):
    config.world.update(train=1200, written=0.75)
    config.data.update(workers=2, worker_kind=kind)
    config.sft.batch = 16
    results = bench_data.run_bench(settings(config), tmp_path)
    check(results, bench_data.FACTS, bench_data.PHOTOS)
    assert (results["reading"]["facts"], results["reading"]["photos"]) == (20_264, 3_559)
    assert results["loading"]["samples_an_epoch"] == 912
    # A batch is 12 MB and an epoch 57 batches: one kept in ten would be 70 MB an epoch.
    first, _, last = results["loading"]["megabytes"]
    assert last - first < 40
