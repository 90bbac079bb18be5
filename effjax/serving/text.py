"""From tokens that come one by one to text that can be shown at once."""

from collections.abc import Iterable, Iterator

from effjax.data.tokenizers import Tokenizer

# What a tokenizer shows for bytes that are not (or not yet) a character.
_INCOMPLETE = "\ufffd"


class TextPieces:
    """The text of tokens as they come, in pieces of whole characters; together they are what `decode` gives of all.

    A character may need several tokens, and what a token's text is may depend on the token before it (a SentencePiece
    vocabulary drops the space before the first word). So a piece is what a few tokens say beyond the ones before them,
    and one that ends within a character waits for its end.
    """

    def __init__(self, tokenizer: Tokenizer, shown: Iterable[int] = ()):
        """Begins behind the tokens `shown`, whose text is there already."""
        self._tokenizer = tokenizer
        self._ids = list(map(int, shown))
        self._start, self._end = (
            0,
            len(self._ids),
        )  # decoding begins at start, and the text up to end is shown
        self._held = ""

    def push(self, token: int) -> str:
        """The text that can be shown once this token is there; it may be empty."""
        self._ids.append(int(token))
        known = self._tokenizer.decode(self._ids[self._start : self._end])
        piece = self._tokenizer.decode(self._ids[self._start :])[len(known) :]
        if not piece or piece.endswith(_INCOMPLETE):
            self._held = piece
            return ""
        self._start, self._end, self._held = self._end, len(self._ids), ""
        return piece

    def flush(self) -> str:
        """The text that waited for its end, when no more tokens will come."""
        piece, self._held = self._held, ""
        return piece


def text_pieces(
    tokenizer: Tokenizer, tokens: Iterable[int], shown: Iterable[int] = ()
) -> Iterator[str]:
    """The text of tokens in pieces as they come; see `TextPieces`.

    Args:
      tokenizer: of the tokens.
      tokens: whose text is wanted.
      shown: tokens before them whose text is shown already.
    """
    pieces = TextPieces(tokenizer, shown)
    for token in tokens:
        if piece := pieces.push(token):
            yield piece
    if piece := pieces.flush():
        yield piece
