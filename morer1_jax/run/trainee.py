"""Builds the model that a run trains, on its mesh, with its parameters and train states."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from transformers import PreTrainedTokenizerFast

from morer1_jax.config.settings import ModelSettings, Settings
from morer1_jax.errors import ConfigError
from morer1_jax.learn.state import TrainState, init_sharded, new_state
from morer1_jax.learn.trainable import ADAPTER, join, select
from morer1_jax.model.config import ModelConfig
from morer1_jax.model.layers import Params
from morer1_jax.model.special import SpecialIds
from morer1_jax.run import mesh as meshes
from morer1_jax.run.checkpoint import Checkpointer
from morer1_jax.run.fit import any_mesh
from morer1_jax.run.placed import Placed, place
from morer1_jax.run.policy import Policy
from morer1_jax.task.ontology import Ontology
from morer1_jax.weights.published import Checkpoint

# A new model's embedding has a multiple of this many rows, so that a mesh can split them.
_ROWS = 64


class Trainee:
    """A policy whose parameters are split into those that train and those that are frozen.

    Attributes:
        policy: the model with its tokenizer and labels, on the mesh.
        checkpoint: the published checkpoint that training starts from; None: from scratch.
    """

    def __init__(self, policy: Policy, *, checkpoint: Checkpoint | None, seed: int) -> None:
        self.policy = policy
        self.checkpoint = checkpoint
        self._seed = seed

    @property
    def placed(self) -> Placed:
        """The model on its mesh, and which of its parts train."""
        return self.policy.placed

    @functools.cached_property
    def frozen(self) -> Params:
        """The frozen parameters, on the mesh.

        Made or read when first used, since that takes minutes for a large model: other errors of a
        run are found before. All stages share them.
        """
        return self._starting_params(self.placed.like_frozen, stream=0)

    def init_params(self, stream: int) -> Params:
        """Makes the parameters that train as they are at the start of training.

        Args:
            stream: separates the random numbers of the run's models.
        """
        return self._starting_params(self.placed.like, stream)

    def _starting_params(self, like: Params, stream: int) -> Params:
        """Reads the parameters that the checkpoint has, and initialises the others at random."""
        random, loaded = like, {}
        if self.checkpoint is not None:
            random = select(like, lambda path: path[-1] in ADAPTER)
            loaded = select(like, lambda path: path[-1] not in ADAPTER)
        key = jax.random.fold_in(jax.random.key(self._seed), stream)
        params = init_sharded(self.policy.model, key, random) if random else {}
        return join(params, self.checkpoint.load(loaded)) if loaded else params

    def best_params(self, checkpoints: Path) -> Params:
        """Reads a training's best parameters by validation, those that train.

        Args:
            checkpoints: the training's, from `Store.checkpoints`.
        """
        return Checkpointer(checkpoints).restore_best(self.placed.like)[0]

    def whole(self, params: Params) -> Params:
        """Joins parameters that train with the frozen ones; copies nothing."""
        return join(params, self.frozen)

    def new_state(self, params: Params, optimizer: optax.GradientTransformation) -> TrainState:
        """Makes a state at step 0 around a copy of `params`, on the mesh.

        A copy, because a train step donates its state's buffers and `params` may still be needed.
        """
        make = jax.jit(
            lambda p: new_state(jax.tree.map(jnp.copy, p), optimizer),
            out_shardings=meshes.shardings_of(self.placed.like_state(optimizer)),
        )
        return make(params)


def open_trainee(
    settings: Settings,
    tokenizer: PreTrainedTokenizerFast,
    ontology: Ontology,
    checkpoint: Checkpoint | None,
    *,
    mesh_of_config: bool = True,
) -> Trainee:
    """Builds a run's model on its mesh; makes and reads no parameters.

    Args:
        mesh_of_config: whether the mesh is the config's, or any that fits this machine's devices.

    Raises:
        ConfigError: sizes, devices, kernels or tokenizer do not fit each other.
        DataError: a label that the tokenizer cannot write.
    """
    config = _model_config(settings.model, tokenizer, checkpoint)
    mesh = meshes.make_mesh(settings.mesh.axes) if mesh_of_config else any_mesh(config)
    placed = place(config, settings.runtime, mesh, settings.tune, settings.mesh.sampling_tensor)
    policy = Policy(placed, tokenizer, ontology)
    return Trainee(policy, checkpoint=checkpoint, seed=settings.seed)


def embedding_rows(tokens: int) -> int:
    """Returns the rows of a new model's embedding, for a tokenizer of so many tokens."""
    return -(-tokens // _ROWS) * _ROWS


def _model_config(
    sizes: ModelSettings, tokenizer: PreTrainedTokenizerFast, checkpoint: Checkpoint | None
) -> ModelConfig:
    """Returns the checkpoint's sizes or, for a model from scratch, the config's."""
    if checkpoint is not None:
        config = checkpoint.config_with(tokenizer)
    else:
        special, text = SpecialIds.of(tokenizer), sizes.text
        rows = embedding_rows(len(tokenizer))
        config = ModelConfig(
            text=dataclasses.replace(text, vocab_size=text.vocab_size or rows),
            vision=dataclasses.replace(sizes.vision, out_hidden_size=text.hidden_size),
            image_token_id=special.image,
            video_token_id=special.video,
            vision_start_token_id=special.vision_start,
            vision_end_token_id=special.vision_end,
        )
    if (rows := config.text.vocab_size) < len(tokenizer):
        raise ConfigError(
            f"config.model.text.vocab_size: expected at least the tokenizer's "
            f"{len(tokenizer)}, found {rows}"
        )
    return config
