"""The engine of a server: requests come at any time, and one thread decodes all of them as a batch."""

import collections
import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping, Sequence

from effjax.serving.decoder import Decoder, Drawn, Total
from effjax.serving.prompts import check_prompt
from effjax.serving.requests import Request

logger = logging.getLogger(__name__)


class Overloaded(Exception):
    """As many requests wait as may."""


@dataclasses.dataclass(frozen=True)
class Token:
    """One more token of a text.

    Attributes:
      id: the token.
      logprob: its log-probability (natural) under the model, before temperature and filters.
      finish: "stop" or "length" at the last token of a text, else None.
    """

    id: int
    logprob: float
    finish: str | None


@dataclasses.dataclass(eq=False)
class Ticket:
    """A request on its way.

    Attributes:
      request: what was asked for.
      sink: called from the engine's thread, with tokens or with one exception.
      count: tokens so far.
      cancelled: whether nobody waits for it any more.
    """

    request: Request
    sink: Callable[[Token | Exception], None]
    count: int = 0
    cancelled: bool = False

    def cancel(self) -> None:
        """Frees what the request holds before the next step; the sink hears no more."""
        self.cancelled = True


class Engine:
    """Decodes requests in a thread of its own, as many at a time as there are slots; `close` it, or use `with`.

    Attributes:
      max_length: tokens of a text, prompt included.
      vocab_size: number of token ids.
    """

    def __init__(self, decoder: Decoder, *, max_waiting: int = 64):
        """Starts the thread.

        Args:
          decoder: nobody else uses it from now on.
          max_waiting: requests that may wait for a slot.

        Raises:
          ValueError: for a number that is not valid.
        """
        if max_waiting < 1:
            raise ValueError(f"max_waiting={max_waiting}; valid: at least 1")
        self.max_length = decoder.max_length
        self.vocab_size = decoder.vocab_size
        self._decoder = decoder
        self._max_waiting = max_waiting
        self._num_slots = decoder.num_slots
        self._slots: dict[int, Ticket] = {}  # those that are taken
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._wakes = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_alive(self) -> bool:
        """Whether requests are served."""
        return self._thread.is_alive() and not self._closing

    @property
    def num_active(self) -> int:
        """Texts that are decoded now."""
        return sum(not ticket.cancelled for ticket in tuple(self._slots.values()))

    @property
    def free_cache_tokens(self) -> int | None:
        """Room in the memory that texts share; None if they do not."""
        return self._decoder.free_cache_tokens

    @property
    def totals(self) -> Sequence[Total]:
        """What the decoder has counted."""
        return self._decoder.totals

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a slot."""
        return sum(not ticket.cancelled for ticket in tuple(self._waiting))

    def submit(self, request: Request, sink: Callable[[Token | Exception], None]) -> Ticket:
        """Takes a request; the sink gets its tokens.

        Raises:
          ValueError: for a prompt that is empty, has ids that are not in the vocabulary, or is too long.
          Overloaded: if as many requests wait as may.
        """
        self.check(request)
        ticket = Ticket(request, sink)
        with self._wakes:
            if self._closing:
                raise RuntimeError("the engine is closed")
            if self.num_waiting >= self._max_waiting:
                raise Overloaded(f"{self.num_waiting} requests wait; valid: fewer, try again later")
            self._waiting.append(ticket)
            self._wakes.notify()
        return ticket

    def check(self, request: Request) -> None:
        """Raises ValueError for a request that could not be served."""
        prompt = check_prompt("prompt", request.prompt, self.vocab_size)
        if len(prompt) >= self.max_length:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens; valid: fewer than {self.max_length}"
            )
        if request.max_new_tokens < 1:
            raise ValueError(f"max_tokens={request.max_new_tokens}; valid: at least 1")
        room = self._decoder.room
        if len(prompt) + request.max_new_tokens > room:
            raise ValueError(
                f"a prompt of {len(prompt)} tokens and max_tokens={request.max_new_tokens}; "
                f"valid: at most {room} together"
            )

    def close(self) -> None:
        """Ends the thread; texts that are not finished hear an exception."""
        with self._wakes:
            self._closing = True
            self._wakes.notify()
        self._thread.join()

    def _run(self) -> None:
        while not self._closing:
            with self._wakes:
                self._wakes.wait_for(lambda: self._closing or self._waiting or self.num_active)
            try:
                self._drop_cancelled()
                self._admit()
                if self.num_active:
                    self._deliver(self._decoder.advance())
            except Exception as error:
                # Out of memory, say: these texts are lost, the server is not.
                logger.exception("a decoding step failed")
                self._fail_all(error)
                self._decoder.reset()
        self._fail_all(RuntimeError("the server is shutting down"), with_waiting=True)

    def _drop_cancelled(self) -> None:
        for slot in [slot for slot, ticket in self._slots.items() if ticket.cancelled]:
            self._vacate(slot)
        with self._wakes:
            self._waiting = collections.deque(t for t in self._waiting if not t.cancelled)

    def _admit(self) -> None:
        """Gives free slots to those that wait."""
        while self._waiting and not self._closing and len(self._slots) < self._num_slots:
            ticket = self._waiting[0]
            slot = next(slot for slot in range(self._num_slots) if slot not in self._slots)
            if not ticket.cancelled:
                if not self._decoder.admit(slot, ticket.request):
                    return  # nobody overtakes it
                self._slots[slot] = ticket
            self._waiting.popleft()

    def _deliver(self, drawn: Mapping[int, Sequence[Drawn]]) -> None:
        """Hands out new tokens of slots, up to the one that ends a text."""
        for slot, tokens in drawn.items():
            for token in tokens:
                if self._deliver_one(slot, token) is not None:
                    break

    def _deliver_one(self, slot: int, drawn: Drawn) -> str | None:
        """Hands out a token; returns why the text ends with it, if it does."""
        ticket = self._slots[slot]
        ticket.count += 1
        finish = None
        if drawn.id in ticket.request.stop_tokens:
            finish = "stop"
        elif ticket.count == ticket.request.max_new_tokens:
            finish = "length"
        if finish is not None:
            self._vacate(slot)
        if not ticket.cancelled:
            ticket.sink(Token(*drawn, finish))
        return finish

    def _vacate(self, slot: int) -> None:
        del self._slots[slot]
        self._decoder.release(slot)

    def _fail_all(self, error: Exception, with_waiting: bool = False) -> None:
        failed = list(self._slots.values())
        for slot in list(self._slots):
            self._vacate(slot)
        if with_waiting:
            failed += self._waiting
            self._waiting.clear()
        for ticket in failed:
            if not ticket.cancelled:
                ticket.sink(error)
