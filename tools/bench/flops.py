"""Counts the FLOPs of our programs in what JAX traced."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


def call_flops(function: Callable[..., Any], *arguments: Any, **options: Any) -> float:
    """Returns `product_flops` of a function's program for arguments of these shapes.

    Args:
        arguments: arrays, or `jax.ShapeDtypeStruct`s.
        options: of `product_flops`.
    """
    return product_flops(jax.jit(function).trace(*arguments).jaxpr, **options)


def product_flops(program: ClosedJaxpr, trips: Sequence[int] = ()) -> float:
    """Returns the FLOPs of a program's matrix products, two for a multiplication and its addition.

    Recomputation and padding count. The kernels of splash attention and cuDNN, in which JAX sees no
    products, do not. Of a `cond` the costliest branch counts.

    Args:
        program: traced, `jax.jit(f).trace(…).jaxpr`.
        trips: number of iterations of each `while` loop, in the program's order.

    Raises:
        ValueError: the program has another number of `while` loops.
    """
    remaining = iter(trips)
    total = _flops(program.jaxpr, remaining)
    if rest := len(list(remaining)):
        raise ValueError(
            f"trips: expected one for each of {len(trips) - rest} loops, found {len(trips)}"
        )
    return total


def _flops(jaxpr: Jaxpr, trips: Iterator[int]) -> float:
    return sum(_equation(equation, trips) for equation in jaxpr.eqns)


def _equation(equation: JaxprEqn, trips: Iterator[int]) -> float:
    params = equation.params
    match equation.primitive.name:
        case "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            depth = math.prod(shape[axis] for axis in contracted)
            return 2.0 * math.prod(equation.outvars[0].aval.shape) * depth
        case "scan":
            return params["length"] * _flops(params["jaxpr"].jaxpr, trips)
        case "while":
            iterations = next(trips, None)
            if iterations is None:
                raise ValueError("trips: expected one for each loop, found more loops")
            return iterations * _flops(params["body_jaxpr"].jaxpr, trips)
        case "cond":
            return max(_flops(branch.jaxpr, trips) for branch in params["branches"])
        case "pallas_call":
            return 0.0
    return sum(_flops(inner, trips) for inner in _inner(params.values()))


def _inner(values: Any) -> Iterator[Jaxpr]:
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _inner(value)
