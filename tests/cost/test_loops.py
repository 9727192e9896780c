"""How often loops run, by following their counters."""

import pytest

from morer1_jax.cost.hlo import parse
from morer1_jax.cost.loops import trip_count

LOOP = """
%step (p: s32[]) -> s32[] {{
  %p = s32[]{{:T(128)}} parameter(0)
  %by = s32[]{{:T(128)}} constant({step})
  ROOT %next = s32[]{{:T(128)}} add(%p, %by)
}}

%body (state: ({dtype}[], f32[8], {dtype}[])) -> ({dtype}[], f32[8], {dtype}[]) {{
  %state = ({dtype}[], f32[8], {dtype}[]) parameter(0)
  %counter = {dtype}[]{{:T(128)}} get-tuple-element(%state), index=0
  %kept = {dtype}[]{{:T(128)}} get-tuple-element(%state), index=2
  %x = f32[8] get-tuple-element(%state), index=1
  %same = {dtype}[] copy(%counter)
  %following = {dtype}[] fusion(%same), kind=kLoop, calls=%step
  %y = f32[8] tanh(%x)
  ROOT %out = ({dtype}[], f32[8], {dtype}[]) tuple(%following, %y, %kept)
}}

%condition (state: ({dtype}[], f32[8], {dtype}[])) -> pred[] {{
  %state = ({dtype}[], f32[8], {dtype}[]) parameter(0)
  %counter = {dtype}[] get-tuple-element(%state), index=0
  %limit = {dtype}[] get-tuple-element(%state), index=2
  ROOT %more = pred[] compare(%counter, %limit), direction={direction}
}}

ENTRY %main (x: f32[8]) -> ({dtype}[], f32[8], {dtype}[]) {{
  %x = f32[8] parameter(0)
  %start = {dtype}[] constant({start}){limit}
  %state = ({dtype}[], f32[8], {dtype}[]) tuple(%start, %x, %limit)
  ROOT %loop = ({dtype}[], f32[8], {dtype}[]) while(%state), condition=%condition, body=%body
}}
"""


DATA = """
  %sum = s32[] custom-call(%x), custom_call_target="Sum"
  %limit = s32[] add(%sum, %start)"""


def turns_of(dtype="s32", start=0, step=1, limit="\n  %limit = s32[] constant(7)", direction="LT"):
    limit = f"\n  %limit = {dtype}[] constant({limit})" if isinstance(limit, int) else limit
    module = parse(
        LOOP.format(dtype=dtype, start=start, step=step, limit=limit, direction=direction)
    )
    main = module.computations["main"]
    return trip_count(module, main, main.instructions["loop"])


@pytest.mark.parametrize(
    ("changes", "turns"),
    [
        ({}, 7),
        # As of a windowed product.
        ({"dtype": "u32", "step": 4, "limit": 15}, 4),
        ({"direction": "LE"}, 8),
        ({"direction": "NE", "start": 3, "step": 2}, 2),
        ({"direction": "GT", "start": 5, "step": -1, "limit": 0}, 5),
        ({"direction": "GE", "start": 5, "step": -1, "limit": 0}, 6),
        ({"start": 7}, 0),
        # What depends on data, or never ends.
        ({"limit": DATA}, None),
        ({"step": 0}, None),
    ],
)
def test_counters(changes, turns):
    assert turns_of(**changes) == turns


def test_a_number_that_the_compiler_prints():
    text = LOOP.format(dtype="s32", start=0, step=1, limit=DATA, direction="LT")
    text = text.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"12"}}')
    module = parse(text)
    main = module.computations["main"]
    assert trip_count(module, main, main.instructions["loop"]) == 12


ENDED = """
%body (state: (s32[], pred[])) -> (s32[], pred[]) {
  %state = (s32[], pred[]) parameter(0)
  %counter = s32[] get-tuple-element(%state), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%counter, %one)
  %done = pred[] custom-call(%counter), custom_call_target="AllEnded"
  ROOT %out = (s32[], pred[]) tuple(%next, %done)
}

%condition (state: (s32[], pred[])) -> pred[] {
  %state = (s32[], pred[]) parameter(0)
  %counter = s32[] get-tuple-element(%state), index=0
  %done = pred[] get-tuple-element(%state), index=1
  %limit = s32[] constant(LIMIT)
  %more = pred[] compare(%counter, %limit), direction=LT
  %goes = pred[] not(%done)
  ROOT %both = pred[] and(%more, %goes)
}

ENTRY %main () -> (s32[], pred[]) {
  %start = s32[] constant(0)
  %no = pred[] constant(false)
  %state = (s32[], pred[]) tuple(%start, %no)
  ROOT %loop = (s32[], pred[]) while(%state), condition=%condition, body=%body
}
"""


@pytest.mark.parametrize(("limit", "turns"), [(100, None), (1, 1), (0, 0)])
def test_a_loop_that_ends_by_data_or_at_a_limit(limit, turns):
    """Up to the limit nothing is known; a limit that the first turn reaches decides."""
    module = parse(ENDED.replace("LIMIT", str(limit)))
    main = module.computations["main"]
    assert trip_count(module, main, main.instructions["loop"]) == turns


@pytest.mark.parametrize(
    ("program", "turns"),
    [
        ("loop_of_three", [3]),
        ("nested", [3, 5]),
        ("until", [None]),
        # Unrolled by two, in both directions.
        ("windowed", [4]),
        ("layers", [6, 6]),
        ("feed_forward", [4]),
        ("gather", []),
    ],
)
def test_what_the_compiler_prints(compiled, program, turns):
    module = parse(compiled(program))
    found = [
        trip_count(module, computation, instruction)
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "while"
    ]
    assert sorted(found, key=str) == sorted(turns, key=str)
