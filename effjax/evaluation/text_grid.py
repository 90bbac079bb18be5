"""Text as a grid of cells, one a byte, so that a number can be shown for each byte."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

NEWLINE, TAB = "\u21b5", "\u2192"


@dataclasses.dataclass(frozen=True)
class Passage:
    """A run of text with a number for each token.

    Attributes:
      pieces: the bytes of each token; a token that stands for no text has none.
      values: [n] the number of each token.
    """

    pieces: Sequence[bytes]
    values: np.ndarray

    def __post_init__(self):
        if len(self.pieces) != len(self.values):
            raise ValueError(
                f"values has length {len(self.values)}; valid: one a piece, {len(self.pieces)}"
            )


@dataclasses.dataclass(frozen=True)
class Cell:
    """One byte at its place in the grid.

    Attributes:
      row: from the top.
      column: from the left.
      text: one character, or two hexadecimal digits for a byte that is no printable ASCII.
      value: the number of the byte's token.
    """

    row: int
    column: int
    text: str
    value: float


def passage(tokenizer: Any, tokens: np.ndarray, values: np.ndarray) -> Passage:
    """The passage of token ids.

    Decoding one token by itself drops the space before it in some vocabularies; where a piece is
    one byte shorter than `token_num_bytes` says, that space is put back.
    """
    sizes = tokenizer.token_num_bytes
    pieces = []
    for token in np.asarray(tokens):
        piece = tokenizer.decode_bytes([token]) if sizes[token] else b""
        pieces.append(b" " + piece if len(piece) == sizes[token] - 1 else piece)
    return Passage(pieces, np.asarray(values))


def lay_out(passages: Sequence[Passage], columns: int, max_rows: int) -> list[Cell]:
    """Places the bytes of passages in rows.

    Lines end at a newline, which is shown, or wrap when they are full; passages are set apart by an
    empty row. What does not fit into `max_rows` is left out.

    Raises:
      ValueError: if `columns` or `max_rows` is less than 1.
    """
    if columns < 1 or max_rows < 1:
        raise ValueError(f"columns, max_rows are {columns}, {max_rows}; valid: 1 or more each")
    cells: list[Cell] = []
    row = column = 0
    for one in passages:
        if cells:
            row, column = cells[-1].row + 2, 0
        for piece, value in zip(one.pieces, one.values, strict=True):
            for byte in piece:
                if column == columns:
                    row, column = row + 1, 0
                if row >= max_rows:
                    return cells
                cells.append(Cell(row, column, visible(byte), float(value)))
                row, column = (row + 1, 0) if byte == 0x0A else (row, column + 1)
    return cells


def visible(byte: int) -> str:
    """How a byte is shown: itself if printable ASCII, arrows for newline and tab, else in hexadecimal."""
    if byte in (0x0A, 0x09):
        return NEWLINE if byte == 0x0A else TAB
    return chr(byte) if 0x20 <= byte < 0x7F else f"{byte:02X}"
