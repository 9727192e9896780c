"""README's commands name files that are there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_path_is_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    paths = set(re.findall(r"(?<![\w/.])(?:tests|tools|configs|morer1_jax)/[\w/]+(?:\.\w+)?", text))
    assert len(paths) > 20
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
