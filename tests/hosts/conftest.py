"""Makes `processes.py` a module that tests here import."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
