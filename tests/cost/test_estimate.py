"""What is read off a compiled program, by a chip that the compiler estimates cycles for, and one
that it does not."""

import jax
import jax.numpy as jnp

from morer1_jax.cost.chips import chip
from morer1_jax.cost.estimate import estimate
from morer1_jax.run.mesh import make_mesh


def test_of_a_gpus_program_there_is_memory_and_no_time():
    compiled = jax.jit(lambda x: x @ x).lower(jnp.ones((64, 64))).compile()
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    found = {
        kind: estimate(compiled, mesh, chip(kind), {}, {"beside": 5})
        for kind in ("NVIDIA H100 80GB HBM3", "TPU v5 lite")
    }
    gpu, tpu = found.values()
    assert gpu.memory == tpu.memory
    assert gpu.memory.live >= 2 * 64 * 64 * 4 + 5
    assert gpu.once.compute is None
    assert gpu.once.seconds(chip("NVIDIA H100 80GB HBM3")) is None
    assert gpu.once.places == ()
    # CPUs' compiler estimates no cycles, which is no time and not an unknown one.
    assert tpu.once.seconds(chip("TPU v5 lite")) == 0
