"""Training state, the optimizer, and the update that both go through.

The optimizer is AdamW behind a global-norm clip, with a warm-up and a constant or cosine rate.
Weight decay applies to matrices, not to biases and scales of norms.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from morer1_jax.bounds import above, at_least, between, check_bounds, one_of
from morer1_jax.learn.trainable import ALL, TrainableParts, shares
from morer1_jax.model.config import DType
from morer1_jax.model.layers import Params
from morer1_jax.model.vlm import Qwen25VL, init_params


@struct.dataclass
class TrainState:
    """What training changes.

    Attributes:
        step: int32, the batches (SFT) or rollouts (GRPO) trained on; further updates on a rollout
            count in the optimizer's own state alone.
        params: the trainable parameters; see `learn.trainable`.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState


Schedule = Literal["constant", "cosine"]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Settings of AdamW (arXiv 1711.05101), its schedule and its clip.

    Attributes:
        lr: peak learning rate.
        schedule: "constant", or "cosine" down to `final` times the peak at the last update.
        warmup: updates of linear warm-up.
        final: last rate of the cosine as a share of the peak.
        b1: decay of the gradients' first moment.
        b2: decay of the gradients' second moment.
        eps: added to the root of the second moment.
        weight_decay: of matrices, times the learning rate.
        clip_norm: gradients of a greater global norm are scaled down to it.
        moments: dtype that both moments are kept in; they are computed in float32. "bfloat16"
            halves their memory, and rounds each to three digits.

    Raises:
        FieldError: a field is out of its bounds.
    """

    lr: float = above(0)
    schedule: Schedule = one_of(Schedule, "constant")
    warmup: int = at_least(0, 0)
    final: float = at_least(0, 0.1)
    b1: float = between(0, 1, 0.9)
    b2: float = between(0, 1, 0.95)
    eps: float = at_least(0, 1e-8)
    weight_decay: float = at_least(0, 0.0)
    clip_norm: float = above(0, 1.0)
    moments: DType = one_of(DType, "float32")

    def __post_init__(self) -> None:
        check_bounds(self)

    def learning_rate(self, updates: int) -> optax.Schedule:
        """Returns the learning rate by number of updates done, for a run of `updates`."""
        if self.schedule == "constant":
            after_warmup = optax.constant_schedule(self.lr)
        else:
            length = max(updates - 1 - self.warmup, 1)
            after_warmup = optax.cosine_decay_schedule(self.lr, length, alpha=self.final)
        # From lr / (warmup + 1) on: at a rate of 0 the first update would change nothing.
        warmup = optax.linear_schedule(self.lr / (self.warmup + 1), self.lr, max(self.warmup, 1))
        return optax.join_schedules([warmup, after_warmup], [self.warmup])

    def build(self, updates: int, parts: TrainableParts = ALL) -> optax.GradientTransformation:
        """Returns the optax transformation for a run of `updates` of the trainable parameters."""
        adamw = optax.adamw(
            self.learning_rate(updates),
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            mask=_decayed,
        )
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            adamw if self.moments == "float32" else _kept_in(self.moments, adamw),
            # After AdamW, whose step does not depend on the gradients' scale.
            optax.stateless(
                lambda changes, _: jax.tree.map(jnp.multiply, changes, shares(changes, parts))
            ),
        )


def _kept_in(dtype: str, transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns a transformation that computes its state in float32 and keeps it in `dtype`."""

    def cast(state: optax.OptState, dtype: str) -> optax.OptState:
        return jax.tree.map(
            lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
            state,
        )

    def update(
        grads: Params, state: optax.OptState, params: Params
    ) -> tuple[Params, optax.OptState]:
        updates, state = transform.update(grads, cast(state, "float32"), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(lambda params: cast(transform.init(params), dtype), update)


def _decayed(params: Params) -> Any:
    """Returns a tree of whether each leaf has weight decay."""
    names = ("bias", "scale")
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not jax.tree_util.keystr(path, simple=True).endswith(names), params
    )


def new_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns a state at step 0 with these parameters."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


@functools.lru_cache(maxsize=8)
def abstract_params(model: Qwen25VL) -> Params:
    """Returns shapes and dtypes of all parameters; traced once a model, not to be changed."""
    return jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))


def init_sharded(model: Qwen25VL, key: PRNGKeyArray, like: Params) -> Params:
    """Returns parameters from scratch, each made on the devices that will hold it.

    Args:
        like: the leaves to return, all or a part, as `jax.ShapeDtypeStruct` with shardings.
    """

    def pick(params: Params, like: Params) -> Params:
        return {
            name: pick(params[name], branch)
            if isinstance(branch, dict)
            else params[name].astype(branch.dtype)
            for name, branch in like.items()
        }

    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    return jax.jit(lambda k: pick(init_params(model, k), like), out_shardings=shardings)(key)


def apply_gradients(
    state: TrainState,
    grads: Params,
    optimizer: optax.GradientTransformation,
    sound: Bool[Array, ""] | bool = True,
) -> tuple[Params, optax.OptState, dict[str, Array]]:
    """Applies an update, or skips it and leaves parameters and optimizer state bit for bit.

    It is skipped where the gradients' global norm is not finite, or `sound` is False.
    Both are known before anything is written, so that the new state still takes the old one's
    place in memory. Whether parameters overflow is known only afterwards, by `param_norm`: a copy
    of them until then would double their memory, and the cause would be a setting such as a huge
    learning rate, which skipping does not mend.

    Args:
        sound: whether what the gradients were computed from is finite.

    Returns:
        New parameters, new optimizer state, and metrics: `grad_norm`, before the clip;
        `param_norm`, of the parameters returned; `skipped_updates`, 1 or 0.
    """
    norm = optax.tree.norm(grads)
    applies = jnp.isfinite(norm) & sound
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    new = optax.apply_updates(state.params, updates), opt_state
    old = state.params, state.opt_state
    params, opt_state = jax.tree.map(lambda new, old: jnp.where(applies, new, old), new, old)
    return (
        params,
        opt_state,
        {
            "grad_norm": norm,
            "param_norm": optax.tree.norm(params),
            "skipped_updates": 1 - applies.astype(jnp.int32),
        },
    )
