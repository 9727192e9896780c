"""Where parameters lie while answers are sampled, and how they get there.

Training splits parameters over all devices and gathers each where it is used. Sampling reads every
parameter for every token, so there they lie whole, or split over a few devices by heads and
features, in the dtype of the products and, where the sampler runs its layers in a plain loop, with
the layers apart. Rows are split over the rest. Devices are training's own, in the same order.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from morer1_jax.model.config import ModelConfig
from morer1_jax.model.decoding import separate_layers
from morer1_jax.model.layers import Params
from morer1_jax.model.sharding import HEAD_AXIS, partition_spec
from morer1_jax.model.vlm import Qwen25VL, for_products, split_tower
from morer1_jax.run import mesh as meshes
from morer1_jax.run.fit import check_sampling

_LAYERS = "language/layers/"


@dataclasses.dataclass(frozen=True)
class SamplingLayout:
    """A model's layout for sampling.

    Attributes:
        model: with the kernels and the layout of `mesh`.
        before: shapes, dtypes and shardings in training's layout of all parameters but the tower's.
    """

    model: Qwen25VL
    mesh: Mesh
    before: Params

    @functools.cached_property
    def like(self) -> Params:
        """Shapes, dtypes and shardings of the parameters as the sampler takes them."""
        return self._assembled(self.targets)

    @functools.cached_property
    def given(self) -> Params:
        """Shapes, dtypes and shardings of what `params` returns.

        They are those of `like` in effect; but what lies here already keeps training's mesh, by
        which JAX tells one program from another.
        """
        leaves = enumerate(jax.tree.leaves(self.before))
        return self._assembled([self.targets[n] if n in self.moved else leaf for n, leaf in leaves])

    @functools.cached_property
    def targets(self) -> list[Any]:
        """What becomes of every leaf: its shape with sharding; of layers apart a tuple of these."""

        def target(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> Any:
            name, shape = meshes.path_name(path), leaf.shape
            apart = self._layers_apart and name.startswith(_LAYERS)
            shape = shape[1:] if apart else shape
            sharding = NamedSharding(self.mesh, partition_spec(self.mesh, name, shape))
            like = jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)
            return (like,) * leaf.shape[0] if apart else like

        ready = for_products(self.before, self.model.runtime.dtype)
        return [target(*entry) for entry in jax.tree_util.tree_leaves_with_path(ready)]

    @functools.cached_property
    def moved(self) -> dict[int, jax.ShapeDtypeStruct]:
        """What sampling needs elsewhere or in another form, by its number among all leaves."""
        return {
            number: leaf
            for number, (leaf, target) in enumerate(
                zip(jax.tree.leaves(self.before), self.targets, strict=True)
            )
            if isinstance(target, tuple)
            or leaf.dtype != target.dtype
            or not leaf.sharding.is_equivalent_to(target.sharding, leaf.ndim)
        }

    def params(self, params: Params) -> Params:
        """Moves parameters here from training's layout; what lies here already is not copied.

        Args:
            params: of the whole model; the vision tower's, but its merger's, are left out.
        """
        return self._assembled(
            [
                self.move(number)(leaf) if number in self.moved else leaf
                for number, leaf in enumerate(jax.tree.leaves(split_tower(params)[1]))
            ]
        )

    def move(self, number: int) -> Callable[[jax.Array], Any]:
        """Returns the program that moves one of `moved`; of layers apart it gives a tuple.

        There is one for each: where all are moved at once, all are in memory twice.
        """
        if number not in self._moves:
            target, split = self.targets[number], self.moved[number].sharding
            apart = isinstance(target, tuple)
            lies = NamedSharding(split.mesh, P(*split.spec[1:]) if apart else split.spec)
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
    def _moves(self) -> dict[int, Callable[[jax.Array], Any]]:
        return {}

    @property
    def _layers_apart(self) -> bool:
        return self.model.runtime.decode_unroll

    def _assembled(self, leaves: Sequence[Any]) -> Params:
        """Returns the tree of leaves, some of them tuples of what lies apart."""
        whole = jax.tree.unflatten(jax.tree.structure(self.before), leaves)
        return separate_layers(whole) if self._layers_apart else whole


def sampling_mesh(config: ModelConfig, mesh: Mesh, tensor: int | None) -> Mesh:
    """Returns a mesh of rows and heads over the devices of training's mesh.

    Args:
        tensor: devices that parameters are split over; None: as many as training's axis `tensor`.

    Raises:
        ConfigError: `tensor` does not fit mesh or model.
    """
    if tensor is None:
        tensor = mesh.size // meshes.batch_parts(mesh)
    check_sampling(config, mesh, tensor)
    devices = mesh.devices.reshape(-1, tensor)
    return Mesh(devices, ("data", HEAD_AXIS), axis_types=(AxisType.Auto,) * 2)
