"""Measures a step beside PyTorch's: the same shapes, the same weights, in turns on one machine.

`cases` says what is measured and makes the inputs; `ours` and `peers` run it, each in a process of
its own, which `task` serves; `turns` lets them run in turns, `compare` tells which, and `growth`
draws how time grows with the sizes. `data` measures the loader, `study` runs the job over seeds.
Only `peers` and its parts import PyTorch.
"""
