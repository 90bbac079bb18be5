"""The benchmark of the kernels: what it reads from a schedule, its arithmetic, and a run of it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import pallas_kernels
from benchmarks.kernels import page, plot, report, suite, timing
from benchmarks.kernels.case import BOTH, FORWARD, num_bytes
from benchmarks.kernels.cases import CASES
from benchmarks.kernels.cases.attention import causal_tiles
from benchmarks.kernels.cases.grouped_matmul import visited_tiles
from benchmarks.kernels.roofline import CHIPS, Product, Work, roofline
from benchmarks.kernels.schedules import schedules
from pallas_kernels import topology
from pallas_kernels.bundles import Window, read_kernel

# In the form of libtpu 0.0.51's dump: a grid of 6 steps in a loop of 8, in a step two regions of which one runs, of 1
# and 3 bundles, and a loop from 2 to 10 by 4 of 2 bundles.
BUNDLES = """\
= control target key start
LB: loop body
= control target key end

     0   :  { %s9_s0 = smov.u32 0 /* copy for cssa */ } /* output window allocation for operator output 0. The \
window shape is bf16[1,128], while the full shape is bf16[6,200]. */
   0x1   :  { %s8_s1 = smov.u32 2 }
   0x2 LB: > { %s5_s5 = sphi %s9_s0, %s6_s6 /* phi copy :: iteration index, stage = 0 */ } /* Start region 9 */
   0x3   : > { %11 = sbr.rel (%p1_p1) target = $region4 }
   0x4   : > { %v1 = vadd.f32 %v0, %v0 } /* Start region 3 */
   0x5 PF: > { %12 = sbr.rel (%p2_p2) target = $region6 } /* Start/End empty region 4 :: Start region 5 */
   0x6   : > { %v1 = vmatmul.f32 %v0 }
   0x7   : > { %v2 = vmatmul.f32 %v0 }
   0x8   : > {}
   0x9 PF: > {} /* Start/End empty region 6 */
   0xa LB: >> { %s3_s3 = sphi %s8_s1, %s4_s4  ;;  %s4_s4 = sadd.s32 4, %s3_s3 } /* Start region 7 */
   0xb   : >> { %13 = sbr.rel (!%p4_p4) target = $region7  ;;  %p4_p4 = scmp.ge.s32.totalorder %s4_s4, 10 \
/* loop exit test */ }
   0xc   : > { %s6_s6 = sadd.s32 1, %s5_s5 }
   0xd   : > { %p3_p3 = scmp.ge.s32.totalorder %s6_s6, 8 /* loop exit test */ }
   0xe   :  { %14 = sbr.rel (!%p3_p3) target = $region9 }
   0xf   :  {} /* exit bundle: %kernel.1 = custom-call(%x) */
"""
UTILIZATION = "== CAPACTIY:\nMATMUL, VALU\n    4     4\n== UTILIZATION:\n" + "".join(
    f"{matmul} 0\n" for matmul in (0, 0, 0, 0, 0, 0, 4, 3, 0, 0, 1, 0, 0, 0, 0, 0)
)


@pytest.mark.parametrize(
    "move, matrix_column, add",
    [
        ("smov.u32", "MATMUL", "sadd.s32 4,"),
        ("smov.u32", "MATMUL", "sadd.s32 (!%p1_p1), 4,"),
        ("smov", "MXU", "sadd.s32 4,"),
    ],
    ids=["0.0.51", "predicated", "0.0.50"],
)
def test_a_schedule_is_read_from_a_dump(move, matrix_column, add):
    utilization = UTILIZATION.replace("MATMUL", matrix_column)
    bundles = BUNDLES.replace("smov.u32", move).replace("sadd.s32 4,", add)
    kernel = read_kernel("kernel.1", bundles, utilization)
    # Of the step: bundles 2, 3, 5, 9, 12, 13 and 14, the longer region of 3, and 2 trips of 2 bundles.
    assert kernel.step.bundles == 7 + 3 + 2 * 2
    assert kernel.step.all_regions == kernel.step.bundles + 1
    assert kernel.steps == 6
    assert kernel.cycles == 3 + 6 * 14
    assert kernel.cycles_with_all_regions == 3 + 6 * 15
    assert kernel.matmul_utilization == pytest.approx((4 + 3 + 2 * 1) / (4 * 14))
    assert kernel.windows == (Window((1, 128), (6, 200)),)
    assert kernel.windows[0].num_blocks == (6, 2)


def test_steps_and_trips_that_the_code_does_not_hold_are_said_to_be_unknown():
    text = BUNDLES.replace("%s6_s6, 8 /* loop", "%s6_s6, %s7_s7 /* loop")
    kernel = read_kernel("kernel.1", text.replace("%s4_s4, 10", "%s4_s4, %s2"), UTILIZATION)
    assert kernel.steps is None and kernel.cycles is None
    assert kernel.num_unknown_loops == 1
    assert kernel.step.bundles == 7 + 3 + 2


def test_roofline_arithmetic():
    v5e, v6e = CHIPS["v5e"], CHIPS["v6e"]
    assert v5e.clock == pytest.approx(1.5e9, rel=0.01)
    assert v6e.clock == pytest.approx(1.75e9, rel=0.01)
    # A product of 1024 x 1024 x 1024 is 2 GFLOP, at 131072 a cycle.
    product = roofline(v5e, [Work((Product(1024, 1024, 1024),))], 3 * 2 * 1024**2)
    assert (product.cycles, product.bound) == (2**31 / 2**17, "matmul")
    scan = roofline(v6e, [Work(vector_flops=4096 * 1000)], 0)
    assert (scan.cycles, scan.bound) == (1000, "vector")
    copy = roofline(v6e, [Work()], 1640)
    assert copy.cycles == pytest.approx(v6e.clock * 1e-9) and copy.bound == "memory"


def test_bytes_of_a_pass():
    (case,) = CASES["softmax"](True)
    array = 512 * 4096 * 2
    assert num_bytes(case, FORWARD, jnp.bfloat16) == 2 * array
    assert num_bytes(case, BOTH, jnp.bfloat16) == 5 * array


def test_visited_tiles_are_counted_as_they_lie(rng):
    time, block = 1000, 96
    allowed = np.tril(np.ones((time, time), bool))
    padded = np.pad(allowed, (0, -time % block))
    tiles = padded.reshape(len(padded) // block, block, -1, block).any((1, 3))
    assert causal_tiles(time, block) == tiles.sum()
    ends = [*sorted(rng.integers(0, time, 6)), time]
    group = np.searchsorted(ends, np.arange(time), side="right")
    assert visited_tiles(ends, block) == len(set(zip(group, np.arange(time) // block, strict=True)))


@pytest.mark.parametrize("op", CASES)
def test_peers_compute_what_the_op_does(op):
    (case,) = CASES[op](True)
    inputs = case.make_inputs(jax.random.key(0), jnp.float32)
    own = next(x for x in case.contenders if x.name == "xla")
    peers = [x for x in case.contenders if x.is_peer and x.platforms is None]
    assert peers
    outs = jax.jit(lambda inputs: [x.function(**inputs) for x in [own, *peers]])(inputs)
    for peer, got in zip(peers, outs[1:], strict=True):
        error = jnp.linalg.norm(got - outs[0]) / jnp.linalg.norm(outs[0])
        assert error < 1e-4, f"{peer.name}: {error}"


@pytest.mark.slow
@pytest.mark.skipif(not topology.is_available(), reason="NOT PROVEN: libtpu is not installed")
def test_schedules_come_from_the_compiler():
    found = schedules("decode_attention", "v5e", quick=True)
    (case,) = CASES["decode_attention"](True)
    assert set(found) == {(case.shape, name, FORWARD) for name in ("tpu", "jax.nn")}
    schedule = found[case.shape, "tpu", FORWARD]["schedule"]
    (kernel,) = schedule["kernels"]
    assert kernel["steps"] == 4, "two of eight rows of the batch in each"
    assert kernel["cycles"] > kernel["steps"] * kernel["step_bundles"] > 0
    assert 0 < kernel["matmul_utilization"] < 1
    # At least one block of keys and of values.
    assert 2 * 128 * 128 * 2 < kernel["vmem_bytes"] < 128 * 2**20
    assert found[case.shape, "jax.nn", FORWARD]["schedule"]["kernels"] == []
    assert found[case.shape, "jax.nn", FORWARD]["schedule"]["xla_cycles"] > 0


def test_the_page_holds_cycles_against_roofs_and_peers():
    case = {"op": "softmax", "shape": "[2, 3]", "pass": FORWARD}
    roofs = {"matmul": 0.0, "vector": 10.0, "exponential": 20.0, "memory": 200.0}
    static = {"roofs": roofs, "ratio": 1.5, "cycles": 300}
    rows = [case | {"is_peer": False, "static": {"v5e": static}}]
    rows += [
        case | {"is_peer": True, "static": {"v5e": {"cycles": cycles}}} for cycles in (400, 600)
    ]
    rows.append(case | {"is_peer": False, "static": {"v5e": {"not_run": "loops"}}})
    text = page.document({"rows": rows, "chips": ["v5e"], "versions": {"jax": "1.2"}})
    (line,) = (line for line in text.splitlines() if line.startswith("| softmax"))
    assert line == ("| softmax | [2, 3] | forward | 300 | 20 exponential | 200 | 1.50 | 0.75 |")


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="op='atention' is unknown; valid: attention"):
        suite.run(["atention"], [], quick=True)
    with pytest.raises(ValueError, match="chips='v9' is unknown; valid: v5e, v6e"):
        suite.run(["softmax"], ["v9"], quick=True)


def test_every_op_has_cases():
    assert set(CASES) == set(pallas_kernels.OPS)


def test_a_run_of_one_op(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "_SECONDS", 0)
    results = suite.run(["softmax"], chips=[], quick=True)
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    rows = {(row["implementation"], row["pass"]): row for row in results["rows"]}
    own = {name for name in pallas_kernels.OPS["softmax"] if not name.endswith("_interpret")}
    assert own >= {"tpu", "xla", "reference"}
    assert set(rows) == {
        (name, measured) for name in own | {"jax.nn"} for measured in (FORWARD, BOTH)
    }
    assert rows["tpu", BOTH]["time"] == {"not_run": "needs tpu"}
    for name in ("xla", "reference", "jax.nn"):
        assert 0 < rows[name, BOTH]["time"]["seconds"] < 60
    console = Console(width=120, record=True, quiet=True)
    console.print(report.tables(results))
    plot.save(results, tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").read_bytes().startswith(b"\x89PNG")
