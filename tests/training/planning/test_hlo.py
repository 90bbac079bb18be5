"""Compiled programs as text: what is read from it, and how often each instruction runs."""

import pytest

from effjax.training.planning.hlo import Program, Shape

# A loop of 3 in one of 5, whose counters say so; and a branch.
NESTED = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8,8]{1,0})->f32[8,8]{1,0}}

FileNames
1 "/somewhere/f.py"

%short (p.0: f32[8,8]) -> f32[8,8] {
  ROOT %p.0 = f32[8,8]{1,0} parameter(0)
}

%long (p.1: f32[8,8]) -> f32[8,8] {
  %p.1 = f32[8,8]{1,0} parameter(0)
  ROOT %branch_dot = f32[8,8]{1,0} dot(%p.1, %p.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%inner_body (p.2: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p.2 = (s32[], f32[8,8]{1,0:T(8,128)S(1)}) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %x.2 = f32[8,8]{1,0:T(8,128)S(1)} get-tuple-element(%p.2), index=1
  %two.2 = s32[] constant(2)
  %next.2 = s32[] add(%i.2, %two.2)
  %inner_dot = f32[8,8]{1,0} dot(%x.2, %x.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="a
line of (its author)" stack_frame_id=1}
  ROOT %t.2 = (s32[], f32[8,8]{1,0}) tuple(%next.2, %inner_dot)
}

%inner_condition (p.3: (s32[], f32[8,8])) -> pred[] {
  %p.3 = (s32[], f32[8,8]{1,0}) parameter(0)
  %i.3 = s32[] get-tuple-element(%p.3), index=0
  %seven = s32[] constant(7)
  ROOT %less.3 = pred[] compare(%i.3, %seven), direction=LT
}

%outer_body (p.4: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p.4 = (s32[], f32[8,8]{1,0}) parameter(0)
  %i.4 = s32[] get-tuple-element(%p.4), index=0
  %x.4 = f32[8,8]{1,0} get-tuple-element(%p.4), index=1
  %one.4 = s32[] constant(1)
  %next.4 = s32[] add(%i.4, %one.4)
  %start.4 = s32[] constant(1)
  %init.4 = (s32[], f32[8,8]{1,0}) tuple(%start.4, %x.4)
  %inner = (s32[], f32[8,8]{1,0}) while(%init.4), condition=%inner_condition, body=%inner_body
  %y.4 = f32[8,8]{1,0} get-tuple-element(%inner), index=1
  ROOT %t.4 = (s32[], f32[8,8]{1,0}) tuple(%next.4, %y.4)
}

%outer_condition (p.5: (s32[], f32[8,8])) -> pred[] {
  %p.5 = (s32[], f32[8,8]{1,0}) parameter(0)
  ROOT %i.5 = pred[] custom-call(%p.5), custom_call_target="opaque"
}

ENTRY %main (x: f32[8,8], /*index=1*/which: s32[]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %which = s32[] parameter(1)
  %zero = s32[] constant(0)
  %init = (s32[], f32[8,8]{1,0}) tuple(%zero, /*index=1*/%x)
  %outer = (s32[], f32[8,8]{1,0}) while(%init), condition=%outer_condition, body=%outer_body, TRIPS
  %y = f32[8,8]{1,0} get-tuple-element(%outer), index=1
  ROOT %z = f32[8,8]{1,0} conditional(%which, %y, %y), branch_computations={%short, %long}
}
"""
KNOWN = 'backend_config={"known_trip_count":{"n":"5"},"note":"(a %name)"}'


def times(program):
    return {run.instruction.name: run.times for run in program.runs()}


def test_instructions_run_as_often_as_the_loops_around_them():
    program = Program(NESTED.replace("TRIPS", KNOWN))
    found = times(program)
    # The counter of the inner loop goes from 1 below 7 by 2.
    assert (found["y"], found["inner"], found["inner_dot"]) == (1, 5, 15)
    assert program.unknown_loops == []


def test_of_branches_the_longest_runs():
    found = times(Program(NESTED.replace("TRIPS", KNOWN)))
    assert found["branch_dot"] == 1
    assert "p.0" not in found


def test_a_loop_that_only_the_run_time_knows_counts_once_and_is_named():
    program = Program(NESTED.replace(", TRIPS", ""))
    assert program.unknown_loops == ["outer"]
    assert times(program)["inner_dot"] == 3


def test_what_an_instruction_says():
    program = Program(NESTED.replace("TRIPS", KNOWN))
    body = program.computations["inner_body"]
    counter, array = body.instructions["p.2"].shapes
    assert (counter, array) == (Shape("s32", ()), Shape("f32", (8, 8), memory_space=1))
    assert (counter.num_bytes, array.num_bytes) == (4, 256)
    dot = body.instructions["inner_dot"]
    assert dot.operands == ("x.2", "x.2")
    assert dot.attribute("lhs_contracting_dims") == "1"
    assert 'a\nline of (its author)"' in dot.attributes
    assert body.root.operands == ("next.2", "inner_dot")
    assert [user.name for user in body.users["x.2"]] == ["inner_dot", "inner_dot"]
    outer = program.entry.instructions["outer"]
    assert outer.called == {"condition": ("outer_condition",), "body": ("outer_body",)}
    assert outer.backend_config["note"] == "(a %name)"


@pytest.mark.parametrize(
    ("shape", "num_bytes"),
    [
        (Shape("bf16", (3, 5)), 30),
        (Shape("pred", (7,)), 7),
        (Shape("s4", (3,)), 2),
        (Shape("f8e4m3fn", (4,)), 4),
        (Shape("c64", (2,)), 16),
        (Shape("token", ()), 0),
    ],
)
def test_bytes_of_a_shape(shape, num_bytes):
    assert shape.num_bytes == num_bytes


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        Program("not a program")
