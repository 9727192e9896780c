"""A tool that lacks a package or a program says so in one line, before any work."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = f"--config={ROOT / 'tests' / 'configs' / 'tiny.py'}"
CHOICE = ("--count=1", "--model=m")
# Our modules that import what is optional: imported anew where it is missing.
OPTIONAL = (
    *(f"bench.{name}" for name in ("peers", "peers_model", "peers_transformers", "peers_tuning")),
    "bench.peers_trl",
    "bench.data",
    "morer1_jax.data.more_tfds",
)


@pytest.fixture
def missing(monkeypatch):
    """Makes a package one that is not installed."""

    def without(package):
        for name in OPTIONAL:
            above, _, leaf = name.rpartition(".")
            monkeypatch.delitem(sys.modules, f"{above}.{leaf}", raising=False)
            monkeypatch.delattr(importlib.import_module(above), leaf, raising=False)
        monkeypatch.setitem(sys.modules, package, None)

    return without


@pytest.fixture(autouse=True)
def no_work(monkeypatch):
    """What the tools would begin with."""

    def begin(*_, **__):
        raise AssertionError("work has begun")

    monkeypatch.setattr("bench.model.write_model", begin)
    monkeypatch.setattr("morer1_jax.task.more.write_ontology", begin)
    monkeypatch.setattr("morer1_jax.task.photos.check_photos", begin)


@pytest.mark.parametrize(
    ("package", "tool", "args", "advice"),
    [
        ("trl", "bench", (), "[bench]', or leave TRL out: --tasks=sft,sft_mixed,first/128,sample/"),
        ("datasets", "bench", ("--tasks=grpo/128",), "pip install 'morer1-jax[bench]'"),
        ("torch", "bench", ("--tasks=sft",), "pip install 'morer1-jax[bench]'"),
        ("psutil", "bench_data", (CONFIG,), "pip install 'morer1-jax[bench]'"),
        ("tensorflow_datasets", "bench_data", (CONFIG,), "pip install 'morer1-jax[bench]'"),
        ("tensorflow_datasets", "build_tfds", ("--folder=a", "--data_dir=b"), "morer1-jax[tfds]'"),
        ("openai", "write_reasoning", ("--data=DATA", "--out=OUT", *CHOICE), "morer1-jax[write]'"),
    ],
)
def test_a_missing_package(missing, command, small_world, tmp_path, package, tool, args, advice):
    if tool == "bench":
        pytest.importorskip("torch")
    args = [a.replace("DATA", str(small_world)).replace("OUT", str(tmp_path)) for a in args]
    missing(package)
    out, err = command(str(ROOT / "tools" / f"{tool}.py"), *args, code=2)
    assert err.startswith("error: ")
    assert package in err
    assert advice in err
    assert err.count("\n") == 1
    assert out == ""
    assert not list(tmp_path.iterdir())


def test_a_missing_compiler(command, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setenv("CXX", "no-such-compiler")
    bench = str(ROOT / "tools" / "bench.py")
    _, err = command(bench, "--tasks=sft", "--forms=compiled", code=2)
    assert err.startswith("error: no-such-compiler: expected a C++ compiler for PyTorch's form")
    assert err.count("\n") == 1
