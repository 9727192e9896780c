import pytest

from morer1_jax.errors import ConfigError
from morer1_jax.stages.marker import Stage


def test_a_stage_is_done_once_its_marker_is_there(tmp_path):
    stage = Stage(tmp_path, "sft", {"learn.lr": 1e-5})
    assert not stage.done()
    with pytest.raises(ConfigError, match="stage sft is not done"):
        stage.results()
    stage.folder.mkdir()
    (stage.folder / "output").write_text("half")
    assert not stage.done()
    stage.finish({"best_step": 40})
    again = Stage(tmp_path, "sft", {"learn.lr": 1e-5})
    assert again.done()
    assert again.results() == {"best_step": 40}
    assert not Stage(tmp_path, "grpo", {"learn.lr": 1e-5}).done()


def test_a_stage_made_under_another_config_is_an_error(tmp_path):
    Stage(tmp_path, "sft", {"a": 1, "b": 2}).finish()
    assert Stage(tmp_path, "sft", {"b": 2, "a": 1}).done()
    with pytest.raises(ConfigError, match="sft was made under another config"):
        Stage(tmp_path, "sft", {"a": 1, "b": 3}).done()


@pytest.mark.parametrize("text", ["", "[]", "{}", "3"])
def test_a_marker_that_is_none_is_an_error(tmp_path, text):
    stage = Stage(tmp_path, "sft")
    stage.finish()
    (stage.folder / "DONE.json").write_text(text)
    with pytest.raises(ConfigError, match=r"DONE\.json: expected a stage's marker, found "):
        stage.done()
