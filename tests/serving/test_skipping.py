"""While decoding, a recursion that no row takes is not computed."""

import jax
import jax.numpy as jnp
import numpy as np
from counted_conv import CountedConv, runs_of
from tiny_models import random_variables

from effjax.depth import MixtureOfRecursions, TokenChoice
from effjax.models import DecoderLM


def test_only_the_recursions_that_some_row_takes_run(rng):
    # A recursion is two applications of the mixer; the bias on the scores decides how many of them a token gets.
    model = DecoderLM(
        vocab_size=8,
        d_model=8,
        num_layers=6,
        max_seq_len=8,
        mixers=(CountedConv(counter="skipping"),),
        ffn=None,
        depth=MixtureOfRecursions(3, "cycle", routing=TokenChoice(balancing="loss_free")),
    )
    variables = random_variables(model, rng)
    routing = variables["params"]["depth"]["routing"]
    # Scores are of the token's embedding alone: token 0 wants one recursion, token 1 three.
    routing["router"]["router"]["kernel"] = np.float32([[5, 0, -5]] + [[0, 0, 0]] * 7)
    routing["balance_bias"] = np.zeros(3, np.float32)
    variables["params"]["embed"]["embedding"][:2] = 4 * np.eye(8)[[0, 0]] * [[1], [-1]]
    step = jax.jit(
        lambda token, is_text, state: model.apply(
            variables, token[:, None], segment_ids=is_text[:, None], state=state
        )
    )
    state = model.init_state(2, 8)
    for tokens, is_text, recursions in (
        ([0, 0], [1, 1], 1),
        ([1, 0], [1, 1], 3),
        ([1, 0], [0, 1], 1),
        ([1, 1], [0, 0], 0),
        ([0, 1], [0, 1], 3),
    ):
        before = runs_of("skipping")
        output = step(jnp.array(tokens), jnp.array(is_text), state)
        assert runs_of("skipping") - before == 2 * recursions
        assert output.metrics["token/depth"].max() == recursions
        state = output.state
