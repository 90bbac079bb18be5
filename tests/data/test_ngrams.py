"""n-gram models against the formulas, byte by byte in plain Python."""

import collections
import itertools
import math

import numpy as np
import pytest

from effjax import data
from effjax.data.ngrams import bigram_bits_per_byte, unigram_bits_per_byte


def reference(train, heldout):
    single = collections.Counter(byte for document in train for byte in document)
    double = collections.Counter(
        pair for document in train for pair in itertools.pairwise(document)
    )
    before = collections.Counter(byte for document in train for byte in document[:-1])
    total = sum(single.values())

    def unigram(byte):
        return (single[byte] + 1) / (total + 256)

    def bigram(last, byte):
        return (double[last, byte] + unigram(byte)) / (before[last] + 1)

    bits = np.zeros(2)
    for document in heldout:
        for index, byte in enumerate(document):
            bits[0] -= math.log2(unigram(byte))
            bits[1] -= math.log2(bigram(document[index - 1], byte) if index else unigram(byte))
    return bits / sum(map(len, heldout))


def test_against_the_formulas(rng):
    def corpus(count):
        lengths = rng.integers(0, 60, count)
        return [bytes(rng.choice(40, int(n), p=probabilities).tolist()) for n in lengths]

    probabilities = rng.dirichlet(np.full(40, 0.3))
    train, heldout = corpus(80), [*corpus(30), bytes([250, 251])]  # bytes never seen before
    expected = reference(train, heldout)
    assert unigram_bits_per_byte(train, heldout) == pytest.approx(expected[0], rel=1e-12)
    assert bigram_bits_per_byte(train, heldout) == pytest.approx(expected[1], rel=1e-12)


def test_documents_do_not_run_into_each_other():
    train = [b"ab"] * 50 + [b"bc"]
    apart = bigram_bits_per_byte(train, [b"ab", b"ab"])
    joined = bigram_bits_per_byte(train, [b"abab"])
    assert apart < joined  # "a" never follows "b"


def test_each_conditional_distribution_sums_to_one(rng):
    train = [rng.bytes(200) for _ in range(5)]
    last = train[0][0]
    heldout = [bytes([last, byte]) for byte in range(256)]
    first_bits = -math.log2((b"".join(train).count(last) + 1) / (1000 + 256))
    bits = [2 * bigram_bits_per_byte(train, [document]) - first_bits for document in heldout]
    assert sum(2.0**-b for b in bits) == pytest.approx(1.0, rel=1e-9)


def test_on_the_standard_library():
    splits = [list(data.documents({}, split=split)) for split in ("train", "heldout")]
    unigram, bigram = unigram_bits_per_byte(*splits), bigram_bits_per_byte(*splits)
    assert 2.0 < bigram < unigram < 6.0


def test_nothing_held_out():
    with pytest.raises(ValueError, match="heldout_documents have 0 bytes"):
        unigram_bits_per_byte([b"a"], [b""])
