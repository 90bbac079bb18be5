"""How long a schedule takes, beside sums by hand."""

import types

import jax
import numpy as np
import pytest

from effjax.training.planning import arithmetic, collectives, timeline, topologies
from effjax.training.planning.collectives import Network
from effjax.training.planning.hlo import Program
from effjax.training.planning.kernels import Kernel, Product
from pallas_kernels.chips import CHIPS

CHIP, HOST_LINK = CHIPS["v5e"], topologies.HOST_LINKS["v5e"]
# A gather of 4 MB from the one other chip.
GATHER = 4e6 / CHIP.link_bytes_per_second


def cycles(number):
    return f'backend_config={{"window_config":{{"estimated_cycles":"{number}"}}}}'


TRIPS = 'backend_config={"known_trip_count":{"n":"4"}}'


def program(between, in_loop=0):
    return Program(f"""
%body (p: (s32[], f32[1000000])) -> (s32[], f32[1000000]) {{
  %p = (s32[], f32[1000000]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[1000000]{{0}} get-tuple-element(%p), index=1
  %step = f32[1000000]{{0}} negate(%x), {cycles(in_loop)}
  ROOT %t = (s32[], f32[1000000]{{0}}) tuple(%i, %step)
}}

%condition (q: (s32[], f32[1000000])) -> pred[] {{
  %q = (s32[], f32[1000000]{{0}}) parameter(0)
  ROOT %yes = pred[] constant(true)
}}

ENTRY %main (a: f32[1000000]) -> f32[1000000] {{
  %a = f32[1000000]{{0}} parameter(0)
  %zero = s32[] constant(0)
  %start = (f32[1000000]{{0}}, f32[2000000]{{0}}) all-gather-start(%a), replica_groups=[1,2]<=[2], dimensions={{0}}
  %work = f32[1000000]{{0}} negate(%a), {cycles(between)}
  %init = (s32[], f32[1000000]{{0}}) tuple(%zero, %work)
  %loop = (s32[], f32[1000000]{{0}}) while(%init), condition=%condition, body=%body, {TRIPS}
  %done = f32[2000000]{{0}} all-gather-done(%start)
  ROOT %out = f32[1000000]{{0}} get-tuple-element(%loop), index=1
}}
""")


@pytest.fixture
def network():
    devices = [types.SimpleNamespace(coords=(i, 0), process_index=0) for i in range(2)]
    mesh = types.SimpleNamespace(devices=np.array(devices), shape={"data": 2})
    return Network(mesh, CHIP)


def test_a_wait_takes_what_work_beside_it_leaves(network):
    half = round(GATHER * CHIP.clock / 2)
    times = timeline.play(program(between=half), CHIP, HOST_LINK, network, [])
    assert times.between == pytest.approx(GATHER / 2, rel=1e-3)
    assert times.network == pytest.approx(GATHER / 2, rel=1e-3)
    assert times.total == pytest.approx(GATHER, rel=1e-3)


def test_a_loop_takes_its_body_at_each_trip_and_hides_a_gather(network):
    half = round(GATHER * CHIP.clock / 2)
    times = timeline.play(program(between=0, in_loop=half), CHIP, HOST_LINK, network, [])
    assert times.network == 0
    assert times.total == pytest.approx(4 * GATHER / 2, rel=1e-3)


# An array of 4 MB is copied to the host, 3 MB are written into another that lies there, and 3 MB of that read back.
KEPT, PART = "f32[4,750000]{1,0:S(5)}", "f32[1,750000]{1,0}"
OFFLOADED = f"""
ENTRY %main (a: f32[1000000], b: f32[1,750000], kept: f32[4,750000]) -> f32[1,750000] {{
  %a = f32[1000000]{{0}} parameter(0)
  %b = {PART} parameter(1)
  %kept = {KEPT} parameter(2)
  %i = s32[] constant(0)
  %whole = (f32[1000000]{{0:S(5)}}, f32[1000000]{{0}}, u32[]) copy-start(%a)
  %part = (({KEPT}, {PART}, s32[], s32[]), {KEPT}, u32[]) dynamic-update-slice-start(%kept, %b, %i, %i)
  %back = (({KEPT}, s32[], s32[]), {PART}, u32[]) dynamic-slice-start(%kept, %i, %i)
  %work = f32[1000000]{{0}} negate(%a), WORK
  %whole_done = f32[1000000]{{0:S(5)}} copy-done(%whole)
  %part_done = {KEPT} dynamic-update-slice-done(%part)
  ROOT %out = {PART} dynamic-slice-done(%back)
}}
"""


@pytest.mark.parametrize("share_done", [0.0, 0.5, 2.0])
def test_copies_to_the_host_and_back_take_its_link_beside_work(network, share_done):
    """Those of one direction follow each other, those of the other run beside them; of an array a slice is copied."""
    to_host = (4e6 + 3e6) / HOST_LINK
    work = round(share_done * to_host * CHIP.clock)
    program = Program(OFFLOADED.replace("WORK", cycles(work)))
    times = timeline.play(program, CHIP, HOST_LINK, network, [])
    assert times.between == pytest.approx(share_done * to_host, rel=1e-3, abs=1e-9)
    assert times.host == pytest.approx(max(0.0, 1 - share_done) * to_host, rel=1e-3)
    assert times.copies == times.network == 0
    # In the chip's memory each of the three is read or written once, beside what the work reads and writes.
    runs = [x for x in program.runs() if x.instruction.name != "work"]
    moved = [arithmetic.memory_bytes(x.instruction, x.computation, program) for x in runs]
    assert sum(moved) == 4e6 + 3e6 + 3e6


def test_a_copy_to_the_host_that_nothing_runs_beside_is_waited_for(network):
    text = """ENTRY %main (a: f32[1000000]) -> f32[1000000] {
  %a = f32[1000000]{0} parameter(0)
  ROOT %kept = f32[1000000]{0:S(5)} copy(%a)
}
"""
    times = timeline.play(Program(text), CHIP, HOST_LINK, network, [])
    assert times.host == times.total == pytest.approx(4e6 / HOST_LINK)


def test_copies_within_the_chip_take_its_memory_and_a_place_in_it_takes_nothing(network):
    text = """ENTRY %main (a: f32[4,250000]) -> f32[4,250000] {
  %a = f32[4,250000]{1,0} parameter(0)
  %place = f32[9,1000000]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %start = ((f32[4,250000]{1,0}), f32[1,250000]{1,0:S(1)}, u32[]) slice-start(%a), slice={[0:1], [0:250000]}
  %done = f32[1,250000]{1,0:S(1)} slice-done(%start)
  ROOT %out = f32[4,250000]{1,0} bitcast(%a)
}
"""
    times = timeline.play(Program(text), CHIP, HOST_LINK, network, [])
    assert times.copies == times.total == pytest.approx(1e6 / CHIP.hbm_bytes_per_second)


def test_every_chip_has_a_link_to_its_host():
    assert topologies.HOST_LINKS.keys() == CHIPS.keys()
    assert all(
        topologies.host_link(f"{name}:2x2") < CHIPS[name].hbm_bytes_per_second for name in CHIPS
    )


CHAIN = 'frontend_attributes={chain_id="1"}'


def chained(name, operand):
    """A fusion that does a step of a gather, which others begin and end."""
    return (
        f"""
%{name}_steps (p: f32[1000000]) -> f32[1000000] {{
  %p = f32[1000000]{{0}} parameter(0)
  %gather = f32[2000000]{{0}} all-gather(%p), channel_id=7, replica_groups=[1,2]<=[2], {CHAIN}
  ROOT %x = f32[1000000]{{0}} negate(%p)
}}
""",
        f"  %{name} = f32[1000000]{{0}} fusion(%{operand}), kind=kCustom, calls=%{name}_steps",
    )


def test_a_gather_in_steps_runs_once_beside_the_work_of_its_fusions(network):
    half = round(GATHER * CHIP.clock / 2)
    parts = [chained(*names) for names in (("begin", "a"), ("one", "begin"), ("done", "one"))]
    text = "".join(computation for computation, _ in parts)
    begin, one, done = (line for _, line in parts)
    program = Program(f"""{text}
ENTRY %main (a: f32[1000000]) -> f32[1000000] {{
  %a = f32[1000000]{{0}} parameter(0)
{begin}
{one}, {cycles(half)}
{done}
  ROOT %out = f32[1000000]{{0}} bitcast(%done)
}}
""")
    times = timeline.play(program, CHIP, HOST_LINK, network, [])
    assert times.between == pytest.approx(GATHER / 2, rel=1e-3)
    assert times.network == pytest.approx(GATHER / 2, rel=1e-3)
    (row,) = collectives.total(program, network)
    assert (row["times"], row["seconds"]) == (1, pytest.approx(GATHER))


def test_without_a_start_and_a_done_nothing_runs_beside(network):
    text = """ENTRY %main (a: f32[1000000]) -> f32[2000000] {
  %a = f32[1000000]{0} parameter(0)
  ROOT %both = f32[2000000]{0} all-gather(%a), replica_groups=[1,2]<=[2], dimensions={0}
}
"""
    assert timeline.play(Program(text), CHIP, HOST_LINK, network, []).network == pytest.approx(
        GATHER
    )


def test_a_kernel_takes_its_padded_products_or_its_bytes(network):
    text = """ENTRY %main (a: bf16[1024,64]) -> bf16[1024,128] {
  %a = bf16[1024,64]{1,0} parameter(0)
  ROOT %jit_some_kernel.3 = bf16[1024,128]{1,0} custom-call(%a), custom_call_target="tpu_custom_call"
}
"""
    large = Product(rows=1024, contracted=64, columns=128, times=1000)
    small = Product(rows=1024, contracted=64, columns=128, times=1)
    num_bytes = 2 * 1024 * (64 + 128)
    for product, seconds in (
        (large, 2 * large.flops / CHIP.peak_flops),  # 64 of 128 rows of the unit are in use
        (small, num_bytes / CHIP.hbm_bytes_per_second),
    ):
        kernel = Kernel("some_kernel", ((1024, 128),), (product,))
        times = timeline.play(Program(text), CHIP, HOST_LINK, network, [kernel])
        assert times.kernels == pytest.approx(seconds)
        assert times.total == times.kernels


def test_without_an_estimate_an_operation_takes_what_its_products_or_bytes_do(network):
    def product(x):
        return x @ x

    size = 2048
    x = jax.ShapeDtypeStruct((size, size), np.float32)
    text = jax.jit(product).lower(x).compile().as_text()
    times = timeline.play(Program(text), CHIP, HOST_LINK, network, [])
    assert times.products >= 2 * size**3 / CHIP.peak_flops
    assert times.estimated == 0
