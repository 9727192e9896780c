"""A model on a mesh, before it has parameters: where parameters, state and batches lie.

There are two layouts, over the same devices in the same order. Training splits parameters over all
devices and gathers each where it is used. Sampling reads every parameter for every token, so there
they lie whole, or split over a few devices by heads and features, in the dtype of the products;
compiled programs move them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from morer1_jax.errors import ConfigError
from morer1_jax.learn.state import TrainState, abstract_params, new_state
from morer1_jax.learn.trainable import ALL, TrainableParts, join, split
from morer1_jax.model.config import ModelConfig, Runtime
from morer1_jax.model.decoding import separate_layers
from morer1_jax.model.layers import Params
from morer1_jax.model.sharding import HEAD_AXIS, Layout, partition_spec
from morer1_jax.model.vlm import Qwen25VL
from morer1_jax.run import mesh as meshes
from morer1_jax.run.kernels import choose


@dataclasses.dataclass(frozen=True)
class Placed:
    """A model on a mesh.

    Attributes:
        model: with the kernels and the layout of `mesh`.
        sampling_mesh: the same devices in the same order.
        trainable: which parts train.
    """

    model: Qwen25VL
    mesh: Mesh
    sampling_mesh: Mesh
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

    def micro_batches(self, rows: int, most: int) -> int:
        """Returns in how many parts, at most `most`, rows are run so that each fills the mesh.

        Parts of fewer rows than the mesh splits them into would be computed by every device.
        """
        on_device = max(rows // self.parts, 1)
        return max(count for count in range(1, most + 1) if on_device % count == 0)

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

    @functools.cached_property
    def sampler(self) -> Qwen25VL:
        """The model with the kernels and the layout of the mesh for sampling."""
        model = self.model
        return model.clone(runtime=_on_mesh(model.config, model.runtime, self.sampling_mesh))

    @functools.cached_property
    def like_sampling(self) -> Params:
        """Shapes, dtypes and shardings of all parameters as the sampler takes them."""
        return self._assembled(self.targets)

    def for_sampling(self, params: Params) -> Params:
        """Moves all parameters to the sampler's layout; what lies there already is not copied."""
        return self._assembled(
            [
                self.move(number)(leaf) if number in self.moved else leaf
                for number, leaf in enumerate(jax.tree.leaves(params))
            ]
        )

    @functools.cached_property
    def moved(self) -> dict[int, jax.ShapeDtypeStruct]:
        """What sampling needs elsewhere or in another form, by its number among all leaves."""
        return {
            number: leaf
            for number, (leaf, target) in enumerate(
                zip(jax.tree.leaves(self._whole), self.targets, strict=True)
            )
            if isinstance(target, tuple)
            or leaf.dtype != target.dtype
            or not leaf.sharding.is_equivalent_to(target.sharding, leaf.ndim)
        }

    def move(self, number: int) -> Callable[[Any], Any]:
        """Returns the program that moves one of `moved`; of layers apart it gives a tuple.

        There is one for each: where all are moved at once, all are in memory twice.
        """
        if number not in self._moves:
            target, split = self.targets[number], self.moved[number].sharding.spec
            apart = isinstance(target, tuple)
            lies = NamedSharding(self.mesh, P(*split[1:]) if apart else split)
            dtype = (target[0] if apart else target).dtype

            def move(leaf: jax.Array) -> Any:
                # Cast and cut where it lies, so that half the bytes travel, and no layer twice.
                cast = leaf.astype(dtype)
                pieces = [
                    jax.lax.with_sharding_constraint(piece, lies)
                    for piece in (cast if apart else [cast])
                ]
                return tuple(pieces) if apart else pieces[0]

            takes = (self.moved[number],)
            self._moves[number] = meshes.program(move, takes=takes, gives=target)
        return self._moves[number]

    @functools.cached_property
    def _moves(self) -> dict[int, Callable[[Any], Any]]:
        return {}

    @property
    def _whole(self) -> Params:
        return join(self.like, self.like_frozen)

    @functools.cached_property
    def targets(self) -> list[Any]:
        """What becomes of every leaf: its shape with sharding; of layers apart a tuple."""
        apart = self.model.runtime.decode_unroll

        def target(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> Any:
            name, shape = meshes.path_name(path), leaf.shape
            is_apart = apart and name.startswith("language/layers/")
            shape = shape[1:] if is_apart else shape
            sharding = NamedSharding(
                self.sampling_mesh, partition_spec(self.sampling_mesh, name, shape)
            )
            like = jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)
            return (like,) * leaf.shape[0] if is_apart else like

        ready = self.for_products(self._whole)
        return [target(*entry) for entry in jax.tree_util.tree_leaves_with_path(ready)]

    def _assembled(self, leaves: Sequence[Any]) -> Params:
        """Returns the tree of leaves, some of them tuples of what lies apart."""
        whole = jax.tree.unflatten(jax.tree.structure(self._whole), leaves)
        return separate_layers(whole) if self.model.runtime.decode_unroll else whole

    @functools.cached_property
    def like_reference(self) -> Params:
        """Shapes, dtypes and shardings of a copy of what trains, which is only read."""
        return self.for_products(self.like)

    def reference(self, params: Params) -> Params:
        """Returns what trains as `like_reference` has it; the same arrays where nothing differs."""
        if jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype, params, self.like_reference)):
            return params
        takes, gives = meshes.shardings_of(self.like), self.like_reference
        return meshes.program(self.for_products, takes=(takes,), gives=gives)(params)

    def for_products(self, params: Params) -> Params:
        """Returns parameters in the dtype that their products are computed in.

        Products cast them anyway. Scales of norms, whose products are in float32, stay as they are.

        Args:
            params: arrays, or shapes with shardings; what has the dtype is not copied.
        """
        dtype = jnp.dtype(self.model.runtime.dtype)

        def ready(path: jax.tree_util.KeyPath, leaf: Any) -> Any:
            if path[-1].key == "scale" or leaf.dtype == dtype:
                return leaf
            is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
            return leaf.update(dtype=dtype) if is_shape else leaf.astype(dtype)

        return jax.tree_util.tree_map_with_path(ready, params)


def place(
    config: ModelConfig,
    runtime: Runtime,
    mesh: Mesh,
    trainable: TrainableParts = ALL,
    sampling_tensor: int | None = None,
) -> Placed:
    """Places a model on a mesh, with the kernels that suit its devices.

    Args:
        sampling_tensor: devices that sampling splits parameters over; None: as many as the mesh's
            axis `tensor` has.

    Raises:
        ConfigError: the kernels that the runtime names do not fit devices, dtype or heads, or
            `sampling_tensor` does not fit the mesh.
    """
    model = Qwen25VL(config, _on_mesh(config, runtime, mesh), trainable.adapters)
    return Placed(model, mesh, _sampling_mesh(mesh, sampling_tensor), trainable)


def _on_mesh(config: ModelConfig, runtime: Runtime, mesh: Mesh) -> Runtime:
    kernels = choose(runtime.attention, runtime.dtype, config.head_sizes, mesh)
    layout = Layout(mesh if mesh.size > 1 else None)
    return dataclasses.replace(runtime, kernels=kernels, layout=layout)


def _sampling_mesh(mesh: Mesh, tensor: int | None) -> Mesh:
    """Returns a mesh of rows and heads over another mesh's devices."""
    rows_of_training = meshes.batch_parts(mesh)
    tensor = mesh.size // rows_of_training if tensor is None else tensor
    if mesh.size % tensor or rows_of_training % (mesh.size // tensor):
        raise ConfigError(
            f"mesh.sampling_tensor: expected a divisor of the mesh's {mesh.size} devices that "
            f"leaves a divisor of the {rows_of_training} parts its rows are split into, found "
            f"{tensor}; use a multiple of mesh.tensor"
        )
    devices = mesh.devices.reshape(-1, tensor)
    return Mesh(devices, ("data", HEAD_AXIS), axis_types=(AxisType.Auto,) * 2)
