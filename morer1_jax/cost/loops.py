"""Counts how often a loop of an optimised HLO module runs.

XLA prints the number only where a pass has asked for it, so the counter is followed here: through
the loop's condition and its body, by running on integers the few operations that counters are made
of. A loop that ends by data, such as sampling until every sample has ended, has no number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from morer1_jax.cost.hlo import Computation, Instruction, Module

# Beyond this a counter is taken not to reach its limit.
_MAX_TRIPS = 1 << 20
_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "LT": int.__lt__,
    "LE": int.__le__,
    "GT": int.__gt__,
    "GE": int.__ge__,
    "EQ": int.__eq__,
    "NE": int.__ne__,
}
_SAME = ("bitcast", "convert", "copy", "reshape", "opt-barrier", "copy-done")

# What a name stands for: an integer, the values of a tuple, or None where it is not known.
Value = int | tuple["Value", ...] | None


def trip_count(module: Module, caller: Computation, loop: Instruction) -> int | None:
    """Returns how often a `while` runs its body; None if that depends on data.

    Args:
        caller: the computation that holds the loop.
    """
    known = loop.backend_config.get("known_trip_count", {}).get("n")
    if known is not None:
        return int(known)
    condition = module.computations[loop.attributes["condition"].lstrip("%")]
    body = module.computations[loop.attributes["body"].lstrip("%")]
    state = _Evaluation(module, caller, ()).value(loop.operands[0])
    for trips in range(_MAX_TRIPS):
        goes_on = _Evaluation(module, condition, (state,)).value(condition.root)
        if not isinstance(goes_on, int):
            return None
        if not goes_on:
            return trips
        following = _Evaluation(module, body, (state,)).value(body.root)
        if following == state:
            return None
        state = following
    return None


class _Evaluation:
    """Values of a computation's instructions, as far as they follow from its arguments."""

    def __init__(
        self, module: Module, computation: Computation, arguments: Sequence[Value]
    ) -> None:
        self.module = module
        self.computation = computation
        self.arguments = arguments
        self.values: dict[str, Value] = {}

    def value(self, name: str) -> Value:
        """Returns the value of an instruction."""
        if name not in self.values:
            self.values[name] = self._compute(self.computation.instructions[name])
        return self.values[name]

    def _compute(self, instruction: Instruction) -> Value:
        opcode, operands = instruction.opcode, instruction.operands
        # Of arrays only those of one element are followed.
        if len(instruction.arrays) == 1 and math.prod(instruction.arrays[0].shape) > 1:
            return None
        if opcode == "parameter":
            number = int(operands[0])
            return self.arguments[number] if number < len(self.arguments) else None
        if opcode == "constant":
            return _literal(operands[0]) if operands else None
        if opcode == "tuple":
            return tuple(self.value(name) for name in operands)
        if opcode == "get-tuple-element":
            whole = self.value(operands[0])
            return whole[int(instruction.attributes["index"])] if whole.__class__ is tuple else None
        if opcode in _SAME:
            return self.value(operands[0])
        if opcode in ("fusion", "call"):
            return self._called(instruction)
        return self._arithmetic(instruction)

    def _called(self, instruction: Instruction) -> Value:
        callees = instruction.callees
        if len(callees) != 1 or all(array.shape for array in instruction.arrays):
            return None
        computation = self.module.computations[callees[0]]
        arguments = [self.value(name) for name in instruction.operands]
        return _Evaluation(self.module, computation, arguments).value(computation.root)

    def _arithmetic(self, instruction: Instruction) -> Value:
        opcode = instruction.opcode
        if opcode not in ("add", "subtract", "multiply", "compare", "and", "or", "not"):
            return None
        values = [self.value(name) for name in instruction.operands]
        numbers = [value for value in values if isinstance(value, int)]
        if opcode == "and" and 0 in numbers:
            return 0
        if len(numbers) != len(values):
            return None
        if opcode == "not":
            return int(not numbers[0])
        left, right = numbers
        if opcode == "compare":
            return int(_COMPARISONS[instruction.attributes["direction"]](left, right))
        return {
            "add": left + right,
            "subtract": left - right,
            "multiply": left * right,
            "and": left & right,
            "or": left | right,
        }[opcode]


def _literal(text: str) -> int | None:
    if text in ("true", "false"):
        return int(text == "true")
    try:
        return int(text)
    except ValueError:
        return None
