"""A place where no checkpoint can be kept is found before the work."""

import os
import re
from pathlib import Path

import pytest

from morer1_jax.run.manifest import CheckpointError
from morer1_jax.run.trial import check_saves


def test_that_checkpoints_can_be_saved_is_tried_out(tmp_path, monkeypatch):
    (tmp_path / ".checkpoint-to-try-it-out" / "best" / "step_00000001").mkdir(parents=True)
    check_saves(tmp_path)
    assert os.listdir(tmp_path) == []
    # Orbax gets the path as it is, and merges nothing in such a folder.
    monkeypatch.setattr("morer1_jax.paths._PLAIN", re.compile("(?s:.*)"), raising=False)
    odd = tmp_path / "[1]"
    with pytest.raises(CheckpointError) as error:
        check_saves(odd)
    assert str(error.value).startswith(f"{odd}: expected a folder where checkpoints can be")
    assert str(error.value).endswith("; use another --workdir")
    assert "\n" not in str(error.value)
    assert os.listdir(odd) == []
    deep = str(tmp_path)
    while len(deep) < 4050:
        deep += "/" + "d" * min(200, 4050 - len(deep))
        os.mkdir(deep)
    with pytest.raises(CheckpointError, match="File name too long; use another --workdir"):
        check_saves(Path(deep))
