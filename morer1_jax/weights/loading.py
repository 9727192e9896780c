"""Loads a checkpoint's tensors onto a mesh, a tensor at a time.

A process alone reads tensors whole and gives each device its part. Of several processes each reads
a share of every large tensor, other than the others': as many of its bytes, one after another in
the file, as the process has of the mesh's devices. The devices exchange the shares and keep what is
theirs, so that all processes together read every byte once. (The parts that devices keep would not
do: most kernels, and the embedding, are split along an axis that is the last in the file. Together
they have some bytes of every row, and a process's parts of them span the whole tensor.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from morer1_jax.hosts import group
from morer1_jax.progress import progress
from morer1_jax.weights.names import LeafSlice
from morer1_jax.weights.ranges import Part, Stored, read_parts

# Smaller tensors are read whole by every process: an exchange would take longer.
_SMALL = 1 << 16


@dataclasses.dataclass(frozen=True)
class Target:
    """A tensor that is to be read.

    Attributes:
        leaf_slice: where it goes.
        like: shape, dtype and sharding of the leaf that it is a slice of.
        kept: whether it is to become part of the leaf; else it is read for its digest alone.
    """

    stored: Stored
    leaf_slice: LeafSlice
    like: jax.ShapeDtypeStruct
    kept: bool = True

    @property
    def shared(self) -> bool:
        """Whether each process reads a share, rather than all of it."""
        large = self.stored.end - self.stored.start >= _SMALL
        return large and not self.like.sharding.is_fully_addressable

    @property
    def part(self) -> Part:
        """What this process reads."""
        if not self.shared:
            return Part.whole(self.stored)
        mesh = self.like.sharding.mesh
        return Part(self.stored, own_runs(self.stored.size, mesh, mesh.local_devices))


def load(
    name: str, targets: Mapping[str, Target], digested: Collection[str] = ()
) -> tuple[dict[tuple[str, ...], jax.Array], dict[str, str]]:
    """Reads tensors; returns the leaves by their paths, and the digests asked for.

    All processes call it with the same tensors. The host holds few tensors at once, and leaves are
    never held twice. The first process prints how much it read, and how fast.

    Args:
        name: the checkpoint's, to print.
        targets: the tensors, in the order of reading, by name.
        digested: names of those of which the SHA-256 of what this process reads is returned.

    Raises:
        WeightsError: a tensor cannot be read, or has values that are not finite.
    """
    leaves: dict[tuple[str, ...], jax.Array] = {}
    digests: dict[str, str] = {}
    parts = [target.part for target in targets.values()]
    total, began = sum(part.nbytes for part in parts), time.monotonic()
    with (
        progress(desc=f"load {name}", total=total, unit="B", scale=True) as bar,
        contextlib.closing(read_parts(parts, bar.update)) as found,
    ):
        for (key, target), part, runs in zip(targets.items(), parts, found, strict=True):
            if key in digested:
                digest = hashlib.sha256()
                for run in runs:
                    digest.update(run.view(np.uint8))
                digests[key] = digest.hexdigest()
            if target.kept:
                path = target.leaf_slice.path
                leaf = put(leaves.pop(path, None), target, part, runs)
                # Or the devices' queue, and what waits in it, would grow.
                leaves[path] = jax.block_until_ready(leaf)
    for programs in (_gatherer, _cast, _inserter):  # Nothing is loaded again.
        programs.cache_clear()
    if total and group.is_first():
        seconds = max(time.monotonic() - began, 1e-9)
        rate = total / 1e6 / seconds
        whole = sum(part.stored.end - part.stored.start for part in parts)
        share = "" if whole == total else f"{_shown(total)} of "
        print(
            f"load {name}: {share}{_shown(whole)} in {seconds:.3g} s, "
            f"{rate:,.{0 if rate >= 10 else 1}f} MB/s",
            file=sys.stderr,
        )
    return leaves, digests


def own_runs(size: int, mesh: Mesh, devices: Collection[jax.Device]) -> tuple[tuple[int, int], ...]:
    """Returns which of a tensor's values some of a mesh's devices share out to read.

    Args:
        size: the number of the tensor's values.

    Returns:
        (first, one after the last) of each run of values that follow each other in the file.
    """
    padded = _padded(size, mesh)
    places = _flat(mesh).devices_indices_map((padded,))
    runs: list[tuple[int, int]] = []
    for start, stop in sorted(places[device][0].indices(padded)[:2] for device in devices):
        if runs and runs[-1][1] == start:
            start = runs.pop()[0]
        runs.append((start, stop))
    # The last devices may have nothing but padding.
    return tuple((start, min(stop, size)) for start, stop in runs if start < size)


def put(
    leaf: jax.Array | None, target: Target, part: Part, runs: Sequence[np.ndarray]
) -> jax.Array:
    """Returns `leaf`, or zeros if it is None, with a tensor in its place.

    The old leaf's buffers are donated, so that it is never held twice.

    Args:
        part: what was read of the tensor.
        runs: its values.
    """
    leaf_slice, like = target.leaf_slice, target.like
    sharding, stacked = like.sharding, bool(leaf_slice.index)
    own = sharding
    if stacked:
        own = NamedSharding(sharding.mesh, P(*tuple(sharding.spec)[len(leaf_slice.index) :]))
    # What takes less room, as it is stored or as it is kept; but not every device has float16.
    dtype = target.stored.dtype
    if dtype == np.float16 or dtype.itemsize > like.dtype.itemsize:
        dtype = jnp.dtype(like.dtype)
    if target.shared:
        tensor = _exchange(own, leaf_slice, target.stored.size, part, runs, dtype)
    else:
        value = leaf_slice.to_ours(runs[0])
        tensor = jax.make_array_from_callback(
            value.shape, own, lambda place: np.asarray(value[place], dtype)
        )
    if not stacked:
        return tensor if tensor.dtype == like.dtype else _cast(own, str(like.dtype))(tensor)
    if leaf is None:
        leaf = _zeros(like.shape, like.dtype, sharding)
    return _inserter(sharding)(leaf, tensor, leaf_slice.index)


def _exchange(
    sharding: NamedSharding,
    leaf_slice: LeafSlice,
    size: int,
    part: Part,
    runs: Sequence[np.ndarray],
    dtype: jnp.dtype,
) -> jax.Array:
    """Returns a tensor in our axes, of which each process has read a share."""
    mesh = sharding.mesh
    padded = _padded(size, mesh)

    def of_device(place: tuple[slice]) -> np.ndarray:
        start, stop, _ = place[0].indices(padded)
        share = np.zeros(stop - start, dtype)
        for (first, last), run in zip(part.runs, runs, strict=True):
            if first <= start < last:
                values = run[start - first : stop - first]
                share[: values.size] = values
        return share

    flat = jax.make_array_from_callback((padded,), _flat(mesh), of_device)
    return _gatherer(sharding, size, leaf_slice.split, leaf_slice.permutation)(flat)


@functools.cache
def _gatherer(
    sharding: NamedSharding, size: int, split: tuple[int, ...], permutation: tuple[int, ...]
) -> Any:
    """Returns what gathers a tensor's shares on every device, which then keeps its part."""
    axes = sharding.mesh.axis_names
    # Said explicitly, so that bits are only moved, whatever the compiler would make of it.
    gather = jax.shard_map(
        lambda share: jax.lax.all_gather(share, axes, tiled=True),
        mesh=sharding.mesh,
        in_specs=P(axes),
        out_specs=P(),
        check_vma=False,
    )
    return jax.jit(
        lambda flat: gather(flat)[:size].reshape(split).transpose(permutation),
        out_shardings=sharding,
    )


def _flat(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array with one axis, of which each device has a share."""
    return NamedSharding(mesh, P(mesh.axis_names))


def _padded(size: int, mesh: Mesh) -> int:
    """Returns the next number of values that all devices can share evenly."""
    return -(-size // mesh.size) * mesh.size


def _zeros(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


@functools.cache
def _cast(sharding: NamedSharding, dtype: str) -> Any:
    return jax.jit(lambda x: x.astype(dtype), donate_argnums=0, out_shardings=sharding)


@functools.cache
def _inserter(sharding: NamedSharding) -> Any:
    return jax.jit(
        lambda leaf, value, index: leaf.at[index].set(value.astype(leaf.dtype)),
        donate_argnums=0,
        out_shardings=sharding,
    )


def _shown(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
