"""The mesh's axes, and over which of them each array is split: parameters and activations.

Parameters are split by the end of their path.  A rule speaks of an array's trailing axes only, so
that the same rule serves one layer and layers stacked along leading axes by `nn.scan`.  Activations
are split by rows alone, and by heads inside of attention; where that is said, no program depends
on what the compiler's propagation guesses.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

PyTree = Any

# The axes that the rows of a batch are split over; parameters are split over `fsdp` and `tensor`.
BATCH_AXES = ("data", "fsdp")
# Devices that differ in this axis alone have the same parameters: the axis counts their copies.
COPIES_AXIS = "data"
# The name of the copies inside of `Layout.on_copies`; the mesh's own is known there too.
_COPIES = "copies"
# The axis that attention's heads are split over.
HEAD_AXIS = "tensor"
# Over up to so many chips a sum is scattered in one step; see `Layout.summed`.
ONE_STEP = 8

# (pattern of the path's end, split of the trailing axes); the first that matches decides.  Matrices
# that widen are split by output and those that narrow back by input, heads whole: the tensor axis
# then needs one sum per pair of matrices and nothing in between.
RULES: tuple[tuple[str, P], ...] = (
    ("embedding|head", P("tensor", "fsdp")),  # [v, d]
    ("(q|k|v)/kernel", P("fsdp", "tensor", None)),  # [d, h, head]
    ("(q|k|v)/bias", P("tensor", None)),  # [h, head]
    ("qkv/kernel", P("fsdp", None, "tensor", None)),  # [d, 3, h, head]
    ("qkv/bias", P(None, "tensor", None)),  # [3, h, head]
    ("(o|proj)/kernel", P("tensor", None, "fsdp")),  # [h, head, d]
    ("(gate|up|merger_in)/kernel", P("fsdp", "tensor")),  # [d, f]
    ("(gate|up|merger_in)/bias", P("tensor")),  # [f]
    ("(down|merger_out)/kernel", P("tensor", "fsdp")),  # [f, d]
    ("patch_embed/kernel", P(None, "fsdp")),  # [patch, d]
    ("(q|k|v|gate|up)/lora_a", P("fsdp", None)),  # [d, rank]
    ("(q|k|v)/lora_b", P(None, "tensor", None)),  # [rank, h, head]
    ("(gate|up)/lora_b", P(None, "tensor")),  # [rank, f]
    ("o/lora_a", P("tensor", None, None)),  # [h, head, rank]
    ("down/lora_a", P("tensor", None)),  # [f, rank]
    ("(o|down)/lora_b", P(None, "fsdp")),  # [rank, d]
)


def partition_spec(mesh: Mesh, path: str, shape: Sequence[int]) -> P:
    """Returns how the parameter at `path` is split: by the first rule that matches.

    An axis of the array that its mesh axis does not divide, or whose mesh axis the mesh lacks, is
    not split; of a model that fits its mesh (`run.fit`) these are key-value heads alone.  A
    parameter that no rule matches is replicated.

    Raises:
        ValueError: the parameter has fewer axes than its rule names.
    """
    rules = (spec for pattern, spec in RULES if re.search(rf"(^|/)({pattern})$", path))
    trailing = tuple(next(rules, P()))
    if len(trailing) > len(shape):
        raise ValueError(f"{path}: expected {len(trailing)} axes by its rule, found {len(shape)}")
    aligned = (None,) * (len(shape) - len(trailing)) + trailing
    names = [
        name if name in mesh.shape and size % mesh.shape[name] == 0 else None
        for name, size in zip(aligned, shape, strict=True)
    ]
    return P(*names)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the arrays inside of a program lie; a static argument of programs.

    Attributes:
        mesh: the devices; None: one device, or whatever the compiler chooses.
        sums: dtype in which parameters' gradients are summed over devices.
        apart: whether each copy of the parameters sums its own rows' gradients over micro-batches
            by itself, so that copies, which may lie on different slices, add them up once a step.
        in_copy: whether the program is one of `on_copies`, which sees one copy's rows.
    """

    mesh: Mesh | None = None
    sums: str = "float32"
    apart: bool = False
    in_copy: bool = False

    @property
    def row_axes(self) -> tuple[str, ...]:
        """The mesh's axes that rows are split over."""
        if self.mesh is None:
            return ()
        absent = (COPIES_AXIS,) if self.in_copy else ()
        return tuple(name for name in BATCH_AXES if name in self.mesh.shape and name not in absent)

    @property
    def head_axis(self) -> str | None:
        """The mesh's axis that attention's heads are split over; None: it has none."""
        return HEAD_AXIS if self.mesh is not None and HEAD_AXIS in self.mesh.shape else None

    @property
    def copies(self) -> int:
        """The number of copies of the parameters."""
        return 1 if self.in_copy else self._size(COPIES_AXIS)

    def on_devices(
        self, run: Callable[..., PyTree], takes: PyTree, gives: PyTree, check_vma: bool = True
    ) -> Callable[..., PyTree]:
        """Returns a function that runs once on each device, on its shards of the arguments.

        Args:
            takes, gives: how arguments and results are split, as `jax.shard_map` wants it.
            check_vma: whether JAX checks that results are as alike as `gives` says.
        """
        return jax.shard_map(
            run, mesh=self.mesh, in_specs=takes, out_specs=gives, check_vma=check_vma
        )

    def on_copies(self, run: Callable[[PyTree], PyTree], batch: PyTree) -> PyTree:
        """Runs a function once for each copy of the parameters, on the copy's own rows.

        Devices of different copies send each other nothing but what `run` asks for. Inside, layouts
        must be `in_copy`.

        Args:
            batch: a tree of arrays with rows leading.

        Returns:
            What the copies return, on a leading axis, split over them.
        """

        def by_copy(x: jax.Array) -> jax.Array:
            x = x.reshape(self.copies, x.shape[0] // self.copies, *x.shape[1:])
            return self._constrained(x, P(COPIES_AXIS, own.row_axes))

        own = dataclasses.replace(self, in_copy=True)
        run = jax.vmap(run, axis_name=_COPIES, spmd_axis_name=COPIES_AXIS)
        return run(jax.tree.map(by_copy, batch))

    def most(self, x: jax.Array) -> jax.Array:
        """Returns a number that all devices agree on: the largest of the copies."""
        return jax.lax.pmax(x, _COPIES) if self.in_copy else x

    def parts(self, rows: int) -> int:
        """Returns into how many parts the mesh splits so many rows.

        Raises:
            ValueError: the mesh does not divide the rows; see `rows`.
        """
        count = self._size(*self.row_axes)
        if rows % count:
            raise ValueError(
                f"rows: expected a multiple of the {count} parts that the mesh splits them into, "
                f"found {rows}"
            )
        return count

    def rows(self, x: jax.Array, heads: int | None = None, axis: int = 0) -> jax.Array:
        """Splits an array by its rows.

        Args:
            heads: the axis that is split as attention's heads are; None: no other is split.
            axis: of the rows.

        Raises:
            ValueError: the mesh does not divide the rows, so that every device would compute all of
                them; batches are checked before (`run.mesh.check_rows`).
        """
        if self.mesh is None:
            return x
        self.parts(x.shape[axis])
        spec: list[Any] = [None] * x.ndim
        spec[axis] = self.row_axes
        if heads is not None:
            spec[heads] = self.head_axis
        return self._constrained(x, P(*spec))

    def heads(
        self, q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Splits queries [b, s, h, e], keys and values [b, s, k, e] by rows and heads.

        Key-value heads that the heads' axis does not divide are repeated until it does, so that a
        device has those that its own queries attend to, and no other.
        """
        if self.mesh is None:
            return q, k, v
        devices = self._size(HEAD_AXIS)
        copies = devices // math.gcd(devices, k.shape[2])
        if copies > 1:
            k, v = (jnp.repeat(x, copies, axis=2) for x in (k, v))
        return self.rows(q, heads=2), self.rows(k, heads=2), self.rows(v, heads=2)

    def gathered(self, path: str, kernel: jax.Array) -> jax.Array:
        """Gathers a parameter as a product needs it: whole but for the heads' axis."""
        if self.mesh is None:
            return kernel
        spec = partition_spec(self.mesh, path, kernel.shape)
        return self._constrained(kernel, P(*(n if n == HEAD_AXIS else None for n in spec)))

    def head_dimension(self, path: str, shape: Sequence[int]) -> int | None:
        """Returns which axis of a parameter is split as heads are; None: there is none."""
        names = () if self.mesh is None else tuple(partition_spec(self.mesh, path, shape))
        return names.index(HEAD_AXIS) if HEAD_AXIS in names else None

    def summed(
        self,
        path: str,
        shape: Sequence[int],
        own: Callable[..., jax.Array],
        arrays: Sequence[jax.Array],
        heads: Sequence[int | None],
        turned: int = 0,
    ) -> jax.Array:
        """Sums a parameter's gradient over all rows; splits the sum as the parameter is.

        It is scattered over `fsdp` first, so that over `data`, and between slices, only a share is
        summed. Left to the compiler, it would sum whole gradients on some meshes, and on others
        sum them while it multiplies, which takes longer.

        Args:
            shape: the parameter's.
            own: computes the gradient of a device's rows from its parts of `arrays`.
            arrays: each with rows, or parts of the rows, leading.
            heads: of each array the axis that is split as heads are; None: there is none.
            turned: the parameter's trailing axes that come first in the gradient.
        """
        if self.mesh is None:
            return own(*arrays)
        names = tuple(partition_spec(self.mesh, path, shape))
        first = len(names) - turned
        spec, axes = P(*names[first:], *names[:first]), self.row_axes

        def of_device(*arrays: jax.Array) -> jax.Array:
            gradient = own(*arrays)
            total = gradient.astype(self.sums)
            for axis, name in enumerate(spec):
                if name in axes:
                    total = scatter_sum(total, name, axis, self._factors(name))
            total = jax.lax.psum(total, tuple(name for name in axes if name not in spec))
            return total.astype(gradient.dtype)

        takes = (
            P(axes) if axis is None else P(axes, *(None,) * (axis - 1), HEAD_AXIS) for axis in heads
        )
        total = self.on_devices(of_device, tuple(takes), spec)(*arrays)
        # Without a barrier the compiler may add up whole gradients of micro-batches, to sum these
        # over devices once.
        return jax.lax.optimization_barrier(total)

    def summed_over_copies(self, gradients: jax.Array) -> jax.Array:
        """Sums a parameter's gradients of all copies, which `on_copies` returned."""
        # Not `jnp.sum`, which adds bfloat16 up in float32.
        zero = jnp.zeros((), self.sums)
        total = jax.lax.reduce(gradients.astype(self.sums), zero, jax.lax.add, (0,))
        return total.astype(gradients.dtype)

    def whole(self, x: jax.Array) -> jax.Array:
        """Brings an array whole to every device."""
        return x if self.mesh is None else self._constrained(x, P())

    def _factors(self, name: str) -> tuple[int, int]:
        """Returns in which two steps, by their devices, a sum is scattered over an axis.

        Of a sum over all of a slice's chips, if they are many, TPUs' compiler would otherwise bring
        all of it to every chip.
        """
        size, slices = self.mesh.shape[name], len(slices_of(self.mesh.devices.flat))
        whole = size * slices == self.mesh.size  # Never so of other devices than TPUs.
        return torus_sides(size) if whole and size > ONE_STEP else (1, size)

    def _size(self, *axes: str) -> int:
        """Returns the number of devices along axes, those that the mesh lacks left out."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape.get(axis, 1) for axis in axes)

    def _constrained(self, x: jax.Array, spec: P) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))


def slices_of(devices: Iterable[jax.Device]) -> set[int]:
    """Returns the numbers of the TPU slices that devices belong to; of other devices none."""
    # Of GPUs too some have slices, whose sense is another one.
    return {getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}


def torus_sides(devices: int) -> tuple[int, int]:
    """Returns two numbers whose product is `devices`, as near to each other as can be."""
    short = next(side for side in range(math.isqrt(devices), 0, -1) if devices % side == 0)
    return short, devices // short


def scatter_sum(x: jax.Array, name: str, axis: int, factors: tuple[int, int]) -> jax.Array:
    """Sums an array over devices, of which each keeps its share along `axis`; in a `shard_map`.

    Args:
        name: the mesh's axis; of n devices the i-th keeps the i-th of n shares.
        factors: of n. The sum goes in two steps, first over the devices that are equal modulo the
            second factor, then over each so many that follow each other; one step if either is 1.
    """
    outer, inner = factors
    strided = [[i * inner + j for i in range(outer)] for j in range(inner)]
    adjacent = [[i * inner + j for j in range(inner)] for i in range(outer)]

    def scattered(x: jax.Array) -> jax.Array:
        for groups in [None] if 1 in factors else [strided, adjacent]:
            x = jax.lax.psum_scatter(
                x, name, scatter_dimension=axis, tiled=True, axis_index_groups=groups
            )
        return x

    # An array of one of several copies (`Layout.on_copies`) has an axis of size 1 more on a device,
    # with which TPUs' compiler would bring the whole sum to every chip.
    once = jax.custom_batching.custom_vmap(scattered)

    @once.def_vmap
    def of_copies(size: int, _: list[bool], x: jax.Array) -> tuple[jax.Array, bool]:
        return (scattered(x[0])[None] if size == 1 else jax.vmap(scattered)(x)), True

    return once(x)
