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
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# The axes that the rows of a batch are split over; parameters are split over `fsdp` and `tensor`.
BATCH_AXES = ("data", "fsdp")
# The axis that attention's heads are split over.
HEAD_AXIS = "tensor"

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
    """

    mesh: Mesh | None = None
    sums: str = "float32"

    def parts(self, rows: int) -> int:
        """Returns into how many parts the mesh splits so many rows.

        Raises:
            ValueError: the mesh does not divide the rows; see `rows`.
        """
        count = self._size(*BATCH_AXES)
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
        spec[axis] = tuple(name for name in BATCH_AXES if name in self.mesh.shape)
        if heads is not None and HEAD_AXIS in self.mesh.shape:
            spec[heads] = HEAD_AXIS
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

    def split(self, path: str, gradient: jax.Array, turned: int = 0) -> jax.Array:
        """Splits a parameter's gradient as the parameter itself is, summed over devices.

        Args:
            turned: the parameter's trailing axes that come first in the gradient.
        """
        if self.mesh is None:
            return gradient
        spec = self._turned(path, gradient.shape, turned)
        return self._constrained(gradient.astype(self.sums), spec).astype(gradient.dtype)

    def summed(self, path: str, parts: jax.Array, turned: int = 0) -> jax.Array:
        """Sums a parameter's gradients of all parts of the rows; splits the sum as `split` does.

        It is scattered over `fsdp` first, so that over `data`, and between slices, only a share is
        summed. TPUs' compiler may still compile the scattering as a sum and a slice.

        Args:
            parts: split by its leading axis, as rows are, and over `tensor` where the parameter is.
        """
        if self.mesh is None:
            return jnp.sum(parts, axis=0)
        spec = self._turned(path, parts.shape[1:], turned)
        axes = tuple(name for name in BATCH_AXES if name in self.mesh.shape)

        def of_device(part: jax.Array) -> jax.Array:
            total = jnp.sum(part, axis=0).astype(self.sums)
            for axis, name in enumerate(spec):
                if name in axes:
                    total = jax.lax.psum_scatter(total, name, scatter_dimension=axis, tiled=True)
            return jax.lax.psum(total, tuple(name for name in axes if name not in spec))

        heads = (name if name == HEAD_AXIS else None for name in spec)
        run = jax.shard_map(of_device, mesh=self.mesh, in_specs=P(axes, *heads), out_specs=spec)
        return run(parts).astype(parts.dtype)

    def _turned(self, path: str, shape: tuple[int, ...], turned: int) -> P:
        """Returns how an array is split that is a parameter with `turned` trailing axes first."""
        names = tuple(partition_spec(self.mesh, path, shape[turned:] + shape[:turned]))
        first = len(shape) - turned
        return P(*names[first:], *names[:first])

    def _size(self, *axes: str) -> int:
        """Returns the number of devices along axes, those that the mesh lacks left out."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape.get(axis, 1) for axis in axes)

    def _constrained(self, x: jax.Array, spec: P) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))
