"""Hides PyTorch from a process that has this folder in its PYTHONPATH.

`transformers` imports PyTorch wherever it finds it, which takes longer than a short run.
"""

import sys
from importlib.machinery import PathFinder


class WithoutTorch(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == "torch" else super().find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTorch
