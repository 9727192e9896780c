"""FLOPs of kernels, against counts by hand."""

import pytest

from morer1_jax.cost.hlo import Array, Instruction, parse
from morer1_jax.cost.kernels import count_kernels, kernel_flops
from morer1_jax.cost.program import Work, cost_of

Q, K = Array("bf16", (2, 16, 1024, 128)), Array("bf16", (2, 4, 512, 128))
# Queries of 16 heads with keys: 2 · rows · heads · queries · keys · size of a head.
PRODUCT = 2 * 2 * 16 * 1024 * 512 * 128


def work(name, op_name="jit(step)/blocks_3_of_4/pallas_call", cycles=None, times=1):
    instruction = Instruction(f"{name}.1", "custom-call", (Q,), (), {})
    # The block's tables come first, then queries, keys, values and segments.
    operands = (Array("s8", (1, 2, 2)), Q, K, K, Array("s32", (2, 1024, 128)))
    return Work(instruction, operands, cycles, times, op_name, ())


@pytest.mark.parametrize(
    ("name", "products"),
    [
        ("splash_mha_fwd_segmented_residuals", 2),
        ("splash_mha_fwd_segmented_no_residuals", 2),
        ("splash_mha_dq_segmented_no_residuals", 3),
        ("splash_mha_dkv_segmented_no_residuals", 4),
    ],
)
def test_products_of_each_pass(name, products):
    assert kernel_flops(work(name)) == products * PRODUCT * 3 / 4
    assert kernel_flops(work(name, "blocks_1_of_1")) == products * PRODUCT


def test_the_sum_and_what_is_unknown():
    counted = count_kernels(
        [
            work("splash_mha_fwd", times=5),
            work("splash_mha_dq"),
            # What has an estimate is not counted again.
            work("splash_mha_dkv", cycles=7),
            work("another_kernel", "jit(step)/another"),
            work("another_kernel", "jit(step)/another"),
            # Splash attention that does not say what its mask leaves.
            work("splash_mha_fwd", "jit(step)/mine"),
            work("nameless", ""),
        ]
    )
    assert counted.flops == (5 * 2 + 3) * PRODUCT * 3 / 4
    assert counted.unknown == ("jit(step)/another", "jit(step)/mine", "nameless.1")


def test_attention_that_is_compiled(compiled):
    """Three layers: forward, forward again for the backward pass, queries, keys and values."""
    cost = cost_of(parse(compiled("attention")), devices=16)
    counted = count_kernels(cost.work)
    product = 2 * 4 * 1536 * 1536 * 128
    assert counted.flops == pytest.approx(3 * (2 + 2 + 3 + 4) * product * 6 / 9)
    assert counted.unknown == ()


def test_attention_of_groups_that_is_compiled(compiled):
    """A completion sees the prompt and itself: 1 + 2 + 2 of 9 blocks."""
    cost = cost_of(parse(compiled("attention_of_groups")), devices=16)
    counted = count_kernels(cost.work)
    assert counted.flops == pytest.approx(2 * 2 * 4 * 1536 * 1536 * 128 * 5 / 9)
    assert counted.unknown == ()
