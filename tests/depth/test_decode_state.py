"""How much a depth policy keeps to decode: by counting. That it is the right thing: tests/serving/test_equality.py."""

import jax
import pytest

from effjax.models import create, state_size

LAYERS, RECURSIONS, TOKENS = 8, 3, 64  # a first layer, three times two, and a last


def numbers(name, **options):
    return state_size(create(name, num_layers=LAYERS, **options), TOKENS)[-1].numbers


def test_every_application_of_a_layer_has_a_state_of_its_own():
    assert numbers("transformer") == numbers("recursive") == numbers("mor")


def test_shared_keys_and_values_are_kept_once():
    kept = LAYERS - (RECURSIONS - 1) * 2
    assert numbers("mor", depth={"kv_sharing": "shared"}) * LAYERS == numbers("mor") * kept


@pytest.mark.parametrize("name", ["based", "mor"])
def test_scanned_layers_keep_the_same(name):
    num_layers = 10 if name == "based" else LAYERS
    models = [create(name, num_layers=num_layers, scan_layers=scan) for scan in (False, True)]
    unrolled, scanned = (state_size(model, TOKENS) for model in models)
    assert unrolled == scanned
    leaves = jax.tree.leaves(jax.eval_shape(lambda: models[1].init_state(3, TOKENS)))
    assert len(leaves) < len(
        jax.tree.leaves(jax.eval_shape(lambda: models[0].init_state(3, TOKENS)))
    )
