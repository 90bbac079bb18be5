"""Every headliner trains the same on one device and on any mesh."""

import functools
import itertools
import secrets

import jax
import numpy as np
import pytest
from short_runs import (
    FIELDS,
    LENGTH,
    STATE_SPACE,
    first_state,
    initialiser_of,
    losses,
    losses_on_one_device,
    small,
)

from effjax import pytree
from effjax.heads import Tied
from effjax.training import sharding
from effjax.training.state import initialise

MESHES = {
    "data": {"data": 2},
    "fsdp": {"fsdp": 2},
    "tensor": {"tensor": 2},
    "expert": {"expert": 2},
    "all": {"data": 2, "fsdp": 2, "tensor": 2},
    "with_experts": {"data": 2, "tensor": 2, "expert": 2},
    "with_context": {"data": 2, "tensor": 2, "context": 2},
    "context": {"context": 8},
}
# Whose default mesh is not "all".
MESH_OF_ALL = {"switch": "with_experts", "adamoe": "with_experts", "based": "with_context"}
BASELINES = ("transformer", "recursive")


def cases():
    """Headliners on a mesh of three axes, that of experts among them if there are any.

    BASED has most that passes from one stretch of time to the next: windows, convolutions and states. Each axis alone,
    and the other models, are for `-m slow`.
    """
    for name, mesh in itertools.product(FIELDS, MESHES):
        is_other = name in BASELINES or name in STATE_SPACE
        runs = not is_other and mesh == MESH_OF_ALL.get(name, "all")
        yield pytest.param(name, mesh, marks=[] if runs else [pytest.mark.slow])


@pytest.fixture(scope="module")
def fresh_seed():
    return secrets.randbelow(2**31)


@pytest.fixture
def seed(fresh_seed):
    """One for the file, so that the losses on one device are computed once a model."""
    print(f"seed {fresh_seed}")
    return fresh_seed


@pytest.mark.parametrize(("name", "mesh"), list(cases()))
def test_losses_agree_with_one_device(name, mesh, seed):
    expected = losses_on_one_device(name, seed)
    assert np.ptp(expected) > 1e-4  # it does train
    np.testing.assert_allclose(losses(small(name), name, MESHES[mesh], seed), expected, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["all", "context"])
def test_chunks_of_a_split_vocabulary_give_the_same_losses(mesh, seed):
    model = small("transformer").clone(head=Tied(chunk_size=12))
    want = losses_on_one_device("transformer", seed)
    np.testing.assert_allclose(losses(model, "transformer", MESHES[mesh], seed), want, rtol=1e-5)


@pytest.mark.parametrize("name", ["mor", pytest.param("adamoe", marks=pytest.mark.slow)])
def test_the_first_state_is_that_of_one_device(name, seed):
    expected = first_state(name, seed)
    mesh = sharding.make_mesh(MESHES["all"])
    with jax.set_mesh(mesh):
        found = initialise(initialiser_of(name, seed), sharding.state_shardings(expected, mesh))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    jax.tree.map(close, found, expected)


def test_a_state_whose_types_are_known_is_not_traced_again():
    traced = []

    def init(params=None):
        traced.append(params)
        return {"embed": {"embedding": jax.numpy.ones((8, 4))}}

    mesh = sharding.make_mesh({"data": 1})
    types = sharding.abstract_state(init, mesh)
    found = initialise(init, jax.tree.map(lambda x: x.sharding, types))
    assert len(traced) == 1
    assert found["embed"]["embedding"].sharding == types["embed"]["embedding"].sharding


@pytest.mark.parametrize("name", FIELDS)
def test_every_matrix_has_logical_axes(name):
    """No parameter of a headliner falls through the table of logical axes to the last resort."""
    model = small(name)
    tokens = np.zeros((1, LENGTH), np.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    named = [pattern for pattern, _ in sharding.PARAMETER_AXES[:-1]]
    for path in pytree.paths(shapes):
        leaf = path.rsplit("/", 1)[-1]
        is_small = leaf.endswith(("scale", "bias")) or leaf in ("A_log", "D")
        assert is_small or any(pytree.matches(pattern, path) for pattern in named), path


def test_specs_follow_the_table_and_scanned_axes_are_stages():
    mesh = sharding.make_mesh({"pipeline": 2, "fsdp": 2, "tensor": 2})

    def spec(path, shape):
        return tuple(sharding.parameter_spec(path, shape, mesh))

    assert spec("depth/layers/blocks_0/mixer/query/kernel", (8, 16)) == ("fsdp", "tensor")
    scanned = "depth/layers/blocks_0/mixer/query/kernel"
    assert spec(scanned, (4, 8, 16)) == ("pipeline", "fsdp", "tensor")
    assert spec(scanned, (3, 8, 16)) == (None, "fsdp", "tensor")
    assert spec("depth/layers/blocks_0/mixer_norm/scale", (4, 8)) == ("pipeline", None)
    assert spec("x/ffn/experts/down", (4, 16, 8)) == ("expert", "tensor", "fsdp")
    blocks = "depth/layers/blocks_1/ffn/experts/down"
    assert spec(blocks, (2, 4, 16, 8)) == ("pipeline", "expert", "tensor", "fsdp")
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
        (
            {"model": 2},
            "unknown axis 'model'; valid: pipeline, data, fsdp, tensor, expert, context",
        ),
    ],
)
def test_meshes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(sizes)


def test_one_axis_takes_what_is_left():
    mesh = sharding.make_mesh({"data": -1, "tensor": 2})
    assert dict(mesh.shape) == dict.fromkeys(sharding.MESH_AXES, 1) | {"data": 4, "tensor": 2}
    assert sharding.batch_shards(mesh) == 4
