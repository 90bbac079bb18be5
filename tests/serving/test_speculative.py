"""Speculative decoding: the text of the target, drawn with the odds of the target, and never more of it than asked for.

That states forget what was rejected is shown for every mixer in tests/mixers/test_tentative.py; here whole models do.
"""

import functools
import itertools
import secrets

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from test_sampling import probabilities
from tiny_models import random_variables

from effjax import serving
from effjax.depth import MixtureOfRecursions, Recursive, TokenChoice
from effjax.ffn import Gated, Switch
from effjax.heads import Embedding, Untied
from effjax.mixers import Attention, Mamba, ShortConv, SlidingWindow, TaylorLinear
from effjax.models import DecoderLM
from effjax.serving import Sampling, early_exit, speculate, speculative
from effjax.serving.decoding import served
from effjax.serving.generation import NO_TOKEN
from effjax.serving.programs import compiled

VOCAB, NEW = 24, 16
PROMPTS = (5, 1, 9)
MODEL = DecoderLM(
    vocab_size=VOCAB,
    d_model=16,
    num_layers=2,
    max_seq_len=40,
    mixers=(Attention(2, 1), SlidingWindow(2, window=3)),
    ffn=Gated(hidden_dim=16),
    head=Untied(),
)
EXPERT_CHOICE = MODEL.clone(
    mixers=(Attention(2, 1),), ffn=None, depth=MixtureOfRecursions(2, "cycle")
)
RING = MODEL.clone(num_layers=1, mixers=(SlidingWindow(2, window=3),), ffn=None)
CHEAP = MODEL.clone(num_layers=1, mixers=(ShortConv(),), ffn=None)
GREEDY = Sampling(temperature=0)

# Target and draft.
PAIRS = {
    "ring by a convolution": (RING, CHEAP),
}
SLOW_PAIRS = {
    "expert choice by itself": (EXPERT_CHOICE, EXPERT_CHOICE),
    "caches": (MODEL, RING),
    "constant states": (
        MODEL.clone(num_layers=3, mixers=(ShortConv(), TaylorLinear(2, 4), Mamba(state_dim=4))),
        MODEL,
    ),
    "scanned": (MODEL.clone(num_layers=4, scan_layers=True), CHEAP),
    "middle sequence": (MODEL.clone(num_layers=6, depth=Recursive(2, "middle_sequence")), CHEAP),
    "shared keys": (
        EXPERT_CHOICE.clone(
            num_layers=4,
            mixers=(SlidingWindow(2, window=3),),
            depth=MixtureOfRecursions(
                2, "cycle", kv_sharing="shared", routing=TokenChoice(balancing="loss_free")
            ),
            scan_layers=True,
        ),
        EXPERT_CHOICE,
    ),
    "experts": (MODEL.clone(ffn=Switch(num_experts=4, hidden_dim=8, dispatch="capacity")), CHEAP),
}


def pairs():
    return [
        *(pytest.param(*pair, id=name) for name, pair in PAIRS.items()),
        *(pytest.param(*p, id=name, marks=pytest.mark.slow) for name, p in SLOW_PAIRS.items()),
    ]


@pytest.fixture
def prompts(rng):
    return [rng.integers(VOCAB, size=n) for n in PROMPTS]


@functools.partial(jax.jit, static_argnums=0)
def apply(model, variables, tokens):
    return model.apply(variables, tokens).logits


def in_full(model, variables, prompts, found):
    """Logits [B, NEW, V] that one full pass gives at each new token, float64."""
    text = np.zeros((len(prompts), max(PROMPTS) + NEW), np.int32)
    for row, prompt, tokens in zip(text, prompts, found.completions(), strict=True):
        row[: len(prompt) + len(tokens)] = [*prompt, *tokens]
    logits = np.float64(apply(served(model), variables, text))
    return np.stack([logits[b, len(p) - 1 : len(p) - 1 + NEW] for b, p in enumerate(prompts)])


@pytest.mark.parametrize(("model", "draft"), pairs())
def test_greedy_takes_what_the_target_alone_would_take(model, draft, prompts, rng):
    variables, draft_variables = (random_variables(m, rng) for m in (model, draft))
    options = {"num_draft_tokens": 3, "sampling": GREEDY}
    run = lambda given, **more: speculate(  # noqa: E731
        model, variables, draft, given, prompts, NEW, **options, **more
    )
    found = run(draft_variables)
    assert found.tokens.shape == found.logprobs.shape == (3, NEW)
    assert (found.lengths == NEW).all() and not found.stopped.any()
    np.testing.assert_array_equal(found.lengths, 1 + found.passes + found.accepted)
    assert (found.accepted < found.drafted).any()
    logits = in_full(model, variables, prompts, found)
    taken = np.take_along_axis(logits, found.tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(taken, logits.max(axis=-1), rtol=0, atol=1e-4)
    logprobs = taken - np.log(np.exp(logits).sum(axis=-1))
    np.testing.assert_allclose(found.logprobs, logprobs, rtol=1e-4, atol=1e-4)

    check_stops(run, draft_variables, found)
    if draft == model:
        # Related enough that some of the drafts stay.
        related = run(jax.tree.map(lambda a, b: 0.7 * a + 0.3 * b, variables, draft_variables))
        np.testing.assert_array_equal(related.tokens, found.tokens)
        # Drafted a token at a time and judged several at a time: recursions and logits have to agree.
        itself = run(variables)
        np.testing.assert_array_equal(itself.tokens, found.tokens)
        np.testing.assert_array_equal(itself.accepted, itself.drafted)
        np.testing.assert_array_equal(itself.passes, -(-(NEW - 1) // 4))
    else:
        alone = serving.generate(model, variables, prompts, NEW, sampling=GREEDY)
        np.testing.assert_array_equal(found.tokens, alone.tokens)


def check_stops(run, draft_variables, free):
    """A row ends at its first stop token, wherever in a round it comes."""
    stops = {int(free.tokens[0, 3]), int(free.tokens[2, 6])}
    found = run(draft_variables, stop_tokens=stops)
    for b, tokens in enumerate(free.tokens):
        at = [i for i, token in enumerate(tokens) if int(token) in stops]
        length = at[0] + 1 if at else NEW
        assert found.lengths[b] == length
        assert found.stopped[b] == bool(at)
        np.testing.assert_array_equal(found.tokens[b, :length], tokens[:length])
        assert (found.tokens[b, length:] == NO_TOKEN).all()
        assert not found.logprobs[b, length:].any()
        assert found.passes[b] + found.accepted[b] in (length - 1, length)


# Odds: every text of 4 tokens of a vocabulary of 4, with all the settings.
STEPS, TOKENS, ROWS = 4, 4, 8_000
TINY = CHEAP.clone(vocab_size=TOKENS, d_model=8, max_seq_len=16)
SAMPLING = Sampling(1.2, top_k=3, top_p=0.97, min_p=0.02, repetition_penalty=1.3)
TINY_PROMPTS = ([3], [1, 2, 0])
# Pearson's statistic passes this in one of ten million runs of a right sampler.
TAIL = 1e-7


@pytest.fixture
def tiny(rng):
    """Variables of a target and of a draft that knows nothing of it."""
    return [random_variables(TINY, rng) for _ in range(2)]


def odds_of_texts(variables, prompt):
    """Probability of each text of `STEPS` tokens behind the prompt, [TOKENS**STEPS], token by token in float64."""
    texts = np.array(list(itertools.product(range(TOKENS), repeat=STEPS)))
    rows = np.concatenate([np.tile(prompt, (len(texts), 1)), texts], axis=1)
    logits = np.asarray(apply(TINY, variables, rows))
    odds = np.ones(len(texts))
    for step, t in enumerate(range(len(prompt), rows.shape[1])):
        for i, row in enumerate(rows):
            # Texts with the same beginning lie side by side.
            if i % TOKENS ** (STEPS - step) == 0:
                p = probabilities(logits[i, t - 1], SAMPLING, set(row[:t].tolist()))
            odds[i] *= p[row[t]]
    np.testing.assert_allclose(odds.sum(), 1, rtol=1e-6)
    return odds


def draw_texts(variables, keys):
    prompts = [TINY_PROMPTS[i % 2] for i in range(ROWS)]
    return speculate(
        TINY,
        variables[0],
        TINY,
        variables[1],
        prompts,
        STEPS,
        num_draft_tokens=2,
        sampling=SAMPLING,
        key=keys,
    )


def tail_of(found, odds):
    """Probability of counts at least so far from their odds; texts too rare for the statistic are taken together."""
    texts = found @ TOKENS ** np.arange(STEPS)[::-1]
    counts = np.bincount(texts, minlength=TOKENS**STEPS)
    assert not counts[odds == 0].any()
    expected = odds * len(texts)
    rare = expected < 20
    if expected[rare].sum() < 20:
        rare[np.argmin(np.where(rare, np.inf, expected))] = True
    expected = np.append(expected[~rare], expected[rare].sum())
    counts = np.append(counts[~rare], counts[rare].sum())
    return stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), len(counts) - 1)


def make_keys():
    seed = secrets.randbelow(2**31)
    print(f"key: {seed}")
    return jax.random.split(jax.random.key(seed), ROWS)


def test_texts_are_drawn_with_the_odds_of_the_target(tiny):
    keys = make_keys()
    found = draw_texts(tiny, keys)
    share = found.accepted.sum() / found.drafted.sum()
    print(f"{share:.0%} of the drafts accepted")
    assert 0.05 < share < 0.95
    for i, prompt in enumerate(TINY_PROMPTS):
        assert tail_of(found.tokens[i::2], odds_of_texts(tiny[0], prompt)) > TAIL
    # A row is its prompt and its key alone: two rows on, in other company.
    moved = draw_texts(tiny, jnp.roll(keys, 2))
    np.testing.assert_array_equal(moved.tokens, np.roll(found.tokens, 2, axis=0))


def wrong_accept(keys, drafted, num_drafted, draft, target):
    """As `accept`, but what comes in place of a rejected token is drawn from p and not from the residual."""
    num_accepted, _ = serving.acceptance.accept(keys, drafted, num_drafted, draft, target)
    p = jnp.take_along_axis(target, num_accepted[:, None, None], axis=1)[:, 0]
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, 1)
    return num_accepted, jax.vmap(jax.random.categorical)(keys, jnp.log(p)).astype(jnp.int32)


def test_the_odds_tell_a_wrong_rule(tiny, monkeypatch):
    monkeypatch.setattr(speculative, "accept", wrong_accept)
    compiled.cache_clear()
    try:
        found = draw_texts(tiny, make_keys())
    finally:
        compiled.cache_clear()
    odds = [odds_of_texts(tiny[0], prompt) for prompt in TINY_PROMPTS]
    assert min(tail_of(found.tokens[i::2], odds[i]) for i in range(2)) < TAIL


# Early exit, against full models whose later layers or recursions are made to do nothing.
SMALL = MODEL.clone(d_model=8, num_layers=4, mixers=(Attention(2, 1), ShortConv()))
THREE = SMALL.clone(num_layers=3, mixers=(Attention(2, 1),))
MIDDLE = SMALL.clone(
    num_layers=8,
    mixers=(Attention(2, 1), ShortConv(), SlidingWindow(2, window=3)),
    depth=Recursive(3, "middle_cycle"),
)


def silent(params):
    """Zeros in every map of a layer, so that in the residual stream it is the identity."""
    return jax.tree.map(np.zeros_like, params)


def without_last_layers(params):
    layers = params["depth"]["layers"]
    quiet = {name: silent(layers[name]) for name in ("blocks_2", "blocks_3")}
    return SMALL, {"depth": {"layers": layers | quiet}}


def without_last_scanned_layers(params):
    def silence(stacked):
        return np.concatenate([stacked[:1], silent(stacked[1:])])

    return SMALL.clone(scan_layers=True), {"depth": jax.tree.map(silence, params["depth"])}


def where_no_score_is_above_the_threshold(params):
    depth = params["depth"]
    quiet = {"router_2": silent(depth["routing"]["router_2"])}
    return EXPERTS, {"depth": depth | {"routing": depth["routing"] | quiet}}


def where_the_last_depth_is_never_picked(params):
    depth = params["depth"]
    bias = {"balance_bias": np.float32([0, 0, -10]) + depth["routing"]["balance_bias"]}
    return EVERY_TOKEN, {"depth": depth | {"routing": depth["routing"] | bias}}


def laid_out_as_layers(params):
    """The layer before two recursions of two, those, and the layer behind them, with the mixers that they have."""
    depth = params["depth"]
    shared = list(depth["shared"].values())
    blocks = [depth["first"]["blocks_0"], *shared, *shared, depth["last"]["blocks_0"]]
    attention, conv, window = MIDDLE.mixers
    model = SMALL.clone(num_layers=6, mixers=(attention, conv, window, conv, window, conv))
    return model, {"depth": {"layers": {f"blocks_{i}": b for i, b in enumerate(blocks)}}}


EXPERTS = THREE.clone(depth=MixtureOfRecursions(3, "cycle"))
# Sigmoid gates of a depth say nothing of the others.
EVERY_TOKEN = THREE.clone(
    depth=MixtureOfRecursions(
        3, "cycle", routing=TokenChoice(activation="sigmoid", balancing="loss_free")
    )
)
EXITS = {
    "layers": (SMALL, {"num_layers": 2}, without_last_layers),
    "scanned": (
        SMALL.clone(scan_layers=True),
        {"num_layers": 2},
        without_last_scanned_layers,
    ),
    "recursions": (MIDDLE, {"num_recursions": 2}, laid_out_as_layers),
    "expert choice": (EXPERTS, {"num_recursions": 2}, where_no_score_is_above_the_threshold),
    "token choice": (EVERY_TOKEN, {"num_recursions": 2}, where_the_last_depth_is_never_picked),
}


@pytest.mark.parametrize(
    "name",
    [
        name if name == "expert choice" else pytest.param(name, marks=pytest.mark.slow)
        for name in EXITS
    ],
)
def test_an_early_exit_is_the_model_whose_later_layers_do_nothing(name, rng):
    model, where, quieten = EXITS[name]
    variables = random_variables(model, rng)
    shallow, shallow_variables = early_exit(model, variables, **where)
    full, changed = quieten(variables["params"])
    tokens = rng.integers(VOCAB, size=(3, 8))
    got = apply(shallow, shallow_variables, tokens)
    want = apply(full, {"params": variables["params"] | changed}, tokens)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    assert np.std(got) > 0.1

    held = {id(leaf) for leaf in jax.tree.leaves(variables)}
    copied = [a.size for a in jax.tree.leaves(shallow_variables) if id(a) not in held]
    # Half of the stacked layers; two of the three columns of the router and its bias.
    stacked = sum(a.size for a in jax.tree.leaves(variables["params"]["depth"])) / 2
    assert sum(copied) == {"scanned": stacked, "token choice": 2 * (8 + 1)}.get(name, 0)


@pytest.mark.parametrize(
    ("model", "where", "message"),
    [
        (SMALL, {}, "'plain' by num_layers=None; valid: num_layers of 1 to 4, and nothing else"),
        (SMALL, {"num_layers": 5}, "'plain' by num_layers=5"),
        (SMALL, {"num_recursions": 1}, "'plain' by num_recursions=1; valid: num_layers of 1 to 4"),
        (EXPERTS, {"num_recursions": 0}, "num_recursions=0; valid: num_recursions of 1 to 3"),
        (
            SMALL.clone(scan_layers=True),
            {"num_layers": 3},
            "num_layers=3 of scanned layers whose pattern repeats every 2; valid: a multiple of it",
        ),
    ],
)
def test_an_exit_that_is_none_is_refused(model, where, message, rng):
    with pytest.raises(ValueError, match=message):
        early_exit(model, random_variables(model, rng), **where)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_draft_tokens": 0}, "num_draft_tokens=0; valid: at least 1"),
        (
            {"draft": CHEAP.clone(vocab_size=VOCAB + 1)},
            "the draft has vocab_size=25; valid: that of the model, 24",
        ),
        (
            {"draft": CHEAP.clone(max_seq_len=4)},
            "a prompt of 2 tokens and max_new_tokens=3; valid: at most max_seq_len=4 together",
        ),
        ({"max_new_tokens": 39}, "valid: at most max_seq_len=40 together"),
        ({"max_new_tokens": 0}, "max_new_tokens=0; valid: at least 1"),
        ({"prompts": []}, "prompts is empty; valid: at least one prompt"),
        ({"prompts": [[1] * 41]}, "a prompt of 41 tokens and max_new_tokens=3"),
        ({"prompts": [[VOCAB]]}, r"prompts\[0\] has the id 24; valid: 0 to 23"),
        ({"stop_tokens": [-1]}, "stop_tokens has the id -1; valid: 0 to 23"),
        ({"key": jax.random.split(jax.random.key(0), 2)}, "one for each of 1 rows"),
        ({"draft": CHEAP.clone(head=Embedding())}, "Embedding, which gives no logits"),
    ],
)
def test_what_cannot_be_speculated_is_refused_at_once(change, message, rng):
    arguments = {
        "model": MODEL,
        "draft": CHEAP,
        "prompts": [[1, 2]],
        "max_new_tokens": 3,
    } | change
    variables, draft_variables = (
        random_variables(arguments[which], rng) for which in ("model", "draft")
    )
    with pytest.raises(ValueError, match=message):
        speculate(variables=variables, draft_variables=draft_variables, **arguments)
