"""What is read off a compiled program, by a chip that the compiler estimates cycles for, and one
that it does not."""

import jax
import jax.numpy as jnp
import pytest

from morer1_jax.cost.chips import chip
from morer1_jax.cost.estimate import Part, estimate
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


@pytest.mark.parametrize(
    ("compute", "flops", "reads", "slow"),
    [
        (0.79, 197e11, 0, False),  # 0.1 s at the peak of 197 TFLOP/s
        (0.81, 197e11, 0, True),
        (0.81, 0, 819e8, True),  # 0.1 s at 819 GB/s
        (0.79, 1, 819e8, False),
        (0.009, 0, 0, False),  # too short to tell
        (None, 197e11, 0, False),  # unknown, as of GPUs
    ],
)
def test_computing_for_much_longer_than_the_bound_is_a_fault(compute, flops, reads, slow):
    part = Part(compute=compute, sent=(), unknown_kernels=(), places=())
    text = "expected to compute for at most 8 times its lower bound of 0.100 s, found 0.810 s"
    lines = part.slow(chip("TPU v5 lite"), flops, reads)
    assert [line.split(";")[0] for line in lines] == ([text] if slow else [])
