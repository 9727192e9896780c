"""The table of chips."""

import pytest

from morer1_jax.cost.chips import chip, known_chip
from morer1_jax.errors import ConfigError

# As JAX names them: our name, dense bfloat16 TFLOP/s.
KINDS = {
    "TPU v4": ("TPU v4", 275),
    "TPU v5 lite": ("TPU v5e", 197),
    "TPU v5e": ("TPU v5e", 197),
    "TPU v5": ("TPU v5p", 459),
    "TPU v5p": ("TPU v5p", 459),
    "TPU v6 lite": ("TPU v6e", 918),
    "TPU v6e": ("TPU v6e", 918),
    "TPU7x": ("TPU7x", 1153.5),
    "NVIDIA H200": ("H200", 989),
    "NVIDIA H100 80GB HBM3": ("H100 SXM", 989),
    "NVIDIA H100 PCIe": ("H100 PCIe", 756),
    "NVIDIA A100-SXM4-40GB": ("A100 SXM 40GB", 312),
    "NVIDIA A100-SXM4-80GB": ("A100 SXM 80GB", 312),
    "NVIDIA A100-PCIE-40GB": ("A100 PCIe", 312),
}


@pytest.mark.parametrize(("kind", "expected"), KINDS.items())
def test_kinds(kind, expected):
    found = chip(kind)
    assert (found.name, found.flops / 1e12) == expected
    assert known_chip(kind) is found
    # Memory is read faster than links send, and links faster than the network.
    assert found.hbm_bytes > found.link_bytes > found.network_bytes > 0
    assert (found.clock is None) == (not kind.startswith("TPU"))


@pytest.mark.parametrize(
    ("kind", "clock"),
    [("TPU v4", 1.049e9), ("TPU v5e", 1.503e9), ("TPU v5p", 1.751e9), ("TPU v6e", 1.751e9)],
)
def test_clocks(kind, clock):
    assert chip(kind).clock == pytest.approx(clock, rel=1e-3)


def test_numbers_of_v5e():
    v5e = chip("TPU v5 lite")
    assert (v5e.flops, v5e.hbm, v5e.hbm_bytes) == (197e12, 15.75 * 2**30, 819e9)
    assert (v5e.link_bytes, v5e.network_bytes) == (180e9, 3.125e9)


@pytest.mark.parametrize("kind", ["cpu", "TPU v3", "NVIDIA V100"])
def test_a_kind_that_is_not_in_the_table(kind):
    with pytest.raises(ConfigError, match=f"TPU v5 lite, .* found '{kind}'"):
        chip(kind)
    assert known_chip(kind) is None
