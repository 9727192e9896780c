"""Devices by the name of a topology."""

import pytest

from morer1_jax.cost.topology import describe
from morer1_jax.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "slices", "found"),
    [
        ("h100:0", 1, "0 in 1"),
        ("h100:x", 1, "x in 1"),
        ("h100", 1, "no number in 1"),
        ("a100:65", 1, "65 in 1"),
        ("h200:8", 2, "8 in 2"),
    ],
)
def test_gpus_that_nothing_stands_in_for_are_refused(name, slices, found):
    with pytest.raises(ConfigError, match=f"--topology={name}: expected .* GPUs.* found {found}$"):
        describe(name, slices)


@pytest.mark.parametrize(
    ("name", "count", "chip"),
    [("v5e:4x4", 16, "TPU v5e"), ("h100:1", 1, "H100 SXM"), ("h200:6", 6, "H200")],
)
def test_devices_and_what_they_can_do(name, count, chip):
    pytest.importorskip("libtpu")
    topology = describe(name)
    assert (len(topology.devices), topology.chip.name) == (count, chip)
    # Those that stand in for GPUs have more memory.
    kind = topology.devices[0].device_kind
    assert kind == ("TPU v5 lite" if "v5e" in name else "TPU v5")


def test_slices_have_devices_of_their_own():
    pytest.importorskip("libtpu")
    assert {device.slice_index for device in describe("v5e:2x2", 2).devices} == {0, 1}


def test_a_topology_that_no_tpu_has_is_refused():
    pytest.importorskip("libtpu")
    with pytest.raises(ConfigError, match=r"^--topology=v5e:3x5: expected a version and chips"):
        describe("v5e:3x5")
