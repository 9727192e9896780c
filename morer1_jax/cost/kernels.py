"""Counts the FLOPs of kernels, whose work the compiler does not estimate.

A kernel is told by its name. Of splash attention every pass multiplies matrices of as many FLOPs as
queries with keys, 2·b·h·s·s·e, heads as padded: two in the forward pass (scores, output), three for
the gradient of queries (scores, gradient of weights, of queries), four for those of keys and values
(scores, gradient of weights, of keys, of values); but only in blocks that the static mask leaves,
which `model/splash.py` writes into the name, as `blocks_15_of_25`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable

from morer1_jax.cost.program import Work

# Products of matrices by the start of a kernel's name.
_PRODUCTS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


@dataclasses.dataclass(frozen=True)
class KernelFlops:
    """FLOPs of kernels.

    Attributes:
        flops: of all turns of those whose kind is known.
        unknown: names of the others, each once.
    """

    flops: float
    unknown: tuple[str, ...]


def count_kernels(works: Iterable[Work]) -> KernelFlops:
    """Returns the FLOPs of the work that has no estimate."""
    flops, unknown = 0.0, {}
    for work in works:
        if work.cycles is not None:
            continue
        of_one = kernel_flops(work)
        if of_one is None:
            unknown[work.op_name or work.instruction.name] = None
        else:
            flops += of_one * work.times
    return KernelFlops(flops, tuple(unknown))


def kernel_flops(work: Work) -> float | None:
    """Returns the FLOPs of one turn of a kernel; None if its kind or its blocks are not known."""
    name = work.instruction.name
    products = next((count for start, count in _PRODUCTS.items() if name.startswith(start)), None)
    blocks = re.search(r"blocks_(\d+)_of_(\d+)", work.op_name)
    # Queries and keys follow tables of integers: [b h s e], without b where it is one.
    arrays = [array for array in work.operands if array.dtype.startswith(("bf", "f"))]
    if products is None or blocks is None or len(arrays) < 2:
        return None
    share = int(blocks[1]) / int(blocks[2])
    return products * 2 * math.prod(arrays[0].shape) * arrays[1].shape[-2] * share
