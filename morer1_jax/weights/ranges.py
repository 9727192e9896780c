"""Reads safetensors files by ranges of bytes, on this machine or in a bucket: headers and tensors.

    8 bytes   the header's length, little-endian
    header    JSON: by each tensor's name its dtype, its shape, and where its bytes begin and end
    tensors   one after another, without gaps, counted from the header's end

Nothing is mapped and no file is copied: what is asked for is read, several ranges at once.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from morer1_jax import stores
from morer1_jax.errors import ConfigError, WeightsError, one_line
from morer1_jax.weights.finite import count_not_finite

# Dtypes that are read, as files name them.
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
# Ranges that are read at once, and bytes of each.
_AT_ONCE, _PIECE = 16, 16 << 20
# Bytes of tensors that are read ahead of their use. A larger tensor is read alone.
_AHEAD = 512 << 20
# Bytes of the first request, which mostly has the whole header, and most bytes of a header.
_FIRST, _LONGEST = 128 << 10, 100 << 20
_REMEDY = "copy it anew"


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        file: local, or in a bucket.
        name: in the file.
        kind: its dtype, as the file names it.
        shape: of the whole tensor.
        start: where its bytes begin in the file.
        end: where they end.
    """

    file: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """The number of its values."""
        return math.prod(self.shape)

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype, one of `DTYPES`."""
        return jnp.dtype(DTYPES[self.kind])


@dataclasses.dataclass(frozen=True)
class Part:
    """What is read of a tensor.

    Attributes:
        runs: (first value, one after the last) of each run of its values, counted over its axes in
            their order; by default all.
    """

    stored: Stored
    runs: tuple[tuple[int, int], ...] = ()

    @classmethod
    def whole(cls, stored: Stored) -> Part:
        """Returns all of a tensor."""
        return cls(stored, ((0, stored.size),))

    @property
    def nbytes(self) -> int:
        """The number of bytes to read."""
        return self.stored.dtype.itemsize * sum(stop - start for start, stop in self.runs)


def read_header(file: Path) -> tuple[bytes, dict[str, Stored]]:
    """Returns a file's header, as it is written, and the file's tensors by name.

    Raises:
        WeightsError: the file is missing, is no safetensors file, or is not whole.
    """
    # The header's bytes.
    try:
        size = stores.size_of(file)
        first = stores.read_range(file, 0, min(size, _FIRST))
        length = int.from_bytes(first[:8], "little")
        if not 2 <= length <= min(_LONGEST, size - 8):
            found = f"{size:,} bytes, whose first eight name a header of {length:,}"
            raise _not_whole(file, found)
        header = first[8 : 8 + length]
        header += stores.read_range(file, 8 + len(header), 8 + length)
    except (ConfigError, WeightsError):
        raise
    except Exception as e:  # Clients of buckets have classes of their own.
        raise _not_whole(file, one_line(e)) from e
    # The tensors that it lists.
    try:
        entries = json.loads(header, object_pairs_hook=_without_repeats)
        entries.pop("__metadata__", None)
        tensors = {name: _stored(file, name, entry, 8 + length) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise _not_whole(file, f"a header that is none: {one_line(e)}") from e
    # They fill the file.
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.end)):
        if tensor.start != end:
            found = f"{tensor.name} at byte {tensor.start:,}, though what is before ends at {end:,}"
            raise _not_whole(file, found)
        end = tensor.end
    if end != size:
        raise WeightsError(
            f"{file}: expected a whole safetensors file, of {end:,} bytes by its header, found "
            f"{size:,}; {_REMEDY}"
        )
    return header, tensors


def read_parts(parts: Iterable[Part], count: Callable[[int], Any]) -> Iterator[list[np.ndarray]]:
    """Yields each part's runs, in order, as flat arrays that nothing else refers to.

    Ranges are read and checked by several threads, no further ahead than `_AHEAD` bytes.

    Args:
        count: is called, in the caller's thread, with the number of bytes of every range read.

    Raises:
        WeightsError: a range cannot be read, is cut off, or has values that are not finite.
    """
    waiting = collections.deque(parts)
    ahead: collections.deque[tuple[Part, list[np.ndarray], list[Future[int]]]] = collections.deque()
    held = 0
    pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="weights")
    try:
        while waiting or ahead:
            while waiting and (not ahead or held + waiting[0].nbytes <= _AHEAD):
                part = waiting.popleft()
                arrays = [np.empty(stop - start, part.stored.dtype) for start, stop in part.runs]
                pieces = _pieces(part, arrays)
                ahead.append((part, arrays, [pool.submit(_fill, *piece) for piece in pieces]))
                held += part.nbytes
            part, arrays, futures = ahead.popleft()
            bad = 0
            for future in futures:
                read, not_finite = future.result()
                bad += not_finite
                count(read)
            if bad:
                size = sum(array.size for array in arrays)
                raise WeightsError(
                    f"{part.stored.file}: {part.stored.name}: expected finite values, found {bad} "
                    f"of {size} that are not; copy it anew, or take a checkpoint from before its "
                    "training diverged"
                )
            yield arrays
            del arrays, futures  # Else the memory would last until the next are read.
            held -= part.nbytes
    finally:
        # Whoever stops here does not wait for what was to be read next.
        pool.shutdown(cancel_futures=True)


def read_beginnings(tensors: Iterable[Stored], length: int) -> list[bytes]:
    """Returns the first bytes of each tensor, at most `length`.

    Raises:
        WeightsError: they cannot be read.
    """

    def read(tensor: Stored) -> bytes:
        return _read(tensor, tensor.start, min(tensor.start + length, tensor.end))

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(read, tensors))


def _pieces(part: Part, arrays: list[np.ndarray]) -> Iterator[tuple[Stored, int, np.ndarray]]:
    """Yields the ranges that a part is read in: where each begins in the file, and its place."""
    itemsize = part.stored.dtype.itemsize
    step = _PIECE // itemsize
    for (start, _), array in zip(part.runs, arrays, strict=True):
        for offset in range(0, array.size, step):
            begin = part.stored.start + (start + offset) * itemsize
            yield part.stored, begin, array[offset : offset + step]


def _fill(stored: Stored, start: int, place: np.ndarray) -> tuple[int, int]:
    """Reads a range into its place; returns its bytes, and how many values are not finite."""
    place.view(np.uint8)[:] = np.frombuffer(_read(stored, start, start + place.nbytes), np.uint8)
    return place.nbytes, count_not_finite(place)


def _read(stored: Stored, start: int, end: int) -> bytes:
    try:
        data = stores.read_range(stored.file, start, end)
    except ConfigError:
        raise
    except Exception as e:  # Clients of buckets have classes of their own.
        raise WeightsError(
            f"{stored.file}: {stored.name}: expected bytes {start:,} to {end:,}, found "
            f"{one_line(e)}; start again, or copy the file anew"
        ) from e
    if len(data) != end - start:
        raise WeightsError(
            f"{stored.file}: {stored.name}: expected bytes {start:,} to {end:,}, found "
            f"{len(data):,} of them; {_REMEDY}"
        )
    return data


def _stored(file: Path, name: str, entry: Any, offset: int) -> Stored:
    """Returns the tensor that an entry of a header describes; raises the errors of what is none."""
    kind, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)) or end < start:
        raise ValueError(f"{name} has shape {shape} and offsets {start}, {end}")
    tensor = Stored(file, name, str(kind), shape, offset + start, offset + end)
    if kind in DTYPES and tensor.size * tensor.dtype.itemsize != end - start:
        raise ValueError(f"{name}, {kind} of shape {shape}, has {end - start:,} bytes")
    return tensor


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = collections.Counter(name for name, _ in pairs)
        raise ValueError(f"{names.most_common(1)[0][0]} is there twice")
    return entries


def _not_whole(file: Path, found: str) -> WeightsError:
    return WeightsError(f"{file}: expected a whole safetensors file, found {found}; {_REMEDY}")
