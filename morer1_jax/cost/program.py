"""Sums what an optimised HLO module does: compute cycles and bytes sent, loops multiplied out.

A loop that ends by data keeps its own sum, for one turn of it, unless its number of turns is given.
Of a conditional's branches the one with the most cycles counts. A program for several slices
is that of each one of them; what crosses slices is a `send` to the runtime that joins them, which
names the operation.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping

import numpy as np

from morer1_jax.cost.groups import replica_groups, slice_groups, source_target_pairs
from morer1_jax.cost.hlo import Array, Computation, Instruction, Module
from morer1_jax.cost.loops import trip_count
from morer1_jax.cost.products import PRODUCTS, product_flops

# Collectives by name. Of a pair `…-start`, `…-done` the start counts.
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)

# The names that the runtime between slices has for what XLA names otherwise.
_BETWEEN_SLICES = {"ONE_TO_ONE": "collective-permute"}


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A collective.

    Attributes:
        kind: the operation, such as `all-gather`, also where it is compiled as an `all-reduce` of
            zeros and each device's part; `reduce-scatter` also where it is compiled as a fusion of
            an `all-reduce` and the slice that a device keeps.
        arrays: whole on one device: the results of an `all-gather`, what goes into the others,
            without padding.
        entering: what goes in, of an `all-gather` too.
        groups: numbers of the devices that each group joins; of a permutation its pairs.
        bytes: what one device sends in one turn, by a ring.
        times: turns.
        computation: name of the computation that it stands in.
    """

    kind: str
    arrays: tuple[Array, ...]
    entering: tuple[Array, ...]
    groups: tuple[tuple[int, ...], ...]
    bytes: float
    times: float
    op_name: str
    sources: tuple[str, ...]
    computation: str


@dataclasses.dataclass(frozen=True)
class Work:
    """An instruction that computes.

    Attributes:
        operands: arrays that go in.
        cycles: of one turn, as the compiler estimates them; None where it does not, as of kernels.
        times: turns.
    """

    instruction: Instruction
    operands: tuple[Array, ...]
    cycles: int | None
    times: float
    op_name: str
    sources: tuple[str, ...]


@dataclasses.dataclass
class Cost:
    """What a program, or one turn of a loop without a number of turns, does on one device.

    Attributes:
        products: FLOPs of matrix products, kernels left out.
        loops: loops that end by data, with the cost of one turn of each.
    """

    products: float = 0.0
    work: list[Work] = dataclasses.field(default_factory=list)
    transfers: list[Transfer] = dataclasses.field(default_factory=list)
    loops: list[tuple[str, Cost]] = dataclasses.field(default_factory=list)

    @property
    def cycles(self) -> int:
        """Estimated cycles, without loops that end by data and work that has no estimate."""
        return sum(work.cycles * work.times for work in self.work if work.cycles is not None)

    @property
    def bytes(self) -> float:
        """Bytes that a device sends, without loops that end by data."""
        return sum(transfer.bytes * transfer.times for transfer in self.transfers)


def cost_of(module: Module, devices: int, turns: Mapping[str, int] | None = None) -> Cost:
    """Returns what the program does on one of its devices.

    Args:
        devices: that the program was compiled for; of several slices those of one.
        turns: by the name of a scope, of those of its loops that end by data.
    """
    return _Walk(module, devices, turns or {}).cost(module.computations[module.entry], 1)


class _Walk:
    """Follows calls from a computation down."""

    def __init__(self, module: Module, devices: int, turns: Mapping[str, int]) -> None:
        self.module = module
        self.devices = devices
        self.turns = turns

    def cost(self, computation: Computation, times: float) -> Cost:
        """Returns what a computation does that runs so many times."""
        total = Cost()
        channels: set[str] = set()
        for instruction in computation.instructions.values():
            for part in self._parts(computation, instruction, times, channels):
                total.products += part.products
                total.work += part.work
                total.transfers += part.transfers
                total.loops += part.loops
        return total

    def _parts(
        self,
        computation: Computation,
        instruction: Instruction,
        times: float,
        channels: set[str],
    ) -> Iterator[Cost]:
        opcode, computations = instruction.opcode, self.module.computations
        kind = opcode.removesuffix("-start")
        if opcode == "send":
            yield Cost(transfers=self._between_slices(computation, instruction, times))
        elif kind in COLLECTIVES:
            yield Cost(transfers=[self._transfer(computation, instruction, kind, times)])
        elif opcode == "while":
            body = computations[instruction.attributes["body"].lstrip("%")]
            turns = trip_count(self.module, computation, instruction)
            if turns is None:
                # Of the scope that the loop itself is in, not a loop around it.
                own = instruction.op_name.removesuffix("/while").rpartition("while/")[2]
                scopes = own.split("/")
                turns = next((self.turns[scope] for scope in scopes if scope in self.turns), None)
            if turns is None:
                yield Cost(loops=[(instruction.op_name, self.cost(body, 1))])
            else:
                yield self.cost(body, times * turns)
        elif opcode == "conditional":
            branches = [self.cost(computations[name], times) for name in instruction.callees]
            yield max(branches, key=lambda branch: (branch.cycles, branch.bytes))
        elif opcode == "fusion" or opcode.startswith("custom-call"):
            products = self._products_in(instruction) * times
            yield Cost(products, work=self._work(computation, instruction, times))
            # A fusion's own estimate covers the operations in it, but not what it sends.
            yield Cost(transfers=list(self._fused(instruction, times, channels)))
        elif opcode.endswith(("-done", "-update")):
            return
        elif instruction.callees:
            for name in instruction.callees:
                yield self.cost(computations[name], times)
        else:
            products = self._product(computation, instruction) * times
            yield Cost(products, work=self._work(computation, instruction, times))

    def _products_in(self, fusion: Instruction) -> float:
        """Returns the FLOPs of the products in a fusion, and in fusions within it."""
        return sum(
            self._products_in(instruction) + self._product(computation, instruction)
            for computation in (self.module.computations[name] for name in fusion.callees)
            for instruction in computation.instructions.values()
        )

    def _product(self, computation: Computation, instruction: Instruction) -> float:
        if instruction.opcode not in PRODUCTS:
            return 0.0
        left, right = (
            computation.instructions[name].arrays[0].shape for name in instruction.operands[:2]
        )
        return product_flops(instruction, left, right)

    def _fused(self, fusion: Instruction, times: float, channels: set[str]) -> Iterator[Transfer]:
        """Yields the collectives in a fusion.

        One that runs beside other work is written into the fusion of each such work, always with
        the same channel; it counts the first time.

        Args:
            channels: of collectives that the caller's fusions have counted; it grows.
        """
        for name in fusion.callees:
            computation = self.module.computations[name]
            for instruction in computation.instructions.values():
                yield from self._fused(instruction, times, channels)
                kind = instruction.opcode.removesuffix("-start")
                channel = instruction.attributes.get("channel_id", instruction.name)
                if kind not in COLLECTIVES or channel in channels:
                    continue
                channels.add(channel)
                if kind == "all-reduce" and _is_scattered(computation, instruction):
                    kind = "reduce-scatter"
                transfer = self._transfer(computation, instruction, kind, times)
                if not transfer.op_name:
                    sources = tuple(self.module.sources(fusion))
                    transfer = dataclasses.replace(
                        transfer, op_name=fusion.op_name, sources=sources
                    )
                yield transfer

    def _work(self, computation: Computation, instruction: Instruction, times: float) -> list[Work]:
        window = instruction.backend_config.get("window_config", {})
        cycles = window.get("estimated_cycles")
        kernel = instruction.attributes.get("custom_call_target") == '"tpu_custom_call"'
        if cycles is None and not kernel:
            return []
        operands = [computation.instructions[name].arrays for name in instruction.operands]
        return [
            Work(
                instruction=instruction,
                operands=tuple(array for arrays in operands for array in arrays),
                cycles=None if cycles is None else int(cycles),
                times=times,
                op_name=instruction.op_name,
                sources=tuple(self.module.sources(instruction)),
            )
        ]

    def _transfer(
        self, computation: Computation, instruction: Instruction, kind: str, times: float
    ) -> Transfer:
        if instruction.opcode.startswith("collective-permute"):
            groups = source_target_pairs(instruction)
        else:
            groups = replica_groups(instruction, self.devices)
        arrays: tuple[Array, ...] = ()
        if kind == "all-gather":
            count = len(instruction.arrays) // (2 if instruction.opcode.endswith("start") else 1)
            arrays = instruction.arrays[-count:]
        operands = [computation.instructions[name] for name in instruction.operands]
        sent = self._sent(computation, instruction, kind, operands, arrays, groups, times)
        parts = (self._is_padded_part(computation, operand) for operand in operands)
        if kind == "all-reduce" and all(parts):
            return dataclasses.replace(sent, kind="all-gather")
        return sent

    def _is_padded_part(self, computation: Computation, operand: Instruction) -> bool:
        """Returns whether an array is one device's part in a place of its own, and else zero.

        A sum of such arrays over devices brings the parts together.
        """
        update, inner = operand, computation
        if operand.opcode == "fusion":
            inner = self.module.computations[operand.callees[0]]
            update = inner.instructions[inner.root]
        if update.opcode != "dynamic-update-slice":
            return False

        def resolved(name: str) -> tuple[Instruction, Computation]:
            found = inner.instructions[name]
            if found.opcode == "parameter" and inner is not computation:
                name = operand.operands[int(found.operands[0])]
                return computation.instructions[name], computation
            return found, inner

        (around, scope), _, *places = (resolved(name) for name in update.operands)
        if around.opcode == "broadcast":
            around = scope.instructions[around.operands[0]]
        is_zero = around.opcode == "constant" and around.operands == ("0",)
        return is_zero and any(place.opcode != "constant" for place, _ in places)

    def _between_slices(
        self, computation: Computation, send: Instruction, times: float
    ) -> list[Transfer]:
        operation = _attribute_of_slices(send, "transfer_type")
        kind = _BETWEEN_SLICES.get(operation, operation.lower().replace("_", "-"))
        if not kind:
            return []
        groups = slice_groups(_attribute_of_slices(send, "target"))
        # What comes back is the result of the `recv` of the same name.
        name = _rendezvous(send)
        arrays = next(
            instruction.arrays[:1]
            for instruction in computation.instructions.values()
            if instruction.opcode == "recv" and _rendezvous(instruction) == name
        )
        operands = [computation.instructions[send.operands[0]]]
        return [self._sent(computation, send, kind, operands, arrays, groups, times)]

    def _sent(
        self,
        computation: Computation,
        instruction: Instruction,
        kind: str,
        operands: list[Instruction],
        arrays: tuple[Array, ...],
        groups: np.ndarray,
        times: float,
    ) -> Transfer:
        """Returns a transfer by its kind; `arrays` are the results of an all-gather."""
        size = groups.shape[1]
        entering = sum(operand.bytes for operand in operands)
        unpadded = [_unpadded(computation, operand).arrays for operand in operands]
        taken = tuple(array for arrays in unpadded for array in arrays)
        if kind == "all-gather":
            # What each device has of it is sent to all others.
            sent = entering * (size - 1)
        elif kind == "all-reduce":
            sent = 2 * entering * (size - 1) / size
        elif kind in ("reduce-scatter", "all-to-all", "ragged-all-to-all"):
            sent = entering * (size - 1) / size
        else:
            # A permutation, or a broadcast.
            sent = entering
        return Transfer(
            kind=kind,
            arrays=arrays if kind == "all-gather" else taken,
            entering=taken,
            groups=tuple(tuple(int(i) for i in group) for group in groups),
            bytes=sent,
            times=times,
            op_name=instruction.op_name,
            sources=tuple(self.module.sources(instruction)),
            computation=computation.name,
        )


def _attribute_of_slices(instruction: Instruction, name: str) -> str:
    """Returns an attribute of a transfer between slices; empty where there is none."""
    text = instruction.attributes.get("frontend_attributes", "")
    value = re.search(rf'_xla_megascale_{name}=(?:"([^"]*)"|(\{{\{{.*?\}}\}}))', text)
    return (value[1] or value[2]) if value else ""


def _rendezvous(instruction: Instruction) -> str:
    text = instruction.attributes.get("frontend_attributes", "")
    value = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', text)
    return value[1] if value else ""


def _unpadded(computation: Computation, instruction: Instruction) -> Instruction:
    """Returns the instruction whose result is padded, if it is."""
    while instruction.opcode == "pad":
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def _is_scattered(computation: Computation, instruction: Instruction) -> bool:
    """Returns whether each device keeps only a slice of a sum, as TPUs' compiler prints it.

    That is so within a fusion only: of a sum that a later operation slices, every device receives
    the whole.
    """
    users = [
        user for user in computation.instructions.values() if instruction.name in user.operands
    ]
    return bool(users) and all(user.opcode == "dynamic-slice" for user in users)
