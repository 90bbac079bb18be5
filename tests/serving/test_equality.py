"""Reading prompts in pieces, and then one token after the other, gives the logits of one full pass.

For every mixer with every depth policy, and every feed-forward with every depth policy. A full pass stands on its own
references (tests/mixers, tests/ffn, tests/depth), so this is the proof of decoding.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_composition import LENGTH, VOCAB, composes, parts
from tiny_models import random_variables

from effjax import models
from effjax.depth import MixtureOfRecursions, Plain, Recursive, TokenChoice
from effjax.ffn import Dense, Gated, Switch
from effjax.heads import Tied, Untied
from effjax.mixers import Attention, Mamba, ShortConv, SlidingWindow, TaylorLinear
from effjax.models import DecoderLM, SequenceModel
from effjax.serving.decoding import served

# Two pieces of up to four tokens of each prompt, then four single tokens: a ring of four slots wraps in both.
PIECE, STEPS = 4, LENGTH - 8
PROMPTS = np.array([5, 8, 1])
ENDS = PROMPTS + STEPS
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}

RING = SlidingWindow(num_heads=2, window=3)
TIED, GATED = Tied(), Gated(hidden_dim=8)


def make_model(mixers, ffn, depth, head=TIED, num_layers=2, scan_layers=False):
    model = SequenceModel(
        vocab_size=VOCAB,
        d_model=16,
        num_layers=num_layers,
        max_seq_len=LENGTH,
        mixers=mixers,
        ffn=ffn,
        depth=depth,
        head=head,
        scan_layers=scan_layers,
    )
    return served(model)


EXPERT_CHOICE = make_model((Attention(2, 1),), GATED, MixtureOfRecursions(2, "cycle"))
MOST = {
    "plain": make_model((ShortConv(), Mamba(state_dim=4)), Switch(4, 8), Plain(), Untied()),
    "expert_choice": EXPERT_CHOICE,
    "token_choice_shared_scanned": make_model(
        (RING,),
        Dense(8),
        MixtureOfRecursions(
            2, "cycle", kv_sharing="shared", routing=TokenChoice(balancing="loss_free")
        ),
        num_layers=4,
        scan_layers=True,
    ),
}
LAYOUTS = {
    "scanned": make_model((RING, TaylorLinear(2, 4)), GATED, Plain(), Untied(), 4, True),
    "middle_sequence": make_model((RING,), GATED, Recursive(2, "middle_sequence"), num_layers=6),
    "middle_cycle": make_model((RING,), GATED, MixtureOfRecursions(2), num_layers=6),
}


def every_pair():
    """Every depth policy with every mixer and every feed-forward."""
    mixers, ffns, depths = (list(parts(kind)) for kind in ("mixer", "ffn", "depth"))
    for d, (depth, policy) in enumerate(depths):
        fitting = [m for m in mixers if composes((m[1],), None, policy, None)]
        for i in range(max(len(fitting), len(ffns))):
            mixer, mixes = fitting[i % len(fitting)]
            ffn, feeds = ffns[(d + i) % len(ffns)]
            yield f"{mixer}-{ffn}-{depth}", make_model((mixes,), feeds, policy)


def presets():
    for name in models.names():
        model = models.create(name, vocab_size=VOCAB, d_model=64, max_seq_len=LENGTH)
        if isinstance(model, DecoderLM):
            yield name, served(model)


def cases():
    """Those that show most, and as slow ones all of them."""
    slow = (*every_pair(), *LAYOUTS.items(), *presets())
    return [
        *(pytest.param(model, id=name) for name, model in MOST.items()),
        *(pytest.param(model, id=name, marks=pytest.mark.slow) for name, model in slow),
    ]


@functools.partial(jax.jit, static_argnums=0)
def in_full(model, variables, tokens):
    """(logits, recursions of each token) of one pass over rows that end where `ENDS` says."""
    is_text = jnp.arange(LENGTH) < ENDS[:, None]
    output = model.apply(variables, tokens, segment_ids=is_text.astype(jnp.int32))
    return output.logits, output.metrics.get("token/depth", is_text)


@functools.partial(jax.jit, static_argnums=0)
def decoded(model, variables, pieces, steps):
    """The same of pieces (tokens, segments) [2, B, PIECE] and steps [STEPS, B, 1], and tokens seen of each row."""

    def read(state, piece):
        tokens, segment_ids = piece
        output = model.apply(variables, tokens, segment_ids=segment_ids, state=state)
        return output.state, (output.logits, output.metrics.get("token/depth", segment_ids))

    state = model.init_state(len(PROMPTS), LENGTH)
    state, in_pieces = jax.lax.scan(read, state, pieces)
    state, in_steps = jax.lax.scan(read, state, steps)
    return in_pieces, in_steps, state.length


def cut(tokens, rng):
    """The pieces of the prompts, padding before or behind them, and the single tokens."""
    pieces = np.zeros((2, len(PROMPTS), PIECE), np.int32)
    segments = np.zeros_like(pieces)
    for b, length in enumerate(PROMPTS):
        for i in range(2):
            text = tokens[b, i * PIECE : min(length, (i + 1) * PIECE)]
            start = rng.choice([0, PIECE - len(text)])
            pieces[i, b, start : start + len(text)] = text
            segments[i, b, start : start + len(text)] = 1
    steps = tokens[np.arange(len(PROMPTS)), PROMPTS + np.arange(STEPS)[:, None]][..., None]
    return (pieces, segments), (steps, np.ones_like(steps))


@pytest.mark.parametrize("model", cases())
def test_decoding_gives_the_logits_of_a_full_pass(model, rng):
    variables = random_variables(model, rng)
    tokens = rng.integers(VOCAB, size=(len(PROMPTS), LENGTH), dtype=np.int32)
    want, want_depth = in_full(model, variables, tokens)
    pieces, steps = cut(tokens, rng)
    *outputs, length = decoded(model, variables, pieces, steps)
    np.testing.assert_array_equal(length, ENDS)
    assert np.std(want) > 0.1
    for b, end in enumerate(ENDS):
        is_text = [pieces[1][i, b] > 0 for i in range(2)]
        joined = [
            np.concatenate(
                [in_pieces[0, b][is_text[0]], in_pieces[1, b][is_text[1]], in_steps[:, b, 0]]
            )
            for in_pieces, in_steps in zip(*map(jax.device_get, outputs), strict=True)
        ]
        np.testing.assert_array_equal(joined[1], want_depth[b, :end], err_msg="recursions")
        np.testing.assert_allclose(joined[0], want[b, :end], **TOLERANCE)


def test_how_often_the_choice_of_training_is_not_that_of_decoding(rng):
    """Expert choice takes the best of a row while training, and those above the threshold while decoding.

    The first recursion takes every token, so both score the same states in the second, and a token's depth tells them
    apart. Routers are not trained here: the auxiliary loss is there to bring the share down.
    """
    variables = random_variables(EXPERT_CHOICE, rng)
    is_text = np.arange(LENGTH) < ENDS[:, None]
    train = jax.jit(
        lambda tokens: (
            EXPERT_CHOICE.apply(
                variables, tokens, segment_ids=jnp.int32(is_text), train=True
            ).metrics
        )
    )
    differ = []
    for _ in range(20):
        tokens = rng.integers(VOCAB, size=is_text.shape, dtype=np.int32)
        trained = train(tokens)
        _, depth = in_full(EXPERT_CHOICE, variables, tokens)
        differ.append(np.mean((trained["token/depth"] != depth)[is_text]))
        agreement = trained["depth/selection_agreement"]
        np.testing.assert_allclose(1 - agreement, differ[-1], atol=1e-6)
    print(f"{np.mean(differ):.0%} of the tokens have another depth in training than in decoding")
    assert 0 < np.mean(differ) < 1


def test_the_head_reads_the_tokens_it_is_told(rng):
    model = make_model((ShortConv(),), None, Plain(), num_layers=1)
    variables = random_variables(model, rng)
    tokens = rng.integers(VOCAB, size=(3, LENGTH), dtype=np.int32)
    at = rng.integers(LENGTH, size=(3, 2))
    every, some = jax.jit(
        lambda: (model.apply(variables, tokens), model.apply(variables, tokens, head_at=at))
    )()
    want = np.take_along_axis(np.asarray(every.logits), at[..., None], axis=1)
    np.testing.assert_allclose(some.logits, want, rtol=1e-5, atol=1e-5)
    head = model.head.flops_per_token(16, VOCAB)
    saved = every.metrics["flops/spent"] - some.metrics["flops/spent"]
    np.testing.assert_allclose(saved, head * (1 - 2 / LENGTH), rtol=1e-4)


@pytest.mark.parametrize(
    ("rows", "width", "options", "message"),
    [
        (3, 5, {}, "5 tokens for a state with max_length=4; valid: at most as many"),
        (2, 4, {}, "state is of 3 rows; valid: as many as tokens, 2"),
        (3, 4, {"train": True}, "train=True with a decode state"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(rows, width, options, message):
    model = make_model((Attention(2, 1),), GATED, Plain())
    state = model.init_state(3, 4)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda tokens: model.init_with_output(
                jax.random.key(0), tokens, state=state, **options
            ),
            jnp.zeros((rows, width), jnp.int32),
        )


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((1, 0), "max_length=0; valid: 1 to max_seq_len=12"),
        ((1, LENGTH + 1), "max_length=13; valid: 1 to max_seq_len=12"),
        ((0, 4), "batch_size=0; valid: at least 1"),
    ],
)
def test_a_state_of_no_valid_size_is_refused(size, message):
    with pytest.raises(ValueError, match=message):
        make_model((Attention(2, 1),), GATED, Plain()).init_state(*size)


def test_a_model_that_sees_later_tokens_has_no_decode_state():
    model = make_model((Attention(2, 1, causal=False),), GATED, Plain())
    with pytest.raises(ValueError, match="decoding needs causal mixers"):
        model.init_state(1, 4)
