import pytest

from morer1_jax.errors import ConfigError
from morer1_jax.stages.marker import read_marker, read_results, write_marker


def test_a_stage_is_done_once_its_marker_is_there(tmp_path):
    folder = tmp_path / "sft"
    assert read_marker(folder) is None
    with pytest.raises(ConfigError, match=r"found no DONE\.json; run stage sft first"):
        read_results(folder)
    folder.mkdir()
    (folder / "output").write_text("half")
    assert read_marker(folder) is None
    write_marker(folder, {"learn.lr": 1e-5}, {"best_step": 40})
    assert read_marker(folder)["config"] == {"learn.lr": 1e-5}
    assert read_results(folder) == {"best_step": 40}
    assert read_marker(tmp_path / "grpo") is None


@pytest.mark.parametrize("text", ["", "[]", "{}", "3", '{"config": "a1", "results": {}}'])
def test_a_marker_that_is_none_is_an_error(tmp_path, text):
    write_marker(tmp_path / "sft", {}, {})
    (tmp_path / "sft" / "DONE.json").write_text(text)
    with pytest.raises(ConfigError, match=r"DONE\.json: expected a stage's marker, found") as error:
        read_marker(tmp_path / "sft")
    assert "\n" not in str(error.value)
