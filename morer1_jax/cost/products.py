"""Counts the FLOPs of matrix products in an optimised program.

TPUs' compiler writes a product as a convolution. Of labels such as `b0f_io0->bf0` b are rows, f
features; of the right operand i are those that go in, o those that come out; digits are axes of
space. Batches of products are spatial axes too, with windows that meet an element in some places
alone: only these are counted, as they alone are computed.
"""

from __future__ import annotations

import math
import re

import numpy as np

from morer1_jax.cost.hlo import Instruction

Shape = tuple[int, ...]

# The operations that multiply matrices.
PRODUCTS = ("dot", "convolution")


def product_flops(instruction: Instruction, left: Shape, right: Shape) -> float:
    """Returns the FLOPs of a product, 2 for each multiplication and sum.

    Args:
        instruction: of `PRODUCTS`.
        left, right: the shapes of its operands.
    """
    if instruction.opcode == "dot":
        contracted = _numbers(instruction.attributes.get("lhs_contracting_dims", "{}"))
        out = math.prod(instruction.arrays[0].shape)
        return 2.0 * out * math.prod(left[axis] for axis in contracted)
    of_left, of_right, of_out = re.split("_|->", instruction.attributes["dim_labels"])
    out = instruction.arrays[0].shape
    flops = 2.0 * out[of_out.index("b")] * out[of_out.index("f")] * right[of_right.index("i")]
    window = _window(instruction.attributes.get("window", ""))
    for axis in range(len(of_left) - 2):
        name = str(axis)
        flops *= _meetings(
            left[of_left.index(name)],
            right[of_right.index(name)],
            out[of_out.index(name)],
            {key: values[axis] for key, values in window.items()},
        )
    return flops


def _meetings(left: int, right: int, out: int, window: dict[str, str]) -> int:
    """Returns along one spatial axis for how many places of output and window there is an element.

    A place of the output and one of the window name a place of the left operand, which is spread by
    `lhs_dilate` and padded; between its elements and beyond its ends there is nothing.
    """
    before = int(window.get("pad", "0_0").split("_")[0])
    spread = int(window.get("lhs_dilate", 1))
    place = np.arange(out)[:, None] * int(window.get("stride", 1)) - before
    place = place + np.arange(right)[None] * int(window.get("rhs_dilate", 1))
    meets = (place >= 0) & (place <= (left - 1) * spread) & (place % spread == 0)
    return int(np.count_nonzero(meets))


def _window(text: str) -> dict[str, list[str]]:
    """Returns a window's fields, `{size=2x3 pad=0_0x1_1}`, by name with a value for each axis."""
    return {key: value.split("x") for key, value in re.findall(r"(\w+)=([\w\-]+)", text)}


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
