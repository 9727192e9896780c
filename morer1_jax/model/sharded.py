"""Attention kernels over a mesh: the compiler cannot partition a kernel by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from morer1_jax.model.attention import Kernels, Keys, Queries
from morer1_jax.model.config import Runtime
from morer1_jax.model.rotary import Rotary
from morer1_jax.model.sharding import Layout


@dataclasses.dataclass(frozen=True)
class ShardedKernels:
    """`attention.Kernels` that run one device's kernels on every device's own rows and heads.

    Rows and heads, key-value heads among them, must divide over their axes (`Layout.heads`).

    Attributes:
        kernels: those of one device.
        layout: how rows and heads are split; it has a mesh.
    """

    kernels: Kernels
    layout: Layout

    def rotate(self, x: Float[Array, "*s h e"], rotary: Rotary) -> Float[Array, "*s h e"]:
        """Rotates as `kernels` does; the compiler can partition that."""
        return self.kernels.rotate(x, rotary)

    def causal(self, q: Queries, k: Keys, v: Keys, segment_ids: Int[Array, "b s"]) -> Queries:
        """Attends as `kernels` does, on each device's shard."""
        return self._run(self.kernels.causal, q, k, v, segment_ids)

    def full(self, q: Queries, k: Keys, v: Keys, segment_ids: Int[Array, "b s"]) -> Queries:
        """Attends as `kernels` does, on each device's shard."""
        return self._run(self.kernels.full, q, k, v, segment_ids)

    def shared_prefix(
        self,
        q: Queries,
        k: Keys,
        v: Keys,
        prompt_mask: Bool[Array, "b p"],
        completion_mask: Bool[Array, "b g t"],
    ) -> Queries:
        """Attends as `kernels` does, on each device's shard."""
        return self._run(self.kernels.shared_prefix, q, k, v, prompt_mask, completion_mask)

    def _run(
        self, run: Callable[..., Queries], q: Queries, k: Keys, v: Keys, *masks: Array
    ) -> Queries:
        """Runs a kernel under `shard_map`; masks are split by rows alone."""
        layout = self.layout
        spec = P(layout.row_axes, None, layout.head_axis)
        return layout.on_devices(
            run,
            (spec, spec, spec, *(P(layout.row_axes) for _ in masks)),
            spec,
            check_vma=False,  # Pallas's outputs do not declare over which axes they vary.
        )(q, k, v, *masks)


def in_copy(runtime: Runtime) -> Runtime:
    """Returns a runtime for a program of `Layout.on_copies`."""
    layout, kernels = dataclasses.replace(runtime.layout, in_copy=True), runtime.kernels
    if isinstance(kernels, ShardedKernels):
        kernels = dataclasses.replace(kernels, layout=layout)
    return dataclasses.replace(runtime, layout=layout, kernels=kernels)
