"""A compilation inside a step is counted; one for shapes that were seen before is told of."""

import jax
import jax.numpy as jnp
import numpy as np

from morer1_jax.run.instruments import CompileWatch


def test_once_a_shape_and_no_more():
    step = jax.jit(lambda batch: jnp.sum(batch["x"]) * 3)
    told = []
    with CompileWatch() as watch:
        for length in (4, 7, 4, 7, 7, 4):
            batch = {"x": np.ones(length, np.float32)}
            with watch.step(batch) as again:
                step(batch)
            told += again
        assert (watch.count, told) == (2, [])
        # Another program for a batch like those before.
        with watch.step(batch) as again:
            jax.jit(lambda batch: jnp.prod(batch["x"]) * 5)(batch)
        assert watch.count == 3
        assert len(again) == 1
        assert again[0] > 0


def test_what_is_compiled_outside_of_steps_does_not_count():
    with CompileWatch() as watch:
        jax.jit(lambda x: x * 11)(1.0)
    assert watch.count == 0
    with CompileWatch() as other, other.step(np.zeros(1)):
        jax.jit(lambda x: x * 13)(1.0)
    assert (watch.count, other.count) == (0, 1)
