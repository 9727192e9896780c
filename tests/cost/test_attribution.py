"""What transfers move, told by shapes."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from morer1_jax.cost.attribution import ACTIVATIONS, GRADIENTS, IDS, SMALL, WEIGHTS, attribute
from morer1_jax.cost.hlo import Array, parse
from morer1_jax.cost.program import Transfer, cost_of

# Of four devices along `fsdp` and two along `tensor`.
PARAMS = {
    "head": ((4096, 512), P("tensor", "fsdp")),
    "q": ((3, 512, 8, 256), P(None, "fsdp", "tensor", None)),
    "down": ((3, 1024, 768), P(None, "tensor", "fsdp")),
}
BACKWARD = "jit(step)/transpose(jvp(model))/while/body/q/dot_general"
FORWARD = "jit(step)/jvp(model)/while/body/q/dot_general"


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()).reshape(1, 4, 2), ("data", "fsdp", "tensor"))


def tree(mesh, params):
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for name, (shape, spec) in params.items()
    }


def transfer(kind, shape, dtype="bf16", **changes):
    arrays = (Array(dtype, shape),)
    fields = {
        "kind": kind,
        "arrays": arrays,
        "entering": arrays,
        "groups": ((0, 2, 4, 6), (1, 3, 5, 7)),
        "bytes": float(2**20),
        "times": 1,
        "op_name": BACKWARD,
        "sources": (),
        "computation": "body",
    }
    return Transfer(**(fields | changes))


def moved(mesh, *transfers):
    return attribute(transfers, mesh, tree(mesh, PARAMS))


@pytest.mark.parametrize(
    ("kind", "shape", "what"),
    [
        # Wholes, also transposed; layers of a stack; gathered over one axis of two; reshaped.
        ("all-gather", (4096, 512), WEIGHTS),
        ("all-gather", (512, 4096), WEIGHTS),
        ("all-gather", (3, 512, 8, 256), WEIGHTS),
        ("all-gather", (1, 512, 8, 256), WEIGHTS),
        ("all-gather", (512, 4, 256), WEIGHTS),
        ("all-gather", (512, 1024), WEIGHTS),
        ("all-gather", (512, 2048), WEIGHTS),
        ("all-gather", (768, 1024), WEIGHTS),
        # A shard alone.
        ("collective-permute", (128, 4, 256), WEIGHTS),
        # As many elements as a weight has, in dimensions that it has not; too many layers.
        ("all-gather", (1024, 1024), ACTIVATIONS),
        ("all-gather", (5, 512, 8, 256), ACTIVATIONS),
        ("all-gather", (16, 640, 512), ACTIVATIONS),
        ("all-reduce", (512, 8, 256), GRADIENTS),
        ("reduce-scatter", (1024, 768), GRADIENTS),
        ("all-reduce", (16, 640, 512), ACTIVATIONS),
        ("all-to-all", (16, 640, 512), ACTIVATIONS),
    ],
)
def test_shapes(mesh, kind, shape, what):
    (found,) = moved(mesh, transfer(kind, shape))
    assert found.what == what
    assert found.summed == (kind in ("all-reduce", "reduce-scatter"))
    assert found.axes == ("fsdp",)
    assert not found.across_slices


@pytest.mark.parametrize(
    ("rows", "what"), [(512, GRADIENTS), (128, GRADIENTS), (32, GRADIENTS), (256, ACTIVATIONS)]
)
def test_gradients_are_scattered_in_two_steps_over_many(rows, what):
    """Of sixteen devices first over four, then over four."""
    chips = types.SimpleNamespace(
        devices=np.array([types.SimpleNamespace(slice_index=0)] * 16), axis_names=("fsdp",)
    )
    abstract = jax.sharding.AbstractMesh((16,), ("fsdp",))
    params = tree(abstract, {"q": ((512, 8, 256), P("fsdp"))})
    sent = transfer("reduce-scatter", (rows, 8, 256), groups=((0, 1, 2, 3),))
    assert [one.what for one in attribute([sent], chips, params)] == [what]


def test_a_gather_whose_pieces_are_not_in_place_is_known_by_a_piece(mesh):
    pieces = transfer("all-gather", (4096 * 4, 128), entering=(Array("bf16", (2048, 128)),))
    assert moved(mesh, pieces)[0].what == WEIGHTS


def test_whole_numbers_are_no_weights(mesh):
    assert moved(mesh, transfer("all-gather", (4096, 512), "s32"))[0].what == IDS
    # Photos are no ids.
    assert moved(mesh, transfer("all-gather", (4096, 512), "u8"))[0].what == ACTIVATIONS


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (BACKWARD, GRADIENTS),
        ("", GRADIENTS),
        ("jit(step)/add", GRADIENTS),
        (FORWARD, ACTIVATIONS),
        (BACKWARD.replace("/q", "/rematted_computation/q"), ACTIVATIONS),
        # Layers that a backward pass runs again itself (`model.running`), and their gradients.
        (BACKWARD.replace("/q", "/jvp()/q"), ACTIVATIONS),
        (BACKWARD.replace("/q", "/transpose(jvp())/q"), GRADIENTS),
    ],
)
def test_a_sum_in_a_forward_pass_is_of_activations(mesh, name, what):
    """However much its shape is a weight's."""
    assert moved(mesh, transfer("all-reduce", (512, 8, 256), op_name=name))[0].what == what


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({}, [ACTIVATIONS, ACTIVATIONS]),
        # Under another name, over other devices, or of another shape it is a weight.
        ({"op_name": "jit(sample)/while/body/up/dot_general"}, [GRADIENTS, WEIGHTS]),
        ({"groups": ((0, 1), (2, 3), (4, 5), (6, 7))}, [GRADIENTS, WEIGHTS]),
        ({"arrays": (Array("bf16", (768, 1024)),)}, [GRADIENTS, WEIGHTS]),
    ],
)
def test_a_sum_in_two_halves_is_of_activations(mesh, change, what):
    """Of 1024 samples and 768 features, the shape of a weight."""
    name = "jit(sample)/while/body/down/dot_general"
    scattered = transfer("reduce-scatter", (1024, 768), op_name=name)
    gathered = transfer("all-gather", (1024, 768), **({"op_name": name} | change))
    assert [found.what for found in moved(mesh, scattered, gathered)] == what


def test_a_weight_is_gathered_and_its_gradient_summed_under_one_name(mesh):
    halves = transfer("reduce-scatter", (1024, 768)), transfer("all-gather", (1024, 768))
    assert [found.what for found in moved(mesh, *halves)] == [GRADIENTS, WEIGHTS]


def test_what_sends_less_than_a_megabyte_in_all_turns(mesh):
    small = transfer("all-reduce", (16, 640, 512), bytes=1000.0)
    often = transfer("all-reduce", (16, 640, 512), bytes=1000.0, times=2000)
    assert [found.what for found in moved(mesh, small, often)] == [SMALL, ACTIVATIONS]


def test_arrays_that_travel_together(mesh):
    weight, little = Array("f32", (512, 8, 256)), Array("f32", (77,))
    rows = Array("f32", (16, 640, 512))
    for arrays, what in (((weight, little), GRADIENTS), ((weight, rows), ACTIVATIONS)):
        both = transfer("all-reduce", (1,), arrays=arrays, entering=arrays)
        assert moved(mesh, both)[0].what == what


@pytest.mark.parametrize(("loop", "what"), [("rs", GRADIENTS), ("ag", WEIGHTS)])
def test_windowed_products(mesh, loop, what):
    """Of the loop's name a hop outside of it is told by its own name and shape."""
    inside = transfer(
        "collective-permute", (128, 4, 256), computation=f"windowed_dot_general_body_{loop}.2"
    )
    outside = transfer("collective-permute", (128, 4, 256), computation="main")
    rows = transfer(
        "collective-permute", (16, 640, 512), computation=f"windowed_dot_general_body_{loop}"
    )
    found = moved(mesh, inside, outside, rows)
    assert [one.what for one in found] == [what, what, ACTIVATIONS]
    assert [one.summed for one in found] == [loop == "rs"] * 3


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        (((0, 1), (2, 3), (4, 5), (6, 7)), ("tensor",)),
        (((0, 2, 4, 6), (1, 3, 5, 7)), ("fsdp",)),
        (((0, 2), (1, 3), (4, 6), (5, 7)), ("fsdp",)),
        ((tuple(range(8)),), ("fsdp", "tensor")),
        (((0,), (1,)), ()),
        ((), ()),
        # Pairs of a permutation.
        (((0, 2), (2, 4), (4, 6), (6, 0)), ("fsdp",)),
    ],
)
def test_axes(mesh, groups, axes):
    assert moved(mesh, transfer("all-gather", (4096, 512), groups=groups))[0].axes == axes


@pytest.mark.parametrize(
    ("groups", "across"), [(((0, 1), (2, 3)), False), (((0, 2), (1, 3)), True), (((1, 2),), True)]
)
def test_slices(groups, across):
    devices = np.array([types.SimpleNamespace(slice_index=i // 2) for i in range(4)])
    slices = types.SimpleNamespace(devices=devices.reshape(2, 2), axis_names=("data", "fsdp"))
    (found,) = attribute([transfer("all-reduce", (8, 8), groups=groups)], slices, {})
    assert found.across_slices == across


@pytest.mark.parametrize(
    ("shape", "what"),
    [
        # Of [512, 8, 256], half of it on a device: whole, a half each, neither; not in tiles.
        ((512, 8, 128), GRADIENTS),
        ((256, 8, 128), GRADIENTS),
        ((384, 8, 128), ACTIVATIONS),
        ((256, 1024), ACTIVATIONS),
    ],
)
def test_between_slices_gradients_travel_flat(shape, what):
    """Two slices, each with two parts of the rows and two of the parameters."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))
    params = tree(mesh, {"q": ((512, 8, 256), P("fsdp", None, None))})
    devices = np.array([types.SimpleNamespace(slice_index=i // 4) for i in range(8)])
    slices = types.SimpleNamespace(devices=devices.reshape(4, 2), axis_names=("data", "fsdp"))
    sent = transfer("all-reduce", shape, "f32", op_name="", groups=((0, 4), (1, 5)))
    assert [one.what for one in attribute([sent], slices, params)] == [what]


# The mesh and the shapes of `programs.py`: (program, weights, what is moved over which axes).
LAYERS = ((6, 2048, 2048), P(None, ("data", "fsdp"), None))
ALL = ("data", "fsdp")
COMPILED = [
    ("layers", [LAYERS], {(WEIGHTS, False, ALL), (GRADIENTS, True, ALL)}),
    ("windowed", [((2048, 8192), P(ALL))], {(WEIGHTS, False, ALL)}),
    (
        "feed_forward",
        [((4, 1024, 4096), P(None, ALL)), ((4, 4096, 1024), P(None, None, ALL))],
        {(WEIGHTS, False, ALL)},
    ),
    (
        "contracted",
        [((6, 2048, 2048), P(None, "fsdp"))],
        {(ACTIVATIONS, True, ("fsdp",))},
    ),
    # Nothing of the program is a weight.
    ("layers", [], {(ACTIVATIONS, False, ALL), (ACTIVATIONS, True, ALL)}),
    (
        "scatter_fused",
        [((4096, 1024), P())],
        {(GRADIENTS, True, ("fsdp",)), (SMALL, False, ("fsdp",))},
    ),
]


@pytest.mark.parametrize(("program", "weights", "expected"), COMPILED)
def test_compiled_programs(compiled, program, weights, expected):
    shape = types.SimpleNamespace(slice_index=0)
    devices = np.array([shape] * 16).reshape(4, 4)
    chips = types.SimpleNamespace(devices=devices, axis_names=ALL)
    abstract = jax.sharding.AbstractMesh((4, 4), ALL)
    params = tree(abstract, {str(number): weight for number, weight in enumerate(weights)})
    cost = cost_of(parse(compiled(program)), devices=16)
    found = attribute(cost.transfers, chips, params)
    assert {(one.what, one.summed, one.axes) for one in found} == expected
    assert not any(one.across_slices for one in found)


def test_what_crosses_slices_in_a_compiled_program(compiled):
    """Of a sum over all chips of two slices a sixteenth crosses; the rest stays in the slices."""
    devices = [types.SimpleNamespace(slice_index=i // 16) for i in range(32)]
    chips = types.SimpleNamespace(devices=np.array(devices).reshape(2, 16), axis_names=ALL)
    transfers = cost_of(parse(compiled("sum_over_slices")), devices=16).transfers
    transfers = [dataclasses.replace(one, times=100) for one in transfers]
    found = attribute(transfers, chips, {})
    assert sorted((one.axes, one.across_slices, one.summed) for one in found) == [
        (("data",), True, True),
        (("fsdp",), False, False),
        (("fsdp",), False, True),
    ]
