"""The page: its files, and the document they draw it from. Nothing is decided here; all of it is told elsewhere too."""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Self

import orjson
from cachetools import TTLCache
from starlette.requests import Request
from starlette.responses import Response

from src.cache.entry import Entry, etag_of
from src.core import metrics
from src.core.errors import NotFound
from src.gateway import ALL, Gateway, Served
from src.streams.feed import TRANSPORTS
from src.streams.hub import StreamHub
from src.web import responses, status
from src.web.recent import Recent

FOLDER = Path(__file__).parents[1] / "static"
DOCS_FOLDER = FOLDER / "docs"
SWAGGER_UI = ("swagger-ui-bundle.js", "swagger-ui.css")  # of the package fastapi_swagger
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "Cache-Control": "no-cache",  # asked about at every opening, so that a new page never meets an old script
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
}
# Swagger UI draws its icons from data: URLs in its style sheet. Otherwise the policy is the page's.
DOCS_HEADERS = HEADERS | {
    "Content-Security-Policy": HEADERS["Content-Security-Policy"].replace("img-src 'self'", "img-src 'self' data:")
}
FIRST_SECONDS = 0.7  # for tickers: the page shows what is there within a second, whichever exchange hangs
KEEP_SECONDS = 1.0  # any number of viewers of one list costs what one does
MAX_DOCUMENTS = 64  # lists of symbols; the document of a longest one has some 150 KB
FIGURES_SECONDS, ERRORS_SECONDS = 60.0, 600.0


class Files:
    """What a page is made of, read once."""

    def __init__(self, paths: Iterable[Path], headers: Mapping[str, str]) -> None:
        self._bodies = {path.name: path.read_bytes() for path in paths if path.suffix in TYPES}
        self._headers = headers

    @classmethod
    def of_page(cls) -> Self:
        """Read the files of the page."""
        return cls(FOLDER.iterdir(), HEADERS)

    @classmethod
    def of_docs(cls) -> Self:
        """Read the files of `/docs`: ours, and Swagger UI from an installed package."""
        package = Path(str(resources.files("fastapi_swagger.resources")))
        return cls([*DOCS_FOLDER.iterdir(), *(package / name for name in SWAGGER_UI)], DOCS_HEADERS)

    async def send(self, request: Request) -> Response:
        """Send the file a path names, or else the page; raises `NotFound`."""
        name = request.path_params.get("name", "index.html")
        if (body := self._bodies.get(name)) is None:
            raise NotFound("the page has no such file")
        headers = {**self._headers, "ETag": etag_of(body)}
        if responses.matches(request.headers.getlist("if-none-match"), headers["ETag"]):
            return Response(status_code=304, headers=headers)
        return Response(body, headers=headers, media_type=TYPES[Path(name).suffix])


class Dashboard:
    """The document, and the samples that are taken for it; one object per process."""

    def __init__(self, gateway: Gateway, streams: StreamHub | None) -> None:
        self.recent = Recent(gateway.clock)
        self._gateway, self._streams = gateway, streams
        self._kept: TTLCache[tuple[str, ...], asyncio.Task[Entry]]
        self._kept = TTLCache(MAX_DOCUMENTS, KEEP_SECONDS, timer=gateway.clock.monotonic)

    async def data(self, symbols: Sequence[str]) -> Served:
        """Return the document with every exchange's tickers of these symbols; what could not be had is told in it."""
        name, result = tuple(symbols), "hit_memory"
        if (making := self._kept.get(name)) is None:
            result, making = "miss", asyncio.create_task(self._make(symbols))
            self._kept[name] = making
        entry = await asyncio.shield(making)  # who leaves takes it from nobody
        age = entry.age(self._gateway.clock.monotonic())
        return Served(entry.body, entry.etag, age, entry.ttl - age, result)

    async def _make(self, symbols: Sequence[str]) -> Entry:
        tickers = await self._gateway.tickers(symbols, ALL, None, FIRST_SECONDS)
        document = self._document() | {"market": orjson.Fragment(responses.batch_body(tickers))}
        now = self._gateway.clock.monotonic()
        return Entry.of(orjson.dumps(document), now, now, KEEP_SECONDS)

    def _document(self) -> dict[str, Any]:
        gateway, settings = self._gateway, self._gateway.settings
        return {
            "generated_at": int(gateway.clock.time() * 1000),
            "version": metrics.VERSION,
            "symbols": [gateway.markets.canonical(symbol) for symbol in settings.dashboard_symbols],
            "outlier_ratio": settings.dashboard_outlier_ratio,
            "streaming": settings.streaming,
            "grafana_url": settings.grafana_url,
            "ticker_ttl_seconds": settings.ticker_ttl_seconds,
            "exchanges": status.exchanges(gateway, self._streams),
            "health": status.health(gateway, self._streams),
            **self._figures(),
            "recent_errors": self._errors(),
        }

    def _figures(self) -> dict[str, Any]:
        gained = self.recent.gained(FIGURES_SECONDS)
        total, seconds, asked = gained.total, gained.seconds, gained.total("cache_requests_total")
        age, served = (total(f"cache_served_age_seconds_{part}", *metrics.DATA_ROUTES) for part in ("sum", "count"))
        clients = [client.transport for client in self._streams.subscribers] if self._streams else []
        cache = {
            "requests": int(asked),
            "memory_hit_ratio": _ratio(total("cache_requests_total", "hit_memory"), asked),
            "redis_hit_ratio": _ratio(total("cache_requests_total", "hit_redis"), asked),
            "stale_ratio": _ratio(total("cache_requests_total", "stale_error", "stale_revalidate"), asked),
            "entries": len(self._gateway.cache),
        }
        service = {
            "requests_per_second": _ratio(total("http_requests_total"), seconds),
            "updates_per_second": _ratio(total("stream_messages_sent_total"), seconds),
            "served_age_seconds": _ratio(age, served),
            "in_flight": metrics.in_progress.count,
            "subscribers": {transport: clients.count(transport) for transport in TRANSPORTS},
        }
        window = {"window_seconds": round(seconds, 3)}
        return {"cache": window | cache, "service": window | service}

    def _errors(self) -> dict[str, Any]:
        counts, seconds = self.recent.gained(ERRORS_SECONDS)
        exchanges: dict[str, dict[str, int]] = {name: {} for name in self._gateway.manager.names}
        answers: dict[str, int] = {}
        for (counter, first, *rest), count in counts.items():
            if counter == "exchange_requests_total" and first in exchanges and rest != ["success"]:
                exchanges[first][rest[0]] = int(count)
            elif counter == "http_requests_total" and first >= "400":
                answers[first] = int(count)
        return {"window_seconds": round(seconds, 3), "answers": answers, "exchanges": exchanges}


def _ratio(part: float, whole: float) -> float | None:
    """Divide, if there is anything to divide by."""
    return round(part / whole, 4) if whole else None
