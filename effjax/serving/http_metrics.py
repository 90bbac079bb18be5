"""What a server counts, for Prometheus."""

import time
from collections.abc import Callable, Iterator

import fastapi
import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from effjax.serving.engine import Engine


class Metrics:
    """Counters of one application.

    Attributes:
      prompt_tokens: tokens read.
      generated_tokens: tokens drawn.
    """

    def __init__(self, engine: Engine | None):
        self._registry = prometheus.CollectorRegistry()
        count = lambda name, text, *labels: prometheus.Counter(  # noqa: E731
            f"effjax_{name}", text, labels, registry=self._registry
        )
        self.prompt_tokens = count("prompt_tokens", "Tokens of prompts and of texts to embed.")
        self.generated_tokens = count("generated_tokens", "Tokens drawn.")
        self._requests = count("requests", "Requests answered.", "path", "status")
        self._seconds = prometheus.Histogram(
            "effjax_request_seconds",
            "Seconds until the answer, or the first event of a stream.",
            ["path"],
            registry=self._registry,
        )
        if engine is not None:
            self._gauge("active", "Texts that are decoded.", lambda: engine.num_active)
            self._gauge("waiting", "Requests that wait for a slot.", lambda: engine.num_waiting)
            if engine.free_cache_tokens is not None:
                self._gauge(
                    "free_cache_tokens",
                    "Room in the memory that texts share.",
                    lambda: engine.free_cache_tokens or 0,
                )
            self._registry.register(_Totals(engine))

    def _gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        prometheus.Gauge(f"effjax_{name}", text, registry=self._registry).set_function(value)

    def observe(self, path: str, status: int, seconds: float) -> None:
        """Counts an answer."""
        self._seconds.labels(path).observe(seconds)
        self._requests.labels(path, status).inc()

    async def page(self) -> fastapi.Response:
        """What Prometheus reads."""
        return fastapi.Response(
            prometheus.generate_latest(self._registry), media_type=prometheus.CONTENT_TYPE_LATEST
        )


class _Totals(Collector):
    """What the decoder has counted, read from it when Prometheus asks."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[CounterMetricFamily]:
        for total in self._engine.totals:
            yield CounterMetricFamily(f"effjax_{total.name}", total.text, value=total.count)


class Observed:
    """ASGI middleware that counts and times answers."""

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begin = time.perf_counter()

        async def observed(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                path = "other" if route is None else route.path  # so that there are few of them
                self._metrics.observe(path, message["status"], time.perf_counter() - begin)
            await send(message)

        await self._app(scope, receive, observed)
