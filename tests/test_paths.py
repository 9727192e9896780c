import os
import tempfile
from pathlib import Path

import pytest

from morer1_jax.paths import any_path, did_you_mean, is_hub_name, local_path, plain_path


def test_a_path_is_as_a_shell_has_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for way in (local_path, any_path):
        assert os.fspath(way("~", "--out")) == f"{tmp_path}"
        assert os.fspath(way("~/a [1] é", "--out")) == f"{tmp_path}/a [1] é"
        assert os.fspath(way("~root/a", "--out")) == f"{os.path.expanduser('~root')}/a"
        for same in ("a~", "a b", "no:url", "/x/gs:/y", "*?[1]\\ "):
            assert os.fspath(way(same, "--out")) == os.fspath(Path(same))
        for own in ("./~", "./~/a", "~nobody-of-this-name/a", ".//~b"):
            once = way(own, "--out")
            assert os.fspath(once) == os.path.join(os.getcwd(), Path(own))
            assert way(once, "--out") == once
    assert os.fspath(any_path("gs://b/~ [1]", "--data")) == "gs://b/~ [1]"


@pytest.mark.parametrize("ways", [(local_path,), (any_path,)])
@pytest.mark.parametrize(
    ("path", "shown", "problem"),
    [
        ("", "--out=", "expected a path, found none; name one"),
        (" ", "--out= ", "expected a path, found none; name one"),
        ("a\0b", "--out='a\\x00b'", "expected a path, found none; name one"),
        ("a\udce9", "--out='a\\udce9'", "found another encoding or locale; name another, or set"),
        ("foo://b/x", "--out=foo://b/x", "expected a path"),
    ],
)
def test_what_is_no_path_is_named(ways, path, shown, problem):
    for way in ways:
        with pytest.raises(OSError, match="name") as error:
            way(path, "--out")
        assert error.value.filename == shown
        assert problem in error.value.strerror


@pytest.mark.parametrize("url", ["gs://b/x", "s3://b", "file:///tmp/x", Path("gs://b/x")])
def test_a_url_is_no_path_of_this_machine(url):
    with pytest.raises(OSError, match="expected a path of this machine, found a URL; name another"):
        local_path(url, "--out")


def test_a_plain_path_leads_to_the_same_and_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "[1]"))
    odd = tmp_path / "[1]" / "a.b [c].jsonl.gz"
    odd.parent.mkdir()
    odd.write_text("x")
    with plain_path(odd) as path:
        assert path.read_text() == "x"
        assert path.suffixes == [".jsonl", ".gz"]
        assert not set("[] ") & set(str(path))
    assert not path.parent.exists()
    assert odd.read_text() == "x"
    with plain_path(tmp_path) as path:
        assert path == tmp_path


def test_names_of_the_hub_and_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    for name in ("Qwen/Qwen2.5-VL-3B-Instruct", "team/a_b-c.d", "run/dem"):
        assert is_hub_name(name)
    for name in (
        *("runs/demo", "runs/absent", "run/demo", "./a", "../a", "a", "a/b/c", "/a/b", "~/a"),
        *("a/b.jsonl", "a/model.safetensors", "a/b.parquet", "a/run.py", "gs://a/b", "a b/c"),
    ):
        assert not is_hub_name(name)
    assert did_you_mean("rnus/demo") == did_you_mean("runs/dmeo") == "; is it runs/demo?"
    assert did_you_mean("/nowhere/at/all") == did_you_mean("elsewhere") == ""
