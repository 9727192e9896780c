"""A model on a mesh, before it has parameters: where parameters, state and batches lie."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from morer1_jax.batch import EncodedBatch, PromptBatch, VisionBatch
from morer1_jax.learn.state import TrainState, abstract_params, new_state
from morer1_jax.learn.trainable import ALL, TrainableParts, join, split
from morer1_jax.model.config import ModelConfig, Runtime
from morer1_jax.model.layers import Params
from morer1_jax.model.parts import fitting_parts, map_rows
from morer1_jax.model.sharding import Layout
from morer1_jax.model.vision import VisionInputs, VisionTower
from morer1_jax.model.vlm import Qwen25VL, for_products, split_tower
from morer1_jax.run import mesh as meshes
from morer1_jax.run.fit import check_mesh
from morer1_jax.run.kernels import choose
from morer1_jax.run.sampling import SamplingLayout, sampling_mesh


@dataclasses.dataclass(frozen=True)
class Placed:
    """A model on a mesh.

    Attributes:
        model: with the kernels and the layout of `mesh`.
        sampling_mesh: of `run.sampling`, over the same devices.
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
    def sampling(self) -> SamplingLayout:
        """The model as it samples."""
        model, mesh = self.model, self.sampling_mesh
        sampler = model.clone(runtime=_on_mesh(model.config, model.runtime, mesh))
        # Sampling takes images that the tower has run on.
        _, params = split_tower(join(self.like, self.like_frozen))
        return SamplingLayout(sampler, mesh, params)

    @property
    def tower_trains(self) -> bool:
        """Whether images have to be encoded anew, with gradients, wherever they are used."""
        return self.trainable.vision > 0

    def encode(self, params: Params, prompts: PromptBatch) -> PromptBatch:
        """Runs the vision tower on a batch's images, for all the programs that use them.

        The merger, which may train where the tower does not, is left to these programs. Features,
        and a shape without slots for images, are returned as they are.

        Args:
            params: of the whole model, as training holds them.
        """
        images = prompts.vision
        if not isinstance(images, VisionBatch) or not images.patches.shape[1]:
            return prompts
        encoded, index = self.tower(split_tower(params)[0], images, prompts.vision_index)
        return prompts._replace(vision=encoded, vision_index=index)

    @functools.cached_property
    def tower(self) -> Callable[..., tuple[EncodedBatch, jax.Array]]:
        """The compiled tower without its merger: `(params, images, index) -> (encoded, index)`.

        It takes the first tree of `split_tower`, and takes and gives a `vision_index`. Rows of
        tokens may share rows of images; what it gives has a row for each.
        """
        vision, runtime = self.model.config.vision, self.model.runtime
        tower = VisionTower(vision, runtime)

        def run(
            params: Params, images: VisionBatch, index: jax.Array
        ) -> tuple[EncodedBatch, jax.Array]:
            def of_part(part: VisionBatch) -> jax.Array:
                inputs = VisionInputs.of(part, vision.temporal_patch_size)
                return tower.apply({"params": params["vision"]}, inputs, merge=False)

            rows, windows, slots = images.patches.shape[:3]
            parts = fitting_parts(runtime.layout, rows, windows * slots)
            hidden = map_rows(of_part, images, parts)
            # From slots to places: the patches of an image token lie one after another.
            merged = hidden.reshape(rows, -1, vision.spatial_merge_size**2 * vision.hidden_size)
            place = jnp.maximum(index, 0).reshape(rows, -1, 1)
            of_places = jnp.take_along_axis(merged, place, axis=1)
            encoded = EncodedBatch(of_places.reshape(len(index), -1, vision.hidden_size))
            return encoded, jnp.where(index >= 0, jnp.arange(index.shape[1]), -1)

        takes = split_tower(self.param_shardings)[0], self.rows, self.rows
        return meshes.program(run, takes=takes, gives=self.rows)

    @functools.cached_property
    def like_reference(self) -> Params:
        """Shapes, dtypes and shardings of a copy of what trains, which is only read."""
        return for_products(self.like, self.model.runtime.dtype)

    def reference(self, params: Params) -> Params:
        """Returns what trains as `like_reference` has it; the same arrays where nothing differs."""
        if jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype, params, self.like_reference)):
            return params
        takes, gives = meshes.shardings_of(self.like), self.like_reference
        dtype = self.model.runtime.dtype
        cast = meshes.program(lambda p: for_products(p, dtype), takes=(takes,), gives=gives)
        return cast(params)


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
        ConfigError: the kernels that the runtime names do not fit devices, dtype or heads, or the
            mesh or `sampling_tensor` does not fit the model.
    """
    check_mesh(config, mesh)
    sampling = sampling_mesh(config, mesh, sampling_tensor)
    model = Qwen25VL(config, _on_mesh(config, runtime, mesh), trainable.adapters)
    return Placed(model, mesh, sampling, trainable)


def _on_mesh(config: ModelConfig, runtime: Runtime, mesh: Mesh) -> Runtime:
    kernels = choose(runtime.attention, runtime.dtype, config.head_sizes, mesh)
    # Not on GPUs, whose attention kernel JAX cannot map over copies of the parameters.
    apart = mesh.devices.flat[0].platform == "tpu" and Layout(mesh).copies > 1
    layout = Layout(mesh if mesh.size > 1 else None, runtime.gradient_sums, apart)
    return dataclasses.replace(runtime, kernels=kernels, layout=layout)
