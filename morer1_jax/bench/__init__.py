"""Measuring a step beside PyTorch's: the same shapes, the same weights, in turns on one machine.

`cases` says what is measured and makes the inputs; `ours` and `peers` run it, each in a process of
its own (`worker`); `turns` lets them run in turns, and `report` writes what was seen. Only `peers`
imports PyTorch.
"""
