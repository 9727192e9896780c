"""Prints the lowest versions that pyproject.toml permits, as pip's constraints.

python .ci/lowest.py > lowest.txt && pip install -c lowest.txt .
"""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
for wanted in (project["dependencies"], *project["optional-dependencies"].values()):
    for requirement in wanted:
        # Constraints have no extras; what is pinned or our own needs none.
        if bound := re.fullmatch(r"([\w.-]+)(?:\[[\w,-]+\])?>=([\w.]+)", requirement):
            print(f"{bound[1]}=={bound[2]}")
