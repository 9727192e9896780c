"""FLOPs of products, against counts by hand."""

import jax
import jax.numpy as jnp
import pytest

from morer1_jax.cost.hlo import parse
from morer1_jax.cost.program import cost_of


def product(text, left, right, out):
    """The FLOPs of one operation with operands of these shapes."""
    module = f"""
ENTRY %main (x: f32[{left}], y: f32[{right}]) -> f32[{out}] {{
  %x = f32[{left}] parameter(0)
  %y = f32[{right}] parameter(1)
  ROOT %z = f32[{out}] {text}
}}
"""
    return cost_of(parse(module), devices=1).products


@pytest.mark.parametrize(
    ("text", "shapes", "count"),
    [
        (
            "dot(%x, %y), lhs_contracting_dims={1,2}, rhs_contracting_dims={0,1}",
            ("8,4,6", "4,6,10", "8,10"),
            8 * 4 * 6 * 10,
        ),
        ("convolution(%x, %y), dim_labels=bf_io->bf", ("8,24", "24,10", "8,10"), 8 * 24 * 10),
        # The right operand is taken transposed.
        ("convolution(%x, %y), dim_labels=bf_oi->bf", ("8,24", "10,24", "8,10"), 8 * 24 * 10),
        # A second contracted axis, written as one of space that the window covers.
        (
            "convolution(%x, %y), window={size=4}, dim_labels=b0f_0io->bf0",
            ("8,4,6", "4,6,10", "8,10,1"),
            8 * 4 * 6 * 10,
        ),
        # A batch of 4 products, each of one window's place.
        (
            "convolution(%x, %y), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf",
            ("4,8,6", "4,6,10", "4,8,10"),
            4 * 8 * 6 * 10,
        ),
        # The right operand's axis becomes one of the output: padded and turned around.
        (
            "convolution(%x, %y), window={size=4 pad=3_3 rhs_reversal=1}, dim_labels=bf0_i0o->b0f",
            ("8,6,1", "6,4,10", "8,4,10"),
            8 * 6 * 4 * 10,
        ),
        # Two groups of rows, each with its own half of the features that come out.
        (
            "convolution(%x, %y), window={size=1}, dim_labels=b0f_0io->b0f, batch_group_count=2",
            ("4,8,6", "1,6,10", "2,8,10"),
            2 * 8 * 6 * 10,
        ),
        # Images: 3 × 3 windows, which at the ends of 8 × 8 places meet padding.
        (
            "convolution(%x, %y), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f",
            ("2,8,8,5", "3,3,5,7", "2,8,8,7"),
            2 * 5 * 7 * (3 * 8 - 2) ** 2,
        ),
    ],
)
def test_one_product(text, shapes, count):
    assert product(text, *shapes) == 2 * count


def test_products_in_loops_and_fusions_of_a_program():
    """As XLA itself counts the one of a turn."""

    def run(x, y):
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.tanh(x @ y), x)

    x, y = jnp.ones((32, 48)), jnp.ones((48, 48))
    compiled = jax.jit(run).lower(x, y).compile()
    assert cost_of(parse(compiled.as_text()), 1).products == 5 * 2 * 32 * 48 * 48


def test_products_of_tpus(compiled):
    """A loop over four layers of two products; a product in turns, while its weight goes round."""
    rows, wide = 16384 // 16, 1024 * 4096
    cost = cost_of(parse(compiled("feed_forward")), devices=16)
    assert cost.products == 4 * 2 * 2 * rows * wide
    cost = cost_of(parse(compiled("windowed")), devices=16)
    assert cost.products == 2 * (65536 // 16) * 2048 * 8192
