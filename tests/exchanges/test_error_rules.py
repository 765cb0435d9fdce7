"""The exchanges' error answers: their meaning, what they are about, and how long they last.

The texts are those of the exchanges' documentation, of recordings and of public reports.
"""

from typing import Any

import orjson
import pytest

from src.core.errors import BadUpstreamData, ExchangeRateLimited, UnknownSymbol
from src.exchanges.ccxt_client import ccxt
from src.exchanges.http_client import Answer
from src.exchanges.pauses import MARKETS_FOR_EXCHANGE_SCOPE, MAX_PAUSES, Pauses, Target
from src.exchanges.translation import MAX_RETRY_AFTER_SECONDS, translate
from src.sandbox.server import Sandbox
from tests.conftest import FakeClock, StartGateway, make_settings

EXCHANGES = ["bybit", "binance", "kraken"]
KINDS = ["ticker", "orderbook", "ohlcv", "trades"]
NOW = 1_796_031_000.0


def kraken(text: str) -> dict[str, Any]:
    return {"body": orjson.dumps({"error": [text]}).decode()}


def bybit(code: int, text: str) -> dict[str, Any]:
    answer = {"retCode": code, "retMsg": text, "result": {}}
    return {"body": orjson.dumps(answer).decode()}


def binance(status: int, code: int, text: str) -> dict[str, Any]:
    return {"status": status, "body": orjson.dumps({"code": code, "msg": text}).decode()}


CLOUDFRONT = (
    '<!DOCTYPE HTML PUBLIC "-//W3C//DTD HTML 4.01 Transitional//EN" '
    '"http://www.w3.org/TR/html4/loose.dtd">\n<HTML><HEAD><META HTTP-EQUIV="Content-Type" '
    'CONTENT="text/html; charset=iso-8859-1">\n<TITLE>ERROR: The request could not be satisfied'
    "</TITLE>\n</HEAD><BODY>\n<H1>403 ERROR</H1>\n<H2>The request could not be satisfied.</H2>\n"
    '<HR noshade size="1px">\n%s\n'
)
BLOCKED = CLOUDFRONT % "Request blocked.\nWe can't connect to the server for this app or website."
COUNTRY = CLOUDFRONT % (
    "The Amazon CloudFront distribution is configured to block access from your country."
)
CLOUDFLARE = (
    '<!DOCTYPE html>\n<!--[if lt IE 7]> <html class="no-js ie6 oldie"> <![endif]-->\n<head>\n'
    "<title>api.kraken.com | 520: Web server is returning an unknown error</title>\n"
    + " " * 1400
    + '<span class="cf-code-label">Error code <span>%d</span></span>'
)

LIMITED = (503, "exchange_rate_limited")
BANNED = (503, "exchange_banned")
GEO = (451, "geo_blocked")
DOWN = (502, "exchange_unavailable")
LATE = (504, "exchange_timeout")
HALTED = (503, "market_halted")
UNKNOWN = (404, "unknown_symbol")
INVALID = (422, "request_rejected")
RESET = {"X-Bapi-Limit-Reset-Timestamp": f"{NOW * 1000 + 3000:.0f}"}
ELIGIBLE = "Service unavailable from a restricted location according to 'b. Eligibility'"
BAN = "Way too many requests; IP(1.2.3.4) banned until %d. Please use the websocket for updates"
# fmt: off
# Exchange, answer, status and code of the gateway, what it is about, seconds of its pause.
RULES: list[tuple[str, dict[str, Any], tuple[int, str], str, float]] = [
    ("kraken", kraken("EAPI:Rate limit exceeded"), LIMITED, "exchange", 15),
    ("kraken", kraken("EGeneral:Too many requests"), LIMITED, "market", 5),
    ("kraken", kraken(f"EService: Throttled: {NOW + 42:.0f}"), LIMITED, "exchange", 42),
    ("kraken", kraken(f"EService:Throttled: {NOW + 42:.0f}"), LIMITED, "exchange", 42),
    ("kraken", kraken("EService: Throttled: 1700000000"), LIMITED, "exchange", 60),
    ("kraken", kraken("EGeneral:Temporary lockout"), BANNED, "exchange", 900),
    ("kraken", kraken("EService:Unavailable"), DOWN, "exchange", 0),
    ("kraken", kraken("EService:Busy"), DOWN, "exchange", 0),
    ("kraken", kraken("EService:Timeout"), LATE, "exchange", 0),
    ("kraken", kraken("EService:Market in cancel_only mode"), HALTED, "market", 60),
    ("kraken", kraken("EService:Market in post_only mode"), HALTED, "market", 60),
    ("kraken", kraken("EQuery:Unknown asset pair"), UNKNOWN, "market", 10),
    ("kraken", kraken("EGeneral:Invalid arguments"), INVALID, "call", 10),
    ("kraken", {"status": 520, "body": CLOUDFLARE % 520}, DOWN, "exchange", 0),
    ("kraken", {"status": 530, "body": CLOUDFLARE % 1033}, DOWN, "exchange", 0),
    ("kraken", {"status": 429, "body": "error code: 1015"}, LIMITED, "exchange", 60),
    ("kraken", {"status": 403, "body": CLOUDFLARE % 1020}, LIMITED, "exchange", 300),
    ("kraken", {"status": 403, "body": "Error 1009"}, GEO, "exchange", 900),
    ("bybit", bybit(10006, "Too many visits!"), LIMITED, "endpoint", 5),
    ("bybit", bybit(10006, "Too many visits!") | {"headers": RESET}, LIMITED, "endpoint", 3),
    ("bybit", bybit(10018, "exceed ip rate limit"), LIMITED, "exchange", 600),
    ("bybit", bybit(10018, "access too frequent") | {"status": 403}, LIMITED, "exchange", 600),
    ("bybit", bybit(10000, "Server Timeout"), LATE, "exchange", 0),
    ("bybit", bybit(10016, "System error. Please try again later."), DOWN, "exchange", 0),
    ("bybit", bybit(10001, "Not supported symbols"), UNKNOWN, "market", 10),
    ("bybit", bybit(10001, "params error: Symbol Invalid"), UNKNOWN, "market", 10),
    ("bybit", bybit(10001, "params error: Category is invalid"), INVALID, "call", 10),
    ("bybit", {"status": 403, "body": BLOCKED}, LIMITED, "exchange", 600),
    ("bybit", {"status": 403, "body": COUNTRY}, GEO, "exchange", 900),
    ("binance", {"status": 403, "body": BLOCKED}, LIMITED, "exchange", 300),
    ("binance", {"status": 451, "body": "{}"}, GEO, "exchange", 900),
    ("binance", binance(403, 0, ELIGIBLE), GEO, "exchange", 900),
    ("binance", binance(429, -1003, "Too much request weight used"), LIMITED, "exchange", 60),
    ("binance", binance(429, -1003, f"until {NOW * 1000 + 7000:.0f}."), LIMITED, "exchange", 7),
    ("binance", binance(418, -1003, BAN % (NOW * 1000 + 600_000)), BANNED, "exchange", 600),
    ("binance", binance(418, -1003, BAN % 1_700_000_600_000), BANNED, "exchange", 120),
    ("binance", binance(418, -1003, BAN % 9_999_999_999_999), BANNED, "exchange", 120),
    ("binance", binance(400, -1121, "Invalid symbol."), UNKNOWN, "market", 10),
    ("binance", binance(400, -1122, "Invalid symbol status."), HALTED, "market", 60),
    ("binance", binance(400, -1120, "Invalid interval."), INVALID, "call", 10),
    ("binance", binance(408, -1007, "Timeout waiting for response."), LATE, "exchange", 0),
    ("binance", binance(503, -1008, "Server is currently overloaded"), DOWN, "exchange", 0),
    ("binance", binance(500, -1001, "Internal error; unable to process."), DOWN, "exchange", 0),
]
# fmt: on
IDS = [f"{rule[0]}-{rule[2][1]}-{number}" for number, rule in enumerate(RULES)]


class TestClock(FakeClock):
    """A clock that starts at `NOW`, to which the times in the texts refer."""

    __test__ = False

    def __init__(self) -> None:
        super().__init__()
        self._utc = NOW


@pytest.fixture
def clock() -> FakeClock:
    return TestClock()


@pytest.mark.parametrize(("name", "knobs", "problem", "scope", "seconds"), RULES, ids=IDS)
async def test_error_answer_has_its_meaning_scope_and_pause(
    start: StartGateway,
    sandbox: Sandbox,
    clock: FakeClock,
    name: str,
    knobs: dict[str, Any],
    problem: tuple[int, str],
    scope: str,
    seconds: float,
) -> None:
    """Each answer has its code and pause, and stops only what it is about."""
    live = await start()

    async def ask(kind: str, symbol: str = "DOT/USDT") -> tuple[int, str, float | None]:
        answer = await live.get(f"/{kind}/{symbol}?exchange={name}")
        document = answer.json()
        return answer.status_code, document.get("code", ""), document.get("retry_after")

    await sandbox.set(name, rate_limit=-1, **knobs)
    status, code, retry_after = await ask("ohlcv")
    assert (status, code) == problem
    if problem[0] in {404, 422}:
        assert retry_after is None
    else:
        assert retry_after == (seconds or 1)
    await sandbox.set(name, rate_limit=-1)
    sandbox.clear_counts()
    is_held = scope == "exchange" and seconds > 0
    breaker = live.gateway.manager[name].breaker
    assert (breaker.state == "open") == is_held
    assert ((await ask("ohlcv"))[0] == 200) == (seconds == 0), "the same market and endpoint"
    assert ((await ask("ohlcv", "BTC/USDT"))[0] == 200) == (scope != "endpoint" and not is_held)
    assert ((await ask("ticker"))[0] == 200) == (not is_held)
    if is_held:
        assert sandbox.count(name) == 0
    clock.advance(seconds)
    assert (await ask("ohlcv"))[0] == 200


async def test_second_trip_carries_the_wait_that_is_enforced(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """The error of a failed probe has the doubled open time, and a retry after it is admitted."""
    live = await start(cb_threshold=1, cb_reset_seconds=60, cb_max_open_seconds=120)
    await sandbox.set("kraken", status=429, headers={"Retry-After": "30"})
    for expected in (60, 120, 120):
        for after in (0, 1):
            problem = (await live.get("/ticker/BTC/USDT?exchange=kraken")).json()
            assert problem["retry_after"] == expected - after
            clock.advance(1)
        clock.advance(expected - 2)
    await sandbox.set("kraken", rate_limit=-1)
    assert (await live.get("/ticker/BTC/USDT?exchange=kraken")).status_code == 200


@pytest.mark.parametrize("knobs", [{"status": 500}, {"reset": True}], ids=str)
async def test_failure_that_opens_the_breaker_carries_its_wait(
    start: StartGateway, sandbox: Sandbox, knobs: dict[str, Any]
) -> None:
    """A failure that opens the breaker promises no earlier retry than the next answer."""
    live = await start(cb_threshold=2, cb_reset_seconds=60)
    await sandbox.set("bybit", **knobs)
    waits = [
        (await live.get("/ticker/BTC/USDT?exchange=bybit")).json()["retry_after"] for _ in range(3)
    ]
    assert waits == [1, 60, 60]


# What one market's requests get, whatever kind of data is requested.
MARKET_TROUBLES: dict[str, dict[str, dict[str, Any]]] = {
    "any": {
        "foreign": {"body": '{"a":1}'},
        "cut": {"body": '{"error":[],"resu'},
        "empty": {"body": ""},
        "html": {"body": "<html>busy</html>"},
        "down": {"status": 500},
        "disconnected": {"reset": True},
    },
    "bybit": {
        "unknown": bybit(10001, "Not supported symbols"),
        "late": bybit(10000, "Server Timeout"),
        "invalid": bybit(10001, "params error"),
        "busy": bybit(10016, "System error."),
    },
    "binance": {
        "unknown": binance(400, -1121, "Invalid symbol."),
        "halted": binance(400, -1122, "Invalid symbol status."),
        "invalid": binance(400, -1100, "Illegal characters"),
        "late": binance(408, -1007, "Timeout"),
        "busy": binance(503, -1008, "overloaded"),
    },
    "kraken": {
        "unknown": kraken("EQuery:Unknown asset pair"),
        "limited": kraken("EGeneral:Too many requests"),
        "halted": kraken("EService:Market in cancel_only mode"),
        "late": kraken("EService:Timeout"),
        "busy": kraken("EService:Busy"),
        "invalid": kraken("EGeneral:Invalid arguments"),
    },
}
MARKET_CASES = [
    (name, trouble, knobs)
    for name in EXCHANGES
    for trouble, knobs in (MARKET_TROUBLES["any"] | MARKET_TROUBLES[name]).items()
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "trouble", "knobs"), MARKET_CASES)
async def test_trouble_with_one_market_leaves_the_others(
    start: StartGateway,
    sandbox: Sandbox,
    clock: FakeClock,
    name: str,
    trouble: str,
    knobs: dict[str, Any],
    kind: str,
) -> None:
    """After six failed requests for one market, every other market is answered at once."""
    live = await start()
    await sandbox.set(name, **({"rate_limit": -1} | knobs))
    for _ in range(6):
        assert (await live.get(f"/{kind}/DOT/USDT?exchange={name}")).status_code >= 400, trouble
        clock.advance(5)
    await sandbox.set(name, rate_limit=-1)
    assert (await live.get(f"/{kind}/BTC/USDT?exchange={name}")).status_code == 200
    assert live.gateway.manager[name].breaker.state == "closed"
    assert (await live.get(f"/{kind}/ETH/USDT?exchange={name}")).status_code == 200


async def test_bad_data_of_two_markets_opens_the_breaker(
    start: StartGateway, sandbox: Sandbox
) -> None:
    """Implausible data counts against the exchange from the second market on."""
    live = await start(cb_threshold=2)
    await sandbox.set("bybit", body='{"retCode":0,"result":{}}')
    breaker = live.gateway.manager["bybit"].breaker
    states = []
    for symbol in ("DOT", "BTC", "ETH"):
        await live.get(f"/ticker/{symbol}/USDT?exchange=bybit")
        states.append(breaker.state)
    assert (states, breaker.cause) == (["closed", "closed", "open"], "bad_data")


async def test_market_that_opened_the_breaker_pauses_alone(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """Once another market was answered, the market that failed waits for the open time."""
    live = await start(cb_threshold=2, cb_reset_seconds=60)
    await sandbox.set("bybit", status=500)
    for _ in range(2):
        await live.get("/ticker/DOT/USDT?exchange=bybit")
    await sandbox.set("bybit", rate_limit=-1)
    clock.advance(10)
    assert (await live.get("/ticker/BTC/USDT?exchange=bybit")).status_code == 200
    problem = (await live.get("/orderbook/DOT/USDT?exchange=bybit")).json()
    assert (problem["code"], problem["retry_after"]) == ("circuit_open", 50)
    assert (await live.get("/ticker/DOT/USDT")).json()["exchange"] == "binance"
    clock.advance(50)
    assert (await live.get("/orderbook/DOT/USDT?exchange=bybit")).status_code == 200


async def test_limit_of_several_pairs_pauses_the_exchange(
    start: StartGateway, sandbox: Sandbox, clock: FakeClock
) -> None:
    """One limited pair waits alone. When several are limited, the whole exchange waits."""
    live = await start()
    await sandbox.set("kraken", **kraken("EGeneral:Too many requests"))
    symbols = ["BTC", "ETH", "SOL", "XRP"][:MARKETS_FOR_EXCHANGE_SCOPE]
    breaker = live.gateway.manager["kraken"].breaker
    for symbol in symbols:
        assert breaker.state == "closed"
        await live.get(f"/ohlcv/{symbol}/USDT?exchange=kraken")
    assert (breaker.state, breaker.cause, breaker.retry_after) == ("open", "rate_limited", 5)
    await sandbox.set("kraken", rate_limit=-1)
    clock.advance(5)
    assert (await live.get("/ohlcv/BTC/USDT?exchange=kraken")).status_code == 200


async def test_paused_market_is_answered_by_another_exchange(
    start: StartGateway, sandbox: Sandbox
) -> None:
    """Without `exchange`, a market that is paused is requested from the next exchange."""
    live = await start(exchange_order="kraken,bybit")
    await sandbox.set("kraken", **kraken("EGeneral:Too many requests"))
    for _ in range(2):
        assert (await live.get("/ohlcv/BTC/USDT?limit=5")).json()["exchange"] == "bybit"
    assert sandbox.count("kraken", "OHLC") == 1
    await sandbox.set("kraken", rate_limit=-1)
    assert (await live.get("/ohlcv/ETH/USDT?limit=5")).json()["exchange"] == "kraken"


EMPTY = {
    "bybit": {
        "orderbook": '{"retCode":0,"result":{"s":"DOTUSDT","b":[],"a":[],"ts":1,"u":1},"time":1}',
        "ohlcv": '{"retCode":0,"result":{"category":"spot","symbol":"DOTUSDT","list":[]},"time":1}',
        "trades": '{"retCode":0,"retMsg":"OK","result":{"category":"spot","list":[]},"time":1}',
    },
    "binance": {
        "orderbook": '{"lastUpdateId":5,"bids":[],"asks":[]}',
        "ohlcv": "[]",
        "trades": "[]",
    },
    "kraken": {
        "orderbook": '{"error":[],"result":{"DOTUSDT":{"bids":[],"asks":[]}}}',
        "ohlcv": '{"error":[],"result":{"DOTUSDT":[],"last":1}}',
        "trades": '{"error":[],"result":{"DOTUSDT":[],"last":"1"}}',
    },
}
EMPTY_CASES = [(name, kind, body) for name in EXCHANGES for kind, body in EMPTY[name].items()]


@pytest.mark.parametrize(("name", "kind", "body"), EMPTY_CASES)
async def test_empty_answer_about_the_market_is_data(
    start: StartGateway, sandbox: Sandbox, name: str, kind: str, body: str
) -> None:
    """A halted market has an empty order book and no candles or trades: 200, and no failure."""
    live = await start(cb_threshold=1)
    await sandbox.set(name, body=body)
    answer = await live.get(f"/{kind}/DOT/USDT?exchange={name}")
    assert answer.status_code == 200, answer.text
    names = {"orderbook": ("bids", "asks"), "ohlcv": ("candles",), "trades": ("trades",)}[kind]
    assert [answer.json()[member] for member in names] == [[]] * len(names)


@pytest.mark.parametrize(("name", "kind", "body"), EMPTY_CASES)
async def test_empty_answer_about_another_market_is_bad_data(
    start: StartGateway, sandbox: Sandbox, name: str, kind: str, body: str
) -> None:
    """An answer without rows that may be about anything else is not served as an empty market."""
    live = await start()
    foreign = body.replace("DOTUSDT", "ETHUSDT").replace('"list":[]', '"l":[]')
    foreign = foreign.replace('"lastUpdateId":5,', "").replace("[]", "{}")
    await sandbox.set(name, body=foreign)
    answer = await live.get(f"/{kind}/DOT/USDT?exchange={name}")
    assert (answer.status_code, answer.json()["code"]) == (502, "bad_upstream_data"), answer.text


async def test_locked_order_book_is_served(start: StartGateway, sandbox: Sandbox) -> None:
    """In an auction the best bid equals the best ask."""
    live = await start()
    await sandbox.set(
        "binance", body='{"lastUpdateId":5,"bids":[["6.0","2"]],"asks":[["6.0","3"]]}'
    )
    book = (await live.get("/orderbook/DOT/USDT?exchange=binance")).json()
    assert (book["bids"], book["asks"]) == ([[6.0, 2.0]], [[6.0, 3.0]])


def test_ccxt_error_without_an_answer_keeps_its_class() -> None:
    """A rule needs an answer. An error that ccxt raises by itself is translated by its class."""
    for name in EXCHANGES:
        error = translate(name, ccxt.BadSymbol("x"), Answer())
        assert type(error) is UnknownSymbol


@pytest.mark.parametrize("text", ["1", "0", "99999999999999999999", "-5", "later", ""])
def test_impossible_time_is_ignored(text: str) -> None:
    """A time in the past or beyond the longest ban is no promise."""
    answer = Answer(body_start=f'{{"error":["eservice: throttled: {text}"]}}'.encode())
    error = translate("kraken", ccxt.ExchangeError("x"), answer, NOW)
    assert (type(error), error.retry_after) == (ExchangeRateLimited, 60)
    assert (error.retry_after or 0) < MAX_RETRY_AFTER_SECONDS


def test_pauses_are_bounded(clock: FakeClock) -> None:
    """The number of remembered markets has a bound, and pauses end."""
    pauses = Pauses(clock, make_settings())
    error = BadUpstreamData("a crossed book", exchange="bybit")
    for number in range(MAX_PAUSES + 10):
        target = Target("bybit", "ticker", f"S{number}/USDT")
        pauses.add(target, error, 1 + number)
        pauses.is_widespread(target, error)
    assert pauses.find(Target("bybit", "ticker", "S0/USDT")) is None
    assert len(pauses._pauses) == MAX_PAUSES
    assert sum(map(len, pauses._troubled.values())) <= MARKETS_FOR_EXCHANGE_SCOPE
    clock.advance(MAX_PAUSES + 20)
    assert pauses.find(target) is None


def test_trouble_of_markets_counts_together_only_within_the_window(clock: FakeClock) -> None:
    """Two markets with bad data concern the exchange, unless one recovered or it is long ago."""
    pauses = Pauses(clock, make_settings())
    error = BadUpstreamData("a crossed book", exchange="bybit")
    first, second = (Target("bybit", "ohlcv", symbol) for symbol in ("DOT/USDT", "BTC/USDT"))
    assert not pauses.is_widespread(first, error)
    assert not pauses.is_widespread(first, error)
    clock.advance(60)
    assert not pauses.is_widespread(second, error)
    assert pauses.is_widespread(first, error)
    pauses.succeeded(first._replace(operation="ticker"))
    assert pauses.is_widespread(second, error)
    pauses.succeeded(first)
    assert not pauses.is_widespread(second, error)


# What the sandbox's knob `error` stands for, by exchange where the exchanges differ.
FAILURES: dict[str, dict[str, tuple[str, str]]] = {
    "rate_limit": dict.fromkeys(EXCHANGES, ("exchange_rate_limited", "exchange"))
    | {"bybit": ("exchange_rate_limited", "endpoint")},
    "banned": {
        "bybit": ("exchange_rate_limited", "exchange"),
        "binance": ("exchange_banned", "exchange"),
        "kraken": ("exchange_banned", "exchange"),
    },
    "firewall": {
        "bybit": ("exchange_rate_limited", "exchange"),
        "binance": ("exchange_rate_limited", "exchange"),
        "kraken": ("exchange_unavailable", "call"),
    },
    "busy": dict.fromkeys(EXCHANGES, ("exchange_unavailable", "call")),
    "unavailable": dict.fromkeys(EXCHANGES, ("exchange_unavailable", "call")),
    "timeout": dict.fromkeys(EXCHANGES, ("exchange_timeout", "call")),
    "no_symbol": dict.fromkeys(EXCHANGES, ("unknown_symbol", "market")),
    "pair_limit": {"kraken": ("exchange_rate_limited", "market")},
    "throttled": {"kraken": ("exchange_rate_limited", "exchange")},
}
FAILURE_CASES = [
    (name, failure, *expected)
    for failure, by_exchange in FAILURES.items()
    for name, expected in by_exchange.items()
]


@pytest.mark.parametrize(("name", "failure", "code", "scope"), FAILURE_CASES)
async def test_failure_of_one_pair_stops_what_it_is_about(
    start: StartGateway, sandbox: Sandbox, name: str, failure: str, code: str, scope: str
) -> None:
    """While requests for one pair fail, every other pair is answered, unless all are refused."""
    live = await start()
    await sandbox.set(name, rate_limit=-1, error=failure, pair="DOTUSDT")
    codes = []
    for _ in range(6):
        problem = (await live.get(f"/trades/DOT/USDT?exchange={name}")).json()
        codes.append(problem["code"])
    assert codes[0] == code
    other = await live.get(f"/trades/BTC/USDT?exchange={name}")
    assert (other.status_code == 200) == (scope in {"call", "market"})
    assert (await live.get(f"/ticker/BTC/USDT?exchange={name}")).is_success == (scope != "exchange")
    assert live.gateway.manager[name].breaker.state == ("open" if scope == "exchange" else "closed")
