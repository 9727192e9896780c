"""Bytes and cycles of programs, against counts by hand."""

import pytest

from morer1_jax.cost.hlo import Array, parse
from morer1_jax.cost.program import cost_of

# Four chips. Of each kind of transfer one, of f32[1024], 4,096 bytes, on each chip.
TRANSFERS = """
ENTRY %main (x: f32[1024]) -> f32[1024] {
  %x = f32[1024] parameter(0)
  %gather = f32[4096] all-gather(%x), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}
  %pair = (f32[1024], f32[2048]) all-gather-start(%x), channel_id=2, replica_groups=[2,2]<=[4]
  %pair.1 = f32[2048] all-gather-done(%pair)
  %sum = f32[1024] all-reduce(%x), channel_id=3, replica_groups={}, to_apply=%add
  %part = f32[256] reduce-scatter(%x), channel_id=4, replica_groups={{0,1,2,3}}, dimensions={0}
  %exchange = f32[1024] all-to-all(%x), channel_id=5, replica_groups={{0,1,2,3}}, dimensions={0}
  %move = (f32[1024], f32[1024], u32[], u32[]) collective-permute-start(%x), channel_id=6, \
source_target_pairs={{0,1},{1,0}}
  %move.1 = f32[1024] collective-permute-done(%move)
  %copied = f32[1024] collective-broadcast(%x), channel_id=7, replica_groups={{0,1,2,3}}
  %two = (f32[1024], bf16[1024]) all-reduce(%x, %half), channel_id=8, replica_groups={}, \
to_apply=%add
  %half = bf16[1024] convert(%x)
  ROOT %single = f32[1024] all-reduce(%x), channel_id=9, replica_groups={{0},{1},{2},{3}}, \
to_apply=%add
}
"""


def test_bytes_of_each_kind():
    cost = cost_of(parse(TRANSFERS), devices=4)
    assert [(transfer.kind, transfer.bytes) for transfer in cost.transfers] == [
        ("all-gather", 4096 * 3),
        ("all-gather", 4096),
        ("all-reduce", 2 * 4096 * 3 / 4),
        ("reduce-scatter", 4096 * 3 / 4),
        ("all-to-all", 4096 * 3 / 4),
        ("collective-permute", 4096),
        ("collective-broadcast", 4096),
        ("all-reduce", 2 * (4096 + 2048) * 3 / 4),
        ("all-reduce", 0),
    ]
    # What a gather brings together; what goes into the others.
    assert [transfer.arrays for transfer in cost.transfers][:4] == [
        (Array("f32", (4096,)),),
        (Array("f32", (2048,)),),
        (Array("f32", (1024,)),),
        (Array("f32", (1024,)),),
    ]
    assert cost.transfers[1].groups == ((0, 1), (2, 3))
    assert cost.transfers[5].groups == ((0, 1), (1, 0))
    assert cost.bytes == sum(transfer.bytes for transfer in cost.transfers)


# A gather begins beside other work, goes on in a second fusion, and ends in a third: all have its
# channel. A fourth has a gather of its own.
ASYNCHRONOUS = """
%start (p: f32[1024]) -> (f32[1024], f32[4096]) {
  %p = f32[1024] parameter(0)
  %g.1 = f32[4096] all-gather(%p), channel_id=CHANNEL, replica_groups={}, dimensions={0}
  ROOT %s = (f32[1024], f32[4096]) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%between (p: f32[1024]) -> f32[4096] {
  %p = f32[1024] parameter(0)
  ROOT %g.2 = f32[4096] all-gather(%p), channel_id=CHANNEL, replica_groups={}, dimensions={0}
}

%own (p: f32[1024]) -> f32[4096] {
  %p = f32[1024] parameter(0)
  ROOT %g.3 = f32[4096] all-gather(%p), channel_id=8, replica_groups={}, dimensions={0}
}

ENTRY %main (x: f32[1024]) -> f32[4096] {
  %x = f32[1024] parameter(0)
  %a = (f32[1024], f32[4096]) fusion(%x), kind=kCustom, calls=%start
  %b = f32[4096] fusion(%x), kind=kCustom, calls=%between, \
backend_config={"window_config":{"estimated_cycles":"10"}}
  %c = f32[4096] fusion(%x), kind=kCustom, calls=%between
  ROOT %d = f32[4096] fusion(%x), kind=kCustom, calls=%own
}
"""


def test_a_gather_beside_other_work_counts_once():
    cost = cost_of(parse(ASYNCHRONOUS.replace("CHANNEL", "7")), devices=4)
    assert [transfer.bytes for transfer in cost.transfers] == [3 * 4096, 3 * 4096]
    assert cost.cycles == 10


SCATTERED = """
%scatter (p: f32[1024], i: u32[]) -> f32[256] {
  %p = f32[1024] parameter(0)
  %i = u32[] parameter(1)
  %sum = f32[1024] all-reduce(%p), channel_id=1, replica_groups={}, to_apply=%add
  ROOT %mine = f32[256] dynamic-slice(%sum, %i), dynamic_slice_sizes={256}
}

ENTRY %main (x: f32[1024], i: u32[]) -> (f32[256], f32[256]) {
  %x = f32[1024] parameter(0)
  %i = u32[] parameter(1)
  %a = f32[256] fusion(%x, %i), kind=kCustom, calls=%scatter
  %whole = f32[1024] all-reduce(%x), channel_id=2, replica_groups={}, to_apply=%add
  %b = f32[256] dynamic-slice(%whole, %i), dynamic_slice_sizes={256}
  ROOT %out = (f32[256], f32[256]) tuple(%a, %b)
}
"""


def test_a_sum_is_scattered_only_where_the_slice_is_fused():
    """A sum that is sliced afterwards arrives whole on every device."""
    cost = cost_of(parse(SCATTERED), devices=4)
    kinds = {transfer.kind: transfer.bytes for transfer in cost.transfers}
    assert kinds == {"reduce-scatter": 3072, "all-reduce": 2 * 3072}


# Parts in places of their own: by itself, and in a fusion; then in an array that is no constant,
# and all in the same place.
PADDED = """
%place (p: f32[1024], q: f32[256], i: u32[]) -> f32[1024] {
  %p = f32[1024] parameter(0)
  %q = f32[256] parameter(1)
  %i = u32[] parameter(2)
  ROOT %u = f32[1024] dynamic-update-slice(%p, %q, %i)
}

ENTRY %main (x: f32[1024], y: f32[256], i: u32[]) -> (f32[1024], f32[1024]) {
  %x = f32[1024] parameter(0)
  %y = f32[256] parameter(1)
  %i = u32[] parameter(2)
  %zero = f32[] constant(0)
  %zeros = f32[1024] broadcast(%zero), dimensions={}
  %a = f32[1024] dynamic-update-slice(%zeros, %y, %i)
  %b = f32[1024] fusion(%zeros, %y, %i), kind=kLoop, calls=%place
  %both = (f32[1024], f32[1024]) all-reduce(%a, %b), channel_id=1, replica_groups={}, \
to_apply=%add
  %c = f32[1024] fusion(%x, %y, %i), kind=kLoop, calls=%place
  %d = f32[1024] all-reduce(%c), channel_id=2, replica_groups={}, to_apply=%add
  %same = u32[] constant(3)
  %f = f32[1024] dynamic-update-slice(%zeros, %y, %same)
  %g = f32[1024] all-reduce(%f), channel_id=4, replica_groups={}, to_apply=%add
  %e = f32[1024] all-reduce(%x), channel_id=3, replica_groups={}, to_apply=%add
  ROOT %out = (f32[1024], f32[1024]) tuple(%d, %e)
}
"""


def test_a_sum_of_parts_in_places_of_their_own_is_a_gather():
    """It sends twice as much as a gather would, and nothing is added up."""
    transfers = cost_of(parse(PADDED), devices=4).transfers
    assert [(transfer.kind, transfer.bytes) for transfer in transfers] == [
        ("all-gather", 2 * 2 * 3072),
        ("all-reduce", 2 * 3072),
        ("all-reduce", 2 * 3072),
        ("all-reduce", 2 * 3072),
    ]
    assert transfers[0].arrays == (Array("f32", (1024,)),) * 2


BRANCHES = """
%busy (p: f32[1024]) -> f32[1024] {
  %p = f32[1024] parameter(0)
  ROOT %a = f32[1024] tanh(%p), backend_config={"window_config":{"estimated_cycles":"CYCLES"}}
}

%sends (p: f32[1024]) -> f32[1024] {
  %p = f32[1024] parameter(0)
  %b = f32[1024] all-reduce(%p), channel_id=1, replica_groups={}, to_apply=%add
  ROOT %c = f32[1024] tanh(%b), backend_config={"window_config":{"estimated_cycles":"20"}}
}

%called (p: f32[1024], n: s32[]) -> f32[1024] {
  %p = f32[1024] parameter(0)
  %n = s32[] parameter(1)
  ROOT %r = f32[1024] conditional(%n, %p, %p), branch_computations={%busy, %sends}
}

ENTRY %main (x: f32[1024], n: s32[]) -> f32[1024] {
  %x = f32[1024] parameter(0)
  %n = s32[] parameter(1)
  ROOT %r = f32[1024] call(%x, %n), to_apply=%called
}
"""


@pytest.mark.parametrize(("cycles", "sent"), [(30, 0), (20, 2 * 3072), (10, 2 * 3072)])
def test_of_branches_the_one_with_most_cycles_then_bytes_counts(cycles, sent):
    cost = cost_of(parse(BRANCHES.replace("CYCLES", str(cycles))), devices=4)
    assert (cost.cycles, cost.bytes) == (max(cycles, 20), sent)


UNTIL = """
%body (p: f32[1024]) -> f32[1024] {
  %p = f32[1024] parameter(0)
  ROOT %a = f32[1024] tanh(%p), backend_config={"window_config":{"estimated_cycles":"40"}}
}

%condition (p: f32[1024]) -> pred[] {
  %p = f32[1024] parameter(0)
  ROOT %c = pred[] custom-call(%p), custom_call_target="x"
}

ENTRY %main (x: f32[1024]) -> f32[1024] {
  %x = f32[1024] parameter(0)
  ROOT %w = f32[1024] while(%x), condition=%condition, body=%body, \
metadata={op_name="jit(f)/chunks/while"}
}
"""


def test_a_loop_that_ends_by_data_takes_the_turns_that_are_given():
    assert cost_of(parse(UNTIL), 4, {"chunks": 7}).cycles == 7 * 40
    # Another's do not matter; without any it is counted apart.
    for turns in ({"chunk": 7}, None):
        cost = cost_of(parse(UNTIL), 4, turns)
        assert (cost.cycles, [(name, loop.cycles) for name, loop in cost.loops]) == (
            0,
            [("jit(f)/chunks/while", 40)],
        )
    # Nor do those of a loop around it, whose scope its name has, too.
    inside = UNTIL.replace("jit(f)/chunks/while", "jit(f)/attempts/while/body/chunks/while")
    for turns, cycles in (({"attempts": 7}, 0), ({"chunks": 7, "attempts": 2}, 7 * 40)):
        assert cost_of(parse(inside), 4, turns).cycles == cycles


KERNEL = """
ENTRY %main (x: f32[1024]) -> f32[1024] {
  %x = f32[1024] parameter(0)
  %k = f32[1024] custom-call(%x), custom_call_target="tpu_custom_call", metadata={op_name="kernel"}
  %a = f32[1024] custom-call(), custom_call_target="AllocateBuffer"
  ROOT %c = f32[1024] copy(%k), backend_config={"window_config":{"estimated_cycles":"7"}}
}
"""


def test_a_kernel_without_an_estimate_is_listed():
    cost = cost_of(parse(KERNEL), devices=1)
    assert [(work.op_name, work.cycles) for work in cost.work] == [("kernel", None), ("", 7)]
    assert cost.cycles == 7


# (program, of each transfer its kind, the bytes that a chip sends, and turns)
COMPILED = [
    # Of bf16[1024, 512], a sixteenth to fifteen others.
    ("gather", [("all-gather", 1024 * 512 * 2 * 15 / 16, 1)]),
    ("gather_columns", [("all-gather", 512 * 128 * 4 * 3 / 4, 1)]),
    ("gather_turned", [("all-gather", 1024 * 512 * 2 * 15 / 16, 1)]),
    ("loop_of_three", [("all-reduce", 2 * 64 * 1024 * 4 * 15 / 16, 3)]),
    ("nested", [("all-reduce", 2 * 64 * 1024 * 4 * 3 / 4, 15)]),
    ("permute", [("collective-permute", 256 * 512 * 2, 1)]),
    ("exchange", [("all-to-all", 64 * 2048 * 4 * 15 / 16, 1)]),
    ("scatter", [("reduce-scatter", 1024 * 256 * 4 * 3 / 4, 1)]),
    (
        "scatter_fused",
        [
            ("collective-permute", 24 * 1024 * 4, 1),
            ("reduce-scatter", (4096 + 32) * 1024 * 4 * 3 / 4, 1),
        ],
    ),
    ("scatter_not_fused", [("all-reduce", 2 * 4096 * 1024 * 4 * 15 / 16, 1)]),
    ("branches", [("all-reduce", 2 * 512 * 1024 * 4 * 15 / 16, 1)]),
    (
        "layers",
        [("all-gather", 2 * 2048**2 * 15 / 16, 6), ("all-reduce", 2 * 2 * 2048**2 * 15 / 16, 6)],
    ),
    ("contracted", [("reduce-scatter", 1024 * 2048 * 2 * 3 / 4, 6)]),
    # In each slice a sum; of a sixteenth a sum between slices; and a gather in each slice.
    (
        "sum_over_slices",
        [
            ("all-gather", 2**20 * 4 * 15 / 16, 1),
            ("all-reduce", 2 * 2**20 * 4 / 16 * 1 / 2, 1),
            ("all-reduce", 2 * 2**20 * 4 * 15 / 16, 1),
        ],
    ),
    ("gather_over_slices", [("all-gather", 32 * 65536 * 4, 1)]),
    ("permute_over_slices", [("collective-permute", 1024 * 1024 * 4, 1)]),
    ("feed_forward", [("all-gather", 2 * 1024 * 4096 * 15 / 16, 4)] * 2),
]


@pytest.mark.parametrize(("program", "transfers"), COMPILED)
def test_bytes_of_compiled_programs(compiled, program, transfers):
    cost = cost_of(parse(compiled(program)), devices=16)
    found = [(transfer.kind, transfer.bytes, transfer.times) for transfer in cost.transfers]
    assert sorted(found) == sorted(transfers)
    assert cost.loops == []


def test_a_gather_inside_of_a_fusion(compiled):
    """Of the weights of a layer the second is gathered beside the first product."""
    text = compiled("feed_forward")
    assert "AsyncCollectiveStart" in text
    # More are written than there are.
    assert text.count(" all-gather(") > 2


def test_a_windowed_product(compiled):
    """A shard of 128 rows goes round once, in 15 hops; the compiler makes one or two more."""
    text = compiled("windowed")
    assert "windowed_dot_general_body" in text
    cost = cost_of(parse(text), devices=16)
    shard = 128 * 8192 * 2
    assert {(transfer.kind, transfer.bytes) for transfer in cost.transfers} == {
        ("collective-permute", shard)
    }
    assert 15 * shard <= cost.bytes <= 17 * shard
    # Four units of 128² multiply; the sum is read and written for every two shards.
    ideal = 4096 * 2048 * 8192 / (4 * 128**2)
    assert ideal <= cost.cycles < 4 * ideal


@pytest.mark.parametrize("program", ["gather_over_slices", "permute_over_slices"])
def test_devices_of_two_slices(compiled, program):
    (transfer,) = cost_of(parse(compiled(program)), devices=16).transfers
    pairs = {tuple(sorted(group)) for group in transfer.groups}
    assert pairs == {(place, 16 + place) for place in range(16)}
    shape = {"gather_over_slices": (64, 65536), "permute_over_slices": (1024, 1024)}[program]
    assert transfer.arrays == (Array("f32", shape),)


def test_a_loop_that_ends_by_data_counts_by_the_turn(compiled):
    cost = cost_of(parse(compiled("until")), devices=16)
    assert cost.bytes == 0
    ((name, turn),) = cost.loops
    assert name.endswith("while")
    assert turn.bytes == 2 * 64 * 1024 * 4 * 15 / 16
    # The product of 64 rows is in the turn; the cast of its weight is before the loop.
    assert turn.cycles >= 64 * 1024 * 1024 / (4 * 128**2)
    assert cost.cycles > 0


def test_cycles_of_a_loop_are_multiplied(compiled):
    """Layers forward: one product; backward: two. The estimate is near that of full units."""
    cost = cost_of(parse(compiled("layers")), devices=16)
    ideal = 6 * 3 * 256 * 2048 * 2048 / (4 * 128**2)
    products = sum(work.cycles * work.times for work in cost.work if "dot_general" in work.op_name)
    assert ideal <= products < 2 * ideal
    assert {work.times for work in cost.work if "dot_general" in work.op_name} == {6}
