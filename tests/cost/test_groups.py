"""Which devices a collective joins, in every form that XLA prints."""

import numpy as np
import pytest

from morer1_jax.cost.groups import replica_groups, slice_groups, source_target_pairs
from morer1_jax.cost.hlo import parse
from morer1_jax.cost.program import COLLECTIVES

ROWS = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
COLUMNS = [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]]


def instruction(attributes):
    text = f"ENTRY %main () -> f32[] {{\n  ROOT %r = f32[] all-reduce(%x), {attributes}\n}}\n"
    return parse(text).computations["main"].instructions["r"]


def members(groups):
    return sorted(sorted(int(number) for number in group) for group in groups)


@pytest.mark.parametrize(
    ("text", "devices", "groups"),
    [
        # Lists.
        ("{}", 4, [[0, 1, 2, 3]]),
        ("{{0,2},{1,3}}", 4, [[0, 2], [1, 3]]),
        ("{{0},{1}}", 2, [[0], [1]]),
        # Numbers counted in another order.
        ("[1,4]<=[4]", 4, [[0, 1, 2, 3]]),
        ("[4,4]<=[16]", 16, ROWS),
        ("[4,4]<=[4,4]T(1,0)", 16, COLUMNS),
        ("[4,2]<=[2,2,2]T(0,2,1)", 8, [[0, 2], [1, 3], [4, 6], [5, 7]]),
        # Axes of a mesh.
        ("mesh['a'=4,'b'=4] {'b'}", 16, ROWS),
        ("mesh['a'=4,'b'=4] {'a'}", 16, COLUMNS),
        ("mesh['a'=4,'b'=4] {'a','b'}", 16, [list(range(16))]),
        ("mesh['a'=1,'b'=4,'c'=1] {'b'}", 4, [[0, 1, 2, 3]]),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", 8, [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", 4, [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=(3,1,0,2) {'b'}", 4, [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=(3,1,0,2) {'a'}", 4, [[0, 3], [1, 2]]),
        (
            "mesh['a'=2,'b'=1,'c'=4], device_ids=([2,2,2]T(0,2,1)) {'c':(2)2}",
            8,
            [[0, 2], [1, 3], [4, 6], [5, 7]],
        ),
        # An axis in part: 8 is 2 · 2 · 2, of which the outer, the middle or the inner factor joins.
        ("mesh['a'=8] {'a':(1)2}", 8, [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=8] {'a':(2)2}", 8, [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("mesh['a'=8] {'a':(4)2}", 8, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("mesh['a'=8] {'a':(1)2,'a':(4)2}", 8, [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("mesh['a'=8,'b'=2] {'a':(2)4,'b'}", 16, [list(range(8)), list(range(8, 16))]),
    ],
)
def test_members(text, devices, groups):
    found = replica_groups(instruction(f"replica_groups={text}, to_apply=%add"), devices)
    assert members(found) == groups


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("mesh['a'=2,'b'=3] {'a','b'}", [0, 1, 2, 3, 4, 5]),
        ("mesh['a'=2,'b'=3] {'b','a'}", [0, 3, 1, 4, 2, 5]),
        ("mesh['a'=4,'b'=2] {'b','a':(2)2}", [0, 2, 1, 3]),
    ],
)
def test_members_are_in_the_order_of_their_axes(text, first):
    devices = 6 if "3" in text else 8
    found = replica_groups(instruction(f"replica_groups={text}, to_apply=%add"), devices)
    assert found[0].tolist() == first


def test_no_groups_are_all_devices():
    assert members(replica_groups(instruction("to_apply=%add"), 4)) == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{0,1},{2}}", r"r: expected groups of one size, found \{\{0,1\},\{2\}\}"),
        ("all", "r: expected groups of devices, found 'all'"),
    ],
)
def test_groups_that_are_not_understood(text, message):
    with pytest.raises(ValueError, match=message):
        replica_groups(instruction(f"replica_groups={text}"), 4)


def test_pairs_of_a_permutation():
    pairs = source_target_pairs(instruction("source_target_pairs={{0,1},{1,2},{12,3}}"))
    assert pairs.tolist() == [[0, 1], [1, 2], [12, 3]]
    assert source_target_pairs(instruction("to_apply=%add")).shape == (0, 2)


@pytest.mark.parametrize(
    ("target", "groups"),
    [
        ("{1,2}x{0:3}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("{1,3}x{0:1}", [[0, 4], [1, 5]]),
        # Device 4 of a slice is its second.
        ("{{100000,300000},{100004,300004}}", [[0, 4], [1, 5]]),
        (
            "{{100000->200000},{200000->100000},{100004->200004},{200004->100004}}",
            [[0, 2], [2, 0], [1, 3], [3, 1]],
        ),
    ],
)
def test_what_joins_slices(target, groups):
    assert slice_groups(target).tolist() == groups


def test_a_target_that_is_not_understood():
    with pytest.raises(ValueError, match="between slices: expected groups, found 'all'"):
        slice_groups("all")


# The mesh of `programs.py`: `data` is 4 rows of `fsdp` 4.
@pytest.mark.parametrize(
    ("program", "groups"),
    [
        ("gather", [list(range(16))]),
        ("gather_columns", COLUMNS),
        ("gather_turned", [list(range(16))]),
        ("nested", ROWS),
        ("scatter", ROWS),
    ],
)
def test_what_the_compiler_prints(compiled, program, groups):
    module = parse(compiled(program))
    collectives = [
        instruction
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode.removesuffix("-start") in COLLECTIVES
    ]
    assert len(collectives) == 1
    assert members(replica_groups(collectives[0], 16)) == groups


def test_the_order_of_a_turned_gather(compiled):
    """The mesh's first axis splits the array's second: pieces come in the order 0, 4, 8."""
    module = parse(compiled("gather_turned"))
    (gather,) = (
        instruction
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "all-gather"
    )
    assert np.array(replica_groups(gather, 16))[0, :5].tolist() == [0, 4, 8, 12, 1]
