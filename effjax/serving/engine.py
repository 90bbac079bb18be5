"""The engine of a server: requests come at any time, and one thread decodes all of them as a batch."""

import collections
import dataclasses
import logging
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from effjax.models import SequenceModel
from effjax.serving.pages import PAGE_SIZE
from effjax.serving.prompts import check_prompt
from effjax.serving.sampling import PLAIN, Sampling
from effjax.serving.slots import Slots

logger = logging.getLogger(__name__)


class Overloaded(Exception):
    """As many requests wait as may."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A text to be continued.

    Attributes:
      prompt: token ids, at least one.
      max_new_tokens: most tokens that are drawn.
      sampling: how they are drawn.
      stop_tokens: ids that end the text.
      seed: of the draws. A text depends on its prompt, sampling and seed, and not on the others in the batch.
    """

    prompt: Int[np.ndarray, " n"]
    max_new_tokens: int
    sampling: Sampling = PLAIN
    stop_tokens: frozenset[int] = frozenset()
    seed: int = 0


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
      pages: what it has of the memory that texts share.
    """

    request: Request
    sink: Callable[[Token | Exception], None]
    count: int = 0
    cancelled: bool = False
    pages: list[int] = dataclasses.field(default_factory=list)

    def cancel(self) -> None:
        """Frees what the request holds before the next step; the sink hears no more."""
        self.cancelled = True


class Engine:
    """Decodes requests in a thread of its own, as many at a time as there are slots; `close` it, or use `with`.

    Attributes:
      max_length: tokens of a text, prompt included.
      vocab_size: number of token ids.
    """

    def __init__(
        self,
        model: SequenceModel,
        variables: Any,
        *,
        num_slots: int = 8,
        max_length: int | None = None,
        max_waiting: int = 64,
        cache_tokens: int | None = None,
    ):
        """Starts the thread.

        Args:
          model: a model that generates (`effjax.serving.generate`).
          variables: its variables.
          num_slots: texts at a time.
          max_length: room of a text, prompt included; None: the model's `max_seq_len`.
          max_waiting: requests that may wait for a slot.
          cache_tokens: room of all texts together, which they share in pages (`effjax.serving.pages`); a request waits
            until there are pages for its prompt and its `max_new_tokens`. None: each slot has room for `max_length`.

        Raises:
          ValueError: for a number that is not valid, or a model that cannot generate.
        """
        if max_waiting < 1:
            raise ValueError(f"max_waiting={max_waiting}; valid: at least 1")
        self.max_length = model.max_seq_len if max_length is None else max_length
        self.vocab_size = model.vocab_size
        self._variables = variables
        self._max_waiting = max_waiting
        self._programs = Slots(model, num_slots, self.max_length, cache_tokens)
        self._pool = self._programs.pool
        self._rows = self._programs.empty()
        self._slots: list[Ticket | None] = [None] * num_slots
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
        return sum(ticket is not None and not ticket.cancelled for ticket in self._slots)

    @property
    def free_cache_tokens(self) -> int | None:
        """Room in the memory that texts share; None if they do not."""
        return None if self._pool is None else self._pool.num_free * PAGE_SIZE

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
        room = self.max_length if self._pool is None else min(self.max_length, self._pool.room)
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
                self._step()
            except Exception as error:
                # Out of memory, say: these texts are lost, the server is not.
                logger.exception("a decoding step failed")
                self._fail_all(error)
                self._rows = self._programs.empty()
        self._fail_all(RuntimeError("the server is shutting down"), with_waiting=True)

    def _drop_cancelled(self) -> None:
        for slot, ticket in enumerate(self._slots):
            if ticket is not None and ticket.cancelled:
                self._vacate(slot)
        with self._wakes:
            self._waiting = collections.deque(t for t in self._waiting if not t.cancelled)

    def _admit(self) -> None:
        """Gives free slots to those that wait; a prompt is read when it gets its slot."""
        while self._waiting and not self._closing and None in self._slots:
            ticket = self._waiting[0]
            request = ticket.request
            if ticket.cancelled:
                self._waiting.popleft()
                continue
            if self._pool is not None:
                pages = self._pool.take(len(request.prompt) + request.max_new_tokens)
                if pages is None:
                    return  # nobody overtakes it
                ticket.pages = pages
            self._waiting.popleft()
            slot = self._slots.index(None)
            self._slots[slot] = ticket  # so that it hears of a failure
            key = jax.random.key(request.seed)
            one = self._programs.read(self._variables, request.prompt, request.sampling, key)
            self._rows = self._programs.put(self._rows, one, slot, ticket.pages)
            token, logprob = jax.device_get((one.token, one.logprob))
            self._deliver(slot, token[0], logprob[0])

    def _step(self) -> None:
        if not self.num_active:
            return
        samplings = [None if ticket is None else ticket.request.sampling for ticket in self._slots]
        self._rows = self._programs.step(self._variables, self._rows, samplings)
        tokens, logprobs = jax.device_get((self._rows.token, self._rows.logprob))
        for slot, ticket in enumerate(self._slots):
            if ticket is not None:
                self._deliver(slot, tokens[slot], logprobs[slot])

    def _deliver(self, slot: int, token: Any, logprob: Any) -> None:
        ticket = self._slots[slot]
        ticket.count += 1
        finish = None
        if int(token) in ticket.request.stop_tokens:
            finish = "stop"
        elif ticket.count == ticket.request.max_new_tokens:
            finish = "length"
        if finish is not None:
            self._vacate(slot)
        if not ticket.cancelled:
            ticket.sink(Token(int(token), float(logprob), finish))

    def _vacate(self, slot: int) -> None:
        ticket, self._slots[slot] = self._slots[slot], None
        if self._pool is not None:
            self._pool.give_back(ticket.pages)

    def _fail_all(self, error: Exception, with_waiting: bool = False) -> None:
        failed = [ticket for ticket in self._slots if ticket is not None]
        for slot, ticket in enumerate(self._slots):
            if ticket is not None:
                self._vacate(slot)
        if with_waiting:
            failed += self._waiting
            self._waiting.clear()
        for ticket in failed:
            if not ticket.cancelled:
                ticket.sink(error)
