import numpy as np
import pytest

from effjax.data.tokenizers import ByteTokenizer
from effjax.evaluation.text_grid import NEWLINE, TAB, Passage, lay_out, passage, visible


def shown(cells):
    rows = {}
    for cell in cells:
        rows.setdefault(cell.row, []).append((cell.column, cell.text))
    for row in rows.values():
        assert [column for column, _ in row] == list(range(len(row)))
    return {row: [text for _, text in found] for row, found in rows.items()}


def test_every_byte_is_visible():
    texts = [visible(byte) for byte in range(256)]
    assert texts[ord("a")] == "a"
    assert texts[ord("\n")] == NEWLINE
    assert texts[ord("\t")] == TAB
    assert texts[0] == "00"
    assert texts[0x7F] == "7F"
    assert texts[0xE2] == "E2"
    assert len(set(texts)) == 256
    assert all(text.isprintable() for text in texts)


def test_lines_end_at_newlines_and_wrap_when_full():
    cells = lay_out([Passage([b"ab\nc", b"defg"], np.array([1, 2]))], columns=3, max_rows=10)
    assert shown(cells) == {0: ["a", "b", NEWLINE], 1: ["c", "d", "e"], 2: ["f", "g"]}
    assert [cell.value for cell in cells] == [1] * 4 + [2] * 4


def test_a_newline_in_the_last_column_does_not_leave_an_empty_row():
    cells = lay_out([Passage([b"ab\nc"], np.array([0.0]))], columns=2, max_rows=10)
    assert shown(cells) == {0: ["a", "b"], 1: [NEWLINE], 2: ["c"]}


def test_passages_are_apart_and_what_does_not_fit_is_left_out():
    one = Passage([b"a"], np.array([0.0]))
    assert [cell.row for cell in lay_out([one] * 5, columns=4, max_rows=5)] == [0, 2, 4]
    assert [cell.row for cell in lay_out([one] * 5, columns=4, max_rows=4)] == [0, 2]


def test_tokens_without_text_have_no_cell(rng):
    tokens = np.array([257, *rng.integers(256, size=20), 258])
    found = passage(ByteTokenizer(), tokens, np.arange(22))
    assert found.pieces[0] == found.pieces[-1] == b""
    assert len(lay_out([found], columns=96, max_rows=99)) == 20


def test_the_space_that_decoding_drops_is_put_back():
    class Dropping:
        token_num_bytes = np.array([4, 3])

        def decode_bytes(self, ids):
            return [b"the", b"cat"][ids[0]]

    assert passage(Dropping(), np.array([0, 1]), np.zeros(2)).pieces == [b" the", b"cat"]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="values has length 2"):
        Passage([b"a"], np.zeros(2))
    with pytest.raises(ValueError, match="columns"):
        lay_out([], columns=0, max_rows=1)
