"""Generation: what is drawn, when it ends, and that a row is its own."""

import dataclasses
import secrets

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counted_conv import TRACED, CountedConv, runs_of
from tiny_models import random_variables

from effjax import serving
from effjax.depth import MixtureOfRecursions
from effjax.ffn import Gated, Switch
from effjax.heads import Embedding
from effjax.mixers import Attention, ShortConv, TaylorLinear
from effjax.models import DecoderLM, TextEncoder
from effjax.serving import Sampling
from effjax.serving.decoding import served
from effjax.serving.generation import NO_TOKEN

VOCAB, NEW = 24, 16
MODEL = DecoderLM(
    vocab_size=VOCAB,
    d_model=16,
    num_layers=1,
    max_seq_len=40,
    mixers=(Attention(2, 1),),
    ffn=Gated(hidden_dim=16),
)
MODELS = [
    pytest.param(MODEL, id="attention"),
    *(
        pytest.param(MODEL.clone(num_layers=2, **parts), id=name, marks=pytest.mark.slow)
        for name, parts in {
            "constant state": {"mixers": (ShortConv(), TaylorLinear(2, 4))},
            "expert choice": {"depth": MixtureOfRecursions(2, "cycle")},
            "shared keys": {"depth": MixtureOfRecursions(2, "cycle", kv_sharing="shared")},
        }.items()
    ),
]
GREEDY = Sampling(temperature=0)
EVERYTHING = Sampling(3.0, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.2)


@pytest.fixture
def variables(rng):
    return random_variables(MODEL, rng)


@pytest.fixture
def prompts(rng):
    return [rng.integers(VOCAB, size=n) for n in (5, 1, 9)]


@pytest.fixture
def key():
    seed = secrets.randbelow(2**31)
    print(f"key: {seed}")
    return jax.random.key(seed)


def generate(variables, prompts, sampling=EVERYTHING, **options):
    return serving.generate(MODEL, variables, prompts, NEW, sampling=sampling, **options)


@pytest.mark.parametrize("model", MODELS)
def test_greedy_takes_the_most_likely_token_of_a_full_pass(model, prompts, rng):
    variables = random_variables(model, rng)
    found = serving.generate(model, variables, prompts, NEW, sampling=GREEDY)
    assert found.tokens.shape == found.logprobs.shape == (3, NEW)
    assert (found.lengths == NEW).all() and not found.stopped.any()
    text = np.zeros((3, 9 + NEW), np.int32)
    for row, prompt, tokens in zip(text, prompts, found.tokens, strict=True):
        row[: len(prompt) + NEW] = [*prompt, *tokens]
    logits = np.float64(
        jax.jit(model.apply)(variables, text).logits
    )  # causal: what follows does not matter
    for b, prompt in enumerate(prompts):
        seen = logits[b, len(prompt) - 1 : len(prompt) + NEW - 1]
        np.testing.assert_array_equal(found.tokens[b], seen.argmax(axis=-1))
        logprobs = seen.max(axis=-1) - np.log(np.exp(seen).sum(axis=-1))
        np.testing.assert_allclose(found.logprobs[b], logprobs, rtol=1e-4, atol=1e-4)


def test_a_row_ends_at_its_first_stop_token(variables, prompts, key):
    free = generate(variables, prompts, key=key)
    stops = {int(free.tokens[0, 3]), int(free.tokens[2, 6])}
    found = generate(variables, prompts, key=key, stop_tokens=stops)
    for b in range(3):
        at = [i for i, token in enumerate(free.tokens[b]) if int(token) in stops]
        length = at[0] + 1 if at else NEW
        assert found.lengths[b] == length
        assert found.stopped[b] == bool(at)
        np.testing.assert_array_equal(found.tokens[b, :length], free.tokens[b, :length])
        np.testing.assert_array_equal(found.completions()[b], free.tokens[b, :length])
        assert (found.tokens[b, length:] == NO_TOKEN).all()
        assert not found.logprobs[b, length:].any()
    steps = list(
        serving.stream(
            MODEL, variables, prompts, NEW, sampling=EVERYTHING, key=key, stop_tokens=stops
        )
    )
    assert len(steps) == found.lengths.max()
    streamed = np.stack([step.tokens for step in steps], axis=1)
    np.testing.assert_array_equal(streamed, found.tokens[:, : len(steps)])
    np.testing.assert_allclose(
        np.stack([step.logprobs for step in steps], axis=1),
        found.logprobs[:, : len(steps)],
        rtol=1e-5,
        atol=1e-5,
    )
    np.testing.assert_array_equal(steps[-1].stopped, found.stopped)


def test_a_row_is_its_prompt_and_its_key_alone(variables, prompts, key, rng):
    keys = jax.random.split(key, 3)
    found = generate(variables, prompts, key=keys)
    assert not keys.is_deleted()
    for b in range(3):
        # In another place, in other company.
        company = [rng.integers(VOCAB, size=n) for n in rng.integers(1, 16, size=2)]
        place = int(rng.integers(3))
        company.insert(place, prompts[b])
        others = generate(variables, company, key=jnp.roll(keys, place - b))
        np.testing.assert_array_equal(others.tokens[place], found.tokens[b])
    assert (generate(variables, prompts, key=keys[::-1]).tokens != found.tokens).any()


def test_one_key_draws_other_tokens_in_each_row(variables, prompts, key):
    found, again = (generate(variables, prompts[:1] * 3, key=key) for _ in range(2))
    np.testing.assert_array_equal(found.tokens, again.tokens)
    assert (found.tokens[0] != found.tokens[1]).any()


def test_a_penalty_against_everything_seen_never_repeats(variables, key, rng):
    """Logits are all far above 0 here, and the penalty brings those of seen tokens down to it."""
    variables["params"]["embed"]["embedding"][:] += 50.0
    prompts = [rng.integers(VOCAB, size=n) for n in (5, 1, 8)]
    sampling = dataclasses.replace(EVERYTHING, repetition_penalty=1e6, top_p=0.9999)
    found = generate(variables, prompts, sampling, key=key)
    for prompt, tokens in zip(prompts, found.tokens, strict=True):
        assert len({*prompt.tolist(), *tokens.tolist()}) == len({*prompt.tolist()}) + NEW


def test_compiled_programs_are_used_again_and_the_loop_ends_when_all_rows_have(rng):
    model = MODEL.clone(mixers=(CountedConv(counter="generation"),))
    variables = random_variables(model, rng)
    prompt = lambda n: rng.integers(VOCAB, size=n)  # noqa: E731

    def run(prompts, new, **options):
        before = runs_of("generation")
        found = serving.generate(model, variables, prompts, new, sampling=GREEDY, **options)
        return found, runs_of("generation") - before

    run([prompt(5)], 12)
    traced = TRACED["generation"]
    found, runs = run([prompt(13)], 9)
    assert found.tokens.shape == (1, 9)
    assert runs == 9  # the prompt, and every token but the last
    found, runs = run([prompt(2)], 16, stop_tokens=())
    assert runs == 16
    assert TRACED["generation"] == traced
    # Nothing is left to be done after the first token.
    found, runs = run([prompt(4)], 16, stop_tokens=range(VOCAB))
    assert runs == 1
    assert found.lengths == 1 and found.stopped.all()


def test_a_mixture_of_experts_drops_nothing():
    moe = MODEL.clone(ffn=Switch(num_experts=4, hidden_dim=8, dispatch="capacity"))
    assert served(moe).ffn.dispatch == "dropless"
    assert served(MODEL) is MODEL


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "prompts is empty; valid: at least one prompt"),
        ({"prompts": [[1], []]}, r"prompts\[1\] is float64\[0\]; valid: one or more token ids"),
        ({"prompts": [[[1]]]}, r"prompts\[0\] is int64\[1, 1\]"),
        ({"prompts": [[0.5]]}, r"prompts\[0\] is float64\[1\]"),
        ({"prompts": [[1, VOCAB]]}, r"prompts\[0\] has the id 24; valid: 0 to 23"),
        ({"prompts": [[-1]]}, r"prompts\[0\] has the id -1; valid: 0 to 23"),
        ({"max_new_tokens": 0}, "max_new_tokens=0; valid: at least 1"),
        (
            {"max_new_tokens": 39},
            "a prompt of 2 tokens and max_new_tokens=39; valid: at most max_seq_len=40 together",
        ),
        ({"stop_tokens": [VOCAB]}, "stop_tokens has the id 24; valid: 0 to 23"),
        ({"key": jnp.zeros(2, jnp.uint32)}, r"key is uint32\[2\]; valid: a key of jax.random.key"),
        ({"key": jax.random.split(jax.random.key(0), 2)}, "one for each of 1 rows"),
        ({"model": MODEL.clone(head=Embedding())}, "Embedding, which gives no logits"),
        ({"model": TextEncoder(vocab_size=VOCAB)}, "decoding needs causal mixers"),
    ],
)
def test_what_cannot_be_generated_is_refused_at_once(change, message, rng):
    arguments = {"model": MODEL, "prompts": [[1, 2]], "max_new_tokens": 3} | change
    shapes = jax.eval_shape(
        arguments["model"].init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
    )
    variables = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
    with pytest.raises(ValueError, match=message):
        serving.generate(variables=variables, **arguments)
