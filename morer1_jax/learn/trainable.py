"""Training by part: which parameters train, at what share of the learning rate, and which do not.

A model's parameters are split into two trees, `trained` and `frozen`, whose branches lie beside
each other; `join` puts them together, without copying. Gradients, optimizer state and checkpoints
exist for the trained ones only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from morer1_jax.model.config import LoRA
from morer1_jax.model.layers import Params

ADAPTER = ("lora_a", "lora_b")


@dataclasses.dataclass(frozen=True)
class TrainableParts:
    """What trains.

    Attributes:
      vision, merger, language: what the learning rate is multiplied by in the vision tower, in the
        merger between it and the decoder, and in the decoder with embedding and head; 0 freezes.
      lora: adapters that train in the decoder's stead; None: the decoder itself does.
    """

    vision: float = 1.0
    merger: float = 1.0
    language: float = 1.0
    lora: LoRA | None = None

    def __post_init__(self) -> None:
        if self.lora is not None and not self.language:
            raise ValueError(
                "language: 0 found, but adapters train at its share of the learning rate; give it "
                "one (they train in the decoder's stead), or set lora.rank to 0"
            )
        for name in ("vision", "merger", "language"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} found, at least 0 expected")
        if not (self.vision or self.merger or self.language):
            raise ValueError(
                "language: vision, merger and language are all 0, so nothing trains; give one a "
                "share of the learning rate"
            )

    def factor(self, path: tuple[str, ...]) -> float:
        """What the learning rate of the leaf at `path` is multiplied by."""
        if path[0] == "vision":
            return self.merger if path[1].startswith("merger") else self.vision
        if self.lora is not None and path[-1] not in ADAPTER:
            return 0.0
        return self.language


ALL = TrainableParts()


def split(params: Params, parts: TrainableParts) -> tuple[Params, Params]:
    """(trained, frozen), the leaves of `params` themselves."""
    return (
        select(params, lambda path: parts.factor(path) > 0),
        select(params, lambda path: parts.factor(path) == 0),
    )


def select(
    params: Params, wanted: Callable[[tuple[str, ...]], bool], path: tuple[str, ...] = ()
) -> Params:
    """The leaves whose paths are wanted, without empty branches."""
    chosen = {}
    for key, value in params.items():
        here = (*path, key)
        if isinstance(value, dict):
            if below := select(value, wanted, here):
                chosen[key] = below
        elif wanted(here):
            chosen[key] = value
    return chosen


def join(trained: Params, frozen: Params) -> Params:
    """The whole tree again."""
    both = {**frozen, **trained}
    return {
        key: join(trained[key], frozen[key]) if key in trained and key in frozen else value
        for key, value in both.items()
    }


def factors(trained: Params, parts: TrainableParts) -> Any:
    """`TrainableParts.factor` of every trained leaf, a tree like them."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: parts.factor(tuple(entry.key for entry in path)), trained
    )
