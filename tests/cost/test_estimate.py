"""What is read off a compiled program, by a chip that the compiler estimates cycles for, and one
that it does not."""

import jax
import jax.numpy as jnp
import pytest

from morer1_jax.cost.chips import chip
from morer1_jax.cost.estimate import Part, Sent, estimate
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
    assert gpu.once.flops == tpu.once.flops == 2 * 64**3
    # CPUs' compiler estimates no cycles, which is no time and not an unknown one.
    assert tpu.once.seconds(chip("TPU v5 lite")) == 0


@pytest.mark.parametrize(
    ("found", "share", "fault"),
    [
        (3.9e12, 1e12, False),
        (4.1e12, 1e12, True),
        (1.9e11, 1e9, False),  # 0.97 ms at the peak of 197 TFLOP/s: too short to tell
        (2.1e11, 1e9, True),
    ],
)
def test_computing_much_more_than_a_chips_share_is_a_fault(found, share, fault):
    part = Part(flops=found, compute=None, sent=(), unknown_kernels=(), places=())
    text = (
        f"expected a chip to compute at most 4 times its share of {share / 1e12:.3g} TFLOP, found "
        f"{found / 1e12:.3g}"
    )
    lines = part.repeated(chip("TPU v5 lite"), share)
    assert [line.split(";")[0] for line in lines] == ([text] if fault else [])


@pytest.mark.parametrize(
    ("sent", "fault"),
    [
        (("all-reduce", "activations", True, ("fsdp",), 1e5), "summed over axes that split rows"),
        (("all-gather", "activations", False, ("data", "fsdp"), 3e7), "gathered over axes that"),
        (("all-gather", "ids and masks", False, ("fsdp",), 3e7), None),
        (("all-gather", "activations", False, ("tensor",), 3e9), None),
        (("all-to-all", "activations", False, ("fsdp",), 3e9), None),
        (("all-gather", "weights", False, ("fsdp",), 3e9), None),
    ],
)
def test_what_does_not_scale_is_a_fault(sent, fault):
    kind, what, summed, axes, size = sent
    one = Sent(kind, what, summed, axes, across_slices=False, bytes=size)
    part = Part(flops=0, compute=None, sent=(one,), unknown_kernels=(), places=())
    lines = part.faults(in_decode_loop=False)
    assert len(lines) == (fault is not None)
    assert all(fault in line and f"{size / 1e6:,.1f} MB by {kind}" in line for line in lines)
