"""Plans of whole steps: their FLOPs beside counts by hand, their memory beside that of a run, and what is refused."""

import json
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import pytest

from effjax import data, models, optim, registry
from effjax.evaluation.cost import measure_memory
from effjax.training import config as configs
from effjax.training import lowering, planning, sharding
from effjax.training.planning import report, topologies
from effjax.training.state import initialise, initialiser
from pallas_kernels import topology

D, HIDDEN, VOCAB, LENGTH, ROWS = 32, 80, 260, 18, 8
needs_libtpu = pytest.mark.skipif(not topology.is_available(), reason="needs libtpu")


def recipe(model, num_layers, **mesh):
    """A tiny config, whose attention is the plain one: all pairs of tokens, whether they are masked or not."""
    depth = {"sharing": "cycle"} if model == "mor" else {}
    config = configs.default(model, d_model=D, num_layers=num_layers, depth=depth)
    config.model.scan_layers = model == "transformer"
    config.model.mixers[0].update(num_heads=4, num_kv_heads=4, implementation="reference")
    config.model.ffn.hidden_dim = HIDDEN
    config.data.update(seq_len=LENGTH, batch_size=ROWS)
    config.mesh.update(data=1, fsdp=8, **mesh)
    return config


def forward_by_hand(passes, keys):
    """Forward FLOPs of a row: of `passes`, tuples of (layers, tokens), and of the head.

    A layer has four square products, and three of the feed-forward; each token meets `keys(tokens)` keys, twice.
    """
    linear = 2 * (4 * D * D + 3 * D * HIDDEN)
    layers = sum(count * tokens * (linear + 2 * 2 * D * keys(tokens)) for count, tokens in passes)
    return layers + LENGTH * 2 * D * VOCAB


PASSES = {
    "transformer": [(4, LENGTH)],
    # A third of the tokens leaves after each of three recursions.
    "mor": [(1, LENGTH), (1, LENGTH * 2 // 3), (1, LENGTH // 3)],
}


@pytest.fixture(scope="module", params=["transformer", pytest.param("mor", marks=pytest.mark.slow)])
def planned(request):
    """(name, config, plan)."""
    config = recipe(request.param, num_layers=sum(count for count, _ in PASSES[request.param]))
    return request.param, config, planning.plan(config, "cpu")


def test_the_programs_flops_are_those_counted_by_hand(planned):
    """Each product has two more in the backward pass; nothing is recomputed."""
    name, _, plan = planned
    by_hand = ROWS * 3 * forward_by_hand(PASSES[name], keys=lambda tokens: tokens)
    assert plan.work.matmul_flops * plan.num_chips == pytest.approx(by_hand, rel=0.02)


def test_the_models_flops_are_those_counted_by_hand(planned):
    """A causal token meets half of the keys on average."""
    name, _, plan = planned
    by_hand = ROWS * 3 * forward_by_hand(PASSES[name], keys=lambda tokens: (tokens + 1) / 2)
    assert plan.model_flops == pytest.approx(by_hand, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("num_microbatches", [2, 4])
def test_a_pipelines_program_has_the_steps_without_work_too(num_microbatches):
    """Each of the M + S - 1 steps of a stage computes the layers of a micro-batch, of which there are M."""
    config = recipe("transformer", 4)
    config.model.num_microbatches = num_microbatches
    config.mesh.update(pipeline=2, fsdp=4)
    config.data.batch_size = rows = 2 * ROWS
    plan = planning.plan(config, "cpu")
    layers = forward_by_hand([(4, LENGTH)], keys=lambda tokens: tokens)
    head = forward_by_hand([], keys=None)
    bubble = (num_microbatches + 2 - 1) / num_microbatches
    by_hand = rows * 3 * ((layers - head) * bubble + head)
    assert plan.work.matmul_flops * plan.num_chips == pytest.approx(by_hand, rel=0.02)
    assert plan.settings["num_microbatches"] == num_microbatches
    assert plan.model_flops < rows * 3 * layers


def test_memory_is_that_of_a_run(planned):
    _, config, plan = planned
    config = configs.resolve(config)
    mesh = sharding.make_mesh(config["mesh"])
    model, training = models.create(**config["model"]), config["training"]
    optimizer, _ = optim.build(config["optimizer"], training["num_steps"])
    objective = registry.build("objective", config["objective"])
    batch = next(data.build(config["data"], split="train"))
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.AXIS_RULES):
        init = initialiser(model, optimizer, config)
        shardings = jax.tree.map(lambda x: x.sharding, sharding.abstract_state(init, mesh))
        state = initialise(init, shardings)
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        step = (
            lowering.trace(model, objective, optimizer, training, state, batch, mesh)
            .lower()
            .compile()
        )

    def held(tree):
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

    assert plan.memory.parameters == held(state.params)
    assert plan.memory.optimizer == held(state.opt_state)
    assert plan.memory.total == measure_memory(step).peak
    parts = plan.memory.parameters + plan.memory.optimizer + plan.memory.other
    assert parts + plan.memory.temporaries == plan.memory.total
    assert plan.memory.other >= held(batch)


def test_parameters_that_are_split_are_gathered_along_their_axis(planned):
    _, _, plan = planned
    gathered = [row for row in plan.work.collectives if row["kind"] == "all-gather"]
    assert gathered
    assert {tuple(row["axes"]) for row in plan.work.collectives} == {("fsdp",)}


def test_a_plan_is_printed_and_written(planned, tmp_path):
    _, _, plan = planned
    path, picture = report.write(plan, tmp_path / "new", "plan")
    written = json.loads(path.read_text())
    assert written["memory"]["total"] == plan.memory.total
    assert written["verdict"] == plan.verdict
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("topology_name", "changes", "message"),
    [
        ("v7x:2x2", {}, "unknown chip 'v7x'.*known: h100, v4, v5e, v5p, v6e.*such as v5p:8x8x8"),
        ("cpu:4", {}, "unknown chip 'cpu'"),
        (
            "cpu",
            {"mesh.fsdp": 3},
            "has 8 chips and config.mesh=.* uses 3; valid: sizes whose product is 8",
        ),
        ("cpu", {"mesh.fsdp": 16}, "plan.topology='cpu' with config.mesh: .* needs 16 devices"),
        ("cpu", {"data.batch_size": 12}, "data.batch_size=12; valid: a multiple of 8"),
        ("cpu", {"data.seq_len": 4096}, "longer than model.max_seq_len"),
    ],
)
def test_what_cannot_work_is_refused(topology_name, changes, message):
    config = recipe("transformer", 2)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        planning.plan(config, topology_name)


@needs_libtpu
def test_a_shape_that_no_tpu_has_is_refused():
    with pytest.raises(ValueError, match="not known to libtpu; valid: v4, v5e, v5p, v6e"):
        planning.plan(recipe("transformer", 2), "v5e:3x5")


@pytest.mark.slow
@needs_libtpu
def test_on_tpus_a_scanned_step_has_the_products_of_an_unrolled_one():
    """The trips of a TPU's loops follow from the loops themselves; the compiler notes none."""
    plans = []
    for scan_layers in (True, False):
        # One head of 128 dimensions: smaller ones share registers, and their products are of all that are in one.
        heads = {"num_heads": 1, "num_kv_heads": 1}
        config = configs.default("transformer", num_layers=3, scan_layers=scan_layers, d_model=128)
        config.model.mixers[0].update(heads)
        config.data.batch_size = 8
        config.mesh.update(data=1, fsdp=4)
        plans.append(planning.plan(config, "v5e:2x2"))
    scanned, unrolled = plans
    assert scanned.work.unknown_loops == 0
    assert scanned.work.matmul_flops == pytest.approx(unrolled.work.matmul_flops, rel=1e-3)
    assert scanned.work.matmul_flops * 4 == pytest.approx(scanned.model_flops, rel=0.5)
    assert {tuple(row["axes"]) for row in scanned.work.collectives} == {("fsdp",)}
    assert scanned.memory.parameters < unrolled.memory.total < scanned.memory.capacity


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("what", ["optimizer", "activations"])
def test_what_is_kept_by_the_hosts_passes_their_links(what):
    """There and back at each step, which takes longer for it."""
    plans = []
    for is_offloaded in (False, True):
        config = configs.default("transformer", num_layers=4, scan_layers=True, remat="dots")
        config.data.update(batch_size=16, seq_len=256)
        config.mesh.update(data=1, fsdp=4)
        if is_offloaded and what == "optimizer":
            config.training.offload_optimizer = True
        elif is_offloaded:
            config.model.remat = "offload"
        plans.append(planning.plan(config, "v5e:2x2"))
    here, there = plans
    assert here.work.to_host_bytes == here.work.from_host_bytes == here.memory.host == 0
    # Tiles of the memory pad what lies there, and not what is sent.
    passed = there.work.to_host_bytes
    assert there.work.from_host_bytes == passed > 0.5 * there.memory.host > 0
    if what == "optimizer":
        assert passed == pytest.approx(here.memory.optimizer, rel=1e-3)
    assert there.pace.roofs["host link"] == passed / topologies.HOST_LINKS["v5e"]
    assert there.pace.times.host > 0 == here.pace.times.host
    assert there.pace.seconds > here.pace.seconds


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize(
    ("name", "axes"),
    [("transformer", {"context": 4}), ("mamba2", {"context": 2, "data": 2})],
)
def test_rows_that_tpus_share_pass_keys_or_states_along_the_row(name, axes):
    """Around the ring or down the line, forward and backward, in every layer."""
    config = configs.default(name, num_layers=2, scan_layers=True)
    config.data.update(batch_size=8, seq_len=1024)
    config.model.max_seq_len = 1024
    config.mesh.update({"data": 1} | axes)
    plan = planning.plan(config, "v5e:2x2")
    passed = [x for x in plan.work.collectives if x["kind"] == "collective-permute"]
    assert {tuple(x["axes"]) for x in passed} == {("context",)}
    assert sum(x["times"] for x in passed) >= 2 * config.model.num_layers
    assert plan.pace.roofs["network"] > 0


@pytest.mark.slow
@pytest.mark.skipif(not topology.is_available("gpu"), reason="needs JAX's CUDA plugin")
def test_a_plan_for_gpus_that_are_described():
    """Two hosts of two: between hosts is a network, and what is exchanged with them takes its time."""
    config = configs.default("transformer", num_layers=2, scan_layers=True)
    config.data.update(batch_size=8, seq_len=256)
    config.mesh.update(data=2, fsdp=2)
    plan = planning.plan(config, "h100:2x2")
    assert plan.num_chips == 4
    assert plan.memory.fits and 0 < plan.memory.total < plan.memory.capacity
    assert {axis for row in plan.work.collectives for axis in row["axes"]} == {"data", "fsdp"}
    # Nothing estimates cycles, so that a step takes at least what its operations and bytes do.
    assert not plan.pace.is_estimate
    assert plan.verdict.startswith("fits") and "at least" in plan.verdict
    assert plan.work.matmul_flops * 4 == pytest.approx(plan.model_flops, rel=0.5)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("name", ["switch", "adamoe"])
def test_tokens_go_to_the_experts_of_tpus_and_not_experts_to_the_tokens(name):
    """There and back in both layers, forward and backward; no chip gathers the experts of another."""
    config = configs.default(name, num_layers=2)
    config.data.update(batch_size=16, seq_len=512)
    config.mesh.update(data=1, expert=4)
    plan = planning.plan(config, "v5e:2x2")
    found = {row["kind"]: row for row in plan.work.collectives}
    assert found.keys() == {"all-to-all", "all-reduce"}
    assert found["all-to-all"]["times"] == 2 * 2 * 2
    # Of gradients only those are summed that are not of experts, which are most of what a chip holds.
    assert found["all-reduce"]["bytes"] < plan.memory.parameters / 2


@pytest.mark.slow
@needs_libtpu
def test_the_command_plans_with_the_schedules_of_kernels(tmp_path):
    root = pathlib.Path(__file__).parents[3]
    flags = ("--config.data.batch_size=8", "--config.mesh.fsdp=-1", "--config.mesh.data=1")
    command = (sys.executable, "train.py", "--config=configs/transformer.py", *flags)
    found = subprocess.run(
        (*command, "--plan.topology=v5e:2x2", f"--workdir={tmp_path}"),
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    plan = json.loads((tmp_path / "plan-v5e-2x2.json").read_text())
    assert plan["verdict"] in found.stdout.replace("\n", " ")
    assert plan["fits"] and plan["num_chips"] == 4
    # Softmax keeps a kernel longer than its products do.
    assert plan["pace"]["times"]["kernels"] > 0
    assert (tmp_path / "plan-v5e-2x2.png").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--plan.search"], "--plan.search without --plan.topology"),
        (["--plan.topology=v7:2x2"], "unknown chip 'v7'"),
        (["--plan.topology=cpu", "--plan.decode_context=8"], "--plan.decode_context without"),
    ],
)
@pytest.mark.slow
def test_wrong_flags_are_one_message(flags, message, tmp_path):
    root = pathlib.Path(__file__).parents[3]
    command = (sys.executable, "train.py", "--config=configs/transformer.py", *flags)
    found = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert found.returncode == 2
    assert message in found.stderr
    assert "Traceback" not in found.stderr
