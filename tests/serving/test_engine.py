"""The engine: many texts in few slots, each as if it were alone."""

import dataclasses
import queue
import threading

import jax
import numpy as np
import pytest
from test_generation import EVERYTHING, GREEDY, MODEL, VOCAB
from tiny_models import random_variables

from effjax import serving
from effjax.depth import Recursive
from effjax.mixers import Mamba, SlidingWindow
from effjax.models import DecoderLM
from effjax.serving import Sampling
from effjax.serving.engine import Engine, Overloaded
from effjax.serving.plain_decoder import PlainDecoder
from effjax.serving.requests import Request
from effjax.serving.slots import batch_axes

SLOTS, WAITING = 2, 6


class Heard:
    """What an engine tells of a request."""

    def __init__(self, engine, request):
        self.events = queue.Queue()
        self.ticket = engine.submit(request, self.events.put)

    def rest(self):
        """Tokens up to the last, and why that was the last."""
        tokens = []
        while True:
            event = self.events.get(timeout=60)
            if isinstance(event, Exception):
                raise event
            tokens.append(event)
            if event.finish:
                return tokens


@pytest.fixture(scope="module")
def variables():
    seed = np.random.SeedSequence().entropy
    print(f"seed {seed}")
    return random_variables(MODEL, np.random.default_rng(seed))


@pytest.fixture(scope="module")
def engine(variables):
    decoder = PlainDecoder(MODEL, variables, num_slots=SLOTS)
    with Engine(decoder, max_waiting=WAITING) as engine:
        yield engine


def random_request(rng, sampling=GREEDY, max_new_tokens=12, **options):
    prompt = rng.integers(VOCAB, size=rng.integers(1, 16))
    return Request(prompt, max_new_tokens, sampling, seed=int(rng.integers(2**31)), **options)


def alone(variables, request):
    """The text that `generate` makes of a request."""
    return serving.generate(
        MODEL,
        variables,
        [request.prompt],
        request.max_new_tokens,
        sampling=request.sampling,
        stop_tokens=request.stop_tokens,
        key=jax.random.key(request.seed)[None],
    )


@pytest.mark.slow  # by default of the decoder, in test_decoders
def test_every_text_is_what_it_is_alone(engine, variables, rng):
    other = dataclasses.replace(EVERYTHING, temperature=1.5, top_k=3)
    samplings = [GREEDY, Sampling(2.0), EVERYTHING, other, GREEDY, Sampling(0.5)]
    # Lengths of one bucket, so that `alone` compiles once for each kind of sampling.
    requests = [
        Request(rng.integers(VOCAB, size=rng.integers(8, 16)), int(rng.integers(9, 16)), s, seed=i)
        for i, s in enumerate(samplings)
    ]
    heard = [Heard(engine, request) for request in requests]  # more than there are slots
    for request, one in zip(requests, heard, strict=True):
        tokens, want = one.rest(), alone(variables, request)
        assert [t.id for t in tokens] == want.completions()[0].tolist()
        np.testing.assert_allclose(
            [t.logprob for t in tokens], want.logprobs[0], rtol=1e-4, atol=1e-4
        )
        assert [t.finish for t in tokens] == [None] * (len(tokens) - 1) + ["length"]


def test_a_stop_token_ends_a_text(engine, variables, rng):
    request = random_request(rng)
    text = alone(variables, request).completions()[0].tolist()
    stop = text[5]
    found = Heard(engine, Request(request.prompt, 12, GREEDY, frozenset({stop}))).rest()
    assert [t.id for t in found] == text[: text.index(stop) + 1]
    assert found[-1].finish == "stop"


def test_who_cancels_leaves_the_slot_and_hears_no_more(engine, rng):
    """The sink holds the engine's thread at the first token, so that what follows is certain."""
    arrived, goes_on = threading.Event(), threading.Event()
    heard = []

    def sink(token):
        heard.append(token)
        arrived.set()
        goes_on.wait(60)

    ticket = engine.submit(random_request(rng, max_new_tokens=20), sink)
    assert arrived.wait(60)
    waiting = [Heard(engine, random_request(rng)) for _ in range(WAITING)]
    assert (engine.num_active, engine.num_waiting) == (1, WAITING)
    with pytest.raises(Overloaded, match=f"{WAITING} requests wait"):
        engine.submit(random_request(rng), heard.append)
    waiting[0].ticket.cancel()
    ticket.cancel()
    goes_on.set()
    for one in waiting[1:]:
        assert one.rest()[-1].finish == "length"
    assert len(heard) == 1 and waiting[0].events.empty()


def test_a_failing_step_is_told_and_the_engine_goes_on(engine, variables, rng, monkeypatch):
    def fails(*_):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(engine._decoder, "_step", fails)
        with pytest.raises(MemoryError, match="no room"):
            Heard(engine, random_request(rng)).rest()
    request = random_request(rng)
    found = Heard(engine, request).rest()
    assert [t.id for t in found] == alone(variables, request).completions()[0].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": np.zeros(0, int)}, "prompt is int64\\[0\\]; valid: one or more token ids"),
        ({"prompt": np.array([3, VOCAB])}, f"prompt has the id {VOCAB}; valid: 0 to {VOCAB - 1}"),
        ({"prompt": np.zeros(40, int)}, "the prompt has 40 tokens; valid: fewer than 40"),
        (
            {"prompt": np.zeros(30, int)},
            "a prompt of 30 tokens and max_tokens=12; valid: at most 40",
        ),
        ({"max_new_tokens": 0}, "max_tokens=0; valid: at least 1"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(engine, change, message):
    fields = {"prompt": np.zeros(3, int), "max_new_tokens": 12} | change
    with pytest.raises(ValueError, match=message):
        engine.submit(Request(**fields), print)


def test_closing_is_told_to_those_that_wait(variables, rng):
    engine = Engine(PlainDecoder(MODEL, variables, num_slots=1))
    holds = threading.Event()
    engine.submit(random_request(rng), lambda _: holds.wait(60))
    waiting = Heard(engine, random_request(rng))
    closing = threading.Thread(target=engine.close)
    closing.start()
    holds.set()
    closing.join(60)
    assert not engine.is_alive
    with pytest.raises(RuntimeError, match="shutting down"):
        waiting.rest()
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(random_request(rng), print)


def test_rows_are_found_in_states_of_scanned_layers():
    mixers = (SlidingWindow(2, 1, window=4), Mamba(state_dim=4))
    fields = {"vocab_size": 24, "d_model": 16, "num_layers": 4, "mixers": mixers}
    model = DecoderLM(**fields, depth=Recursive(2, "cycle"))
    axes = {scan: batch_axes(model.clone(scan_layers=scan), 8) for scan in (False, True)}
    assert set(jax.tree.leaves(axes[False])) == {0}
    assert set(jax.tree.leaves(axes[True].layers)) == {1}
