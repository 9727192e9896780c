"""The package's modules with their annotations checked; programs that compile quickly."""

import importlib
import sys
import types

import jax
import jaxtyping
import pytest
from jax.extend.core import jaxprs_in_params

import morer1_jax.model


@pytest.fixture(scope="session")
def rows_of(reference):
    """`lay_out`, for tests to place samples in rows."""
    return reference.lay_out


@pytest.fixture
def suppressed(reference):
    """Ids that are never sampled: image, video, vision start and end, padding."""
    return reference.SUPPRESSED


@pytest.fixture(autouse=True)
def _quick_to_compile_and_exact(monkeypatch, tiny):
    """Compiling is most of these tests' time; their bounds are for true float32 products."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    monkeypatch.setattr(jax, "jit", tiny.jit)
    with jax.default_matmul_precision("highest"):
        yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def weighed():
    """`weighed(run, *args)`: products in the program, bytes it needs, and its results."""

    def products(jaxpr):
        count = 0
        for equation in jaxpr.eqns:
            count += equation.primitive.name == "dot_general"
            count += sum(map(products, jaxprs_in_params(equation.params)))
        return count

    def run(function, *args):
        traced = jax.jit(function).trace(*args)
        compiled = traced.lower().compile()
        memory = compiled.memory_analysis().temp_size_in_bytes
        return products(traced.jaxpr.jaxpr), memory, compiled(*args)

    return run


@pytest.fixture(scope="session")
def checked(reference):
    """The package's model modules, imported once more with every annotation checked at run time.

    Their classes are not those the other tests know, so what goes in must be made of them.
    """
    prefix, names = "morer1_jax.model", "morer1_jax.weights.names"
    known = {
        name: sys.modules.pop(name)
        for name in list(sys.modules)
        if name.startswith(prefix) or name == names
    }
    with jaxtyping.install_import_hook([prefix, names], "beartype.beartype"):
        modules = {
            name: importlib.import_module(f"{prefix}.{name}")
            for name in (
                "attention",
                "config",
                "decoding",
                "flops",
                "language",
                "layers",
                "vision",
                "vlm",
            )
        }
        modules["names"] = importlib.import_module(names)
    sys.modules.update(known)
    morer1_jax.model = sys.modules[prefix]
    return types.SimpleNamespace(**modules)
