"""A run goes on with what it was begun with; what has no digest yet gets one."""

import json

import pytest

from morer1_jax.run.digests import bind, listed
from morer1_jax.task.fact import DataError

BEGUN = {"txt/train.txt": "a", "img_org/train/1.jpg": "b", "img_org/valid/2.jpg": "c"}


def test_what_is_bound_is_compared_ever_after(tmp_path):
    path = tmp_path / "data.json"
    bind(path, BEGUN, "data")
    before = path.read_bytes()
    bind(path, dict(reversed(BEGUN.items())), "data")
    for name in BEGUN:
        gone = {key: value for key, value in BEGUN.items() if key != name}
        for found in (BEGUN | {name: "z"}, gone):
            with pytest.raises(DataError) as error:
                bind(path, found, "data")
            assert str(error.value) == (
                f"data: {name} changed since the run began ({path}); put what was there back, or "
                "use a new --workdir"
            )
    with pytest.raises(DataError, match=r"^data: img_org/train/9\.jpg changed since"):
        bind(path, BEGUN | {"img_org/train/9.jpg": "d"}, "data")
    assert path.read_bytes() == before


def test_a_run_begun_before_photos_had_digests_goes_on_and_has_them_from_then_on(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"txt/train.txt": "a"}))
    with pytest.raises(DataError, match=r"^data: txt/train\.txt changed"):
        bind(path, BEGUN | {"txt/train.txt": "z"}, "data")
    # Only photos and tokenizers: a text that is new was not there when the run began.
    with pytest.raises(DataError, match=r"^data: reasoning\.jsonl changed"):
        bind(path, BEGUN | {"reasoning.jsonl": "e"}, "data")
    bind(path, BEGUN, "data")
    assert json.loads(path.read_text()) == BEGUN
    with pytest.raises(DataError, match=r"^data: img_org/train/1\.jpg changed"):
        bind(path, BEGUN | {"img_org/train/1.jpg": "z"}, "data")


def test_many_names_are_a_few_and_a_number():
    assert listed(["a", "b", "c"]) == "a, b, c"
    assert listed(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
