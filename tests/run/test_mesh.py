import types
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from morer1_jax.cost.topology import describe
from morer1_jax.errors import ConfigError
from morer1_jax.model.config import ModelConfig, TextConfig, VisionConfig
from morer1_jax.run.mesh import (
    batch_parts,
    batch_sharding,
    make_mesh,
    param_shardings,
    path_name,
    put_batch,
    state_shardings,
    this_host,
)
from morer1_jax.weights.names import empty_params, leaf_slices


@flax.struct.dataclass
class State:
    step: Any
    params: Any
    opt_state: Any


def mesh_2x2x2():
    return make_mesh({"data": 2, "fsdp": -1, "tensor": 2})


def model_params():
    """The parameter tree of a small model of the real architecture, as shapes."""
    text = TextConfig(64, 16, 32, 3, 4, 2, (1, 1, 0))
    vision = VisionConfig(4, 16, 32, 2, 16, (1, 3), patch_size=4, window_size=16)
    config = ModelConfig(text, vision, 60, 61, 62, 63)
    tree = empty_params(leaf_slices(config), "float32")
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def specs_by_path(shardings):
    return {
        path_name(path): leaf.spec for path, leaf in jax.tree_util.tree_leaves_with_path(shardings)
    }


def test_make_mesh_fills_in_the_free_axis():
    mesh = mesh_2x2x2()
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    one = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, devices=jax.devices()[3:4])
    assert list(one.devices.flat) == jax.devices()[3:4]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (
            {"data": -1, "fsdp": 3},
            "mesh.data: expected a multiple of fsdp 3 = 3 devices, found 8; let the other sizes "
            "multiply to a divisor of 8",
        ),
        ({"data": 2, "fsdp": 2}, "expected 8 devices, found data 2 × fsdp 2 = 4;"),
        ({"data": -1, "fsdp": -1}, "at most one size of -1, found data and fsdp;"),
        ({"data": -1, "tensor": 0}, "mesh.tensor: expected a positive size or -1, found 0"),
    ],
)
def test_make_mesh_names_what_does_not_fit(axes, message):
    with pytest.raises(ConfigError) as error:
        make_mesh(axes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_slices_are_the_outermost_of_the_first_axis():
    """Whose size they must divide; how they are arranged, `test_compile.py` shows on a topology."""
    chips = [types.SimpleNamespace(platform="tpu", slice_index=i // 4) for i in range(8)]
    with pytest.raises(
        ConfigError, match=r"mesh\.data: expected a multiple of the 2 slices, found 1"
    ):
        make_mesh({"data": 1, "fsdp": 8, "tensor": 1}, chips)


def test_the_rules_cover_every_matrix_of_the_model():
    params = model_params()
    specs = specs_by_path(param_shardings(mesh_2x2x2(), params))
    assert specs["embedding"] == P("tensor", "fsdp")
    assert specs["head"] == P("tensor", "fsdp")
    assert specs["language/layers/q/kernel"] == P(None, "fsdp", "tensor", None)
    assert specs["language/layers/k/bias"] == P(None, "tensor", None)
    assert specs["language/layers/o/kernel"] == P(None, "tensor", None, "fsdp")
    assert specs["language/layers/mlp/up/kernel"] == P(None, "fsdp", "tensor")
    assert specs["language/layers/mlp/down/kernel"] == P(None, "tensor", "fsdp")
    windowed = "vision/groups/windowed"  # Two leading axes: group and place in it.
    assert specs[f"{windowed}/attn/qkv/kernel"] == P(None, None, "fsdp", None, "tensor", None)
    assert specs[f"{windowed}/attn/proj/kernel"] == P(None, None, "tensor", None, "fsdp")
    assert specs[f"{windowed}/mlp/gate/bias"] == P(None, None, "tensor")
    assert specs["vision/merger_in/kernel"] == P("fsdp", "tensor")
    for path, spec in specs.items():
        matrix = path.split("/")[-1] in ("kernel", "embedding", "head")
        assert ("fsdp" in spec) == matrix, path
        if "norm" in path:
            assert not any(spec), path


def test_optimizer_state_follows_the_parameters():
    mesh = mesh_2x2x2()
    params = model_params()
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1.0, 0.0, 3))
    )
    state = State(
        step=jax.ShapeDtypeStruct((), jnp.int32),
        params=params,
        opt_state=jax.eval_shape(optimizer.init, params),
    )
    shardings = state_shardings(mesh, state, params)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    expected = param_shardings(mesh, params)
    assert shardings.params == expected
    adam = shardings.opt_state[1][0]
    assert adam.mu == expected
    assert adam.nu == expected
    assert adam.count.spec == P()
    assert shardings.step.spec == P()


def test_factored_moments_of_another_shape_are_replicated():
    mesh = mesh_2x2x2()
    params = {"embedding": jax.ShapeDtypeStruct((256, 256), jnp.float32)}
    state = jax.eval_shape(optax.adafactor(1e-3).init, params)
    assert any("v_row" in path for path in specs_by_path(state_shardings(mesh, state, params)))
    for path, spec in specs_by_path(state_shardings(mesh, state, params)).items():
        assert spec == P(), path


def test_put_batch_splits_rows_over_data_and_fsdp():
    mesh = mesh_2x2x2()
    batch = {"tokens": np.arange(24).reshape(8, 3), "mask": np.ones(4, bool)}
    arrays = put_batch(batch, mesh)
    np.testing.assert_array_equal(arrays["tokens"], batch["tokens"])
    assert arrays["tokens"].sharding == batch_sharding(mesh)
    assert {s.data.shape for s in arrays["tokens"].addressable_shards} == {(2, 3)}
    for shard in arrays["tokens"].addressable_shards:
        np.testing.assert_array_equal(shard.data, batch["tokens"][shard.index])


@pytest.mark.parametrize("array", [np.zeros((6, 2)), np.float32(1)])
def test_put_batch_names_the_array_that_does_not_divide(array):
    with pytest.raises(
        ConfigError, match=r"batch images/patches: expected a multiple of 4 .* [06];"
    ):
        put_batch({"images": {"patches": array}}, mesh_2x2x2())


TOPOLOGIES = {
    "v5e:4x4": 4,
    "v5e:8x8": 16,
    "v6e:4x4": 4,
    "v5p:2x2x4": 4,
}


@pytest.mark.parametrize("axes", [(-1, 1, 1), (1, -1, 1), (2, -1, 1), (-1, 2, 2), (1, 2, -1)])
@pytest.mark.parametrize("name", TOPOLOGIES)
def test_hosts_prepare_what_their_chips_hold_on_real_topologies(name, axes):
    """Chips lie on a mesh in the torus's order, in which a host's need not be neighbours."""
    pytest.importorskip("libtpu")
    devices = describe(name).devices
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), axes, strict=True)), devices)
    total, processes = batch_parts(mesh), {device.process_index for device in devices}
    assert len(processes) == TOPOLOGIES[name]
    rows = [f"row {number}" for number in range(2 * total)]
    counted = []
    for process in processes:
        host = this_host(mesh, process)
        own = host.rows(rows)
        # What the process's chips hold, by the sharding itself.
        held = {
            row
            for device, (part,) in batch_sharding(mesh).devices_indices_map((len(rows),)).items()
            if device.process_index == process
            for row in rows[part]
        }
        assert sorted(own) == sorted(held)
        assert own == sorted(own, key=rows.index)
        counted += host.counted_rows(np.asarray(own)).tolist()
    assert sorted(counted) == sorted(rows)


def test_a_hosts_parts_are_not_its_share_of_neighbours_on_a_torus():
    pytest.importorskip("libtpu")
    devices = describe("v5e:4x4").devices
    mesh = make_mesh({"data": 1, "fsdp": -1, "tensor": 1}, devices)
    parts = [this_host(mesh, process).parts for process in range(4)]
    assert any(own != tuple(range(4 * n, 4 * n + 4)) for n, own in enumerate(parts)), parts


def test_one_process_prepares_and_counts_all_rows():
    host = this_host(mesh_2x2x2())
    assert host.parts == host.counted == (0, 1, 2, 3)
    assert host.rows(range(8)) == range(8)
