"""The reader of HLO's text, on texts as XLA prints them."""

from pathlib import Path

import pytest

from morer1_jax.cost.hlo import Array, parse

MODULE = """HloModule jit_step, is_scheduled=true, num_partitions=16

FileNames
1 "/model/layers.py"
2 "/learn/step.py"

FunctionNames
1 "layer"
2 "step"

FileLocations
1 {file_name_id=1 function_name_id=1 line=27 end_line=27 column=8 end_column=30}
2 {file_name_id=2 function_name_id=2 line=5 end_line=5 column=4 end_column=9}

StackFrames
1 {file_location_id=2 parent_frame_id=1}
2 {file_location_id=1 parent_frame_id=2}


%fused_computation (param_0: bf16[8,128], param_1: u32[]) -> bf16[1,128] {
  %param_0 = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %param_1 = u32[]{:T(128)S(6)} parameter(1)
  ROOT %slice.1 = bf16[1,128]{1,0:T(8,128)(2,1)} dynamic-slice(%param_0, %param_1, %param_1), \
dynamic_slice_sizes={1,128}
}

ENTRY %main (p: bf16[8,128], q: (f32[2], /*index=1*/s32[])) -> (bf16[1,128], f32[2]) {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="x[\\'a\\']"}
  %q = (f32[2]{0}, /*index=1*/s32[]) parameter(1)
  %first = f32[2]{0} get-tuple-element(%q), index=0
  %kernel = f32[2]{0} custom-call(%first), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(step)/layer/\\"a\\"" stack_frame_id=2}, \
backend_config={"custom_call_config":{"body":"module {
  func @f(%a) { return %a }  // brackets that stand alone }}}
}
ENTRY %not_one () -> f32[] {
","n":"7"},"window_config":{"estimated_cycles":"5"}}
  %zero = u32[] constant(0)
  %row = bf16[1,128]{1,0:T(8,128)(2,1)} fusion(%p, /*index=1*/%zero), kind=kLoop, \
calls=%fused_computation
  ROOT %out = (bf16[1,128]{1,0}, f32[2]{0}) tuple(%row, %kernel)
}
"""


@pytest.fixture
def module():
    return parse(MODULE)


@pytest.fixture
def main(module):
    return module.computations[module.entry].instructions


def test_computations_and_their_instructions_in_order(module):
    assert list(module.computations) == ["fused_computation", "main"]
    assert module.entry == "main"
    main = module.computations["main"]
    assert list(main.instructions) == ["p", "q", "first", "kernel", "zero", "row", "out"]
    assert main.root == "out"
    assert module.computations["fused_computation"].root == "slice.1"


def test_types_without_layouts(main):
    assert main["p"].arrays == (Array("bf16", (8, 128)),)
    assert main["q"].arrays == (Array("f32", (2,)), Array("s32", ()))
    assert main["out"].arrays == (Array("bf16", (1, 128)), Array("f32", (2,)))


def test_operands_and_attributes(main):
    assert main["row"].operands == ("p", "zero")
    assert main["row"].callees == ("fused_computation",)
    assert main["row"].attributes["kind"] == "kLoop"
    assert main["zero"].operands == ("0",)
    assert main["q"].operands == ("1",)
    assert main["first"].attributes["index"] == "0"


def test_strings_of_several_lines_belong_to_their_instruction(main):
    config = main["kernel"].backend_config
    assert config["window_config"] == {"estimated_cycles": "5"}
    assert config["custom_call_config"]["n"] == "7"
    assert config["custom_call_config"]["body"].splitlines()[2:] == [
        "}",
        "ENTRY %not_one () -> f32[] {",
    ]
    assert main["row"].backend_config == {}


def test_names_and_source_lines(module, main):
    assert main["kernel"].op_name == r"jit(step)/layer/\"a\""
    assert module.sources(main["kernel"]) == ["/model/layers.py:27", "/learn/step.py:5"]
    assert main["row"].op_name == ""
    assert module.sources(main["row"]) == []


@pytest.mark.parametrize(
    ("dtype", "shape", "size"),
    [
        ("bf16", (3, 5), 30),
        ("f32", (), 4),
        ("pred", (9,), 9),
        ("s4", (3,), 2),
        ("f8e4m3fn", (10,), 10),
        ("c64", (2,), 16),
        ("c128", (2,), 32),
        ("f64", (0, 4), 0),
        ("token", (), 0),
    ],
)
def test_bytes_of_an_array(dtype, shape, size):
    assert Array(dtype, shape).bytes == size


def test_bytes_of_a_tuple(main):
    assert main["out"].bytes == 256 + 8


@pytest.mark.parametrize(
    ("text", "callees"),
    [
        ("conditional(%n, %x, %y), branch_computations={%a, %b.1}", ("a", "b.1")),
        ("conditional(%p, %x, %y), true_computation=%t, false_computation=%f", ("t", "f")),
        ("while(%x), condition=%c, body=%b", ("b", "c")),
        ("call(%x), to_apply=%f", ("f",)),
        ("all-reduce(%x), replica_groups={}, to_apply=%add", ()),
        ("reduce(%x, %y), dimensions={0}, to_apply=%add", ()),
    ],
)
def test_callees(text, callees):
    module = parse(f"ENTRY %main () -> f32[] {{\n  ROOT %r = f32[] {text}\n}}\n")
    assert module.computations["main"].instructions["r"].callees == callees


def test_a_text_without_an_entry():
    with pytest.raises(ValueError, match="expected an ENTRY computation, found none"):
        parse("HloModule nothing\n")


@pytest.mark.parametrize("end", ["add((%x, %y)", 'custom-call(), backend_config={"a":"}'])
def test_an_instruction_that_never_ends(end):
    with pytest.raises(ValueError, match="expected the end of r, found none"):
        parse(f"ENTRY %main () -> f32[] {{\n  ROOT %r = f32[] {end}\n")


def test_what_the_compiler_prints(compiled):
    module = parse(compiled("layers"))
    main = module.computations[module.entry]
    parameters = [i.arrays for i in main.instructions.values() if i.opcode == "parameter"]
    assert sorted(parameters, key=lambda arrays: arrays[0].dtype) == [
        (Array("bf16", (256, 2048)),),
        (Array("f32", (6, 128, 2048)),),
    ]
    assert main.instructions[main.root].arrays == (Array("f32", (6, 128, 2048)),)
    # Every operand is an instruction of the same computation.
    for computation in module.computations.values():
        for instruction in computation.instructions.values():
            if instruction.opcode not in ("parameter", "constant", "iota"):
                assert set(instruction.operands) <= set(computation.instructions), instruction
    # The product of a layer leads back to its line.
    lines = Path(__file__).with_name("programs.py").read_text(encoding="utf-8").splitlines()
    line = next(n for n, text in enumerate(lines, 1) if "jnp.tanh(x @ constrained(" in text)
    products = [
        module.sources(instruction)
        for computation in module.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "convolution"
    ]
    assert products
    sources = [source for product in products for source in product]
    assert any(source.endswith(f"tests/cost/programs.py:{line}") for source in sources), products
