import jax
import jax.numpy as jnp
import pytest

from effjax import models
from effjax.evaluation import cost
from effjax.evaluation.forward import compile_forward

V, D, F, L, E, M, K = 23, 16, 24, 2, 4, 3, 2
ATTENTION = {"name": "attention", "num_heads": 4, "num_kv_heads": 2}
MIXER = D * D + 2 * D * (D // 2) + D * D
DENSE = 3 * D * F
NORMS = 2 * D


def create(name, **overrides):
    small = {"vocab_size": V, "d_model": D, "num_layers": L, "mixers": (ATTENTION,)}
    return models.create(name, **small | overrides)


def parameters(model, **options):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    return cost.count_parameters(shapes["params"], **options)


def test_dense_model():
    found = parameters(create("transformer", ffn={"hidden_dim": F}))
    total = V * D + L * (MIXER + DENSE + NORMS) + D
    assert found == cost.Parameters(total=total, embedding=V * D, active=total)


def test_untied_head_is_no_embedding():
    found = parameters(create("transformer", ffn={"hidden_dim": F}, head="untied"))
    assert found.embedding == V * D
    assert found.total == 2 * V * D + L * (MIXER + DENSE + NORMS) + D


def test_a_token_uses_its_share_of_the_experts():
    ffn = {"name": "adamoe", "num_experts": E, "num_null": M, "top_k": K, "hidden_dim": F}
    model = create("adamoe", ffn=ffn)
    rest = V * D + L * (MIXER + D * (E + M) + NORMS) + D
    assert parameters(model).total == rest + L * E * DENSE
    expected = cost.expert_share(model)
    assert expected == pytest.approx(K / (E + M))
    active = parameters(model, used_experts=expected).active
    assert active == round(rest + L * DENSE * E * K / (E + M))
    measured = cost.expert_share(model, mean_experts=1.5)
    assert parameters(model, used_experts=measured).active == rest + L * DENSE * 1.5


def test_shared_parameters_count_once():
    shared = {"name": "recursive", "num_recursions": 3, "sharing": "cycle"}
    model = create("transformer", num_layers=6, ffn={"hidden_dim": F}, depth=shared)
    assert parameters(model).total == V * D + 2 * (MIXER + DENSE + NORMS) + D


def test_a_model_without_experts_uses_all_of_itself():
    assert cost.expert_share(create("transformer")) == 1.0


def test_memory_and_latency_of_the_compiled_forward_pass():
    model = create("transformer", ffn={"hidden_dim": F})
    inputs = {"tokens": jnp.zeros((3, 8), jnp.int32)}
    variables = jax.jit(model.init)(jax.random.key(0), **inputs)
    forward = compile_forward(model, variables, inputs)
    logits, metrics = forward(variables, inputs)
    assert logits.shape == (3, 8, V)
    assert metrics["flops/spent"] == metrics["flops/full"]
    memory = cost.measure_memory(forward)
    total = parameters(model).total
    assert memory.arguments == pytest.approx(4 * total + 4 * 3 * 8, rel=0.02)
    assert memory.outputs == pytest.approx(4 * 3 * 8 * V, rel=0.02)
    parts = memory.arguments + memory.outputs + memory.temporary
    assert memory.peak == pytest.approx(parts, rel=1e-3)  # allocations are aligned
    latency = cost.measure_latency(forward, variables, inputs, num_runs=3)
    assert 0 < latency.fastest_seconds <= latency.median_seconds
    assert latency.tokens_per_second == pytest.approx(24 / latency.median_seconds)
    assert latency.num_runs == 3
    with pytest.raises(ValueError, match="num_runs is 0"):
        cost.measure_latency(forward, variables, inputs, num_runs=0)


def test_decode_state_of_attention_is_keys_and_values_of_every_token():
    kv_heads, head_dim, slot = 2, D // 4, 4 * 2  # a slot has its position and segment too
    per_token = 2 * kv_heads * head_dim * 4 + slot
    counter = 4
    model = create("transformer")
    assert cost.decode_state_bytes(model, 10) == L * (10 * per_token + counter)
    window = {"name": "sliding_window", "num_heads": 4, "num_kv_heads": 2, "window": 5}
    assert cost.decode_state_bytes(create("transformer", mixers=(window,)), 10) == L * (
        5 * per_token + counter
    )
    both_ways = {"name": "attention", "num_heads": 4, "causal": False}
    assert cost.decode_state_bytes(create("matryoshka", mixers=(both_ways,)), 10) is None
