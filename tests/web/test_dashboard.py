"""The page as the gateway serves it: its files, the document it is drawn from, and the figures in that.

What it looks like and does in a browser is in test_page.py.
"""

import asyncio
from typing import Any

import pytest

from config import ConfigError, load_settings, setting_names
from src.cache.entry import Key
from src.core import metrics
from src.sandbox.server import Sandbox
from src.web import dashboard, recent
from src.web.recent import Recent
from tests.conftest import NO_ENV_FILE, FakeClock, Live, StartGateway, eventually
from tests.deployment.test_edge import StartEdge, edge
from tests.web.test_server_events import events

__all__ = ["edge"]  # a fixture
DATA = "/api/dashboard/data"
EXCHANGES = ["bybit", "binance", "kraken"]
BTC = Key("kraken", "ticker", "BTC/USDT")
TYPES = {
    "html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}  # fmt: skip
POLICY = {
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'", "connect-src 'self'",
    "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'", "require-trusted-types-for 'script'",
    "trusted-types 'none'",
}  # fmt: skip


async def data(live: Live, symbols: str | None = "", **headers: str) -> dict[str, Any]:
    """Ask for the document, of no symbols unless some are given; of the usual ones with None."""
    query = "" if symbols is None else f"?symbols={symbols}"
    answer = await live.get(DATA + query, headers=headers)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def told(document: dict[str, Any], symbol: str) -> dict[str, str]:
    """Name what each exchange has of a symbol: `fresh`, `stale`, or the code of its error."""
    market = document["market"]
    fine = {name: "stale" if it["stale"] else "fresh" for name, it in market["tickers"].get(symbol, {}).items()}
    return fine | {name: it["code"] for name, it in market["errors"].get(symbol, {}).items()}


# The files.


async def test_every_file_is_served_as_what_it_is(start: StartGateway) -> None:
    """Each file of the page has its type, a strong tag that is right for a 304, and says what a browser may do."""
    live = await start()
    files = sorted(path for path in dashboard.FOLDER.iterdir() if path.is_file())
    assert files
    for path in files:
        url = f"/static/{path.name}"
        answer = await live.get(url)
        assert (answer.status_code, answer.content) == (200, path.read_bytes()), url
        head = answer.headers
        assert head["content-type"] == TYPES[path.suffix[1:]], url
        assert (head["cache-control"], head["x-content-type-options"]) == ("no-cache", "nosniff"), url
        assert head["referrer-policy"] == "no-referrer", url
        assert set(head["content-security-policy"].split("; ")) == POLICY, url
        assert head["etag"].startswith('"'), url
        again = await live.get(url, headers={"If-None-Match": head["etag"]})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", head["etag"]), url
        assert again.headers["content-security-policy"] == head["content-security-policy"], url
        assert (await live.get(url, headers={"If-None-Match": '"other"'})).status_code == 200, url
        bare = await live.client.head(live.url + url)
        assert (bare.status_code, bare.content, bare.headers["etag"]) == (200, b"", head["etag"]), url
        assert bare.headers["content-length"] == str(len(answer.content)), url


async def test_the_page_is_one(start: StartGateway) -> None:
    """`/` and `/mobile` are the same bytes, those of index.html, whatever stands behind the question mark."""
    live = await start()
    answers = [await live.get(path) for path in ("/", "/mobile", "/static/index.html", "/?name=style.css")]
    assert {answer.status_code for answer in answers} == {200}
    assert len({(answer.content, answer.headers["etag"], answer.headers["content-type"]) for answer in answers}) == 1


async def test_nothing_else_is_a_file(start: StartGateway) -> None:
    """Only what was read at the start is served, by its very name."""
    live = await start(wait=False)
    for path in (
        "/static/nothing.js", "/static/", "/static", "/static/INDEX.HTML", "/static/index.html/", "/static/..%2fapi.py",
        "/static/%2e%2e/api.py", "/static/../api.py", "/static/..%5capi.py", "/static//etc/passwd",
        "/static/index.html%00.js", "/mobile/", "/index.html",
    ):  # fmt: skip
        answer = (await live.raw(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())).decode()
        assert answer.split(" ")[1] == ("400" if "%00" in path else "404"), path
        assert "application/problem+json" in answer, path


def test_the_page_is_small() -> None:
    """All that a browser loads is less than 106,000 bytes, and nothing lies there that is not served."""
    files = [path for path in dashboard.FOLDER.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 106_000
    assert {(path.parent, path.suffix in dashboard.TYPES) for path in files} == {(dashboard.FOLDER, True)}


async def test_the_page_is_open_and_its_data_are_not(start: StartGateway) -> None:
    """With keys the files need none, and count against no limit; the data need one, and do."""
    live = await start(api_keys="desk:12345678", client_rate_limit=4)
    for path in ("/", "/mobile", "/static/index.html") * 2:
        answer = await live.get(path)
        assert (answer.status_code, "ratelimit" in answer.headers) == (200, False)
    for path in (DATA, "/nothing", "/static", "//"):  # whatever else begins with a slash
        assert (await live.get(path)).status_code == 401, path
    answers = [await live.get(f"{DATA}?symbols=", headers={"X-API-Key": "12345678"}) for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 200, 429]
    assert answers[0].headers["cache-control"].startswith("private")
    assert "ratelimit" in answers[0].headers


async def test_the_page_passes_the_edge(start: StartGateway, edge: StartEdge) -> None:
    """Through nginx it is the same page, with each header once; the document and several streams pass too."""
    live = await start()
    front = await edge(live)
    direct, through = await live.get("/"), await front.get("/")
    assert (through.status_code, through.content) == (200, direct.content)
    for name in (*dashboard.HEADERS, "ETag", "Content-Type"):
        assert through.headers.get_list(name) == direct.headers.get_list(name), name
    again = await front.get("/mobile", headers={"If-None-Match": direct.headers["etag"]})
    assert (again.status_code, again.headers.get_list("x-content-type-options")) == (304, ["nosniff"])
    assert (await front.get("/static/nothing.js")).json()["code"] == "not_found"
    assert (await front.get(f"{DATA}?symbols=BTC-USDT")).json()["market"]["errors"] == {}
    async with front.client.stream("GET", f"{front.url}/stream/BTC-USDT,ETH-USDT?exchange=kraken") as answer:
        got = await events(answer.aiter_lines(), 4)
    assert {data["symbol"] for _, _, data in got} == {"BTC/USDT", "ETH/USDT"}


# The document.


async def test_viewers_who_come_at_once_share_one_document(start: StartGateway, sandbox: Sandbox) -> None:
    """While it is made nobody makes another, and one who leaves takes it from nobody."""
    live = await start()
    await sandbox.set("kraken", hang=True)
    url = f"{live.url}{DATA}"
    first = asyncio.create_task(live.client.get(url))
    others = [asyncio.create_task(live.client.get(url)) for _ in range(5)]
    answers = await asyncio.gather(first, *others)
    ways = sorted(answer.headers["cache-status"].split(";")[1].strip() for answer in answers)
    assert ways == ["fwd=miss", *["hit"] * 5]
    assert len({answer.content for answer in answers}) == 1


async def test_the_document_keeps_its_contract(start: StartGateway) -> None:
    """Every member the page reads is there and of its type; what is told elsewhere is what is told there."""
    live = await start()
    found = await data(live, None)
    default = setting_names()["DASHBOARD_SYMBOLS"][1]
    assert list(found["market"]["tickers"]) == found["symbols"] == list(default)  # type: ignore[call-overload]
    assert all(told(found, symbol) == dict.fromkeys(EXCHANGES, "fresh") for symbol in found["symbols"])
    assert (found["version"], found["streaming"], found["grafana_url"]) == (metrics.VERSION, True, "")
    assert (found["outlier_ratio"], found["ticker_ttl_seconds"]) == (0.01, 15)
    assert found["generated_at"] == int(live.gateway.clock.time() * 1000)
    assert found["market"] == (await live.get(f"/tickers?symbols={','.join(found['symbols'])}&exchange=all")).json()
    assert found["exchanges"] == (await live.get("/exchanges")).json()
    assert found["health"] == (await live.get("/health")).json()
    assert set(found["cache"]) == {
        "window_seconds", "requests", "memory_hit_ratio", "redis_hit_ratio", "stale_ratio", "entries",
    }  # fmt: skip
    assert set(found["service"]) == {
        "window_seconds", "requests_per_second", "updates_per_second", "served_age_seconds", "in_flight", "subscribers",
    }  # fmt: skip
    assert found["cache"]["entries"] == len(live.gateway.cache) == 3 * len(found["symbols"])
    assert found["service"]["subscribers"] == {"ws": 0, "sse": 0}
    assert found["service"]["in_flight"] == 1
    assert set(found["recent_errors"]) == {"window_seconds", "answers", "exchanges"}
    assert len(found) == 13


async def test_symbols_are_the_viewers(start: StartGateway) -> None:
    """None, some in any spelling, unknown and malformed ones; what is wrong with one is told beside the others."""
    live = await start(dashboard_symbols="eth-usdt, BTC/USDT", grafana_url="https://grafana.example/")
    usual = await data(live, None)
    assert list(usual["market"]["tickers"]) == usual["symbols"] == ["ETH/USDT", "BTC/USDT"]
    assert usual["grafana_url"] == "https://grafana.example"
    assert (await data(live, ""))["market"] == {"tickers": {}, "errors": {}}
    mixed = await data(live, "btc-usdt,FOO-BAR,*")
    assert mixed["symbols"] == usual["symbols"]
    assert told(mixed, "BTC/USDT") == dict.fromkeys(EXCHANGES, "fresh")
    assert told(mixed, "FOO/BAR") == dict.fromkeys(EXCHANGES, "unknown_symbol")
    assert told(mixed, "*") == dict.fromkeys(EXCHANGES, "malformed_request")


async def test_symbols_are_bounded(start: StartGateway) -> None:
    """A hundred may be asked for, one more may not."""
    live = await start()
    many = [f"X{number}-USDT" for number in range(101)]
    assert len((await data(live, ",".join(many[:100])))["market"]["errors"]) == 100
    answer = await live.get(f"{DATA}?symbols={','.join(many)}")
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_parameter")


async def test_a_hanging_exchange_holds_up_nobody(start: StartGateway, sandbox: Sandbox, clock: FakeClock) -> None:
    """The others' prices come without it; its load goes on, and what it brings is there next time."""
    live = await start()
    await sandbox.set("kraken", hang=True)
    async with asyncio.timeout(20):  # the gateway would wait for 30 s
        found = await data(live, "BTC-USDT")
    assert told(found, "BTC/USDT") == {"bybit": "fresh", "binance": "fresh", "kraken": "deadline_exceeded"}
    await sandbox.set("kraken", rate_limit=-1)
    await eventually(lambda: live.gateway.cache.has_fresh(BTC))
    assert sandbox.count("kraken", "Ticker") == 1
    clock.advance(dashboard.KEEP_SECONDS)
    assert told(await data(live, "BTC-USDT"), "BTC/USDT") == dict.fromkeys(EXCHANGES, "fresh")
    assert sandbox.count("kraken", "Ticker") == 1
    clock.advance(20)
    await sandbox.set("kraken", hang=True)
    old = await data(live, "BTC-USDT")
    assert told(old, "BTC/USDT") == {"bybit": "fresh", "binance": "fresh", "kraken": "stale"}


async def test_a_document_is_kept_for_a_second(start: StartGateway, clock: FakeClock) -> None:
    """Whoever asks within it gets the same, with its age and tag; after it there is a new one."""
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


async def test_documents_are_bounded(start: StartGateway) -> None:
    """However many lists are asked for, no more than so many are kept."""
    live = await start()
    for number in range(dashboard.MAX_DOCUMENTS + 3):
        await data(live, f"X{number}-USDT")
    assert len(live.server.lifespan.state["dashboard"]._kept) == dashboard.MAX_DOCUMENTS


# The figures.


async def test_figures_are_those_of_late(start: StartGateway, clock: FakeClock) -> None:
    """Rates and shares of what happened here, hits of the fast path too; none where no time has gone by."""
    live = await start()
    at_once = await data(live)
    assert at_once["cache"]["window_seconds"] == at_once["service"]["window_seconds"] == 0
    assert [at_once["service"][name] for name in ("requests_per_second", "served_age_seconds")] == [None, None]
    assert [at_once["cache"][f"{name}_ratio"] for name in ("memory_hit", "redis_hit", "stale")] == [None, None, None]
    await live.get("/ticker/BTC-USDT?exchange=kraken")
    clock.advance(10)
    for _ in range(3):  # the first is the app's, and the fast path's are the others
        await live.get("/ticker/BTC-USDT?exchange=kraken")
    clock.advance(10)
    found = await data(live)
    cache, service = found["cache"], found["service"]
    assert cache["window_seconds"] == service["window_seconds"] == 20
    assert (cache["requests"], cache["memory_hit_ratio"], cache["redis_hit_ratio"]) == (4, 0.75, 0)
    assert (service["requests_per_second"], service["served_age_seconds"]) == (5 / 20, 7.5)
    assert cache["stale_ratio"] == service["updates_per_second"] == 0


async def test_stale_values_are_counted(start: StartGateway, sandbox: Sandbox, clock: FakeClock) -> None:
    """What had to stand in for something newer has its share."""
    live = await start()
    await live.get("/ticker/BTC-USDT?exchange=kraken")
    clock.advance(20)
    await sandbox.set("kraken", status=500)
    assert (await live.get("/ticker/BTC-USDT?exchange=kraken")).json()["stale"]
    found = await data(live)
    assert (found["cache"]["requests"], found["cache"]["stale_ratio"]) == (2, 0.5)


async def test_what_is_pushed_is_counted(start: StartGateway, clock: FakeClock) -> None:
    """Connected clients by transport, and what they were sent."""
    live = await start()
    async with live.client.stream("GET", f"{live.url}/stream/BTC-USDT?exchange=kraken") as answer:
        assert len(await events(answer.aiter_lines(), 3)) == 3
        clock.advance(1)
        found = await data(live)
    assert found["service"]["subscribers"] == {"ws": 0, "sse": 1}
    assert found["service"]["updates_per_second"] >= 3


async def test_without_streams_there_are_none(start: StartGateway) -> None:
    """With STREAMING off the page is told, and nobody is connected."""
    found = await data(await start(streaming=False))
    assert found["streaming"] is False
    assert found["service"]["subscribers"] == {"ws": 0, "sse": 0}


async def test_errors_are_told_by_kind(start: StartGateway, sandbox: Sandbox, clock: FakeClock) -> None:
    """Answers by status, calls by exchange and outcome; what went well is not among them."""
    live = await start()
    assert (await data(live))["recent_errors"] == {
        "window_seconds": 0, "answers": {}, "exchanges": {name: {} for name in EXCHANGES},
    }  # fmt: skip
    await live.get("/ticker/BTC-USDT?exchange=bybit")
    for _ in range(2):
        await live.get("/ticker/FOO-BAR")
    await sandbox.set("kraken", body="{}")
    await live.get("/ticker/BTC-USDT?exchange=kraken")
    await sandbox.set("kraken", refuse=True)
    await live.get("/ticker/BTC-USDT?exchange=kraken")
    clock.advance(30)
    found = (await data(live))["recent_errors"]
    assert found["answers"] == {"404": 2, "502": 2}
    assert found["exchanges"] == {"bybit": {}, "binance": {}, "kraken": {"bad_data": 1, "unavailable": 1}}
    assert found["window_seconds"] == 30


async def test_samples_slide_and_are_bounded(clock: FakeClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window begins at the last sample that is old enough; those past ten minutes are let go."""
    metrics.cache_served_age_seconds.labels(metrics.DATA_ROUTES[0])
    kept, name = Recent(clock), "stream_messages_sent_total"
    monkeypatch.setattr(recent, "SAMPLE_SECONDS", 0.0)
    running = asyncio.create_task(kept.run())
    try:
        for seconds, count in ((30.0, 5), (60.0, 2)):
            clock.advance(seconds)
            metrics.streamed["ticker"] += count
            await eventually(lambda: kept._samples[-1][0] == clock.monotonic())
        assert (kept.gained(90).seconds, kept.gained(90).total(name)) == (90, 7)
        assert (kept.gained(60).seconds, kept.gained(60).total(name)) == (60, 2)
        assert (kept.gained(10).seconds, kept.gained(10).total(name)) == (60, 2)
        assert kept.gained(600).seconds == 90
        assert "cache_served_age_seconds_sum" in {key[0] for key in kept._samples[0][1]}
        assert not [key for key in kept._samples[0][1] if "bucket" in key[0]], "they would be most of a sample"
        await eventually(lambda: kept._samples[0][0] == clock.monotonic())
        assert (kept.gained(600).seconds, len(kept._samples)) == (0, 121)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def test_ten_minutes_are_kept(clock: FakeClock) -> None:
    """There is room for as many samples as errors are told for."""
    pauses = (Recent(clock)._samples.maxlen or 0) - 1
    assert pauses * recent.SAMPLE_SECONDS == recent.KEEP_SECONDS == dashboard.ERRORS_SECONDS


# The settings.


@pytest.mark.parametrize(
    "value", [",", "BTC", "BTC-USDT,btc/usdt", "BTC-USDT-X", "BTC/USDT/X", "A" * 25 + "-USDT", "$-"]
)
def test_symbols_that_are_none_stop_the_start(value: str) -> None:
    """A list that could not be shown is refused with one line that says what can."""
    with pytest.raises(ConfigError, match=r"^DASHBOARD_SYMBOLS is no list of 1 to 100 distinct .* BTC-USDT$"):
        load_settings({"DASHBOARD_SYMBOLS": value}, NO_ENV_FILE)


@pytest.mark.parametrize("value", ["0", "1.1", "nan", "much"])
def test_a_ratio_that_is_none_stops_the_start(value: str) -> None:
    """A share is more than nothing and no more than all."""
    with pytest.raises(ConfigError, match=r"^DASHBOARD_OUTLIER_RATIO='.*' is not accepted; allowed: a number above 0"):
        load_settings({"DASHBOARD_OUTLIER_RATIO": value}, NO_ENV_FILE)


def test_grafana_is_a_page() -> None:
    """What a browser cannot be sent to is refused, not left out without a word."""
    with pytest.raises(ConfigError, match=r"^GRAFANA_URL is no URL of a page; allowed: http://"):
        load_settings({"GRAFANA_URL": "wss://grafana.example"}, NO_ENV_FILE)


def test_a_hundred_symbols_are_allowed() -> None:
    """As many as a request may name, and swaps among them."""
    names = [f"X{number}-USDT:USDT" for number in range(101)]
    assert len(load_settings({"DASHBOARD_SYMBOLS": ",".join(names[:100])}, NO_ENV_FILE).dashboard_symbols) == 100
    with pytest.raises(ConfigError, match="DASHBOARD_SYMBOLS"):
        load_settings({"DASHBOARD_SYMBOLS": ",".join(names)}, NO_ENV_FILE)
