"""Texts that end a completion, found in text that comes in pieces."""

from collections.abc import Sequence


class StopStrings:
    """Passes text on up to the first of some strings; what may be the beginning of one waits until that is clear."""

    def __init__(self, strings: Sequence[str]):
        self._strings = tuple(strings)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """The text that can be shown, and whether one of the strings has come, with which the text ends."""
        text = self._held + piece
        starts = [start for string in self._strings if (start := text.find(string)) >= 0]
        if starts:
            self._held = ""
            return text[: min(starts)], True
        held = max((_overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def flush(self) -> str:
        """The text that waited, when no more will come."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, string: str) -> int:
    """How much of the end of `text` is the beginning of `string`."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(string[:n])), 0)
