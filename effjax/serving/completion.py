"""The texts that one HTTP request asks for, as they come from the engine."""

import asyncio
import dataclasses
import functools
from collections.abc import AsyncGenerator, Sequence

from effjax.data import Tokenizer
from effjax.serving.engine import Engine, Ticket, Token
from effjax.serving.requests import Request
from effjax.serving.stop_strings import StopStrings
from effjax.serving.text import TextPieces


class EngineFailure(Exception):
    """The engine lost a text."""


@dataclasses.dataclass(frozen=True)
class Delta:
    """What a token adds to a text.

    Attributes:
      index: of the text in the request.
      text: new text, perhaps none: a character may need several tokens.
      token: the token.
      finish: "stop" or "length" at the end of the text, else None.
    """

    index: int
    text: str
    token: Token
    finish: str | None


class _Text:
    """A text in the making."""

    def __init__(self, tokenizer: Tokenizer, request: Request, stops: Sequence[str]):
        self._pieces = TextPieces(tokenizer, request.prompt)
        self._stops = StopStrings(stops)

    def add(self, token: Token) -> tuple[str, str | None]:
        """The text that a token adds, and why the text ends with it, if it does."""
        # The token that ends a text is not part of it.
        text = "" if token.finish == "stop" else self._pieces.push(token.id)
        if token.finish is not None:
            text += self._pieces.flush()
        text, is_stopped = self._stops.push(text)
        if is_stopped:
            return text, "stop"
        if token.finish is not None:
            text += self._stops.flush()
        return text, token.finish


async def complete(
    engine: Engine, tokenizer: Tokenizer, requests: Sequence[Request], stops: Sequence[str] = ()
) -> AsyncGenerator[Delta, None]:
    """Runs requests and gives their texts token by token, each in its order; closing the iterator cancels them.

    Args:
      engine: what decodes.
      tokenizer: of the model.
      requests: what to continue.
      stops: strings that end a text.

    Raises:
      ValueError, Overloaded: as `Engine.submit`; then none of them runs.
      EngineFailure: if decoding fails.
    """
    loop = asyncio.get_running_loop()
    events: asyncio.Queue[tuple[int, Token | Exception]] = asyncio.Queue()

    def sink(index: int, event: Token | Exception) -> None:
        loop.call_soon_threadsafe(events.put_nowait, (index, event))

    texts = [_Text(tokenizer, request, stops) for request in requests]
    tickets: list[Ticket] = []
    try:
        for index, request in enumerate(requests):
            tickets.append(engine.submit(request, functools.partial(sink, index)))
        unfinished = set(range(len(requests)))
        while unfinished:
            index, event = await events.get()
            if isinstance(event, Exception):
                raise EngineFailure(str(event)) from event
            if index not in unfinished:  # tokens behind a stop string
                continue
            text, finish = texts[index].add(event)
            if finish is not None:
                unfinished.remove(index)
                tickets[index].cancel()
            yield Delta(index, text, event, finish)
    finally:
        for ticket in tickets:
            ticket.cancel()
