"""Depth-wise batching: the texts of `generate`, at the price of the recursions that their tokens take."""

import heapq

import jax
import numpy as np
import pytest
from tiny_models import random_variables

from effjax import serving
from effjax.depth import ExpertChoice, MixtureOfRecursions, Recursive, TokenChoice
from effjax.depth.sharing import STRATEGIES
from effjax.ffn import Gated, Switch
from effjax.mixers import Attention, Mamba, ShortConv, SlidingWindow, TaylorLinear
from effjax.models import DecoderLM
from effjax.serving import Sampling

VOCAB, NEW, SLOTS = 24, 12, 2
ATTENTION, RING = Attention(2, 1), SlidingWindow(num_heads=2, window=8)
SEEDED, PENALISED = Sampling(1.5), Sampling(temperature=0, repetition_penalty=1.2)
# The first recursion is not for every token either: some take none at all.
EXPERT_CHOICE = ExpertChoice(capacities=(0.7, 0.4), alpha=1.0, selection="aux_router")
TOKEN_CHOICE = TokenChoice(balancing="loss_free")


def make_model(depth, mixers=(ATTENTION,), num_layers=4, **parts):
    return DecoderLM(
        vocab_size=VOCAB,
        d_model=16,
        num_layers=num_layers,
        max_seq_len=32,
        mixers=mixers,
        depth=depth,
        **{"ffn": Gated(hidden_dim=16)} | parts,
    )


def every_combination():
    depth = MixtureOfRecursions(2, "cycle", EXPERT_CHOICE)
    for sharing in STRATEGIES:
        num_layers = 6 if sharing == "middle_sequence" else 4
        yield f"recursive {sharing}", make_model(Recursive(2, sharing), num_layers=num_layers)
        for name, routing in {"expert": ExpertChoice(), "token": TOKEN_CHOICE}.items():
            own = MixtureOfRecursions(2, sharing, routing)
            yield f"{name} {sharing}", make_model(own, num_layers=num_layers)
            if sharing.endswith("cycle"):
                yield f"{name} {sharing} shared", make_model(own.clone(kv_sharing="shared"))
    yield (
        "ring, shared",
        make_model(depth.clone(kv_sharing="shared", routing=ExpertChoice()), (RING,)),
    )
    yield "constant states", make_model(depth, (ShortConv(), TaylorLinear(2, 4)))
    yield "scanned", make_model(depth, scan_layers=True)
    yield "scanned states", make_model(depth, (Mamba(state_dim=4),), scan_layers=True)
    yield "experts", make_model(depth, ffn=Switch(4, 16))


EXPERTS = make_model(MixtureOfRecursions(2, "middle_cycle", EXPERT_CHOICE))
THREE = MixtureOfRecursions(3, "cycle", TOKEN_CHOICE, "shared")
CASES = [
    # Tokens are those of `generate` by default in test_decoders.
    pytest.param(EXPERTS, SEEDED, id="expert choice", marks=pytest.mark.slow),
    pytest.param(make_model(THREE, (RING,), 3), SEEDED, id="token choice, shared"),
    pytest.param(EXPERTS, PENALISED, id="penalised", marks=pytest.mark.slow),
    *(pytest.param(m, SEEDED, id=n, marks=pytest.mark.slow) for n, m in every_combination()),
]


@pytest.fixture
def prompts(rng):
    """More of them than slots, so that some wait for the end of others."""
    return [rng.integers(VOCAB, size=n) for n in (5, 1, 9, 3, 16)]


def depths(model, variables, prompts, generation):
    """Recursions of every token of each text that was drawn and read, by one pass over all whole texts."""
    texts = np.zeros((len(prompts), model.max_seq_len), np.int32)
    segment_ids = np.zeros_like(texts)
    completions = generation.completions()
    for b, (prompt, new) in enumerate(zip(prompts, completions, strict=True)):
        read = np.concatenate([prompt, new[:-1]])
        texts[b, : len(read)], segment_ids[b, : len(read)] = read, 1
    metrics = jax.jit(lambda texts, ids: model.apply(variables, texts, segment_ids=ids).metrics)(
        texts, segment_ids
    )
    full = np.full(texts.shape, model.depth.num_recursions)
    found = np.asarray(metrics.get("token/depth", full), int)
    return [
        row[len(prompt) : len(prompt) + len(new) - 1]
        for row, prompt, new in zip(found, prompts, completions, strict=True)
    ]


def steps_of(depths, num_slots):
    """When the last text ends, if each begins in the slot that is free first."""
    free = [0] * num_slots
    for depth in depths:
        # A token that takes no recursion waits for a step all the same.
        heapq.heapreplace(free, free[0] + int(np.maximum(depth, 1).sum()))
    return max(free)


@pytest.mark.parametrize(("model", "sampling"), CASES)
def test_texts_are_those_of_generate_and_cost_their_depth(model, sampling, prompts, rng):
    variables = random_variables(model, rng)
    options = {"sampling": sampling, "key": jax.random.key(rng.integers(2**31))}
    want = serving.generate(model, variables, prompts, NEW, **options)
    # Text 0 ends with its third token, and others where they come to it.
    options["stop_tokens"] = [want.tokens[0, 2]]
    want = serving.generate(model, variables, prompts, NEW, **options)
    got = serving.generate_depthwise(model, variables, prompts, NEW, num_slots=SLOTS, **options)
    for field in ("tokens", "lengths", "stopped"):
        np.testing.assert_array_equal(getattr(got, field), getattr(want, field), err_msg=field)
    np.testing.assert_allclose(got.logprobs, want.logprobs, rtol=1e-4, atol=1e-4)

    depth = depths(model, variables, prompts, got)
    spent, reads = sum(map(np.sum, depth)), np.sum(want.lengths - 1)
    assert got.applications == spent
    assert got.steps == steps_of(depth, SLOTS)
    assert got.mean_depth == pytest.approx(spent / reads)
    assert got.occupancy == pytest.approx(spent / (SLOTS * got.steps))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (EXPERTS, {"num_slots": 0}, "num_slots=0; valid: at least 1"),
        (EXPERTS, {"stop_tokens": [VOCAB]}, f"stop_tokens has the id {VOCAB}"),
        (
            EXPERTS.clone(depth=DecoderLM().depth),
            {},
            "depth='plain' has no recursions .*; valid: 'recursive' or 'mixture_of_recursions'",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        serving.generate_depthwise(model, {}, [[1, 2]], 4, **options)
