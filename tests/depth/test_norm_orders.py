"""Where norms stand: numbers are held against BERT and Gemma 2 in tests/interop; here, that they compose."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.depth import Block, MixtureOfRecursions, Plain
from effjax.depth.block import NORM_ORDERS
from effjax.ffn import Dense
from effjax.mixers import Attention
from effjax.models import DecoderLM
from effjax.nn import RMSNorm, TokenEmbedding

LENGTH = 7


MOR = MixtureOfRecursions(num_recursions=2, sharing="cycle")


@pytest.mark.parametrize(
    ("norm_order", "depth"),
    [
        case
        if case in [("post", Plain()), ("sandwich", MOR)]
        else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product(NORM_ORDERS, [Plain(), MOR])
    ],
)
def test_decoding_gives_what_the_parallel_form_gives(norm_order, depth, rng):
    model = DecoderLM(
        vocab_size=11,
        d_model=8,
        num_layers=2,
        mixers=(Attention(num_heads=2, rope_base=None),),
        ffn=Dense(hidden_dim=8),
        depth=depth,
        norm_order=norm_order,
        embed=TokenEmbedding(learned_positions=True),
        max_seq_len=LENGTH,
    )
    tokens = jnp.asarray(rng.integers(11, size=(2, LENGTH)))
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
    variables = jax.tree.map(lambda p: np.float32(rng.normal(size=p.shape)), shapes)
    expected = model.apply(variables, tokens).logits
    state = model.init_state(2, LENGTH)
    first = model.apply(variables, tokens[:, :4], state=state)
    then = model.apply(variables, tokens[:, 4:], state=first.state)
    actual = np.concatenate([first.logits, then.logits], axis=1)
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm_order": "before"}, r"unknown norm_order 'before'"),
        ({"norm_order": "sandwich"}, "mixer_out_norm=None with norm_order='sandwich'"),
        ({"mixer_out_norm": RMSNorm()}, "with norm_order='pre'; valid: a norm for 'sandwich'"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Block(Attention(), Dense(), RMSNorm(), RMSNorm(), **fields)
