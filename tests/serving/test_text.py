"""Text that comes in pieces is the text of all the tokens."""

import numpy as np
import sentencepiece

from effjax.data.tokenizers import ByteTokenizer, SentencePieceTokenizer
from effjax.serving import text_pieces

TEXT = "naïve 😀 日本 plain"


def test_pieces_are_whole_characters():
    tokenizer = ByteTokenizer()
    pieces = list(text_pieces(tokenizer, tokenizer.encode(TEXT)))
    assert pieces == list(TEXT)  # a character may be four tokens, but comes as one piece


def test_bytes_that_are_no_text_are_shown_as_decode_shows_them(rng):
    tokenizer = ByteTokenizer()
    for ids in (rng.integers(256, size=200), tokenizer.encode(TEXT)[:3], [0xFF, 97, 258, 0xE2]):
        assert "".join(text_pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_words_keep_the_space_before_them(tmp_path, rng):
    """Where decoding a token by itself would lose it."""
    words = ["".join(rng.choice(list("abcde"), size=rng.integers(2, 6))) for _ in range(50)]
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(" ".join(rng.choice(words, 12)) for _ in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "model"),
        vocab_size=60,
        model_type="bpe",
        minloglevel=2,
    )
    tokenizer = SentencePieceTokenizer(path=str(tmp_path / "model.model"))
    text = " ".join(rng.choice(words, 20))
    ids = tokenizer.encode(text)
    assert "".join(text_pieces(tokenizer, ids)) == tokenizer.decode(ids) == text
    cut = int(rng.integers(1, len(ids)))
    pieces = text_pieces(tokenizer, ids[cut:], shown=ids[:cut])
    assert tokenizer.decode(ids[:cut]) + "".join(pieces) == text
    assert np.size(ids) > 20  # words of several tokens are among them
