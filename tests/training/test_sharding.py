"""Every headliner trains the same on one device and on any mesh."""

import functools
import itertools
import secrets

import flax.linen as nn
import jax
import numpy as np
import pytest

from effjax import models, optim, pytree, registry
from effjax.training import sharding
from effjax.training.state import init_state, initialise
from effjax.training.step import make_train_step

# Routers choose by comparing scores, so a rounding error can move a token that is almost a tie to another expert or
# depth. The rows are long enough that one token among theirs stays within the tolerance.
STEPS, ROWS, LENGTH, VOCAB = 20, 8, 64, 32
MESHES = {
    "data": {"data": 2},
    "fsdp": {"fsdp": 2},
    "tensor": {"tensor": 2},
    "expert": {"expert": 2},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
}
SMALL = {"d_model": 16, "num_layers": 2, "vocab_size": VOCAB, "max_seq_len": LENGTH}
HEADLINERS = {
    "transformer": {},
    "recursive": {"depth.num_recursions": 2, "depth.sharing": "cycle"},
    "mor": {"depth.num_recursions": 2, "depth.sharing": "cycle"},
    "switch": {},
    "adamoe": {},
    "based": {"num_layers": 3},
    "matryoshka": {},
}
STATE_SPACE = {
    "mamba": {"num_layers": 1, "mixers": ({"name": "mamba", "state_dim": 4},)},
    "mamba2": {"num_layers": 1, "mixers": ({"name": "mamba2", "head_dim": 8, "state_dim": 4},)},
}
FIELDS = HEADLINERS | STATE_SPACE


@pytest.fixture(scope="module")
def fresh_seed():
    return secrets.randbelow(2**31)


@pytest.fixture
def seed(fresh_seed):
    """One for the file, so that the losses on one device are computed once a model."""
    print(f"seed {fresh_seed}")
    return fresh_seed


def batches(name, seed):
    rng = np.random.default_rng(seed)
    for _ in range(STEPS):
        tokens = rng.integers(VOCAB, size=(ROWS, LENGTH + 1), dtype=np.int32)
        segments = 1 + (np.arange(LENGTH) >= rng.integers(4, LENGTH, size=(ROWS, 1))).astype(
            np.int32
        )
        if name == "matryoshka":
            # Unrelated pairs: where the loss nears 0, a rounding error is a large part of it, on one device too.
            whole = np.ones_like(segments)
            yield {
                "query_tokens": tokens[:, 1:],
                "query_segment_ids": whole,
                "document_tokens": rng.integers(VOCAB, size=segments.shape, dtype=np.int32),
                "document_segment_ids": whole,
            }
        else:
            yield {
                "tokens": tokens[:, :-1],
                "targets": tokens[:, 1:],
                "segment_ids": segments,
                "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)),
                "loss_mask": np.ones((ROWS, LENGTH), np.float32),
            }


@functools.cache
def losses_on_one_device(name, seed):
    return losses(name, {}, seed)


def losses(name, mesh_sizes, seed):
    mesh = sharding.make_mesh(
        mesh_sizes, jax.devices()[: np.prod(list(mesh_sizes.values()) or [1])]
    )
    model = models.create(name, **(SMALL | FIELDS[name]))
    objective = registry.build("objective", objective_of(name))
    schedule = {"name": "constant", "peak": 1e-3}
    optimizer, _ = optim.build(optim.spec("adamw", schedule=schedule), STEPS)
    first = next(batches(name, seed))
    init = functools.partial(init_state, model, first, optimizer, seed % 1000, ema=False)
    shardings = sharding.state_shardings(jax.eval_shape(init), mesh)
    rows = sharding.batch_sharding(mesh)
    found = []
    with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.AXIS_RULES):
        state = initialise(init, shardings)
        step = jax.jit(
            make_train_step(model, objective, optimizer),
            in_shardings=(shardings, rows),
            out_shardings=(shardings, None),
        )
        for batch in batches(name, seed):
            state, metrics = step(state, jax.device_put(batch, rows))
            found.append(float(metrics["loss"]))
    return np.array(found)


def objective_of(name):
    if name == "matryoshka":
        return {"name": "contrastive", "matryoshka_dims": (4, 8, 16)}
    return {"name": "next_token"}


@pytest.mark.parametrize(
    ("name", "mesh"),
    [*itertools.product(HEADLINERS, MESHES), *itertools.product(STATE_SPACE, ["all"])],
)
def test_losses_agree_with_one_device(name, mesh, seed):
    expected = losses_on_one_device(name, seed)
    assert np.ptp(expected) > 1e-4  # it does train
    np.testing.assert_allclose(losses(name, MESHES[mesh], seed), expected, rtol=1e-4)


@pytest.mark.parametrize("name", FIELDS)
def test_every_matrix_has_logical_axes(name):
    """No parameter of a headliner falls through the table of logical axes to the last resort."""
    model = models.create(name, **(SMALL | FIELDS[name]))
    tokens = np.zeros((1, LENGTH), np.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    named = [pattern for pattern, _ in sharding.PARAMETER_AXES[:-1]]
    for path in pytree.paths(shapes):
        leaf = path.rsplit("/", 1)[-1]
        is_small = leaf.endswith(("scale", "bias")) or leaf in ("A_log", "D")
        assert is_small or any(pytree.matches(pattern, path) for pattern in named), path


def test_specs_follow_the_table_and_leave_scanned_axes_whole():
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2, "expert": 2})

    def spec(path, shape):
        return tuple(sharding.parameter_spec(path, shape, mesh))

    assert spec("depth/layers/blocks_0/mixer/query/kernel", (8, 16)) == ("fsdp", "tensor")
    assert spec("depth/layers/blocks_0/mixer/query/kernel", (3, 8, 16)) == (None, "fsdp", "tensor")
    assert spec("x/ffn/experts/down", (4, 16, 8)) == ("expert", "tensor", "fsdp")
    assert spec("embed/embedding", (32, 8)) == ("tensor", "fsdp")
    assert spec("final_norm/scale", (8,)) == (None,)
    assert spec("mu/x/out/kernel", (16, 8)) == ("tensor", "fsdp")  # moments follow their parameter


def test_a_dimension_that_does_not_divide_is_kept_whole_and_logged(caplog):
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 4})
    assert tuple(sharding.parameter_spec("embed/embedding", (30, 8), mesh)) == (None, "fsdp")
    assert "embed/embedding: dimension 0 of size 30" in caplog.text


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 16}, "needs 16 devices, and there are 8"),
        ({"data": -1, "tensor": 3}, "needs a multiple of 3 devices, and there are 8"),
        ({"data": -1, "fsdp": -1}, "at most one -1"),
        ({"data": 0}, "positive numbers"),
        ({"model": 2}, "unknown axis 'model'; valid: data, fsdp, tensor, expert"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(sizes)


def test_one_axis_takes_what_is_left():
    mesh = sharding.make_mesh({"data": -1, "tensor": 2})
    assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2, "expert": 1}
    assert sharding.batch_shards(mesh) == 4
