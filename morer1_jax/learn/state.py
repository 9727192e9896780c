"""Parameters, optimizer and what changes them.

The optimizer is AdamW behind a global-norm clip, with a warm-up and a constant or cosine rate.
Decay applies to matrices and leaves biases and norm scales alone.
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

from morer1_jax.learn.trainable import ALL, TrainableParts, factors
from morer1_jax.model.vlm import Qwen25VL, init_params

Params = dict[str, Any]


@struct.dataclass
class TrainState:
    """What training changes; of the parameters, those that train (see `learn.trainable`).

    `step` counts the batches (of SFT) or rollouts (of GRPO) spent; an update that follows the
    same rollout again counts in the optimizer's own state.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW's.

    Attributes:
      lr: peak learning rate.
      schedule: "constant", or "cosine" down to `final` times the peak at the last update.
      warmup: updates of linear warm-up.
      final: last rate of the cosine as a share of the peak.
      clip_norm: gradients of a greater global norm are scaled down to it.
    """

    lr: float
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: int = 0
    final: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.clip_norm <= 0:
            raise ValueError(f"lr {self.lr} and clip_norm {self.clip_norm}: both must be above 0")

    def learning_rate(self, updates: int) -> optax.Schedule:
        """Learning rate by number of updates done, for a run of `updates`."""
        if self.schedule == "constant":
            rest = optax.constant_schedule(self.lr)
        else:
            length = max(updates - 1 - self.warmup, 1)
            rest = optax.cosine_decay_schedule(self.lr, length, alpha=self.final)
        ramp = optax.linear_schedule(self.lr / (self.warmup + 1), self.lr, max(self.warmup, 1))
        return optax.join_schedules([ramp, rest], [self.warmup])

    def build(self, updates: int, parts: TrainableParts = ALL) -> optax.GradientTransformation:
        """The optax transformation for a run of `updates` of the parameters that train."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip_norm),
            optax.adamw(
                self.learning_rate(updates),
                b1=self.b1,
                b2=self.b2,
                eps=self.eps,
                weight_decay=self.weight_decay,
                mask=_decayed,
            ),
            optax.stateless(
                lambda changes, _: jax.tree.map(jnp.multiply, changes, factors(changes, parts))
            ),
        )


def _decayed(params: Params) -> Any:
    names = ("bias", "scale")
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not jax.tree_util.keystr(path, simple=True).endswith(names), params
    )


def new_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """A state at step 0."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


@functools.lru_cache(maxsize=8)
def abstract_params(model: Qwen25VL) -> Params:
    """Shapes and dtypes of the parameters, without making them; traced once, not to be changed."""
    return jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))


def init_sharded(model: Qwen25VL, key: PRNGKeyArray, like: Params) -> Params:
    """Parameters from scratch, each made where it will live.

    Args:
      like: those that are wanted, of `jax.ShapeDtypeStruct` with shardings.
    """

    def pick(params: Params, like: Params) -> Params:
        return {
            name: pick(params[name], want)
            if isinstance(want, dict)
            else params[name].astype(want.dtype)
            for name, want in like.items()
        }

    shardings = jax.tree.map(lambda want: want.sharding, like)
    return jax.jit(lambda k: pick(init_params(model, k), like), out_shardings=shardings)(key)


def apply_gradients(
    state: TrainState,
    grads: Params,
    optimizer: optax.GradientTransformation,
    sound: Bool[Array, ""] | bool = True,
) -> tuple[Params, optax.OptState, dict[str, Array]]:
    """New parameters and optimizer state; both bit for bit the old ones if the update is skipped.

    It is where the gradients' global norm is not finite, or what they were made of is not sound.
    Both are known before anything is written, so that the new state still takes the old one's
    place. Whether parameters overflow is known only afterwards, as `param_norm`: to keep a copy of
    them until then would cost as much memory as they do, and only a setting such as a huge
    learning rate does it, from which no skipping helps.

    Args:
      sound: False skips the update, too.

    Returns:
      The two, and metrics: `grad_norm`, before the clip; `param_norm`, of the parameters returned;
      `skipped_updates`, 1 or 0.
    """
    norm = optax.tree.norm(grads)
    taken = jnp.isfinite(norm) & sound
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    new = optax.apply_updates(state.params, updates), opt_state
    old = state.params, state.opt_state
    params, opt_state = jax.tree.map(lambda new, old: jnp.where(taken, new, old), new, old)
    return (
        params,
        opt_state,
        {
            "grad_norm": norm,
            "param_norm": optax.tree.norm(params),
            "skipped_updates": 1 - taken.astype(jnp.int32),
        },
    )
