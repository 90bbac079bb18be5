"""The training steps of configs, compiled for meshes of this machine and of TPUs that are not here."""

import importlib
import math
import pathlib
import re

import jax
import pytest

from effjax.training import config as configs
from effjax.training import sharding
from effjax.training.lowering import lower_config
from pallas_kernels import topology

FOLDER = pathlib.Path(__file__).parents[2] / "configs"
RECIPES = sorted(p.stem for p in FOLDER.glob("[a-z]*.py") if p.stem != "uptrain")  # needs a folder
needs_libtpu = pytest.mark.skipif(not topology.is_available(), reason="needs libtpu")


def tiny(recipe):
    config = importlib.import_module(f"configs.{recipe}").get_config()
    config.data.batch_size = 8
    return config


def kernels(compiled) -> list[str]:
    """Names of the Pallas kernels that a program calls."""
    return re.findall(
        r"%(\w+?)[.\d]* = .*custom_call_target=\"tpu_custom_call\"", compiled.as_text()
    )


def test_each_device_holds_its_share_of_the_state_and_the_batch():
    config = tiny("transformer")
    config.mesh.update(data=2, fsdp=2, tensor=2)
    mesh = sharding.make_mesh(config.mesh)
    lowered = lower_config(configs.resolve(config), mesh)
    (state, batch), _ = lowered.args_info
    leaves = jax.tree.leaves((state, batch))
    whole = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    share = lowered.compile().memory_analysis().argument_size_in_bytes
    # Norms, and the step and its key, are whole everywhere; all else is split at least in two.
    assert whole / 8 < share < whole / 2


@pytest.mark.slow
@needs_libtpu
def test_a_sharded_step_runs_on_the_tpu_kernels():
    """Convolution, linear attention and window: BASED on 2 x 2 chips, parameters and heads split."""
    mesh = topology.mesh("v5e:2x2", (1, 1, 2, 2, 1, 1), sharding.MESH_AXES)
    config = tiny("based")
    config.model.num_layers = 3
    found = kernels(lower_config(configs.resolve(config), mesh).compile())
    assert {"attention_forward", "attention_backward"} <= set(found)
    assert {"linear_attention_forward", "linear_attention_backward"} <= set(found)


@pytest.mark.slow
@needs_libtpu
def test_experts_that_drop_nothing_run_on_the_tpu_kernels():
    """AdaMoE on 2 x 2 chips, of which each sorts its own tokens."""
    mesh = topology.mesh("v5e:2x2", (1, 1, 2, 2, 1, 1), sharding.MESH_AXES)
    config = tiny("adamoe")
    config.model.ffn.dispatch = "dropless"
    found = kernels(lower_config(configs.resolve(config), mesh).compile())
    assert {"rows_times_matrices", "rows_times_rows"} <= set(found)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 1), (1, 1, 2, 2, 1, 1)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_compiles_for_tpu_through_the_kernels(recipe, shape):
    chips = "v5e" if math.prod(shape) == 1 else "v5e:2x2"
    mesh = topology.mesh(chips, shape, sharding.MESH_AXES)
    compiled = lower_config(configs.resolve(tiny(recipe)), mesh).compile()
    assert len(set(kernels(compiled))) >= 2  # forward and backward
