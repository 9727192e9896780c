"""Reads which devices a collective of an optimised HLO module joins.

XLA prints them in three forms: a list, `{{0,1},{2,3}}`; numbers counted in another order,
`[2,2]<=[4]` or `[2,2]<=[2,2]T(1,0)`; and axes of a mesh,
`mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}`, an axis possibly in part: `'a':(2)3` is the
factor of 3 that stands right of a factor of 2.

What crosses slices is a `send` to the runtime that joins them, whose target is `{1,2}x{0:15}`, or
lists, `{{100000,200000},…}`, or pairs, `{{100000->200000},…}`: a slice, counted from one, times
100,000, plus a device's number in it.
"""

from __future__ import annotations

import math
import re

import numpy as np
from jaxtyping import Int

from morer1_jax.cost.hlo import Instruction

_PER_SLICE = 100_000


def replica_groups(instruction: Instruction, devices: int) -> Int[np.ndarray, "groups members"]:
    """Returns the numbers of the devices that each group joins, in the program's order of devices.

    Args:
        devices: of the whole program; without groups all of them are one.

    Raises:
        ValueError: the groups are in a form that is not known, or of unequal sizes.
    """
    text = instruction.attributes.get("replica_groups", "{}")
    if text.startswith("mesh["):
        order = instruction.attributes.get("device_ids", "")
        return _of_mesh(text, order, devices)
    if text.startswith("["):
        return _of_iota(text)
    if text in ("{}", "{{}}"):
        return np.arange(devices)[None]
    if text.startswith("{{"):
        groups = [re.findall(r"\d+", group) for group in re.findall(r"\{([\d,]+)\}", text)]
        if len({len(group) for group in groups}) > 1:
            raise ValueError(f"{instruction.name}: expected groups of one size, found {text}")
        return np.array(groups, dtype=np.int64)
    raise ValueError(f"{instruction.name}: expected groups of devices, found {text!r}")


def source_target_pairs(instruction: Instruction) -> Int[np.ndarray, "pairs 2"]:
    """Returns which device sends to which in a `collective-permute`."""
    text = instruction.attributes.get("source_target_pairs", "")
    return np.array(re.findall(r"\{(\d+),(\d+)\}", text), dtype=np.int64).reshape(-1, 2)


def slice_groups(target: str) -> Int[np.ndarray, "groups members"]:
    """Returns the devices that a transfer between slices joins; of a permutation its pairs.

    Devices are numbered slice by slice, and in a slice as the target names them, which is the
    program's order.

    Raises:
        ValueError: the target is in a form that is not known.
    """
    if all_slices := re.fullmatch(r"\{([\d,]+)\}x\{(\d+):(\d+)\}", target):
        slices = np.array([int(number) - 1 for number in all_slices[1].split(",")])
        count = int(all_slices[3]) - int(all_slices[2]) + 1
        return np.arange(count)[:, None] + count * slices
    groups = [re.findall(r"\d+", group) for group in re.findall(r"\{([\d,>-]+)\}", target)]
    if not groups or len({len(group) for group in groups}) > 1:
        raise ValueError(f"transfer between slices: expected groups, found {target!r}")
    slices, devices = np.divmod(np.array(groups, dtype=np.int64), _PER_SLICE)
    places = {number: place for place, number in enumerate(dict.fromkeys(devices.flat))}
    return (slices - 1) * len(places) + np.vectorize(places.get)(devices)


def _iota(text: str) -> Int[np.ndarray, ...]:
    """Reads `[2,2]T(1,0)`: numbers from zero in that shape, with its axes transposed; or a list."""
    if not text.startswith("["):
        return np.array([int(number) for number in text.split(",")])
    sizes, axes = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    shape = [int(size) for size in sizes.split(",")]
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return numbers.transpose([int(axis) for axis in axes.split(",")]) if axes else numbers


def _of_iota(text: str) -> Int[np.ndarray, "groups members"]:
    shape, order = text.split("<=")
    return _iota(order).reshape([int(size) for size in re.findall(r"\d+", shape)])


def _of_mesh(text: str, order: str, devices: int) -> Int[np.ndarray, "groups members"]:
    # The axes that are joined stand behind the last bracket, of the mesh or of its order.
    joined = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", (order or text).rpartition("{")[2])
    axes = re.findall(r"'([^']+)'=(\d+)", text[: text.index("]")])
    numbers = np.arange(devices)
    if order:
        numbers = _iota(order.rpartition("{")[0].strip()[1:-1]).reshape(-1)
    # An axis in part is three axes: what stands before it, itself, what stands after it.
    shape, places = [], {}
    for name, size in axes:
        parts = [(int(before or 1), own) for axis, before, own in joined if axis == name]
        done = 1
        for before, own in sorted(parts):
            shape += [before // done, int(own or size)]
            places[name, before] = len(shape) - 1
            done = before * int(own or size)
        shape.append(int(size) // done)
    # Members are counted in the order in which the axes are named.
    members = [places[axis, int(before or 1)] for axis, before, _ in joined]
    numbers = numbers.reshape(shape)
    others = [axis for axis in range(numbers.ndim) if axis not in members]
    width = math.prod(shape[axis] for axis in members)
    return numbers.transpose([*others, *members]).reshape(-1, width)
