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
    not split.  A parameter that no rule matches is replicated.

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
    """

    mesh: Mesh | None = None

    def parts(self, rows: int) -> int:
        """Returns into how many parts the mesh splits so many rows; 1 where it does not divide."""
        if self.mesh is None:
            return 1
        count = self._batch_size
        return 1 if rows % count else count

    def rows(self, x: jax.Array, heads: int | None = None, axis: int = 0) -> jax.Array:
        """Splits an array by its rows; rows that do not divide are not split.

        Args:
            heads: the axis that is split as attention's heads are; None: no other is split.
            axis: of the rows.
        """
        if self.mesh is None or x.shape[axis] % self._batch_size:
            return x
        spec: list[Any] = [None] * x.ndim
        spec[axis] = self._batch_axes
        if heads is not None and x.shape[heads] % self.mesh.shape.get(HEAD_AXIS, 1) == 0:
            spec[heads] = HEAD_AXIS if HEAD_AXIS in self.mesh.shape else None
        return self._constrained(x, P(*spec))

    def gathered(self, path: str, kernel: jax.Array) -> jax.Array:
        """Gathers a parameter as a product needs it: whole but for the heads' axis."""
        if self.mesh is None:
            return kernel
        spec = partition_spec(self.mesh, path, kernel.shape)
        return self._constrained(kernel, P(*(n if n == HEAD_AXIS else None for n in spec)))

    def split(self, path: str, kernel: jax.Array) -> jax.Array:
        """Splits a parameter's gradient as the parameter itself is."""
        if self.mesh is None:
            return kernel
        return self._constrained(kernel, partition_spec(self.mesh, path, kernel.shape))

    @property
    def _batch_axes(self) -> tuple[str, ...]:
        return tuple(name for name in BATCH_AXES if name in self.mesh.shape)

    @property
    def _batch_size(self) -> int:
        return math.prod(self.mesh.shape[name] for name in self._batch_axes)

    def _constrained(self, x: jax.Array, spec: P) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))
