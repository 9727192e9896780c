"""Makes `processes.py`, and `bucket.py` beside this folder, modules that tests here import."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
