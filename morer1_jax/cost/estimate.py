"""Estimates what a compiled program needs of a chip: memory, bytes sent, time.

Times are estimates, never measurements. Compute is the compiler's own estimate of cycles, with the
FLOPs of kernels, which it does not estimate, at the chip's peak; sending is taken to overlap with
nothing.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from morer1_jax.cost.attribution import ACTIVATIONS, WEIGHTS, attribute
from morer1_jax.cost.chips import Chip
from morer1_jax.cost.hlo import parse
from morer1_jax.cost.kernels import count_kernels
from morer1_jax.cost.program import Cost, cost_of

# Axes that split a batch and parameters, over which no activation need be summed.
_ROW_AXES = frozenset({"data", "fsdp"})
# How many times the model's FLOPs a chip may compute; shorter programs are not looked at. Ours take
# 1.1 to 2.6 times as many: layers run again for the backward pass, and places that do not count.
_REPEATED, _REPEATED_SECONDS = 4.0, 1e-3


@dataclasses.dataclass(frozen=True)
class Sent:
    """Bytes that a device sends of one kind.

    Attributes:
        kind: of collective, such as `all-gather`.
        what: of `cost.attribution`.
        axes: of the mesh that it joins devices along.
        across_slices: whether it joins devices of several slices.
        bytes: in all turns.
    """

    kind: str
    what: str
    summed: bool
    axes: tuple[str, ...]
    across_slices: bool
    bytes: float


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on a device while a program runs.

    Attributes:
        arguments: what it takes, with results that do not take an argument's place.
        temporary: what it needs beside these, its code included.
        beside: what else lies there, by name.
    """

    arguments: int
    temporary: int
    beside: Mapping[str, int]

    @property
    def live(self) -> int:
        """All of it."""
        return self.arguments + self.temporary + sum(self.beside.values())


@dataclasses.dataclass(frozen=True)
class Part:
    """A program without its decode loops, or one turn of one of these, on one device.

    Attributes:
        flops: of matrix products and kernels, however often a chip computes the same.
        compute: seconds, by the compiler's estimate and kernels' FLOPs at the peak; None for GPUs,
            of whose programs there is none.
        sent: largest first.
        unknown_kernels: names of kernels whose FLOPs are not counted.
        places: seconds by source line, the costliest first.
    """

    flops: float
    compute: float | None
    sent: tuple[Sent, ...]
    unknown_kernels: tuple[str, ...]
    places: tuple[tuple[str, float], ...]

    @property
    def wire(self) -> float:
        """Bytes that a device sends."""
        return sum(sent.bytes for sent in self.sent)

    def wire_seconds(self, chip: Chip) -> float:
        """Returns how long sending takes at least."""
        rate = {True: chip.network_bytes, False: chip.link_bytes}
        return sum(sent.bytes / rate[sent.across_slices] for sent in self.sent)

    def seconds(self, chip: Chip) -> float | None:
        """Returns the estimated time, with nothing sent while computing; None as `compute`."""
        return None if self.compute is None else self.compute + self.wire_seconds(chip)

    def faults(self, *, in_decode_loop: bool) -> list[str]:
        """Returns what does not scale: one line for each kind of transfer."""
        lines = []
        for sent in self.sent:
            size = f"{sent.bytes / 1e6:,.1f} MB by {sent.kind} over {' and '.join(sent.axes)}"
            if sent.what == ACTIVATIONS and set(sent.axes) <= _ROW_AXES:
                if sent.summed:
                    lines.append(f"activations are summed over axes that split rows: {size}")
                elif sent.kind == "all-gather":
                    lines.append(f"activations are gathered over axes that split rows: {size}")
            if in_decode_loop and sent.what == WEIGHTS:
                lines.append(f"weights are sent for every token: {size}")
        return lines

    def repeated(self, chip: Chip, flops: float) -> list[str]:
        """Returns a line if a chip computes far more than its share of the model's FLOPs.

        Args:
            flops: that share.
        """
        if self.flops <= max(_REPEATED * flops, _REPEATED_SECONDS * chip.flops):
            return []
        return [
            f"expected a chip to compute at most {_REPEATED:g} times its share of "
            f"{flops / 1e12:.3g} TFLOP, found {self.flops / 1e12:.3g}; several chips may compute "
            "the same, --top=10 shows where"
        ]


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a compiled program needs of each device.

    Attributes:
        once: the program without its decode loops.
        loops: one turn of each decode loop, in order.
    """

    memory: Memory
    once: Part
    loops: tuple[Part, ...]


def estimate(
    compiled: jax.stages.Compiled,
    mesh: Mesh,
    chip: Chip,
    params: Any,
    beside: Mapping[str, int],
    turns: Mapping[str, int] | None = None,
) -> Estimate:
    """Reads a program's costs off its optimised form.

    Args:
        params: tree of the model's parameters as the program takes them, shapes with shardings.
        beside: bytes on a device that are not among the program's arguments, by name.
        turns: see `cost_of`.
    """
    slices = {getattr(device, "slice_index", 0) for device in mesh.devices.flat}
    cost = cost_of(parse(compiled.as_text()), mesh.size // len(slices), turns)
    parts = [_part(part, mesh, chip, params) for part in (cost, *_decode_loops(cost))]
    return Estimate(_memory(compiled, beside), parts[0], tuple(parts[1:]))


def _memory(compiled: jax.stages.Compiled, beside: Mapping[str, int]) -> Memory:
    sizes = compiled.memory_analysis()
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return Memory(
        arguments=sizes.argument_size_in_bytes + results,
        temporary=sizes.temp_size_in_bytes + sizes.generated_code_size_in_bytes,
        beside=dict(beside),
    )


def _decode_loops(cost: Cost) -> list[Cost]:
    return [loop for _, loop in cost.loops]


def _part(cost: Cost, mesh: Mesh, chip: Chip, params: Any) -> Part:
    kernels = count_kernels(cost.work)
    sent: collections.Counter[tuple[Any, ...]] = collections.Counter()
    moved = attribute(cost.transfers, mesh, params)
    for transfer, one in zip(cost.transfers, moved, strict=True):
        key = (transfer.kind, one.what, one.summed, one.axes, one.across_slices)
        sent[key] += transfer.bytes * transfer.times
    places: collections.Counter[str] = collections.Counter()
    compute = None
    if chip.clock is not None:
        compute = cost.cycles / chip.clock + kernels.flops / chip.flops
        for work in cost.work:
            if work.cycles is not None:
                places[_place(work.sources)] += work.cycles * work.times / chip.clock
    return Part(
        flops=cost.products + kernels.flops,
        compute=compute,
        sent=tuple(Sent(*key, size) for key, size in sent.most_common()),
        unknown_kernels=kernels.unknown,
        places=tuple(places.most_common()),
    )


def _place(sources: tuple[str, ...]) -> str:
    """Returns the innermost source line of this package."""
    own = [line for line in sources if "morer1_jax/" in line]
    line = (own or list(sources) or ["the compiler's own"])[0]
    return line.rpartition("morer1_jax/")[2]
