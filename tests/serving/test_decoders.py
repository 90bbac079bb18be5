"""The ways to decode behind an engine: texts come and go in few slots, and each is what it is alone."""

import functools
import queue

import jax
import numpy as np
import pytest
from test_depthwise import depths
from tiny_models import random_variables

from effjax import serving
from effjax.depth import ExpertChoice, MixtureOfRecursions, Recursive, TokenChoice
from effjax.ffn import Gated, Switch
from effjax.heads import Untied
from effjax.mixers import Attention, Mamba, ShortConv, SlidingWindow
from effjax.models import DecoderLM
from effjax.serving import Sampling
from effjax.serving.decoders import Draft, create_decoder, gains_by_depth
from effjax.serving.depthwise_decoder import DepthwiseDecoder
from effjax.serving.engine import Engine
from effjax.serving.plain_decoder import PlainDecoder
from effjax.serving.requests import Request, Requests
from effjax.serving.speculative_decoder import SpeculativeDecoder

VOCAB, SLOTS, DRAFTED, NEW = 24, 2, 3, 16
PLAIN = DecoderLM(
    vocab_size=VOCAB,
    d_model=16,
    num_layers=2,
    max_seq_len=40,
    mixers=(Attention(2, 1),),
    ffn=Gated(hidden_dim=16),
    head=Untied(),
)
# The first recursion is not for every token either: some take none at all.
EXPERT_CHOICE = ExpertChoice(capacities=(0.7, 0.4), alpha=1.0, selection="aux_router")
MOR = PLAIN.clone(ffn=None, depth=MixtureOfRecursions(2, "cycle", EXPERT_CHOICE))
SHARED = PLAIN.clone(
    num_layers=5,
    mixers=(SlidingWindow(num_heads=2, window=8),),
    depth=MixtureOfRecursions(3, "middle_cycle", TokenChoice(balancing="loss_free"), "shared"),
)
SCANNED = MOR.clone(num_layers=4, mixers=(Mamba(state_dim=4),), scan_layers=True)
RING = PLAIN.clone(num_layers=1, mixers=(SlidingWindow(2, window=3),), ffn=None)
CONVOLUTION = PLAIN.clone(num_layers=1, mixers=(ShortConv(),), ffn=None)
GREEDY = Sampling(temperature=0)
# What greedy takes, by the program for all settings.
FIRST = Sampling(2.0, top_k=1)
NARROW = Sampling(0.7, top_p=1e-6, min_p=0.5)
SEEDED = Sampling(1.5, top_k=20, repetition_penalty=1.2)

# A model; how it is decoded, or what drafts for it; and slots: of eight, prompts are read two at a time.
WAYS = {
    "depth-wise": (MOR, "depthwise", SLOTS),
    "speculative": (CONVOLUTION, CONVOLUTION, SLOTS),
}
SLOW_WAYS = {
    "plain": (PLAIN, "plain", 8),
    "depth-wise, eight slots": (MOR, "depthwise", 8),
    "depth-wise, shared rings": (SHARED, "depthwise", SLOTS),
    "depth-wise, scanned states": (SCANNED, "depthwise", 8),
    "depth-wise, every recursion": (MOR.clone(depth=Recursive(2, "cycle")), "depthwise", SLOTS),
    "depth-wise, experts": (MOR.clone(ffn=Switch(4, 16)), "depthwise", SLOTS),
    "speculative, eight slots": (RING, CONVOLUTION, 8),
    "speculative, rings": (RING, RING, SLOTS),
    "speculative, caches": (PLAIN, CONVOLUTION, SLOTS),
    "speculative, scanned states": (SCANNED, CONVOLUTION, 8),
    "speculative, recursions": (MOR, MOR, SLOTS),
}


def ways(ways_of, **options):
    return [pytest.param(*way, id=name, **options) for name, way in ways_of.items()]


def build(model, way, num_slots, rng, share=0.8):
    """Variables of the model, a decoder, and the function that makes texts as it does.

    `share` says how much of a draft's parameters is the model's, where the draft is built like it.
    """
    variables = random_variables(model, rng)
    own, size = (model, variables), {"num_slots": num_slots}
    if isinstance(way, str):
        decoder = create_decoder(*own, decoding=way, **size)
        return variables, decoder, functools.partial(serving.generate, *own)
    drafting = random_variables(way, rng)
    if way == model:
        drafting = jax.tree.map(lambda a, b: share * a + (1 - share) * b, variables, drafting)
    decoder = create_decoder(*own, draft=Draft(way, drafting, DRAFTED), **size)
    speculate = functools.partial(serving.speculate, *own, way, drafting, num_draft_tokens=DRAFTED)
    return variables, decoder, speculate


class Heard:
    """What an engine tells of a request; `at` says what is done at some tokens before the engine goes on."""

    def __init__(self, engine, request, at=None):
        self.tokens, self._done, self._at = [], queue.Queue(), at or {}
        self.ticket = engine.submit(request, self._hear)

    def _hear(self, event):
        if isinstance(event, Exception):
            self._done.put(event)
            return
        self.tokens.append(event)
        if act := self._at.get(len(self.tokens)):
            act(self)
        if event.finish:
            self._done.put(event)

    @property
    def ids(self):
        return [token.id for token in self.tokens]

    def wait(self):
        """Until the text is whole: its token ids."""
        event = self._done.get(timeout=120)
        if isinstance(event, Exception):
            raise event
        return self.ids


def random_prompts(rng, count):
    return [rng.integers(VOCAB, size=n) for n in rng.integers(1, 16, size=count)]


@pytest.mark.parametrize(
    ("model", "way", "num_slots"),
    [
        pytest.param(CONVOLUTION, "plain", 1, id="plain"),
        pytest.param(MOR, "depthwise", 8, id="depth-wise", marks=pytest.mark.slow),
        pytest.param(RING, CONVOLUTION, SLOTS, id="speculative", marks=pytest.mark.slow),
    ],
)
def test_after_a_warm_up_nothing_is_compiled_and_nothing_was_counted(
    model, way, num_slots, rng, caplog
):
    _, decoder, _ = build(model, way, num_slots, rng)
    decoder.warm_up(10)
    assert not any(total.count for total in decoder.totals)
    rng.shuffle(samplings := [GREEDY, Sampling(0.7), NARROW])
    with jax.log_compiles():
        for sampling in samplings:
            for slot in range(num_slots):
                prompt = rng.integers(VOCAB, size=rng.integers(1, 11))
                assert decoder.admit(slot, Request(prompt, 4, sampling))
            for _ in range(num_slots + 2):
                decoder.advance()
            for slot in range(num_slots):
                decoder.release(slot)
    assert "Compiling" not in caplog.text


@pytest.mark.parametrize(
    ("model", "way", "num_slots"), ways(WAYS) + ways(SLOW_WAYS, marks=pytest.mark.slow)
)
def test_texts_that_come_and_go_are_what_generate_makes(model, way, num_slots, rng):
    variables, decoder, _ = build(model, way, num_slots, rng)
    count = num_slots + 4
    prompts, lengths = random_prompts(rng, count), rng.integers(5, NEW, size=count)
    want = serving.generate(model, variables, prompts, NEW, sampling=GREEDY)
    stop = int(want.tokens[2, 3])
    requests = [
        Request(prompt, int(n), FIRST if i % 2 else NARROW)
        for i, (prompt, n) in enumerate(zip(prompts, lengths, strict=True))
    ]
    requests[2] = Request(prompts[2], NEW, FIRST, frozenset([stop]))
    seeded = Request(prompts[0], 12, SEEDED, seed=int(rng.integers(2**31)))
    with Engine(decoder) as engine:
        heard = {}

        def others_come(_):
            """While the first text is under way. The one that is given up leaves its slot to another."""
            give_up = {3: lambda one: one.ticket.cancel()}
            for i in range(1, count):
                heard[i] = Heard(engine, requests[i], give_up if i == 1 else None)
            heard["seeded"] = Heard(engine, seeded)

        heard[0] = Heard(engine, requests[0], {3: others_come})
        for i in [0, "seeded", *range(2, count)]:
            heard[i].wait()
        assert heard["seeded"].ids == Heard(engine, seeded).wait()
    for i in range(count):
        full = want.tokens[i].tolist()
        n = 3 if i == 1 else full.index(stop) + 1 if i == 2 else lengths[i]
        assert heard[i].ids == full[:n]
        finish = {1: None, 2: "stop"}.get(i, "length")
        assert [token.finish for token in heard[i].tokens] == [None] * (n - 1) + [finish]
        logprobs = [token.logprob for token in heard[i].tokens]
        np.testing.assert_allclose(logprobs, want.logprobs[i, :n], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "way", "num_slots"), ways(WAYS | SLOW_WAYS))
def test_each_text_is_drawn_by_its_own_settings_and_seed(model, way, num_slots, rng):
    _, decoder, alone = build(model, way, num_slots, rng)
    samplings = [SEEDED, Sampling(0.8), Sampling(1.5, top_p=0.9, min_p=0.02), GREEDY, SEEDED]
    requests = [
        Request(prompt, NEW, sampling, seed=int(rng.integers(2**31)))
        for prompt, sampling in zip(random_prompts(rng, 5), samplings, strict=True)
    ]
    with Engine(decoder) as engine:
        heard = [Heard(engine, request) for request in requests]
        texts = [one.wait() for one in heard]
    for text, request in zip(texts, requests, strict=True):
        key = jax.random.key(request.seed)[None]
        want = alone([request.prompt], NEW, sampling=request.sampling, key=key)
        assert text == want.tokens[0].tolist()


def totals_of(decoder, prompts, count):
    """What it has counted when it has made texts of so many tokens, and these."""
    with Engine(decoder) as engine:
        heard = [Heard(engine, Request(prompt, count, FIRST)) for prompt in prompts]
        texts = [one.wait() for one in heard]
    return {total.name: total.count for total in decoder.totals}, texts


def test_recursions_are_counted(rng):
    model, *way = WAYS["depth-wise"]
    variables, decoder, _ = build(model, *way, rng)
    prompts = random_prompts(rng, 3)
    totals, texts = totals_of(decoder, prompts, 14)
    made = serving.Generation(np.array(texts), np.zeros(3), np.full(3, 14), np.zeros(3, bool))
    spent = sum(map(np.sum, depths(model, variables, prompts, made)))
    assert totals == {"recursions": spent, "recursion_tokens": 3 * 13}


def test_a_draft_that_is_the_model_is_always_right(rng):
    *_, decoder, _ = build(*WAYS["speculative"], rng, share=1)
    totals, _ = totals_of(decoder, random_prompts(rng, 3), 14)
    # 13 tokens come behind the first one, of which each of 4 passes adds one by itself.
    assert totals == {"draft_tokens": 3 * 9, "accepted_draft_tokens": 3 * 9}


@pytest.mark.slow
def test_a_draft_that_knows_nothing_is_mostly_wrong(rng):
    *_, decoder, _ = build(*WAYS["speculative"], rng, share=0)
    totals, _ = totals_of(decoder, random_prompts(rng, 3), NEW)
    assert totals["accepted_draft_tokens"] < totals["draft_tokens"] / 2


@pytest.mark.parametrize(
    ("model", "num_slots", "gains"),
    [
        (MOR, 2, True),
        (SHARED, 2, True),
        (MOR, 1, False),
        (MOR.clone(num_layers=4, depth=MOR.depth.clone(sharing="sequence")), 2, False),
        (MOR.clone(depth=Recursive(2, "cycle")), 2, False),
        (PLAIN, 2, False),
    ],
)
def test_depth_wise_batching_is_for_texts_whose_tokens_differ(model, num_slots, gains):
    assert gains_by_depth(model, num_slots) == gains


@pytest.mark.parametrize(
    ("model", "options", "kind"),
    [
        (MOR, {}, DepthwiseDecoder),
        (MOR, {"cache_tokens": 64}, PlainDecoder),
        (MOR, {"decoding": "plain"}, PlainDecoder),
        (MOR, {"draft": CONVOLUTION}, SpeculativeDecoder),
    ],
)
def test_the_way_suits_the_model(model, options, kind, rng):
    options = {"num_slots": SLOTS} | options
    if draft := options.get("draft"):
        options["draft"] = Draft(draft, random_variables(draft, rng))
    assert type(create_decoder(model, random_variables(model, rng), **options)) is kind


DRAFT = Draft(RING, {})


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (MOR, {"decoding": "fast"}, "unknown decoding 'fast'.*known: auto"),
        (
            MOR,
            {"decoding": "plain", "draft": DRAFT},
            "decoding='plain' with a draft; valid: 'auto'",
        ),
        (MOR, {"cache_tokens": 64, "draft": DRAFT}, "cache_tokens=64 with a draft; valid: None"),
        (
            MOR,
            {"cache_tokens": 64, "decoding": "depthwise"},
            "cache_tokens=64 with decoding='depthwise'; valid: None",
        ),
        (PLAIN, {"decoding": "depthwise"}, "depth='plain' has no recursions"),
        (PLAIN, {"draft": Draft(RING.clone(vocab_size=9), {})}, "the draft has vocab_size=9"),
        (PLAIN, {"draft": Draft(RING, {}, 0)}, "num_draft_tokens=0; valid: at least 1"),
        (PLAIN, {"draft": Draft(RING.clone(max_seq_len=8), {}), "max_length": 9}, "max_length=9"),
        (PLAIN, {"max_length": 41}, "max_length=41; valid: 1 to max_seq_len=40"),
        (PLAIN, {"num_slots": 0}, "num_slots=0; valid: at least 1"),
    ],
)
def test_what_does_not_go_together_is_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        create_decoder(model, {}, **options)


def test_prompts_are_read_together_if_there_are_enough_of_one_size():
    requests = Requests(5, VOCAB)
    for slot, length in enumerate([3, 16, 17, 5, 6]):
        requests.put(slot, Request(np.zeros(length, int), 1))
    requests.remove(3)
    assert requests.to_read(2) == [0, 1]
    assert requests.is_read.tolist() == [True, True, False, False, False]
    assert requests.to_read(2) == [2]  # the next one would be padded to its length
    assert requests.to_read(2) == [4]
    assert requests.to_read(2) == []
