"""Says what each transfer of a program moves: weights, gradients or activations; and over what.

Optimised HLO does not say which array a transfer's operand came from, so its shape decides. A
parameter is recognised by the dimensions, in any order and merged or split, of the whole, of one
layer of a stack, and of what a device holds of either, gathered over none, some or all of the axes
that split it; a gradient also halfway through `model.sharding.scatter_sum`. Everything that is not
so recognised counts as activations, so that an activation is never taken for something else but
where its shape is exactly a parameter's. What is summed is a gradient, but not in a forward pass,
where the name that JAX gave it tells; nor where a gather of the same name brings the sum's parts
together again.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from morer1_jax.cost.hlo import Array
from morer1_jax.cost.program import Transfer
from morer1_jax.model.sharding import ONE_STEP, torus_sides

WEIGHTS, GRADIENTS, ACTIVATIONS = "weights", "gradients", "activations"
IDS, SMALL = "ids and masks", "scalars and small"
# Arrays of these are ids of tokens, places in others, or masks; photos are u8.
_INTEGERS = ("s32", "u32", "s64", "u64", "pred")
# What a transfer sends in all its turns to be looked at.
_SMALL_BYTES = 2**20
# Of arrays between slices: [tiles, 8, 128].
_TILE = (8, 128)
# Axes of layers stacked by scans: of layers, or of groups of layers.
_MAX_STACKED = 2
# XLA's names of the loops of windowed products: a weight goes round, or a sum does.
_WINDOWED_SUM, _WINDOWED_GATHER = "windowed_dot_general_body_rs", "windowed_dot_general_body_ag"

Dimensions = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Moved:
    """What a transfer moves.

    Attributes:
        what: `WEIGHTS`, `GRADIENTS`, `ACTIVATIONS`, `IDS` or `SMALL`.
        summed: whether it is summed over devices.
        axes: the mesh's axes that it joins devices along, in the mesh's order.
        across_slices: whether it joins devices of several slices.
    """

    what: str
    summed: bool
    axes: tuple[str, ...]
    across_slices: bool


def attribute(transfers: Sequence[Transfer], mesh: Mesh, params: Any) -> list[Moved]:
    """Returns what each transfer of a program moves.

    Args:
        mesh: the program's; a device's place in it is its number in the program.
        params: tree of the parameters' shapes with shardings on the mesh.
    """
    forms: dict[int, set[Dimensions]] = collections.defaultdict(set)
    for leaf in jax.tree.leaves(params):
        for form in _forms(leaf.shape, leaf.sharding):
            forms[math.prod(form)].add(form)
    # A windowed product's first or last shard travels outside of the loop, under the loop's name.
    sums = {_key(transfer): True for transfer in transfers if _is_windowed(transfer, _WINDOWED_SUM)}
    sums |= {
        _key(transfer): False for transfer in transfers if _is_windowed(transfer, _WINDOWED_GATHER)
    }
    halves, slices = _halves(transfers), _slices(mesh)
    within = max(mesh.devices.shape[0] // len(set(slices)), 1)
    moved = []
    for transfer in transfers:
        summed = _is_sum(transfer, sums)
        axes, across = _joined(transfer, mesh, slices)
        what = _what(transfer, forms, summed, within if across else None)
        if _half(transfer) in halves and what not in (IDS, SMALL):
            what = ACTIVATIONS
        moved.append(Moved(what, summed, axes, across))
    return moved


def _halves(transfers: Sequence[Transfer]) -> set[Any]:
    """Returns what names the halves of sums of activations that are compiled in two.

    Each device first has a part of the sum, then all gather these. A weight is gathered, and its
    gradient summed, under one name too, but in a backward pass.
    """
    of_kind = {
        kind: {_half(transfer) for transfer in transfers if transfer.kind == kind}
        for kind in ("reduce-scatter", "all-gather")
    }
    both = of_kind["reduce-scatter"] & of_kind["all-gather"]
    return {half for half in both if half[0] and not _is_backward(half[0])}


def _half(transfer: Transfer) -> Any:
    return transfer.op_name, transfer.groups, tuple(array.shape for array in transfer.arrays)


def _is_backward(name: str) -> bool:
    """Returns whether an operation is a backward pass's own, and not a forward pass run again."""
    last = name.rfind("jvp(")
    return last >= 0 and name[:last].endswith("transpose(") and "rematted_computation" not in name


def _what(
    transfer: Transfer, forms: dict[int, set[Dimensions]], summed: bool, within: int | None
) -> str:
    """Returns what a transfer moves.

    Args:
        within: of one between slices the devices of a slice along the mesh's first axis; else None.
    """
    if transfer.bytes * transfer.times < _SMALL_BYTES:
        return SMALL
    if all(array.dtype in _INTEGERS for array in transfer.arrays):
        return IDS
    # Several may travel together. One that is unknown and not small makes them activations.
    unknown = [
        whole
        for whole, part in zip(transfer.arrays, transfer.entering, strict=True)
        if not (
            whole.dtype in _INTEGERS
            or _is_known(whole, forms)
            or _is_known(part, forms)
            or (within is not None and _is_flat(whole, forms, within))
        )
    ]
    if sum(array.bytes for array in unknown) * transfer.times >= _SMALL_BYTES:
        return ACTIVATIONS
    if not summed:
        return WEIGHTS
    forward = "jvp(" in transfer.op_name and not _is_backward(transfer.op_name)
    return ACTIVATIONS if forward else GRADIENTS


def _is_sum(transfer: Transfer, windowed: dict[Any, bool]) -> bool:
    if transfer.kind != "collective-permute":
        return transfer.kind in ("all-reduce", "reduce-scatter")
    return windowed.get(_key(transfer), False)


def _is_windowed(transfer: Transfer, name: str) -> bool:
    return transfer.kind == "collective-permute" and name in transfer.computation


def _key(transfer: Transfer) -> Any:
    return transfer.kind, transfer.arrays, transfer.op_name


def _forms(shape: Sequence[int], sharding: NamedSharding) -> Iterator[Dimensions]:
    """Yields the dimensions in which a parameter may travel, without those of size one.

    Over an axis that splits it a parameter is gathered or not; a gradient may be in the first of
    two steps of being scattered.
    """
    sizes, spec = sharding.mesh.shape, (*sharding.spec, *(None,) * len(shape))[: len(shape)]
    names = [(name,) if isinstance(name, str) else tuple(name or ()) for name in spec]
    axes = sorted({name for group in names for name in group})
    for parts in itertools.product(*(_divisors(sizes[axis]) for axis in axes)):
        divisors = dict(zip(axes, parts, strict=True))
        dimensions = [
            size // math.prod(divisors[name] for name in group)
            for size, group in zip(shape, names, strict=True)
        ]
        for stacked in range(_MAX_STACKED + 1):
            # The axes of a stack are not split, and what is stacked has at least one axis.
            if stacked >= max(len(shape), 1) or any(names[:stacked]):
                break
            yield _without_ones(dimensions[stacked:])


def _divisors(devices: int) -> set[int]:
    """Returns into how many parts an axis of so many devices may split a parameter's gradient."""
    return {1, devices} | ({torus_sides(devices)[0]} if devices > ONE_STEP else set())


def _without_ones(shape: Iterable[int]) -> Dimensions:
    return tuple(sorted(size for size in shape if size != 1))


def _is_known(array: Array, forms: dict[int, set[Dimensions]]) -> bool:
    if not array.dtype.startswith(("f", "bf")):
        return False
    dimensions = _without_ones(array.shape)
    return any(
        dimensions == form or _is_merged(form, dimensions) or _is_merged(dimensions, form)
        for form in forms.get(math.prod(dimensions), ())
    )


def _is_flat(array: Array, forms: dict[int, set[Dimensions]], within: int) -> bool:
    """Returns whether an array between slices is a parameter's, or a piece of one, in tiles.

    There arrays travel flat. Devices of a slice that would send the same send a piece each.
    """
    if array.shape[1:] != _TILE:
        return False
    size = math.prod(_TILE)
    return any(
        array.shape[0] == math.ceil(count / (pieces * size))
        for count in forms
        for pieces in (1, within)
    )


def _is_merged(fine: Dimensions, coarse: Dimensions) -> bool:
    """Returns whether products of some of `fine` each, all used once, are `coarse`."""
    if not coarse:
        return math.prod(fine) == 1
    first, rest = coarse[0], coarse[1:]
    for count in range(1, len(fine) - len(rest) + 1):
        for chosen in itertools.combinations(range(len(fine)), count):
            left = tuple(size for place, size in enumerate(fine) if place not in chosen)
            if math.prod(fine[place] for place in chosen) == first and _is_merged(left, rest):
                return True
    return False


def _slices(mesh: Mesh) -> list[int]:
    """Returns the slice of each device, in the mesh's order."""
    return [getattr(device, "slice_index", 0) or 0 for device in mesh.devices.flat]


def _joined(transfer: Transfer, mesh: Mesh, slices: Sequence[int]) -> tuple[tuple[str, ...], bool]:
    """Returns the axes along which the members of a group differ, and whether their slices do."""
    groups = np.array(transfer.groups, dtype=np.int64)
    if not groups.size:
        return (), False
    places = np.unravel_index(groups, mesh.devices.shape)
    axes = tuple(
        name
        for name, place in zip(mesh.axis_names, places, strict=True)
        if (place != place[:, :1]).any()
    )
    of_devices = np.array(slices)
    return axes, bool((of_devices[groups] != of_devices[groups[:, :1]]).any())
