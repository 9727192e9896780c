"""Chooses the stages of a run's decode loops, from its model, device, mesh and training targets."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from morer1_jax.config.settings import Settings
from morer1_jax.cost.chips import known_chip
from morer1_jax.data.shapes import SampleSize
from morer1_jax.model.flops import linear_flops, logit_flops
from morer1_jax.model.sharding import HEAD_AXIS
from morer1_jax.rollout.config import Stage, format_stages, parse_stages
from morer1_jax.rollout.plan import StepCost, planned_stages
from morer1_jax.run import mesh as meshes
from morer1_jax.run.placed import Placed

# FLOPs of products in the time in which a byte is read, on a CPU.
_CPU_FLOPS_A_BYTE = 13.0


def decode_stages(
    placed: Placed,
    settings: Settings,
    sizes: Iterable[SampleSize],
    samples: int,
    length: int,
) -> tuple[Stage, ...]:
    """Returns the stages of a decode loop; empty: every sample keeps its slot.

    Args:
        sizes: of facts, whose targets tell how long completions are.
        samples: of all devices, at once.
        length: most tokens of a completion.
    """
    stages = settings.sampling.stages
    # A config's stages are of its longest completion; a baseline's are a label long.
    if stages == "whole" or (stages != "auto" and length != settings.data.completion_length):
        return ()
    if stages != "auto":
        return parse_stages(stages)
    lengths = tuple(size.target for size in sizes if size.target)
    parts = meshes.batch_parts(placed.sampling_mesh)
    return _planned(
        lengths,
        -(-samples // parts),
        length,
        step_cost(placed),
        settings.sampling.cache * 1e9,
        settings.data.round_to,
    )


@functools.cache
def _planned(lengths: tuple[int, ...], samples: int, *rest: Any) -> tuple[Stage, ...]:
    """Plans stages, as for several programs alike, and says which."""
    stages = planned_stages(lengths, samples, *rest)
    if stages:
        print(f"stages of {samples} completions a device: {format_stages(stages)}", flush=True)
    return stages


def step_cost(placed: Placed) -> StepCost:
    """Returns what a token of all slots costs a device.

    Of the weights, those of the tower are not read, nor an embedding that is not the head too.
    """
    text = placed.model.config.text
    weights = {k: v for k, v in placed.sampling.like.items() if k != "vision"}
    if not text.tie_word_embeddings:
        del weights["embedding"]
    split = placed.sampling_mesh.shape[HEAD_AXIS]
    heads = text.num_key_value_heads // math.gcd(text.num_key_value_heads, split)
    chip = known_chip(placed.sampling_mesh.devices.flat[0].device_kind)
    ratio = chip.flops / chip.hbm_bytes if chip else _CPU_FLOPS_A_BYTE
    itemsize = jnp.dtype(placed.model.runtime.dtype).itemsize
    return StepCost(
        weights=meshes.device_bytes(weights),
        slot=(linear_flops(text) + logit_flops(text)) / split / ratio,
        token=2 * text.num_hidden_layers * heads * text.head_dim * itemsize,
    )
