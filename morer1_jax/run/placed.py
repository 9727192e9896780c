"""A model on a mesh, before it has parameters: where parameters, state and batches lie."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from morer1_jax.learn.state import TrainState, abstract_params, new_state
from morer1_jax.learn.trainable import ALL, TrainableParts, split
from morer1_jax.model.config import ModelConfig, Runtime
from morer1_jax.model.layers import Params
from morer1_jax.model.sharding import Layout
from morer1_jax.model.vlm import Qwen25VL
from morer1_jax.run import mesh as meshes
from morer1_jax.run.kernels import choose


@dataclasses.dataclass(frozen=True)
class Placed:
    """A model on a mesh.

    Attributes:
        model: with the kernels and the layout of this mesh.
        trainable: which parts train.
    """

    model: Qwen25VL
    mesh: Mesh
    trainable: TrainableParts = ALL

    @property
    def replicated(self) -> NamedSharding:
        """The sharding of arrays that every device has whole."""
        return NamedSharding(self.mesh, P())

    @property
    def rows(self) -> NamedSharding:
        """The sharding of arrays whose leading axis is a batch's rows."""
        return meshes.batch_sharding(self.mesh)

    @property
    def parts(self) -> int:
        """The number of parts that the rows of a batch are split into."""
        return meshes.batch_parts(self.mesh)

    @functools.cached_property
    def param_shardings(self) -> Any:
        """The sharding of every parameter."""
        return meshes.param_shardings(self.mesh, abstract_params(self.model))

    @property
    def like(self) -> Params:
        """Shapes, dtypes and shardings of the parameters that train."""
        return self._like_parts[0]

    @property
    def like_frozen(self) -> Params:
        """Shapes, dtypes and shardings of the parameters that do not train."""
        return self._like_parts[1]

    @functools.cached_property
    def _like_parts(self) -> tuple[Params, Params]:
        whole = meshes.like(abstract_params(self.model), self.param_shardings)
        trained, frozen = split(whole, self.trainable)
        dtype = jnp.dtype(self.trainable.frozen_dtype)
        return trained, jax.tree.map(lambda leaf: leaf.update(dtype=dtype), frozen)

    def like_state(self, optimizer: optax.GradientTransformation) -> TrainState:
        """Returns shapes, dtypes and shardings of a train state."""
        abstract = jax.eval_shape(lambda p: new_state(p, optimizer), self.like)
        return meshes.like(abstract, meshes.state_shardings(self.mesh, abstract, abstract.params))

    def put(self, batch: Any) -> Any:
        """Puts this host's rows of a batch on the mesh; see `put_batch`."""
        return meshes.put_batch(batch, self.mesh)


def place(
    config: ModelConfig, runtime: Runtime, mesh: Mesh, trainable: TrainableParts = ALL
) -> Placed:
    """Places a model on a mesh, with the kernels that suit its devices.

    Raises:
        ConfigError: the kernels that the runtime names do not fit devices, dtype or heads.
    """
    kernels = choose(runtime.attention, runtime.dtype, config.head_sizes, mesh)
    layout = Layout(mesh if mesh.size > 1 else None)
    runtime = dataclasses.replace(runtime, kernels=kernels, layout=layout)
    return Placed(Qwen25VL(config, runtime, trainable.adapters), mesh, trainable)
