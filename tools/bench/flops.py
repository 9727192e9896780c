"""FLOPs that our programs spend, counted in what JAX traced."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


def call_flops(function: Callable[..., Any], *given: Any, **counts: Any) -> float:
    """`product_flops` of a jitted function for such arguments, arrays or what describes them."""
    return product_flops(jax.jit(function).trace(*given).jaxpr, **counts)


def product_flops(program: ClosedJaxpr, trips: Sequence[int] = (), taken: float = 1.0) -> float:
    """FLOPs of a program's products of matrices, two for a multiplication and its addition.

    What a step computes again is counted again, and what it computes of padding too. Kernels that
    are no products to JAX (splash attention's, cuDNN's) are not seen.

    Args:
      program: traced, as `jax.jit(f).trace(…).jaxpr` has it.
      trips: how often each of its `while` loops goes round, in their order.
      taken: how often, of all times, a `cond` takes its costliest branch; the others count nothing.

    Raises:
      ValueError: the program has another number of `while` loops.
    """
    left = iter(trips)
    total = _flops(program.jaxpr, left, taken)
    if rest := len(list(left)):
        raise ValueError(f"{len(trips)} trips given, but {len(trips) - rest} loops found")
    return total


def _flops(jaxpr: Jaxpr, trips: Iterator[int], taken: float) -> float:
    return sum(_equation(equation, trips, taken) for equation in jaxpr.eqns)


def _equation(equation: JaxprEqn, trips: Iterator[int], taken: float) -> float:
    params = equation.params
    match equation.primitive.name:
        case "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            along = math.prod(shape[axis] for axis in contracted)
            return 2.0 * math.prod(equation.outvars[0].aval.shape) * along
        case "scan":
            return params["length"] * _flops(params["jaxpr"].jaxpr, trips, taken)
        case "while":
            times = next(trips, None)
            if times is None:
                raise ValueError("more loops found than trips given")
            return times * _flops(params["body_jaxpr"].jaxpr, trips, taken)
        case "cond":
            return taken * max(_flops(branch.jaxpr, trips, taken) for branch in params["branches"])
        case "pallas_call":
            return 0.0
    return sum(_flops(inner, trips, taken) for inner in _inner(params.values()))


def _inner(values: Any) -> Iterator[Jaxpr]:
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
        elif isinstance(value, tuple | list):
            yield from _inner(value)
