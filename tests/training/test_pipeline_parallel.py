"""A pipeline of stages computes what one device does: loss, gradients and reports, whatever the other axes split."""

import contextlib
import functools
import secrets

import flax.linen as nn
import jax
import numpy as np
import pytest
from short_runs import FIELDS, LENGTH, ROWS, SMALL, batches

from effjax import models, pytree, registry
from effjax.depth import pipeline
from effjax.ffn.mixture import MixtureOfExperts
from effjax.training import config as configs
from effjax.training import planning, sharding
from pallas_kernels import topology

OBJECTIVE = registry.build("objective", {"name": "next_token"})
needs_libtpu = pytest.mark.skipif(not topology.is_available(), reason="needs libtpu")

# Model, fields, mesh, micro-batches. Jitter is other noise for each micro-batch.
NO_JITTER = {"ffn.jitter": 0.0}
CASES = [
    ("transformer", {}, {"pipeline": 2, "data": 2, "tensor": 2}, 4),
    ("switch", NO_JITTER, {"pipeline": 2, "fsdp": 2, "expert": 2}, 2),
    ("transformer", {"remat": "dots"}, {"pipeline": 4, "fsdp": 2}, 4),
    ("transformer", {}, {"pipeline": 2}, 8),
    ("transformer", {}, {"pipeline": 2, "data": 2, "context": 2}, 2),
    ("mamba2", {}, {"pipeline": 2, "data": 2, "context": 2}, 4),
    ("based", {"num_layers": 10}, {"pipeline": 2, "fsdp": 2, "tensor": 2}, 4),
    ("adamoe", {}, {"pipeline": 4, "expert": 2}, 4),
    ("recursive", {"num_layers": 8}, {"pipeline": 2, "fsdp": 2, "tensor": 2}, 4),
    ("mor", {"num_layers": 8}, {"pipeline": 2, "data": 2, "tensor": 2}, 2),
]


def cases():
    """All but the first are for `-m slow`."""
    for i, case in enumerate(CASES):
        axes = "-".join(f"{axis}{size}" for axis, size in case[2].items())
        marks = [pytest.mark.slow] if i else []
        yield pytest.param(*case, id=f"{case[0]}-{axes}-{case[3]}", marks=marks)


@pytest.fixture
def seed():
    seed = secrets.randbelow(2**31)
    print(f"seed {seed}")
    return seed


def small(name, **fields):
    scanned = {"num_layers": 4, "scan_layers": True}
    return models.create(name, **(SMALL | FIELDS[name] | scanned | fields))


def batch_of(name, seed):
    """Packed rows, one with padding."""
    batch = next(batches(name, seed))
    batch["segment_ids"][3, 40:] = 0
    batch["loss_mask"][3, 40:] = 0
    return batch


def loss_and_gradients(model, params, batch):
    key = jax.random.key(1)
    objective = lambda p: OBJECTIVE(model, {"params": p}, batch, key)  # noqa: E731
    return jax.value_and_grad(objective, has_aux=True)(params)


def on_one_device(model, params, batch, num_stages, num_parts, num_microbatches):
    """The mean over micro-batches, by their targets.

    The rows of each stage are in `num_parts` parts, of each of which its micro-batches have a share.
    """

    def micro_batch(x, m):
        slots = num_microbatches // num_stages
        stage, slot = divmod(m, slots)
        parts = x.reshape(num_stages, num_parts, slots, -1, LENGTH)
        return parts[stage, :, slot].reshape(-1, LENGTH)

    step = jax.jit(functools.partial(loss_and_gradients, model))
    total = None
    for m in range(num_microbatches):
        rows = {name: micro_batch(x, m) for name, x in batch.items()}
        share = rows["loss_mask"].sum() / batch["loss_mask"].sum()
        found = jax.tree.map(lambda x, w=share: w * np.asarray(x), step(params, rows))
        total = found if total is None else jax.tree.map(np.add, total, found)
    return total


@pytest.mark.parametrize(("name", "fields", "sizes", "num_microbatches"), list(cases()))
def test_loss_and_gradients_are_those_of_one_device(name, fields, sizes, num_microbatches, seed):
    model, batch = small(name, **fields), batch_of(name, seed)
    tokens = np.zeros((1, LENGTH), np.int32)
    params = jax.jit(model.init)(jax.random.key(seed % 1000), tokens)["params"]
    with mesh_of(**sizes) as mesh:
        places = sharding.state_shardings(params, mesh)
        piped = model.clone(num_microbatches=num_microbatches)
        step = jax.jit(functools.partial(loss_and_gradients, piped), out_shardings=(None, places))
        split = jax.device_put((params, batch), (places, sharding.batch_sharding(mesh)))
        compiled = step.lower(*split).compile()
        (loss, found), found_gradients = compiled(*split)
        parts = (
            sizes["pipeline"],
            sharding.batch_shards(mesh) // sizes["pipeline"],
            num_microbatches,
        )
    # The load of experts is that of a micro-batch; all else is as if there were none.
    parts = parts if isinstance(model.ffn, MixtureOfExperts) else (1, 1, 1)
    (want, report), gradients = on_one_device(model, params, batch, *parts)
    assert "collective-permute" in compiled.as_text()
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    for part in found.keys() - {"weight"}:
        np.testing.assert_allclose(found[part], report[part], rtol=1e-4, atol=1e-6, err_msg=part)
    for path, ours, theirs in zip(
        pytree.paths(gradients),
        jax.tree.leaves(found_gradients),
        jax.tree.leaves(gradients),
        strict=True,
    ):
        distance = np.linalg.norm(ours - theirs)
        assert distance <= 1e-4 * np.linalg.norm(theirs) + 1e-7, path


@contextlib.contextmanager
def mesh_of(**sizes):
    """The mesh, in force with the rules of the library."""
    mesh = sharding.make_mesh(sizes)
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.AXIS_RULES):
        yield mesh


def test_no_row_leaves_its_device_to_wait_for_the_pipeline(rng):
    """Rows are cut into micro-batches where they lie, and come back in their order."""
    rows = rng.normal(size=(16, 3)).astype(np.float32)
    with mesh_of(pipeline=2, data=2) as mesh:
        given = jax.device_put(rows, sharding.batch_sharding(mesh))
        where = jax.NamedSharding(mesh, jax.P("pipeline", None, "data"))
        split = jax.jit(functools.partial(pipeline.split, num_microbatches=4), out_shardings=where)
        stream = split(given)
        assert stream.shape == (2, 2, 4, 3)
        held = {shard.device: np.asarray(shard.data) for shard in given.addressable_shards}
        for shard in stream.addressable_shards:
            mine = np.asarray(shard.data).reshape(-1, 3)
            assert set(map(bytes, mine)) == set(map(bytes, held[shard.device]))
        assert "all-to-all" not in split.lower(given).compile().as_text()
        np.testing.assert_array_equal(jax.jit(pipeline.merge)(stream), rows)


def test_reports_count_by_tokens(rng):
    """Against sums in NumPy: means by tokens, losses added over stages, and what there is of each token in its row."""
    segments = (np.arange(5) < rng.integers(1, 6, size=(8, 1))).astype(np.int32)
    values = rng.normal(size=(2, 4)).astype(np.float32)
    of_tokens = rng.normal(size=(8, 5)).astype(np.float32)
    with mesh_of(pipeline=2, data=2):
        streams = np.asarray(pipeline.split(of_tokens, 4)).reshape(4, 2, 5)
        reports = {"loss/x": values, "depth": values, "token/y": np.stack([streams, streams])}
        found = pipeline.of_batch(reports, segments)
    # Two micro-batches wait at each stage; each has its share of both parts of the stage's rows.
    tokens = segments.reshape(2, 2, 2, 5).sum(axis=(1, 3)).reshape(-1)
    mean = (values * tokens).sum() / tokens.sum()
    np.testing.assert_allclose(found["loss/x"], mean, rtol=1e-5)
    np.testing.assert_allclose(found["depth"], mean / 2, rtol=1e-5)
    np.testing.assert_allclose(found["token/y"], 2 * of_tokens, rtol=1e-6)


@pytest.mark.parametrize(
    ("rows", "repeats", "count", "said"),
    [
        (8, 4, 4, None),
        (6, 4, 4, "no pipeline for 6 rows: they do not divide into 8"),
        (8, 3, 4, "no pipeline for 3 repeats of the layers: they do not divide into 2"),
        (9, 4, 3, "no pipeline for 3 micro-batches: they do not divide into 2"),
    ],
)
def test_what_does_not_divide_is_no_pipeline_and_logged(rows, repeats, count, said, caplog):
    pipeline._say.cache_clear()  # a process is told once, which other tests may have been
    with mesh_of(pipeline=2, data=2):
        assert pipeline.takes(rows, repeats, count) == (said is None)
    assert said is None or said in caplog.text
    assert not pipeline.takes(8, 4, 4)  # without a mesh


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.scan_layers": False}, "mesh.pipeline=2 with model.scan_layers=False; valid: True"),
        ({"model.num_microbatches": 3}, "model.num_microbatches=3; valid: a multiple of 2"),
        ({"model.num_layers": 5}, "mesh.pipeline=2 with model.num_layers=5.* of 5 repeats"),
        ({"data.batch_size": 12}, "data.batch_size=12; valid: a multiple of 8 .*num_microbatches"),
    ],
)
def test_what_cannot_be_a_pipeline_is_refused(changes, message):
    config = configs.default("transformer", num_layers=4, scan_layers=True, num_microbatches=4)
    config.mesh.update(pipeline=2, data=2)
    config.data.batch_size = 16
    configs.check(config)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        configs.check(config)


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        ({"sharing": "sequence"}, "'mixture_of_recursions' make a stack of 1 repeats"),
        ({"sharing": "cycle", "kv_sharing": "shared"}, "kv_sharing='shared' with a pipeline"),
    ],
)
def test_recursions_that_cannot_be_a_pipeline_are_refused(depth, message):
    depth = {"num_recursions": 2, "kv_sharing": "recursion_wise"} | depth
    config = configs.default("mor", num_layers=8, scan_layers=True, num_microbatches=2, depth=depth)
    config.mesh.update(pipeline=2, data=1)
    with pytest.raises(ValueError, match=message):
        configs.check(config)


def test_parameters_are_those_of_scanned_layers_without_a_pipeline():
    """So a checkpoint goes from mesh to mesh."""
    model, tokens = small("transformer"), np.zeros((1, LENGTH), np.int32)
    plain = jax.eval_shape(model.init, jax.random.key(0), tokens)
    with mesh_of(pipeline=2, data=2):
        piped = model.clone(num_microbatches=4)
        found = jax.eval_shape(piped.init, jax.random.key(0), np.zeros((ROWS, LENGTH), np.int32))
    assert found == plain


@pytest.mark.slow
def test_decoding_on_such_a_mesh_gives_the_same_logits(seed):
    """Without a pipeline: every device takes its rows through all layers."""
    model = small("transformer", num_layers=4, num_microbatches=2)
    tokens = np.random.default_rng(seed).integers(32, size=(4, 8), dtype=np.int32)
    variables = jax.jit(model.init)(jax.random.key(seed), tokens)
    want = model.apply(variables, tokens).logits
    with mesh_of(pipeline=2, data=2) as mesh:
        variables = jax.device_put(variables, sharding.state_shardings(variables, mesh))
        step = jax.jit(lambda v, t, s: model.apply(v, t, state=s))
        state = model.init_state(4, 8)
        first = step(variables, tokens[:, :7], state)
        last = step(variables, tokens[:, 7:], first.state)
    np.testing.assert_allclose(first.logits, want[:, :7], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(last.logits, want[:, 7:], rtol=1e-4, atol=1e-5)


def planned(name, topology_name, pipeline_stages, **mesh):
    config = configs.default(name, num_layers=4, scan_layers=True, num_microbatches=4)
    config.data.update(batch_size=16, seq_len=256)
    config.mesh.update(data=1, pipeline=pipeline_stages, **mesh)
    return planning.plan(config, topology_name)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("name", ["transformer", "mamba2"])
def test_stages_of_tpus_hold_their_layers_and_pass_on_what_they_made(name):
    """Through the kernels, each stage on 2 x 2 chips, for chips that are not here."""
    piped = planned(name, "v5e:4x2", 2, fsdp=2, tensor=2)
    whole = planned(name, "v5e:2x2", 1, fsdp=2, tensor=2)
    passed = {tuple(x["axes"]): x for x in piped.work.collectives if "permute" in x["kind"]}
    # Forward and backward, each of the 4 + 2 - 1 steps hands on what was made and what waits.
    assert passed[("pipeline",)]["times"] >= 2 * 2 * (4 + 2 - 1)
    layers = whole.memory.parameters - piped.memory.parameters
    embedding = 260 * 128 * 4 / 4
    assert layers == pytest.approx((whole.memory.parameters - embedding) / 2, rel=0.05)
    # Each of the M + S - 1 steps computes a micro-batch's worth, where M would do.
    assert piped.work.matmul_flops > 0.5 * whole.work.matmul_flops
