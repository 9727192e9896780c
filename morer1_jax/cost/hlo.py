"""Reads the text of an optimised HLO module into computations and instructions.

XLA offers no reader of its own outside of C++. The grammar is that of XLA's printer
(https://openxla.org/xla/operation_semantics names the operations): a computation is
`%name (parameters) -> type {`, one instruction after another, `}`; an instruction is
`[ROOT] %name = type opcode(operands), attribute=value, …`. The attribute `backend_config` is JSON,
whose strings may hold whole programs of several lines, brackets included.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

# Bits of an element, by the start of its type's name (`f8e4m3fn` is of 8).
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
# A string, a bracket, or the quote of a string that does not end.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|["(){}\[\]]', re.DOTALL)
_OPEN, _CLOSE = "({[", ")}]"
_ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,<=?]*)\]")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", re.DOTALL)
_START = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ", re.DOTALL)
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array's element type, such as `bf16`, and its dimensions."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """The array's size, without the padding of its layout."""
        digits = re.match(r"[a-z]+(\d+)", self.dtype)
        bits = _BITS.get(self.dtype) or (int(digits[1]) if digits else 0)
        return math.ceil(math.prod(self.shape) * bits / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        arrays: of its result; of a tuple all, in order.
        operands: names of instructions of the same computation; of a constant or a parameter what
            stands in its brackets.
        attributes: name to text, as printed.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: Mapping[str, str]

    @property
    def bytes(self) -> int:
        """The size of the result."""
        return sum(array.bytes for array in self.arrays)

    @functools.cached_property
    def backend_config(self) -> Mapping[str, Any]:
        """What the compiler's backend says of the instruction; empty where it says nothing."""
        text = self.attributes.get("backend_config", "")
        return json.loads(text, strict=False) if text.startswith("{") else {}

    @property
    def callees(self) -> tuple[str, ...]:
        """Names of computations that it calls, but for the tiny ones that reduce two numbers."""
        names: list[str] = []
        for key in ("calls", "body", "condition", "branch_computations"):
            names += re.findall(r"%?([\w.\-]+)", self.attributes.get(key, ""))
        for key in ("true_computation", "false_computation"):
            names += re.findall(r"%?([\w.\-]+)", self.attributes.get(key, ""))
        if self.opcode == "call":
            names += re.findall(r"%?([\w.\-]+)", self.attributes.get("to_apply", ""))
        return tuple(names)

    @property
    def op_name(self) -> str:
        """The path of JAX's names that the instruction came from; empty if it is the compiler's."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes.get("metadata", ""))
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions by name, in order; the last to run is the root."""

    name: str
    instructions: Mapping[str, Instruction]
    root: str


@dataclasses.dataclass(frozen=True)
class Module:
    """A module: computations by name, the name of the entry, and stack frames by id.

    Attributes:
        frames: of each frame's id the source line, `file:line`, innermost only.
        parents: of each frame's id that of its caller.
    """

    computations: Mapping[str, Computation]
    entry: str
    frames: Mapping[int, str]
    parents: Mapping[int, int]

    def sources(self, instruction: Instruction) -> list[str]:
        """Returns the source lines that made an instruction, innermost first."""
        metadata = instruction.attributes.get("metadata", "")
        number = re.search(r"stack_frame_id=(\d+)", metadata)
        lines: list[str] = []
        frame = int(number[1]) if number else 0
        while frame in self.frames:
            lines.append(self.frames[frame])
            parent = self.parents.get(frame, 0)
            if parent == frame:
                break
            frame = parent
        return lines


def parse(text: str) -> Module:
    """Parses a module as `jax.stages.Compiled.as_text` prints it.

    Raises:
        ValueError: the text has no entry computation, or an instruction that is not understood.
    """
    computations: dict[str, Computation] = {}
    entry = ""
    for is_entry, computation in _computations(text):
        computations[computation.name] = computation
        entry = computation.name if is_entry else entry
    if not entry:
        raise ValueError("HLO text: expected an ENTRY computation, found none")
    return Module(computations, entry, *_frames(text))


def _computations(text: str) -> Iterator[tuple[bool, Computation]]:
    """Yields each computation, and whether it is the entry."""
    lines = iter(text.splitlines())
    head: re.Match[str] | None = None
    instructions: dict[str, Instruction] = {}
    root = ""
    for line in lines:
        if head is None:
            head = _HEAD.match(_COMMENT.sub("", line))
        elif line.startswith("}"):
            yield bool(head[1]), Computation(head[2], instructions, root)
            head, instructions, root = None, {}, ""
        elif start := _START.match(line):
            # Strings of several lines belong to the instruction that they began in.
            whole = [line]
            while not _balanced("\n".join(whole)):
                following = next(lines, None)
                if following is None:
                    raise ValueError(f"HLO text: expected the end of {start[2]}, found none")
                whole.append(following)
            instruction = _instruction(start[2], "\n".join(whole)[start.end() :])
            instructions[instruction.name] = instruction
            root = instruction.name if start[1] else root


def _balanced(text: str) -> bool:
    """Returns whether every bracket and string that opens in `text` closes."""
    depth = 0
    for token in _TOKEN.finditer(text):
        if token[0] == '"':
            return False
        depth += (token[0] in _OPEN) - (token[0] in _CLOSE)
    return depth == 0


def _close(text: str, start: int) -> int:
    """Returns the place after the bracket that closes the one at `start`."""
    depth = 0
    for token in _TOKEN.finditer(text, start):
        depth += (token[0] in _OPEN) - (token[0] in _CLOSE)
        if not depth:
            return token.end()
    raise ValueError(
        f"HLO text: expected a closing bracket, found none after {text[start:][:80]!r}"
    )


def _split(text: str) -> list[str]:
    """Splits at commas that stand outside of brackets and strings."""
    parts, start, depth = [], 0, 0
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"|[(){}\[\],]', text, re.DOTALL):
        depth += (token[0] in _OPEN) - (token[0] in _CLOSE)
        if token[0] == "," and not depth:
            parts.append(text[start : token.start()].strip())
            start = token.end()
    last = text[start:].strip()
    return [*parts, last] if last else parts


def _instruction(name: str, text: str) -> Instruction:
    """Parses what stands right of an instruction's `name =`."""
    text = text if "/*" not in text else _COMMENT.sub("", text)
    # The type: a tuple, or an array with its layout.
    end = _close(text, 0) if text.startswith("(") else text.index(" ")
    kind, rest = text[:end], text[end:].lstrip()
    opened = rest.index("(")
    closed = _close(rest, opened)
    opcode, inside = rest[:opened], rest[opened + 1 : closed - 1]
    operands = tuple(part.split("%")[-1] for part in _split(inside))
    attributes = {}
    for part in _split(rest[closed:]):
        key, _, value = part.partition("=")
        attributes[key.strip()] = value
    arrays = tuple(
        Array(dtype, tuple(int(size) for size in re.findall(r"\d+", sizes)))
        for dtype, sizes in _ARRAY.findall(_layouts_removed(kind))
    )
    return Instruction(name, opcode, arrays, operands, attributes)


def _layouts_removed(kind: str) -> str:
    return re.sub(r"\{[^{}]*\}", "", kind)


def _frames(text: str) -> tuple[dict[int, str], dict[int, int]]:
    """Reads the tables of files, places and stack frames that stand before the computations."""
    tables: dict[str, dict[int, str]] = {}
    table: dict[int, str] = {}
    for line in text.splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = tables.setdefault(line, {})
        elif entry := re.match(r"^(\d+) (.*)$", line):
            table[int(entry[1])] = entry[2]
        elif line.startswith(("%", "ENTRY")):
            break

    def field(row: str, key: str) -> int:
        number = re.search(rf"\b{key}=(\d+)", row)
        return int(number[1]) if number else 0

    files = {key: row.strip('"') for key, row in tables.get("FileNames", {}).items()}
    places = {
        key: f"{files.get(field(row, 'file_name_id'), '?')}:{field(row, 'line')}"
        for key, row in tables.get("FileLocations", {}).items()
    }
    frames, parents = {}, {}
    for key, row in tables.get("StackFrames", {}).items():
        frames[key] = places.get(field(row, "file_location_id"), "?")
        # The printed ids of parents count from one, where one is "no parent".
        parents[key] = field(row, "parent_frame_id") - 1
    return frames, parents
