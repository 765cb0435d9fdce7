"""The page as the gateway serves it: its files, its document, and the figures in the document.

test_page.py tests the page in a browser.
"""

import asyncio
from typing import Any

import pytest

from config import ConfigError, load_settings, setting_names
from src.cache.entry import Key
from src.core import metrics
from src.kinds import DATA_ROUTES
from src.sandbox.server import Sandbox
from src.web import dashboard
from src.web.dashboard import ERRORS_SECONDS, SAMPLE_SECONDS, Recent
from tests.conftest import NO_ENV_FILE, FakeClock, Live, StartGateway, eventually
from tests.deployment.test_edge import StartEdge, edge
from tests.web.test_server_events import events

__all__ = ["edge"]  # a fixture
DATA = "/api/dashboard/data"
EXCHANGES = ["bybit", "binance", "kraken"]
BTC = Key("kraken", "ticker", "BTC/USDT")
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
POLICY = {
    "default-src 'none'",
    "script-src 'self'",
    "style-src 'self'",
    "img-src 'self'",
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",
    "trusted-types 'none'",
}


async def data(live: Live, symbols: str | None = "", **headers: str) -> dict[str, Any]:
    """Request the document for `symbols`; with None for the default symbols."""
    query = "" if symbols is None else f"?symbols={symbols}"
    answer = await live.get(DATA + query, headers=headers)
    assert answer.status_code == 200, answer.text
    document: dict[str, Any] = answer.json()
    return document


def states_of(document: dict[str, Any], symbol: str) -> dict[str, str]:
    """Return what each exchange has of a symbol: `fresh`, `stale`, or the code of its error."""
    market = document["market"]
    fine = {
        name: "stale" if entry["stale"] else "fresh"
        for name, entry in market["tickers"].get(symbol, {}).items()
    }
    return fine | {name: entry["code"] for name, entry in market["errors"].get(symbol, {}).items()}


# ---- files


async def test_every_file_has_type_tag_and_policies(start: StartGateway) -> None:
    """Each file has its type, a strong tag that works for a 304, and the security headers."""
    live = await start()
    files = sorted(path for path in dashboard.FOLDER.iterdir() if path.is_file())
    assert files
    for path in files:
        url = f"/static/{path.name}"
        answer = await live.get(url)
        assert (answer.status_code, answer.content) == (200, path.read_bytes()), url
        head = answer.headers
        assert head["content-type"] == TYPES[path.suffix[1:]], url
        assert (head["cache-control"], head["x-content-type-options"]) == ("no-cache", "nosniff"), (
            url
        )
        assert head["referrer-policy"] == "no-referrer", url
        assert set(head["content-security-policy"].split("; ")) == POLICY, url
        assert head["etag"].startswith('"'), url
        again = await live.get(url, headers={"If-None-Match": head["etag"]})
        assert (again.status_code, again.content, again.headers["etag"]) == (
            304,
            b"",
            head["etag"],
        ), url
        assert again.headers["content-security-policy"] == head["content-security-policy"], url
        assert (await live.get(url, headers={"If-None-Match": '"other"'})).status_code == 200, url
        bare = await live.client.head(live.url + url)
        assert (bare.status_code, bare.content, bare.headers["etag"]) == (200, b"", head["etag"]), (
            url
        )
        assert bare.headers["content-length"] == str(len(answer.content)), url


async def test_page_has_one_document(start: StartGateway) -> None:
    """`/` and `/mobile` return index.html, whatever the query is."""
    live = await start()
    answers = [
        await live.get(path) for path in ("/", "/mobile", "/static/index.html", "/?name=style.css")
    ]
    assert {answer.status_code for answer in answers} == {200}
    assert (
        len(
            {
                (answer.content, answer.headers["etag"], answer.headers["content-type"])
                for answer in answers
            }
        )
        == 1
    )


async def test_only_known_files_are_served(start: StartGateway) -> None:
    """Only files that were read at the start are served, by their exact names."""
    live = await start(wait=False)
    for path in (
        "/static/nothing.js",
        "/static/",
        "/static",
        "/static/INDEX.HTML",
        "/static/index.html/",
        "/static/..%2fapi.py",
        "/static/%2e%2e/api.py",
        "/static/../api.py",
        "/static/..%5capi.py",
        "/static//etc/passwd",
        "/static/index.html%00.js",
        "/mobile/",
        "/index.html",
    ):
        answer = (
            await live.raw(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        ).decode()
        assert answer.split(" ")[1] == ("400" if "%00" in path else "404"), path
        assert "application/problem+json" in answer, path


def test_page_is_small() -> None:
    """All files together are smaller than 109,000 bytes, and the gateway serves each of them."""
    everything = [path for path in dashboard.FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in everything) < 109_000
    files = [path for path in everything if path.parent != dashboard.DOCS_FOLDER]
    served = {(path.parent, path.suffix[1:] in dashboard.TYPES) for path in files}
    assert served == {(dashboard.FOLDER, True)}


async def test_page_is_open_and_its_data_need_a_key(start: StartGateway) -> None:
    """With keys, files need none and do not count against a limit; the data do."""
    live = await start(api_keys="desk:12345678", client_rate_limit=4)
    for path in ("/", "/mobile", "/static/index.html") * 2:
        answer = await live.get(path)
        assert (answer.status_code, "ratelimit" in answer.headers) == (200, False)
    for path in (DATA, "/nothing", "/static", "//"):  # other paths that begin with a slash
        assert (await live.get(path)).status_code == 401, path
    answers = [
        await live.get(f"{DATA}?symbols=", headers={"X-API-Key": "12345678"}) for _ in range(5)
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 200, 429]
    assert answers[0].headers["cache-control"].startswith("private")
    assert "ratelimit" in answers[0].headers


async def test_page_works_behind_nginx(start: StartGateway, edge: StartEdge) -> None:
    """Through nginx the page is the same, with each header once; document and streams pass too."""
    live = await start()
    front = await edge(live)
    direct, through = await live.get("/"), await front.get("/")
    assert (through.status_code, through.content) == (200, direct.content)
    for name in (*dashboard.HEADERS, "ETag", "Content-Type"):
        assert through.headers.get_list(name) == direct.headers.get_list(name), name
    again = await front.get("/mobile", headers={"If-None-Match": direct.headers["etag"]})
    assert (again.status_code, again.headers.get_list("x-content-type-options")) == (
        304,
        ["nosniff"],
    )
    assert (await front.get("/static/nothing.js")).json()["code"] == "not_found"
    assert (await front.get(f"{DATA}?symbols=BTC-USDT")).json()["market"]["errors"] == {}
    async with front.client.stream(
        "GET", f"{front.url}/stream/BTC-USDT,ETH-USDT?exchange=kraken"
    ) as answer:
        received = await events(answer.aiter_lines(), 4)
    assert {data["symbol"] for _, _, data in received} == {"BTC/USDT", "ETH/USDT"}


# ---- document


async def test_concurrent_viewers_share_one_document(start: StartGateway, sandbox: Sandbox) -> None:
    """The document is built once; a viewer that leaves does not cancel it."""
    live = await start()
    await sandbox.set("kraken", hang=True)
    url = f"{live.url}{DATA}"
    first = asyncio.create_task(live.client.get(url))
    others = [asyncio.create_task(live.client.get(url)) for _ in range(5)]
    answers = await asyncio.gather(first, *others)
    ways = sorted(answer.headers["cache-status"].split(";")[1].strip() for answer in answers)
    assert ways == ["fwd=miss", *["hit"] * 5]
    assert len({answer.content for answer in answers}) == 1


async def test_document_has_every_member(start: StartGateway) -> None:
    """Every member that the page reads has its type; shared parts equal other endpoints."""
    live = await start()
    document = await data(live, None)
    default = setting_names()["DASHBOARD_SYMBOLS"][1]
    assert list(document["market"]["tickers"]) == document["symbols"] == list(default)  # type: ignore[call-overload]
    assert all(
        states_of(document, symbol) == dict.fromkeys(EXCHANGES, "fresh")
        for symbol in document["symbols"]
    )
    assert (document["version"], document["streaming"], document["grafana_url"]) == (
        metrics.VERSION,
        True,
        "",
    )
    assert (document["outlier_ratio"], document["ticker_ttl_seconds"]) == (0.01, 15)
    assert document["generated_at"] == int(live.gateway.clock.time() * 1000)
    assert (
        document["market"]
        == (await live.get(f"/tickers?symbols={','.join(document['symbols'])}&exchange=all")).json()
    )
    assert document["exchanges"] == (await live.get("/exchanges")).json()
    assert document["health"] == (await live.get("/health")).json()
    assert set(document["cache"]) == {
        "window_seconds",
        "requests",
        "memory_hit_ratio",
        "redis_hit_ratio",
        "stale_ratio",
        "entries",
    }
    assert set(document["service"]) == {
        "window_seconds",
        "requests_per_second",
        "updates_per_second",
        "served_age_seconds",
        "in_flight",
        "subscribers",
    }
    assert (
        document["cache"]["entries"]
        == len(live.gateway.cache.memory)
        == 3 * len(document["symbols"])
    )
    assert document["service"]["subscribers"] == {"ws": 0, "sse": 0}
    assert document["service"]["in_flight"] == 1
    assert set(document["recent_errors"]) == {"window_seconds", "answers", "exchanges"}
    assert len(document) == 14


async def test_symbols_are_chosen_by_the_viewer(start: StartGateway) -> None:
    """None, any spelling, unknown and malformed symbols; errors do not affect other symbols."""
    live = await start(
        dashboard_symbols="eth-usdt, BTC/USDT", grafana_url="https://grafana.example/"
    )
    usual = await data(live, None)
    assert list(usual["market"]["tickers"]) == usual["symbols"] == ["ETH/USDT", "BTC/USDT"]
    assert usual["grafana_url"] == "https://grafana.example"
    assert (await data(live, ""))["market"] == {"tickers": {}, "errors": {}}
    mixed = await data(live, "btc-usdt,FOO-BAR,*")
    assert mixed["symbols"] == usual["symbols"]
    assert states_of(mixed, "BTC/USDT") == dict.fromkeys(EXCHANGES, "fresh")
    assert states_of(mixed, "FOO/BAR") == dict.fromkeys(EXCHANGES, "unknown_symbol")
    assert states_of(mixed, "*") == dict.fromkeys(EXCHANGES, "malformed_request")


async def test_number_of_symbols_is_limited(start: StartGateway) -> None:
    """A hundred symbols are accepted, one more is not."""
    live = await start()
    many = [f"X{number}-USDT" for number in range(101)]
    assert len((await data(live, ",".join(many[:100])))["market"]["errors"]) == 100
    answer = await live.get(f"{DATA}?symbols={','.join(many)}")
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_parameter")


async def test_hanging_exchange_does_not_delay_the_document(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """The other prices come without it; its load continues and is in the next document."""
    live = await start()
    await sandbox.set("kraken", hang=True)
    async with asyncio.timeout(20):  # the gateway would wait for 30 s
        document = await data(live, "BTC-USDT")
    assert states_of(document, "BTC/USDT") == {
        "bybit": "fresh",
        "binance": "fresh",
        "kraken": "deadline_exceeded",
    }
    await sandbox.set("kraken", rate_limit=-1)
    await eventually(lambda: live.gateway.cache.has_fresh(BTC))
    assert sandbox.count("kraken", "Ticker") == 1
    clock.advance(dashboard.KEEP_SECONDS)
    assert states_of(await data(live, "BTC-USDT"), "BTC/USDT") == dict.fromkeys(EXCHANGES, "fresh")
    assert sandbox.count("kraken", "Ticker") == 1
    clock.advance(20)
    await sandbox.set("kraken", hang=True)
    old = await data(live, "BTC-USDT")
    assert states_of(old, "BTC/USDT") == {"bybit": "fresh", "binance": "fresh", "kraken": "stale"}


async def test_document_is_kept_for_one_second(start: StartGateway, clock: FakeClock) -> None:
    """Within a second all viewers get the same document, with its age and tag."""
    live = await start()
    first = await live.get(f"{DATA}?symbols=BTC-USDT")
    assert first.headers["cache-status"] == "virtuoso; fwd=miss; stored; ttl=1"
    assert (first.headers["age"], first.headers["cache-control"]) == ("0", "max-age=1")
    clock.advance(0.9)
    second = await live.get(f"{DATA}?symbols=BTC-USDT")
    assert second.content == first.content
    assert second.headers["cache-status"] == "virtuoso; hit; detail=memory; ttl=0"
    same = {"If-None-Match": first.headers["etag"]}
    assert (await live.get(f"{DATA}?symbols=BTC-USDT", headers=same)).status_code == 304
    clock.advance(0.1)
    third = await live.get(f"{DATA}?symbols=BTC-USDT", headers=same)
    assert third.status_code == 200
    assert third.json()["generated_at"] == first.json()["generated_at"] + 1000


async def test_number_of_kept_documents_is_limited(start: StartGateway) -> None:
    """However many lists are requested, at most MAX_DOCUMENTS are kept."""
    live = await start()
    for number in range(dashboard.MAX_DOCUMENTS + 3):
        await data(live, f"X{number}-USDT")
    assert len(live.server.lifespan.state["dashboard"]._documents) == dashboard.MAX_DOCUMENTS


# ---- figures


async def test_saved_calls_count_all_endpoints(start: StartGateway, clock: FakeClock) -> None:
    """Hits of `/ticker` and `/raw` save calls; the two calls that the gateway makes do not."""
    live = await start()
    assert (await data(live))["saved"] == {"window_seconds": 0, "requests": 0, "saved": 0}
    path = "/raw/kraken/0/public/Ticker?pair=XBTUSDT"
    for _ in range(3):
        assert (await live.get("/ticker/BTC-USDT?exchange=kraken")).status_code == 200
        assert (await live.get(path)).status_code == 200
    clock.advance(10)
    saved = (await data(live))["saved"]
    assert saved == {"window_seconds": 10, "requests": 6, "saved": 4}


async def test_figures_cover_the_last_minute(start: StartGateway, clock: FakeClock) -> None:
    """Rates and ratios include the fast path's hits; they are null if no time has passed."""
    live = await start()
    at_once = await data(live)
    assert at_once["cache"]["window_seconds"] == at_once["service"]["window_seconds"] == 0
    assert [at_once["service"][name] for name in ("requests_per_second", "served_age_seconds")] == [
        None,
        None,
    ]
    assert [at_once["cache"][f"{name}_ratio"] for name in ("memory_hit", "redis_hit", "stale")] == [
        None,
        None,
        None,
    ]
    await live.get("/ticker/BTC-USDT?exchange=kraken")
    clock.advance(10)
    for _ in range(3):  # the app answers the first request, the fast path the others
        await live.get("/ticker/BTC-USDT?exchange=kraken")
    clock.advance(10)
    document = await data(live)
    cache, service = document["cache"], document["service"]
    assert cache["window_seconds"] == service["window_seconds"] == 20
    assert (cache["requests"], cache["memory_hit_ratio"], cache["redis_hit_ratio"]) == (4, 0.75, 0)
    assert (service["requests_per_second"], service["served_age_seconds"]) == (5 / 20, 7.5)
    assert cache["stale_ratio"] == service["updates_per_second"] == 0


async def test_stale_values_are_counted(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """Values that were served stale have their ratio."""
    live = await start()
    await live.get("/ticker/BTC-USDT?exchange=kraken")
    clock.advance(20)
    await sandbox.set("kraken", status=500)
    assert (await live.get("/ticker/BTC-USDT?exchange=kraken")).json()["stale"]
    document = await data(live)
    assert (document["cache"]["requests"], document["cache"]["stale_ratio"]) == (2, 0.5)


async def test_streams_are_counted(start: StartGateway, clock: FakeClock) -> None:
    """Connected clients by transport, and the updates sent to them."""
    live = await start()
    async with live.client.stream("GET", f"{live.url}/stream/BTC-USDT?exchange=kraken") as answer:
        assert len(await events(answer.aiter_lines(), 3)) == 3
        clock.advance(1)
        document = await data(live)
    assert document["service"]["subscribers"] == {"ws": 0, "sse": 1}
    assert document["service"]["updates_per_second"] >= 3


async def test_figures_without_streams(start: StartGateway) -> None:
    """With STREAMING off the document says so, and no client is connected."""
    document = await data(await start(streaming=False))
    assert document["streaming"] is False
    assert document["service"]["subscribers"] == {"ws": 0, "sse": 0}


async def test_errors_are_grouped(start: StartGateway, sandbox: Sandbox, clock: FakeClock) -> None:
    """Answers by status, calls by exchange and outcome; successes are not included."""
    live = await start()
    assert (await data(live))["recent_errors"] == {
        "window_seconds": 0,
        "answers": {},
        "exchanges": {name: {} for name in EXCHANGES},
    }
    await live.get("/ticker/BTC-USDT?exchange=bybit")
    for _ in range(2):
        await live.get("/ticker/FOO-BAR")
    await sandbox.set("kraken", body="{}")
    await live.get("/ticker/BTC-USDT?exchange=kraken")
    clock.advance(1)  # the pause of the market
    await sandbox.set("kraken", refuse=True)
    await live.get("/ticker/BTC-USDT?exchange=kraken")
    clock.advance(29)
    document = (await data(live))["recent_errors"]
    assert document["answers"] == {"404": 2, "502": 2}
    assert document["exchanges"] == {
        "bybit": {},
        "binance": {},
        "kraken": {"bad_data": 1, "unavailable": 1},
    }
    assert document["window_seconds"] == 30


async def test_samples_slide_and_are_limited(clock: FakeClock) -> None:
    """A period begins at the last sample that is old enough; samples of ten minutes are kept."""
    metrics.cache_served_age_seconds.labels(DATA_ROUTES[0])
    recent = Recent(clock, ERRORS_SECONDS, SAMPLE_SECONDS)
    key = ("stream_messages_sent_total", "ticker")
    for seconds, count in ((30.0, 5), (60.0, 2)):
        clock.advance(seconds)
        metrics.streamed["ticker"] += count
        await recent.take_sample()
    for seconds, period, count in ((90, 90, 7), (60, 60, 2), (10, 60, 2), (600, 90, 7)):
        counts, length = recent.increases(seconds)
        assert (length, counts[key]) == (period, count)
    names = {name for name, *_ in recent._samples[0][1]}
    assert "cache_served_age_seconds_sum" in names
    assert not [name for name in names if "bucket" in name], "they would be most of a sample"
    for _ in range(200):
        await recent.take_sample()
    assert (recent.increases(600)[1], len(recent._samples)) == (0, 121)
    assert 120 * dashboard.SAMPLE_SECONDS == dashboard.ERRORS_SECONDS == 600


# ---- settings


@pytest.mark.parametrize(
    "value", [",", "BTC", "BTC-USDT,btc/usdt", "BTC-USDT-X", "BTC/USDT/X", "A" * 25 + "-USDT", "$-"]
)
def test_invalid_dashboard_symbols_stop_the_start(value: str) -> None:
    """A list that cannot be shown is refused with one line that says what is allowed."""
    with pytest.raises(
        ConfigError, match=r"^DASHBOARD_SYMBOLS=.* expected 1 to 100 distinct .* BTC-USDT\.$"
    ):
        load_settings({"DASHBOARD_SYMBOLS": value}, NO_ENV_FILE)


@pytest.mark.parametrize("value", ["0", "1.1", "nan", "much"])
def test_invalid_outlier_ratio_stops_the_start(value: str) -> None:
    """A ratio is above 0 and at most 1."""
    with pytest.raises(
        ConfigError,
        match=r"^DASHBOARD_OUTLIER_RATIO='.*' is invalid: expected a number above 0",
    ):
        load_settings({"DASHBOARD_OUTLIER_RATIO": value}, NO_ENV_FILE)


def test_grafana_url_must_be_a_page() -> None:
    """An address that a browser cannot open is refused, not ignored."""
    with pytest.raises(ConfigError, match=r"^GRAFANA_URL=.* is invalid: expected http://"):
        load_settings({"GRAFANA_URL": "wss://grafana.example"}, NO_ENV_FILE)


def test_hundred_dashboard_symbols_are_allowed() -> None:
    """As many as one request may name, swaps included."""
    names = [f"X{number}-USDT:USDT" for number in range(101)]
    assert (
        len(
            load_settings(
                {"DASHBOARD_SYMBOLS": ",".join(names[:100])}, NO_ENV_FILE
            ).dashboard_symbols
        )
        == 100
    )
    with pytest.raises(ConfigError, match="DASHBOARD_SYMBOLS"):
        load_settings({"DASHBOARD_SYMBOLS": ",".join(names)}, NO_ENV_FILE)
