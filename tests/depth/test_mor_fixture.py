"""The whole Mixture-of-Recursions model against outputs of the authors' code (tests/fixtures/record_mor.py)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from effjax.models import create

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = {
    "self_attn.q_proj": ("mixer", "query", "kernel"),
    "self_attn.k_proj": ("mixer", "key", "kernel"),
    "self_attn.v_proj": ("mixer", "value", "kernel"),
    "self_attn.o_proj": ("mixer", "out", "kernel"),
    "mlp.gate_proj": ("ffn", "gate", "kernel"),
    "mlp.up_proj": ("ffn", "up", "kernel"),
    "mlp.down_proj": ("ffn", "down", "kernel"),
    "input_layernorm": ("mixer_norm", "scale"),
    "post_attention_layernorm": ("ffn_norm", "scale"),
}
# kind: routing, the authors' prefix of the shared block, of the last layer, our names of their routers, losses
KINDS = {
    "expert": (
        {"name": "expert_choice", "aux_weight": 1.0, "z_weight": 1.0},
        "layers.1.block.0",
        "layers.4",
        {f"layers.{r + 1}.mor_router.router": f"router_{r}" for r in range(3)},
        {"bce": "loss/router_bce", "router_z": "loss/router_z"},
    ),
    "token": (
        {"name": "token_choice", "balance_weight": 1.0, "z_weight": 1.0, "capacity_factor": 3.0},
        "layers.1.block_list.0.0",
        "layers.2",
        {"layers.1.mor_router.router": "router"},
        {"balancing": "loss/balancing", "router_z": "loss/router_z"},
    ),
}


def named(kind):
    """Our path of every parameter -> the authors' name."""
    _, shared, last, routers, _ = KINDS[kind]
    paths = {("embed", "embedding"): "embed_tokens", ("final_norm", "scale"): "norm"}
    for scope, prefix in (("first", "layers.0"), ("shared", shared), ("last", last)):
        for name, path in NAMES.items():
            paths["depth", scope, "blocks_0", *path] = f"{prefix}.{name}"
    for theirs, ours in routers.items():
        paths["depth", "routing", ours, "router", "kernel"] = theirs
    full = {path: f"model.{name}.weight" for path, name in paths.items()}
    return full | {("head", "unembed", "kernel"): "lm_head.weight"}


def to_ours(path, weight):
    return weight.T if path[-1] == "kernel" else weight


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_is_the_authors(kind):
    recorded = np.load(FIXTURES / f"mor_{kind}_choice.npz")
    routing, *_, losses = KINDS[kind]
    model = create(
        "mor",
        vocab_size=16,
        d_model=16,
        num_layers=5,
        mixers=({"name": "attention", "num_heads": 2, "num_kv_heads": 1},),
        ffn={"name": "gated", "hidden_dim": 24},
        head="untied",
        depth={"routing": routing},
    )
    paths = named(kind)
    params = {path: to_ours(path, recorded[f"weights.{name}"]) for path, name in paths.items()}
    tokens = jnp.asarray(recorded["tokens"])

    def loss(params):
        out = model.apply({"params": unflatten_dict(params)}, tokens, train=True)
        return jnp.sum(out.logits * recorded["probe"]) + sum(out.aux.values()), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(out.logits, recorded["logits"], rtol=1e-4, atol=1e-4)
    for theirs, ours in losses.items():
        np.testing.assert_allclose(out.aux[ours], recorded[theirs], rtol=1e-5)
    compared = 0
    for path, name in paths.items():
        if f"gradients.{name}" in recorded:
            want = to_ours(path, recorded[f"gradients.{name}"])
            np.testing.assert_allclose(gradients[path], want, rtol=1e-3, atol=1e-3, err_msg=name)
            compared += 1
    assert compared == len(NAMES) + len(KINDS[kind][3])
