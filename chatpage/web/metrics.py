"""`/metrics`, `/healthz` and `/readyz`: how the server is, for machines. Totals only, under fixed labels."""

from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from chatpage.engine import Engine
from chatpage.events import Snapshot
from chatpage.settings import Settings
from chatpage.web.errors import Refusal
from chatpage.web.kv import Hub
from chatpage.web.openai import is_authorized

STALLED_SECONDS = 30.0  # without a step although there is work; a large chunk on a CPU can take a good part of it
OUTCOMES = ("stop", "length", "abort", "error")
COUNTERS = {
    "steps": "Steps of the engine.",
    "prompt_tokens": "Tokens of prompts.",
    "cached_tokens": "Tokens of prompts that were found in the cache.",
    "computed_tokens": "Tokens that entered the model.",
    "generated_tokens": "Tokens that the model chose.",
}
GAUGES = {
    "running": "Sequences that run.",
    "waiting": "Requests that wait.",
    "sessions": "Open sessions.",
}


class EngineCollector(Collector):
    """Reads the engine and the hub when somebody asks; nothing is counted twice.

    Args:
        snapshot: of the cache; None where nobody knows.
    """

    def __init__(self, engine: Engine, hub: Hub, snapshot: Snapshot | None) -> None:
        self.engine = engine
        self.hub = hub
        self.snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        stats = self.engine.stats()
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"chatpage_{name}", text, value=stats.get(name, 0))
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"chatpage_{name}", text, value=stats.get(name, 0))
        finished = CounterMetricFamily("chatpage_requests", "Requests that have ended.", labels=["outcome"])
        for outcome in OUTCOMES:
            finished.add_metric([outcome], stats.get(f"finished_{outcome}", 0))
        yield finished
        yield GaugeMetricFamily("chatpage_viewers", "Viewers of the panel.", value=len(self.hub.viewers))
        if self.snapshot is not None:
            yield from _cache(self.snapshot)


def _cache(snapshot: Snapshot) -> Iterator[Metric]:
    blocks = GaugeMetricFamily("chatpage_blocks", "Blocks of the pool, by state.", labels=["state"])
    for state, count in snapshot.counts().items():
        blocks.add_metric([state], count)
    yield blocks
    events = CounterMetricFamily("chatpage_cache_events", "What has happened to blocks.", labels=["kind"])
    for kind, count in snapshot.counters.items():
        if kind != "hit_tokens":  # tokens, not events: cached_tokens tells
            events.add_metric([kind], count)
    yield events


class Operations:
    """The three routes."""

    def __init__(self, engine: Engine, hub: Hub, settings: Settings) -> None:
        self.engine = engine
        self.hub = hub
        self.settings = settings

    def routes(self) -> list[Route]:
        return [
            Route("/healthz", self.healthz, methods=["GET"]),
            Route("/readyz", self.readyz, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
        ]

    async def healthz(self, request: Request) -> Response:
        """Whether steps make progress, or have nothing to do."""
        status = self._health()
        return JSONResponse({"status": status}, 503 if status in ("stalled", "dead") else 200)

    def _health(self) -> str:
        if self.engine.status == "failed":
            return "dead"
        if self.engine.status != "ready":
            return self.engine.status
        stats = self.engine.stats()
        if not stats["has_work"]:
            return "idle"
        return "stalled" if stats["seconds_since_progress"] > STALLED_SECONDS else "ok"

    async def readyz(self, request: Request) -> Response:
        ready = self.engine.status == "ready"
        body = {"status": self.engine.status, "detail": self.engine.detail}
        return JSONResponse(body, 200 if ready else 503, headers=None if ready else {"Retry-After": "2"})

    async def metrics(self, request: Request) -> Response:
        if not is_authorized(request, self.settings.api_key):
            raise Refusal(401, "The API key is missing or wrong.", code="invalid_api_key")
        if self.settings.api_key is None and not self.settings.on_loopback:
            raise Refusal(403, "Beyond loopback, /metrics is served only with --api-key set.", code="api_key_required")
        collector = EngineCollector(self.engine, self.hub, await self.hub.glance())
        return Response(generate_latest(collector), media_type=CONTENT_TYPE_LATEST)
