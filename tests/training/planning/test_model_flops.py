"""Operations that a model needs, beside counts by hand; those of transformers and recursions are in `test_plan`."""

import jax
import numpy as np
import pytest

from effjax.training import config as configs
from effjax.training.planning import model_flops

D, HIDDEN, LENGTH, VOCAB = 16, 24, 12, 260


@pytest.mark.parametrize("scan_layers", [False, True])
def test_experts_of_an_even_load(rng, scan_layers):
    """Of k choices among E true and M null experts, k E / (E + M) are true ones."""
    experts, nulls, top_k = 4, int(rng.integers(1, 8)), int(rng.integers(1, 5))
    ffn = {"num_experts": experts, "num_null": nulls, "top_k": top_k, "hidden_dim": HIDDEN}
    config = configs.default("adamoe", d_model=D, num_layers=2, scan_layers=scan_layers, ffn=ffn)
    config.model.mixers[0].update(num_heads=2, num_kv_heads=2)
    names = ("tokens", "targets", "positions", "segment_ids")
    batch = {name: jax.ShapeDtypeStruct((8, LENGTH), np.int32) for name in names}
    batch["loss_mask"] = jax.ShapeDtypeStruct((8, LENGTH), np.float32)
    found = model_flops.forward_flops_per_token(configs.resolve(config), batch)

    attention = 4 * 2 * D * D + 2 * 2 * D * (LENGTH + 1) / 2
    router = 2 * D * (experts + nulls)
    true_experts = top_k * experts / (experts + nulls) * 3 * 2 * D * HIDDEN
    assert found == pytest.approx(2 * (attention + router + true_experts) + 2 * D * VOCAB, rel=1e-3)
    assert model_flops.positions(batch) == 8 * LENGTH
