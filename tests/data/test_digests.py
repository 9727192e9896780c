"""A run goes on with what it was begun with; what has no digest yet gets one."""

import json

import pytest

from morer1_jax.data.digests import bind, differences
from morer1_jax.errors import DataError

BEGUN = {"txt/train.txt": "a", "img_org/train/1.jpg": "b", "img_org/valid/2.jpg": "c"}


def test_what_is_bound_is_compared_ever_after(tmp_path):
    path = tmp_path / "data.json"
    bind(path, BEGUN, "data")
    before = path.read_bytes()
    bind(path, dict(reversed(BEGUN.items())), "data")
    for name in BEGUN:
        gone = {key: value for key, value in BEGUN.items() if key != name}
        for found, way in ((BEGUN | {name: "z"}, "changed"), (gone, "gone")):
            with pytest.raises(DataError) as error:
                bind(path, found, "data")
            assert str(error.value) == (
                f"data: {name} {way} since the run began ({path}); put what was there back, or use "
                "a new --workdir"
            )
    with pytest.raises(DataError, match=r"^data: img_org/train/9\.jpg new since"):
        bind(path, BEGUN | {"img_org/train/9.jpg": "d"}, "data")
    assert path.read_bytes() == before


def test_a_run_begun_before_photos_had_digests_goes_on_and_has_them_from_then_on(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps({"txt/train.txt": "a"}))
    with pytest.raises(DataError, match=r"^data: txt/train\.txt changed"):
        bind(path, BEGUN | {"txt/train.txt": "z"}, "data")
    # Only photos and tokenizers: a text that is new was not there when the run began.
    with pytest.raises(DataError, match=r"^data: reasoning\.jsonl new since"):
        bind(path, BEGUN | {"reasoning.jsonl": "e"}, "data")
    bind(path, BEGUN, "data")
    assert json.loads(path.read_text()) == BEGUN
    with pytest.raises(DataError, match=r"^data: img_org/train/1\.jpg changed"):
        bind(path, BEGUN | {"img_org/train/1.jpg": "z"}, "data")


def test_of_each_way_some_are_named_and_texts_before_photos():
    kept = {"txt/train.txt": "1", "rel2id.json": "r", "txt/test.txt": "2"}
    kept |= {f"img_org/train/{i}.jpg": str(i) for i in range(10)}
    assert differences(kept, kept) == ""
    found = dict(kept, **{"txt/train.txt": "z", "img_org/train/7.jpg": "z"})
    for number in range(5):
        del found[f"img_org/train/{number}.jpg"]
    found |= {f"img_org/train/1{i}.jpg": "z" for i in range(3)}
    assert differences(kept, found) == (
        "txt/train.txt changed, img_org/train/7.jpg changed, "
        "img_org/train/10.jpg, img_org/train/11.jpg and 1 more new, "
        "img_org/train/0.jpg, img_org/train/1.jpg and 3 more gone"
    )
    texts = {key: value for key, value in kept.items() if key.startswith("img_org")}
    assert differences(kept, texts) == "rel2id.json, txt/test.txt and 1 more gone"
