"""The page: its files, and the document that it shows. Other endpoints have the same data.

The gateway samples its counters, so that the page can show rates without Prometheus.
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import orjson
from cachetools import TTLCache
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from src.cache.entry import NO_KEY, Entry, Served, etag_of
from src.core import metrics
from src.core.clock import Clock
from src.core.errors import NotFound
from src.gateway import ALL, Gateway
from src.kinds import DATA_ROUTES
from src.streams.hub import StreamHub
from src.web import responses, status

FOLDER = Path(__file__).parents[1] / "static"
DOCS_FOLDER = FOLDER / "docs"
SWAGGER_UI = ("swagger-ui-bundle.js", "swagger-ui.css")  # of the package fastapi_swagger
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Cache-Control": "no-cache",  # revalidated at each visit: page and scripts must match
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
}
# Swagger UI draws its icons from data: URLs in its style sheet.
DOCS_POLICY = CONTENT_SECURITY_POLICY.replace("img-src 'self'", "img-src 'self' data:")
DOCS_HEADERS = HEADERS | {"Content-Security-Policy": DOCS_POLICY}
TICKER_SECONDS = 0.7  # for the tickers, so that the page shows the rest if an exchange hangs
KEEP_SECONDS = 1.0  # the viewers of one list of symbols share one document
MAX_DOCUMENTS = 64  # lists of symbols; the document of 100 symbols has about 150 KB
SAMPLE_SECONDS = 5.0
FIGURES_SECONDS = 60.0
ERRORS_SECONDS = 600.0
HOUR_SECONDS = 3600.0
HOUR_SAMPLE_SECONDS = 60.0
COUNTED = (  # each with the labels that are kept apart; together about fifty numbers per sample
    (metrics.http_requests_total, ("code",)),
    (metrics.cache_requests_total, ("result",)),
    (metrics.cache_served_age_seconds, ("route",)),
    (metrics.stream_messages_sent_total, ("channel",)),
    (metrics.exchange_requests_total, ("exchange", "outcome")),
)
Counts = dict[tuple[str, ...], float]  # (sample name without `virtuoso_`, *labels) -> value


def add_routes(app: FastAPI, *, has_docs: bool) -> None:
    """Serve the files of the page and, if `has_docs`, of `/docs`."""
    _serve_files(app, FOLDER.iterdir(), HEADERS, "/", "/mobile", "/static/{name}")
    if has_docs:
        package = Path(str(resources.files("fastapi_swagger.resources")))
        swagger_ui = [package / name for name in SWAGGER_UI]
        paths = [*DOCS_FOLDER.iterdir(), *swagger_ui]
        _serve_files(app, paths, DOCS_HEADERS, "/docs", "/docs/{name}")


def _serve_files(
    app: FastAPI, paths: Iterable[Path], headers: Mapping[str, str], *routes: str
) -> None:
    """Read files once, and serve the file `name` of a route, or the page without a name."""
    bodies = {path.name: path.read_bytes() for path in paths if path.suffix[1:] in TYPES}

    async def send(request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in bodies:
            raise NotFound("the page has no such file; open / instead")
        fields = {**headers, "ETag": etag_of(bodies[name])}
        if responses.matches(request.headers.getlist("if-none-match"), fields["ETag"]):
            return Response(status_code=304, headers=fields)
        media_type = TYPES[name.rpartition(".")[2]]
        return Response(bodies[name], headers=fields, media_type=media_type)

    for route in routes:
        app.add_api_route(route, send, include_in_schema=False, response_model=None)


class Recent:
    """Samples of the counters. The first one is taken at construction."""

    def __init__(self, clock: Clock, seconds: float, sample_seconds: float) -> None:
        self._clock = clock
        first = (clock.monotonic(), _read_counters())
        self._samples = deque([first], maxlen=int(seconds / sample_seconds) + 1)

    async def take_sample(self) -> None:
        """Add a sample. Call it every `sample_seconds`."""
        self._samples.append((self._clock.monotonic(), _read_counters()))

    def increases(self, seconds: float) -> tuple[Counts, float]:
        """Return the counts that increased in the last `seconds`, and the length of the period.

        The period is up to one sample interval longer. After a start it is shorter, and may be 0.
        """
        now = self._clock.monotonic()
        old_samples = (sample for sample in reversed(self._samples) if now - sample[0] >= seconds)
        since, before = next(old_samples, self._samples[0])
        counts = {key: value - before.get(key, 0.0) for key, value in _read_counters().items()}
        return {key: count for key, count in counts.items() if count > 0}, now - since


def _read_counters() -> Counts:
    metrics.flush()
    counts: Counts = {}
    for metric, labels in COUNTED:
        (family,) = metric.collect()
        for sample in family.samples:
            if not sample.name.endswith("_bucket"):
                values = (sample.labels[label] for label in labels)
                key = (sample.name.removeprefix("virtuoso_"), *values)
                counts[key] = counts.get(key, 0.0) + sample.value
    return counts


def _total(counts: Counts, name: str, *labels: str) -> float:
    """Return the sum of a counter, or of its counts whose first label is in `labels`."""
    keys = (key for key in counts if key[0] == name and (not labels or key[1] in labels))
    return sum(counts[key] for key in keys)


class Dashboard:
    """Builds the page's document and samples the counters for it. One object per process."""

    def __init__(self, gateway: Gateway, streams: StreamHub | None) -> None:
        self.recent = Recent(gateway.clock, ERRORS_SECONDS, SAMPLE_SECONDS)
        self.hour = Recent(gateway.clock, HOUR_SECONDS, HOUR_SAMPLE_SECONDS)
        self._gateway = gateway
        self._streams = streams
        self._documents: TTLCache[tuple[str, ...], asyncio.Task[Entry]] = TTLCache(
            MAX_DOCUMENTS, KEEP_SECONDS, timer=gateway.clock.monotonic
        )

    async def data(self, symbols: Sequence[str]) -> Served:
        """Return the document with the tickers of all exchanges, and the errors of missing ones."""
        key = tuple(symbols)
        task = self._documents.get(key)
        result = "hit_memory" if task else "miss"
        if task is None:
            task = asyncio.create_task(self._build(symbols))
            self._documents[key] = task
        entry = await asyncio.shield(task)  # other viewers wait for it, too
        return Served.from_entry(entry, result, self._gateway.clock.monotonic())

    async def _build(self, symbols: Sequence[str]) -> Entry:
        tickers = await self._gateway.tickers(symbols, ALL, None, TICKER_SECONDS)
        market = orjson.Fragment(responses.batch_body(tickers))
        body = orjson.dumps(self._document() | {"market": market})
        now = self._gateway.clock.monotonic()
        return Entry.create(NO_KEY, body, now, now, KEEP_SECONDS)

    def _document(self) -> dict[str, Any]:
        """Return the members of `documents.DashboardData` except `market`."""
        gateway = self._gateway
        settings = gateway.settings
        counts, seconds = self.recent.increases(FIGURES_SECONDS)
        window = {"window_seconds": round(seconds, 3)}
        return {
            "generated_at": int(gateway.clock.time() * 1000),
            "version": metrics.VERSION,
            "symbols": [gateway.markets.canonical(name) for name in settings.dashboard_symbols],
            "outlier_ratio": settings.dashboard_outlier_ratio,
            "streaming": settings.streaming,
            "grafana_url": settings.grafana_url,
            "ticker_ttl_seconds": settings.ticker_ttl_seconds,
            "exchanges": status.exchanges(gateway, self._streams),
            "health": status.health(gateway, self._streams),
            "cache": window | self._cache_figures(counts),
            "service": window | self._service_figures(counts, seconds),
            "saved": self._savings(),
            "recent_errors": self._errors(),
        }

    def _cache_figures(self, counts: Counts) -> dict[str, Any]:
        total = partial(_total, counts, "cache_requests_total")
        requests = total()
        return {
            "requests": int(requests),
            "memory_hit_ratio": _ratio(total("hit_memory"), requests),
            "redis_hit_ratio": _ratio(total("hit_redis"), requests),
            "stale_ratio": _ratio(total("stale_error", "stale_revalidate"), requests),
            "entries": len(self._gateway.cache.memory),
        }

    def _service_figures(self, counts: Counts, seconds: float) -> dict[str, Any]:
        age_sum = _total(counts, "cache_served_age_seconds_sum", *DATA_ROUTES)
        age_count = _total(counts, "cache_served_age_seconds_count", *DATA_ROUTES)
        return {
            "requests_per_second": _ratio(_total(counts, "http_requests_total"), seconds),
            "updates_per_second": _ratio(_total(counts, "stream_messages_sent_total"), seconds),
            "served_age_seconds": _ratio(age_sum, age_count),
            "in_flight": metrics.in_progress.count,
            "subscribers": status.subscribers(self._streams),
        }

    def _savings(self) -> dict[str, Any]:
        """Compare the requested values, each a call without the gateway, with all real calls."""
        counts, seconds = self.hour.increases(HOUR_SECONDS)
        requests = int(_total(counts, "cache_requests_total"))
        saved = max(0, requests - int(_total(counts, "exchange_requests_total")))
        return {"window_seconds": round(seconds, 3), "requests": requests, "saved": saved}

    def _errors(self) -> dict[str, Any]:
        counts, seconds = self.recent.increases(ERRORS_SECONDS)
        answers: dict[str, int] = {}
        exchanges: dict[str, dict[str, int]] = {name: {} for name in self._gateway.manager.names}
        for key, count in counts.items():
            match key:
                case ("http_requests_total", code) if code >= "400":
                    answers[code] = int(count)
                case ("exchange_requests_total", name, outcome) if outcome != "success":
                    exchanges.get(name, {})[outcome] = int(count)
        return {"window_seconds": round(seconds, 3), "answers": answers, "exchanges": exchanges}


def _ratio(part: float, whole: float) -> float | None:
    """Return the quotient, or None if `whole` is 0."""
    return round(part / whole, 4) if whole else None
