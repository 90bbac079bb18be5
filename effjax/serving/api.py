"""The HTTP application: OpenAI's completions, chat and embeddings, health and metrics."""

import abc
import asyncio
import base64
import contextlib
import dataclasses
import hmac
import json
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from typing import Any

import fastapi
import numpy as np
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse

from effjax.data import Tokenizer
from effjax.serving import protocol
from effjax.serving.chat import ChatTemplate
from effjax.serving.completion import Delta, complete
from effjax.serving.embedder import Embedder
from effjax.serving.engine import Engine
from effjax.serving.http_errors import ApiError, add_error_handlers, as_error
from effjax.serving.http_limits import LimitBody
from effjax.serving.http_metrics import Metrics, Observed
from effjax.serving.requests import Request


@dataclasses.dataclass(frozen=True)
class Service:
    """What is served, and within which limits.

    Attributes:
      name: of the model, as clients call it.
      tokenizer: of the model.
      engine: decodes texts; None for a model that does not generate.
      embedder: embeds texts; None for a model that does not.
      template: of chats.
      stop_tokens: ids that end a text.
      timeout: seconds that a request may take.
      max_body_bytes: largest body of a request.
      api_key: bearer token that clients have to show; None: none.
    """

    name: str
    tokenizer: Tokenizer
    engine: Engine | None = None
    embedder: Embedder | None = None
    template: ChatTemplate = dataclasses.field(default_factory=ChatTemplate)
    stop_tokens: frozenset[int] = frozenset()
    timeout: float = 300.0
    max_body_bytes: int = 4 * 2**20
    api_key: str | None = None


def create_app(service: Service) -> fastapi.FastAPI:
    """The application; when it ends, so does the service's engine."""

    @contextlib.asynccontextmanager
    async def lifespan(_: fastapi.FastAPI):
        yield
        if service.engine is not None:
            await run_in_threadpool(service.engine.close)

    app = fastapi.FastAPI(title="effjax", lifespan=lifespan, openapi_url=None)
    add_error_handlers(app)
    metrics = Metrics(service.engine)
    app.add_middleware(Observed, metrics=metrics)
    app.add_middleware(LimitBody, max_bytes=service.max_body_bytes)
    routes = _Routes(service, metrics)
    app.get("/healthz")(routes.health)
    app.get("/metrics")(metrics.page)
    guarded = fastapi.APIRouter(prefix="/v1", dependencies=[fastapi.Depends(routes.authorize)])
    guarded.get("/models")(routes.models)
    guarded.post("/completions", response_model=None)(routes.completions)
    guarded.post("/chat/completions", response_model=None)(routes.chat)
    guarded.post("/embeddings")(routes.embeddings)
    app.include_router(guarded)
    return app


class _Routes:
    def __init__(self, service: Service, metrics: Metrics):
        self.service = service
        self.metrics = metrics

    async def authorize(self, request: fastapi.Request) -> None:
        if self.service.api_key is None:
            return
        shown = request.headers.get("authorization", "").removeprefix("Bearer ")
        # In constant time: how long the comparison takes says nothing of the key.
        if not hmac.compare_digest(shown.encode(), self.service.api_key.encode()):
            raise ApiError(401, "the API key is wrong or missing", code="invalid_api_key")

    async def health(self) -> JSONResponse:
        engine = self.service.engine
        if engine is not None and not engine.is_alive:
            return JSONResponse({"status": "the engine has ended"}, status_code=503)
        return JSONResponse({"status": "ok"})

    async def models(self) -> dict[str, Any]:
        model = {"id": self.service.name, "object": "model", "created": 0, "owned_by": "effjax"}
        return {"object": "list", "data": [model]}

    async def completions(self, body: protocol.CompletionRequest, http: fastapi.Request):
        prompts = self._tokens(body.prompt)
        form = _CompletionForm(self.service, body)
        return await self._generate(http, body, prompts, body.max_tokens, form)

    async def chat(self, body: protocol.ChatRequest, http: fastapi.Request):
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are both given; valid: one")
        messages = [{"role": m.role, "content": m.text()} for m in body.messages]
        prompts = self._tokens(self.service.template.render(messages))
        max_tokens = body.max_completion_tokens or body.max_tokens
        return await self._generate(http, body, prompts, max_tokens, _ChatForm(self.service, body))

    async def embeddings(self, body: protocol.EmbeddingRequest) -> dict[str, Any]:
        self._check_model(body.model)
        if self.service.embedder is None:
            raise ApiError(404, f"the model {self.service.name!r} gives no embeddings")
        texts = self._tokens(body.input)
        found = await run_in_threadpool(self.service.embedder, texts, body.dimensions)
        count = sum(map(len, texts))
        self.metrics.prompt_tokens.inc(count)
        data = [
            {"object": "embedding", "index": i, "embedding": _encode(vector, body.encoding_format)}
            for i, vector in enumerate(found)
        ]
        usage = {"prompt_tokens": count, "total_tokens": count}
        return {"object": "list", "model": self.service.name, "data": data, "usage": usage}

    def _check_model(self, name: str | None) -> None:
        if name not in (None, self.service.name):
            raise ApiError(
                404,
                f"the model {name!r} is not here; valid: {self.service.name!r}",
                param="model",
                code="model_not_found",
            )

    def _tokens(self, texts: protocol.Texts) -> list[np.ndarray]:
        """Token ids of one or several texts; a string begins a document."""
        is_one = isinstance(texts, str) or isinstance(texts[0], int)
        return [
            self._encode(text) if isinstance(text, str) else np.asarray(text, np.int64)
            for text in ([texts] if is_one else texts)
        ]

    def _encode(self, text: str) -> np.ndarray:
        tokenizer = self.service.tokenizer
        ids = tokenizer.encode(text)
        if self.service.engine is None:
            return ids
        start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
        if start is None or (len(ids) and ids[0] == start):  # a chat template may write it
            return ids
        return np.concatenate([[start], ids])

    async def _generate(self, http, body, prompts, max_tokens, form):
        self._check_model(body.model)
        engine = self.service.engine
        if engine is None:
            raise ApiError(404, f"the model {self.service.name!r} does not generate")
        seed = secrets.randbits(32) if body.seed is None else body.seed
        requests = [
            Request(
                prompt=prompt,
                max_new_tokens=max_tokens or engine.max_length - len(prompt),
                sampling=body.sampling(),
                stop_tokens=self.service.stop_tokens,
                seed=(seed + choice) % 2**32,
            )
            for prompt in prompts
            for choice in range(body.n)
        ]
        for request in requests:
            engine.check(request)
        self.metrics.prompt_tokens.inc(sum(map(len, prompts)))
        form.prompt_tokens = sum(map(len, prompts))
        deltas = self._within_limits(
            complete(engine, self.service.tokenizer, requests, body.stops())
        )
        answer = _streamed(form, deltas) if body.stream else form.whole(deltas, len(requests))
        return await _unless_disconnected(http, answer)

    async def _within_limits(
        self, deltas: AsyncGenerator[Delta, None]
    ) -> AsyncGenerator[Delta, None]:
        """The deltas, counted, until the request's time is over."""
        end = asyncio.get_running_loop().time() + self.service.timeout
        async with contextlib.aclosing(deltas):
            while True:
                try:
                    async with asyncio.timeout_at(end):
                        delta = await anext(deltas)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    message = f"the request took longer than {self.service.timeout:g} seconds"
                    raise ApiError(504, message, kind="timeout_error") from None
                self.metrics.generated_tokens.inc()
                yield delta


class _Form(abc.ABC):
    """The shape of an answer, whole or in chunks."""

    kind: str
    chunk_kind: str

    def __init__(self, service: Service, body: Any):
        self._body = body
        self.prompt_tokens = 0
        self._head = {
            "id": f"{self.kind.replace('.', '')}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": service.name,
        }
        self._tokenizer = service.tokenizer

    async def whole(self, deltas: AsyncGenerator[Delta, None], count: int) -> dict[str, Any]:
        """The answer once all texts have ended."""
        parts: list[list[Delta]] = [[] for _ in range(count)]
        async for delta in deltas:
            parts[delta.index].append(delta)
        choices = [
            {
                "index": index,
                "finish_reason": part[-1].finish,
                "logprobs": self._logprobs(part),
                **self._content("".join(delta.text for delta in part)),
            }
            for index, part in enumerate(parts)
        ]
        usage = self._usage(sum(map(len, parts)))
        return {**self._head, "object": self.kind, "choices": choices, "usage": usage}

    async def chunks(
        self, deltas: AsyncGenerator[Delta, None]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The answer as it comes."""
        head = {**self._head, "object": self.chunk_kind}
        begun, count = set(), 0
        async for delta in deltas:
            count += 1
            choice = {
                "index": delta.index,
                "finish_reason": delta.finish,
                "logprobs": self._logprobs([delta]),
                **self._part(delta.text, is_first=delta.index not in begun),
            }
            begun.add(delta.index)
            yield {**head, "choices": [choice]}
        if self._body.wants_usage:
            yield {**head, "choices": [], "usage": self._usage(count)}

    @abc.abstractmethod
    def _content(self, text: str) -> dict[str, Any]:
        """Where a choice has the whole text."""

    @abc.abstractmethod
    def _part(self, text: str, is_first: bool) -> dict[str, Any]:
        """Where a choice has a piece of the text."""

    @abc.abstractmethod
    def _logprobs(self, deltas: Sequence[Delta]) -> dict[str, Any] | None:
        """Log-probabilities of tokens, if they were asked for."""

    def _usage(self, count: int) -> dict[str, int]:
        total = self.prompt_tokens + count
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": count,
            "total_tokens": total,
        }

    def _token_text(self, delta: Delta) -> str:
        return self._tokenizer.decode([delta.token.id])


class _CompletionForm(_Form):
    kind = chunk_kind = "text_completion"

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _part(self, text: str, is_first: bool) -> dict[str, Any]:
        return {"text": text}

    def _logprobs(self, deltas: Sequence[Delta]) -> dict[str, Any] | None:
        if self._body.logprobs is None:
            return None
        tokens = [self._token_text(delta) for delta in deltas]
        values = [delta.token.logprob for delta in deltas]
        return {"tokens": tokens, "token_logprobs": values}


class _ChatForm(_Form):
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def _part(self, text: str, is_first: bool) -> dict[str, Any]:
        return {"delta": {**({"role": "assistant"} if is_first else {}), "content": text}}

    def _logprobs(self, deltas: Sequence[Delta]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        content = [
            {
                "token": text,
                "logprob": delta.token.logprob,
                "bytes": list(text.encode()),
                "top_logprobs": [],
            }
            for delta in deltas
            for text in [self._token_text(delta)]
        ]
        return {"content": content}


async def _streamed(form: _Form, deltas: AsyncGenerator[Delta, None]) -> StreamingResponse:
    """The answer as server-sent events. Headers wait for the first delta, so that a refusal has a status of its own."""
    first = await anext(deltas)
    events = _events(form.chunks(_rejoin(first, deltas)))
    return StreamingResponse(events, media_type="text/event-stream")


async def _rejoin(first: Delta, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[Delta, None]:
    async with contextlib.aclosing(deltas):
        yield first
        async for delta in deltas:
            yield delta


async def _events(chunks: AsyncGenerator[dict[str, Any], None]) -> AsyncGenerator[str, None]:
    """Server-sent events. What goes wrong after the headers is an event too."""
    async with contextlib.aclosing(chunks):
        try:
            async for chunk in chunks:
                yield f"data: {json.dumps(chunk)}\n\n"
        except Exception as error:
            yield f"data: {json.dumps(as_error(error).body())}\n\n"
            return
    yield "data: [DONE]\n\n"


async def _unless_disconnected(http: fastapi.Request, answer: Awaitable[Any]) -> Any:
    """The answer; a client that goes away cancels it, which frees its slots."""

    async def disconnect():
        while (await http.receive())["type"] != "http.disconnect":
            continue

    work, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait({work, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        return Response(status_code=499)  # nobody reads it; nginx counts such requests so
    finally:
        for task in (work, leaving):
            task.cancel()
        await asyncio.gather(work, leaving, return_exceptions=True)


def _encode(vector: np.ndarray, encoding: str) -> list[float] | str:
    if encoding == "float":
        return vector.tolist()
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
