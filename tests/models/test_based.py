import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import models, registry
from effjax.models.state_size import StateSize, state_size


def test_layers_come_in_the_order_of_the_paper():
    model = models.create("based", num_layers=25)
    names = [registry.describe(block.mixer)["name"] for block in model.stack().blocks]
    assert [i for i, name in enumerate(names) if name == "taylor_linear"] == [1, 6, 11, 16, 21]
    assert [i for i, name in enumerate(names) if name == "sliding_window"] == [2, 7, 12, 17, 22]
    assert names.count("short_conv") == 15


def test_a_token_sees_everything_before_it_and_nothing_after(rng):
    """Changes one token a row; only linear attention reaches back beyond the windows and convolutions."""
    spec = models.spec("based", d_model=16, vocab_size=32)
    spec["mixers"][1].update(num_heads=2, feature_dim=4)
    spec["mixers"][2].update(num_heads=2, window=3)
    model = models.create(**spec)
    length, at = 24, 17
    tokens = np.tile(rng.integers(32, size=length), (length + 1, 1))
    tokens[np.arange(length), np.arange(length)] += 1
    tokens %= 32

    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(tokens))
    draw = lambda p: np.float32(rng.normal(size=p.shape) / np.sqrt(p.shape[0]))  # noqa: E731
    variables = jax.tree.map(draw, shapes)
    hidden = jax.jit(lambda tokens: model.apply(variables, tokens).hidden[:, at])
    states = np.asarray(hidden(jnp.asarray(tokens)))
    changes = np.abs(states[:-1] - states[-1]).max(axis=1)
    assert changes[at + 1 :].max() < 1e-5
    assert changes[: at + 1].min() > 1e-3


def test_state_size_counts_what_each_mixer_keeps():
    model = models.create("based", d_model=64, max_seq_len=4096)
    *layers, total = state_size(model, 4096)
    conv = StateSize("short_conv", 2 * 128, 4 * 2 * 128 + 4 * 2)
    sums = 4 * (1 + 16 + 16 * 17 // 2) * (16 + 1)
    window = 64 * 2 * 64
    assert layers == [
        conv,
        StateSize("taylor_linear", sums, 4 * sums + 4),
        StateSize("sliding_window", window, 4 * window + 4 * 2 * 64 + 4),
        conv,
        conv,
    ]
    assert total.numbers == sum(layer.numbers for layer in layers)
    assert total.bytes == sum(layer.bytes for layer in layers)
    assert state_size(model, 100)[-1] == total  # the window is the longest that any layer remembers
    assert state_size(model, 32)[-1].numbers < total.numbers


def test_state_of_attention_grows_with_the_length():
    model = models.create("transformer", dtype="bfloat16")
    short, long = (state_size(model, length)[-1] for length in (100, 1000))
    assert long.numbers == 10 * short.numbers == 4 * 1000 * 2 * 2 * 32
    assert long.bytes == 2 * long.numbers + 4 * (2 * 1000 + 1) * 4


@pytest.mark.parametrize("length", [0, 2049])
def test_length_out_of_range(length):
    with pytest.raises(ValueError, match=f"max_length is {length}; valid: 1 to max_seq_len=2048"):
        state_size(models.create("based"), length)
