"""Counts values that are not finite, without a copy of the array."""

from __future__ import annotations

import numpy as np

# Values of one step: few enough to stay in a core's cache.
_CHUNK = 1 << 16


def count_not_finite(values: np.ndarray) -> int:
    """Returns how many of an array's values are NaN or infinite.

    It takes less time than a copy would: some tenths of a second a gigabyte.

    Args:
        values: floating point of 2 or 4 bytes, bfloat16 among them.
    """
    bits = np.ascontiguousarray(values).reshape(-1).view(f"u{values.dtype.itemsize}")
    # A value is not finite exactly where its bits, the sign apart, are at least infinity's.
    magnitude = bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    infinity = np.array(np.inf, values.dtype).view(bits.dtype)
    count = 0
    buffer = np.empty(min(_CHUNK, bits.size), bits.dtype)
    for start in range(0, bits.size, _CHUNK):
        chunk = bits[start : start + _CHUNK]
        unsigned = np.bitwise_and(chunk, magnitude, out=buffer[: chunk.size])
        if unsigned.max() >= infinity:
            count += int(np.count_nonzero(unsigned >= infinity))
    return count
