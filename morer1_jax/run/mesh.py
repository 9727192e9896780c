"""Makes the device mesh, and decides over which of its axes each array is split.

Parameters are split by the end of their path.  A rule names an array's trailing axes only, so that
it fits both one layer and layers stacked along leading axes by `nn.scan`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.experimental.mesh_utils import create_device_mesh, create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from morer1_jax.data.feed import Host
from morer1_jax.errors import ConfigError
from morer1_jax.model.sharding import BATCH_AXES, partition_spec, slices_of, torus_sides

PyTree = Any


def make_mesh(axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh over all `devices` (by default every device of every process).

    Args:
        axes: sizes by name, outermost first; at most one may be -1, for all remaining devices.
            Slices of TPUs are outermost in the first.

    Raises:
        ConfigError: a size that is neither positive nor -1, two of -1, or sizes that do not fit the
            number of devices or of slices.
    """
    # Each size by itself.
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    sizes = dict(axes)
    for name, size in sizes.items():
        if size != -1 and size < 1:
            raise ConfigError(f"mesh.{name}: expected a positive size or -1, found {size}")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(
            f"mesh: expected at most one size of -1, found {' and '.join(free)}; give all but one "
            "a size"
        )
    # Their product, which also gives the size that is left open.
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    shown = " × ".join(f"{name} {size}" for name, size in sizes.items() if size != -1)
    if free:
        if count % fixed:
            raise ConfigError(
                f"mesh.{free[0]}: expected a multiple of {shown} = {fixed} devices, found {count}; "
                f"let the other sizes multiply to a divisor of {count}"
            )
        sizes[free[0]] = count // fixed
    elif fixed != count:
        raise ConfigError(
            f"mesh: expected {count} devices, found {shown} = {fixed}; give one axis the size -1"
        )
    types = (AxisType.Auto,) * len(sizes)
    shape, names = tuple(sizes.values()), tuple(sizes)
    slices = slices_of(devices)
    if not slices:
        return jax.make_mesh(shape, names, axis_types=types, devices=devices)
    # Between slices only gradients are added up: they are outermost in the first axis.
    if shape[0] % len(slices):
        raise ConfigError(
            f"mesh.{names[0]}: expected a multiple of the {len(slices)} slices, found {shape[0]}; "
            "change it"
        )
    # An axis over a whole slice follows the torus's rows, along which gradients are scattered.
    of_slice = (shape[0] // len(slices), *shape[1:])
    grid = [
        side
        for size in of_slice
        for side in (torus_sides(size) if size * len(slices) == count else (1, size))
    ]
    return Mesh(_arranged(grid, devices, len(slices)).reshape(shape), names, axis_types=types)


def _arranged(grid: Sequence[int], devices: Sequence[jax.Device], slices: int) -> np.ndarray:
    """Returns chips by their places on a grid of so many a slice, slices outermost."""
    try:
        if slices == 1:
            sides = [f"side {i}" for i in range(len(grid))]
            return jax.make_mesh(grid, sides, devices=devices).devices
        return create_hybrid_device_mesh(grid, (slices, *(1 for _ in grid[1:])), devices)
    except NotImplementedError:
        # No side of the torus is as long as one of the grid's, which then takes part of a side.
        if slices == 1:
            return create_device_mesh(grid, devices, allow_split_physical_axes=True)
        return create_hybrid_device_mesh(
            grid, (slices, *(1 for _ in grid[1:])), devices, allow_split_physical_axes=True
        )


def path_name(path: jax.tree_util.KeyPath) -> str:
    """Returns a leaf's path as 'a/b/c', through dicts, dataclasses and tuples alike."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def param_shardings(mesh: Mesh, params: PyTree) -> PyTree:
    """Returns the tree of `NamedSharding` of parameters (arrays or `jax.ShapeDtypeStruct`)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, partition_spec(mesh, path_name(path), leaf.shape)),
        params,
    )


def state_shardings(mesh: Mesh, state: PyTree, params: PyTree) -> PyTree:
    """Returns the tree of `NamedSharding` of a training state.

    A leaf whose path ends in a parameter's path (the longest, if several fit) and that has its
    shape, as an optimizer's moments do, is split like that parameter.  Every other leaf (counters,
    factored moments) is replicated.

    Args:
        state: any tree of arrays or `jax.ShapeDtypeStruct`; dataclasses and optax states included.
        params: the tree of the parameters alone.
    """
    shapes = {
        path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }

    def sharding(path: jax.tree_util.KeyPath, leaf: Any) -> NamedSharding:
        parts = path_name(path).split("/")
        ends = ("/".join(parts[start:]) for start in range(len(parts)))
        owner = next((end for end in ends if end in shapes), None)
        if owner is None or shapes[owner] != leaf.shape:
            return NamedSharding(mesh, P())
        return NamedSharding(mesh, partition_spec(mesh, owner, leaf.shape))

    return jax.tree_util.tree_map_with_path(sharding, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that splits rows, a batch's leading axis, over `BATCH_AXES`."""
    return NamedSharding(mesh, P(tuple(name for name in BATCH_AXES if name in mesh.shape)))


def batch_parts(mesh: Mesh) -> int:
    """Returns the number of parts that the rows of a batch are split into."""
    return math.prod(mesh.shape[name] for name in BATCH_AXES if name in mesh.shape)


def check_rows(key: str, rows: int, mesh: Mesh) -> None:
    """Checks that the mesh can split so many rows of a batch.

    Raises:
        ConfigError: it cannot; the error names the config's key.
    """
    parts = batch_parts(mesh)
    if rows % parts:
        raise ConfigError(
            f"config.{key}: expected a multiple of mesh.data × mesh.fsdp = {parts}, found {rows}; "
            f"use {-(-rows // parts) * parts}, or change the mesh"
        )


def put_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Puts a batch on the mesh: returns global arrays, rows split by `batch_sharding`.

    Args:
        batch: a tree of NumPy arrays, the rows of the global batch that `this_host` returns.

    Raises:
        ConfigError: an array without rows, or whose rows do not divide over the mesh.
    """
    sharding, host = batch_sharding(mesh), this_host(mesh)

    def put(path: jax.tree_util.KeyPath, array: np.ndarray) -> jax.Array:
        rows = array.shape[0] if array.ndim else 0
        if not rows or rows % len(host.parts):
            raise ConfigError(
                f"batch {path_name(path)}: expected a multiple of {len(host.parts)} rows (the part "
                f"of mesh.data × mesh.fsdp on this process), found {rows}; change the batch size "
                "or the mesh"
            )
        if len(host.parts) == host.total:
            return jax.device_put(array, sharding)
        size = rows // len(host.parts)
        own = dict(zip(host.parts, np.split(array, len(host.parts)), strict=True))
        return jax.make_array_from_callback(
            (size * host.total, *array.shape[1:]),
            sharding,
            lambda index: own[(index[0].start or 0) // size],
        )

    return jax.tree_util.tree_map_with_path(put, batch)


def like(tree: PyTree, shardings: PyTree) -> PyTree:
    """Returns a tree's shapes and dtypes with shardings, as `Checkpointer.restore` takes them."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def device_bytes(tree: PyTree) -> int:
    """Returns the bytes of a tree's arrays, or of shapes with shardings, on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def like_on(tree: PyTree, sharding: jax.sharding.Sharding) -> PyTree:
    """Returns a tree's shapes and dtypes, all of one sharding."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def shardings_of(tree: PyTree) -> PyTree:
    """Returns the sharding of every array of a tree."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def program(
    function: Callable[..., PyTree], takes: Sequence[PyTree], gives: PyTree, *, donate: Any = ()
) -> Callable[..., PyTree]:
    """Compiles a function for the mesh, for each shape it is called with.

    Args:
        takes: for each argument its sharding, a tree of shardings, or a tree of arrays (or of
            `jax.ShapeDtypeStruct`) that have them.
        gives: the same for the results.
        donate: indices of the arguments whose memory the results may take.
    """

    def shardings(leaf: Any) -> Any:
        return leaf if isinstance(leaf, jax.sharding.Sharding) else leaf.sharding

    takes, gives = jax.tree.map(shardings, (tuple(takes), gives))
    return jax.jit(function, in_shardings=takes, out_shardings=gives, donate_argnums=donate)


def this_host(mesh: Mesh, process: int | None = None) -> Host:
    """Returns a process as a `Host`, which prepares the rows that its devices on the mesh hold.

    Args:
        process: its number; None: this one's.
    """
    process, total = jax.process_index() if process is None else process, batch_parts(mesh)
    # Devices that differ only in `tensor` hold the same rows.
    holders: dict[int, set[int]] = {}
    for device, (rows,) in batch_sharding(mesh).devices_indices_map((total,)).items():
        holders.setdefault(rows.indices(total)[0], set()).add(device.process_index)
    parts = [part for part in range(total) if process in holders[part]]
    counted = [part for part in parts if min(holders[part]) == process]
    return Host(tuple(parts), total, tuple(counted))


def fetch(tree: PyTree) -> PyTree:
    """Returns arrays of the whole mesh as NumPy arrays, on every process.

    All processes must call it at once, except for arrays that each of them has whole.
    """
    leaves, structure = jax.tree.flatten(tree)
    apart = [n for n, leaf in enumerate(leaves) if not _is_here(leaf)]
    gathered = multihost_utils.process_allgather([leaves[n] for n in apart], tiled=True)
    for number, leaf in zip(apart, gathered, strict=True):
        leaves[number] = leaf
    return jax.device_get(jax.tree.unflatten(structure, leaves))


def _is_here(leaf: Any) -> bool:
    """Returns whether this process has every part of an array."""
    whole = not isinstance(leaf, jax.Array) or leaf.is_fully_replicated
    return whole or leaf.is_fully_addressable
