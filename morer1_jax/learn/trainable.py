"""Which parameters train (all, parts, or LoRA's), at what share of the learning rate.

A model's parameters are split into two trees, `trained` and `frozen`, which `join` merges again
without copying. Gradients, optimizer state and checkpoints exist for the trained ones only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from morer1_jax.bounds import at_least, check_bounds, one_of
from morer1_jax.errors import FieldError
from morer1_jax.model.config import DType, LoRA
from morer1_jax.model.layers import Params
from morer1_jax.model.vision import is_merger

ADAPTER = ("lora_a", "lora_b")


@dataclasses.dataclass(frozen=True)
class TrainableParts:
    """Shares of the learning rate by part of the model; a share of 0 freezes the part.

    Attributes:
        vision: share of the vision tower.
        merger: share of the merger between tower and decoder.
        language: share of the decoder with embedding and head, or of its adapters.
        frozen_dtype: dtype that frozen parameters are held in.
        lora: adapters that train in place of the decoder; of rank 0: the decoder itself trains.

    Raises:
        FieldError: a share is negative, nothing trains, or adapters have no share.
    """

    vision: float = at_least(0, 1.0)
    merger: float = at_least(0, 1.0)
    language: float = at_least(0, 1.0)
    frozen_dtype: DType = one_of(DType, "float32")
    lora: LoRA = LoRA()

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.adapters is not None and not self.language:
            raise FieldError(
                "language",
                "expected above 0 with adapters, which train at its share of the learning rate in "
                "place of the decoder, found 0; raise it or set lora.rank to 0",
            )
        if not (self.vision or self.merger or self.language):
            raise FieldError(
                "language",
                "expected one of vision, merger and language above 0, found none, so that nothing "
                "trains; give one a share of the learning rate",
            )

    @property
    def adapters(self) -> LoRA | None:
        """The adapters; None if there are none."""
        return self.lora if self.lora.rank else None

    def share(self, path: tuple[str, ...]) -> float:
        """Returns the share of the learning rate at which the leaf at `path` trains."""
        # The merger's parameters lie in the tower's branch.
        if path[0] == "vision":
            return self.merger if is_merger(path[1]) else self.vision
        if self.adapters is not None and path[-1] not in ADAPTER:
            return 0.0
        return self.language


ALL = TrainableParts()


def split(params: Params, parts: TrainableParts) -> tuple[Params, Params]:
    """Splits parameters into (trained, frozen), without copying."""
    return (
        select(params, lambda path: parts.share(path) > 0),
        select(params, lambda path: parts.share(path) == 0),
    )


def select(
    params: Params, predicate: Callable[[tuple[str, ...]], bool], path: tuple[str, ...] = ()
) -> Params:
    """Returns the tree of those leaves whose paths meet the predicate, without empty branches.

    Args:
        params: a tree, or the branch of it at `path` from the root.
        predicate: takes a leaf's path from the root.
    """
    tree = {}
    for key, value in params.items():
        key_path = (*path, key)
        if isinstance(value, dict):
            if branch := select(value, predicate, key_path):
                tree[key] = branch
        elif predicate(key_path):
            tree[key] = value
    return tree


def join(trained: Params, frozen: Params) -> Params:
    """Merges two trees that `split` has made, without copying."""
    merged = {**frozen, **trained}
    return {
        key: join(trained[key], frozen[key]) if key in trained and key in frozen else value
        for key, value in merged.items()
    }


def shares(trained: Params, parts: TrainableParts) -> Any:
    """Returns a tree of every trained leaf's share of the learning rate."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: parts.share(tuple(entry.key for entry in path)), trained
    )
