"""Texts that share the memory of their keys and values."""

import jax
import pytest
from test_engine import Heard, random_request
from test_generation import GREEDY, VOCAB
from tiny_models import random_variables

from effjax import serving
from effjax.depth import MixtureOfRecursions, Plain
from effjax.ffn import Gated
from effjax.mixers import Attention, SlidingWindow, TaylorLinear
from effjax.models import DecoderLM
from effjax.serving.engine import Engine
from effjax.serving.pages import PAGE_SIZE, PagePool
from effjax.serving.plain_decoder import PlainDecoder
from effjax.serving.requests import Request

# Caches of whole texts, which later recursions read and do not write; rings; layers of both.
MODEL = DecoderLM(
    vocab_size=VOCAB,
    d_model=16,
    num_layers=4,
    max_seq_len=40,
    mixers=(Attention(2, 1), SlidingWindow(2, 1, window=4)),
    ffn=Gated(hidden_dim=16),
    depth=MixtureOfRecursions(2, "cycle", kv_sharing="shared"),
)


@pytest.mark.parametrize("scan_layers", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_texts_in_few_pages_are_what_they_are_alone(rng, scan_layers):
    model = MODEL.clone(scan_layers=scan_layers)
    variables = random_variables(model, rng)
    lengths = rng.integers(2, 20, size=7)
    requests = [random_request(rng, GREEDY, int(n)) for n in lengths]
    # Three slots would have room for 120 tokens; there are pages for 64.
    decoder = PlainDecoder(model, variables, num_slots=3, cache_tokens=4 * PAGE_SIZE)
    with Engine(decoder) as engine:
        heard = [Heard(engine, request) for request in requests]
        texts = [[token.id for token in one.rest()] for one in heard]
        assert engine.free_cache_tokens == 4 * PAGE_SIZE  # all of it is given back
        leaves = jax.tree.leaves(decoder._rows.state)
    assert max(leaf.size for leaf in leaves) < 3 * 40 * 8
    prompts = [request.prompt for request in requests]
    expected = serving.generate(model, variables, prompts, 20, sampling=GREEDY).tokens
    assert texts == [row[:n].tolist() for row, n in zip(expected, lengths, strict=True)]


def test_pages_are_taken_whole_and_given_back():
    pool = PagePool(3 * PAGE_SIZE - 1)
    assert (pool.num_pages, pool.room) == (3, 3 * PAGE_SIZE)
    first, second = pool.take(PAGE_SIZE + 1), pool.take(1)
    assert sorted(first + second) == [0, 1, 2]
    assert pool.take(1) is None
    pool.give_back(first)
    assert pool.take(2 * PAGE_SIZE + 1) is None and pool.num_free == 2
    row = pool.table_row(second, 40)
    assert row.tolist() == [*second, 3, 3]


def test_memory_that_fits_no_request_or_no_model_is_refused(rng):
    with Engine(PlainDecoder(MODEL, {}, num_slots=1, cache_tokens=PAGE_SIZE)) as engine:
        request = random_request(rng, max_new_tokens=PAGE_SIZE)
        with pytest.raises(ValueError, match=f"max_tokens=16; valid: at most {PAGE_SIZE} together"):
            engine.submit(request, print)
    with pytest.raises(ValueError, match="cache_tokens=0; valid: at least 1, or None"):
        PlainDecoder(MODEL, {}, cache_tokens=0)
    mixers = (TaylorLinear(2, 4), SlidingWindow(2, 1, window=4))
    constant = MODEL.clone(mixers=mixers, depth=Plain())
    with pytest.raises(ValueError, match="the model has no cache of whole texts"):
        PlainDecoder(constant, {}, cache_tokens=64)


def test_slots_without_a_text_write_nothing(rng):
    """Page 2 of a text that has ended in slot 1 is of another by the next step."""
    variables = random_variables(MODEL, rng)
    long = Request(rng.integers(VOCAB, size=12), 2 * PAGE_SIZE - 12, GREEDY)
    short = Request(rng.integers(VOCAB, size=3), 2, GREEDY)
    decoder = PlainDecoder(MODEL, variables, num_slots=2, cache_tokens=3 * PAGE_SIZE)
    with Engine(decoder) as engine:
        heard = [Heard(engine, request) for request in (long, short, long)]
        texts = [[token.id for token in one.rest()] for one in heard]
    assert texts[0] == texts[2]
    prompts, room = [long.prompt, short.prompt], long.max_new_tokens
    expected = serving.generate(MODEL, variables, prompts, room, sampling=GREEDY).tokens
    assert texts[:2] == [expected[0].tolist(), expected[1, :2].tolist()]
