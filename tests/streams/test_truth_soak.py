"""The gateway under random trouble: every number it serves is one that the market had.

20 s in `make test`, 15 minutes in `make test-all`, an hour in `make truth-soak`. The seed is
printed; VIRTUOSO_SOAK_SEED repeats a run. Gateway, exchanges and clients share one event loop and
one clock, which stands still while the loop is late: on a busy machine nothing looks too old.
"""

import asyncio
import json
import logging
import os
import random
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect

from src.sandbox.server import Sandbox
from tests.conftest import FakeClock, Live, eventually, make_settings, serve
from tests.streams.oracle import Oracle

SHORT_SECONDS = 20.0
LONG_SECONDS = float(os.environ.get("TRUTH_SOAK_SECONDS", "900"))
NAMES = ("bybit", "binance", "kraken")
SPOT = ("BTC/USDT", "ETH/USDT")
SWAP = "BTC/USDT:USDT"
VICTIM = "DOGE/USDT"
VICTIM_IDS = {"bybit": "DOGEUSDT", "binance": "DOGEUSDT", "kraken": "XDGUSDT"}
CHANNELS = {"ticker": "ticker", "book": "orderbook", "trades": "trades", "ohlcv": "ohlcv"}
STEADY: dict[str, Any] = {"push_ms": 250, "rate_limit": -1}
VICTIM_ODDITIES = (
    "locked_book",
    "crossed_book",
    "empty_book",
    "one_sided_book",
    "empty_candles",
    "duplicate_candle",
    "odd_trades",
    "lost_delta",
)
ASKERS = 12
CHANGE_SECONDS = (1.0, 4.0)
TICK_SECONDS = 0.02
MAX_PROBLEMS = 20
LAST_CHANGES = 30

# Trouble of a whole exchange.
TROUBLE: tuple[dict[str, Any], ...] = (
    {"latency_ms": 300},
    {"hang": True},
    {"refuse": True},
    {"reset": True},
    {"status": 503},
    {"body": "{"},
    {"freeze": True},
    {"drop": "cut"},
    {"drop": "close"},
    {"error": "rate_limit"},
    {"error": "throttled"},
    {"error": "busy"},
    {"error": "unavailable"},
    {"error": "timeout"},
    {"error": "firewall"},
    {"odd": ["duplicates"]},
    {"odd": ["late"]},
    {"odd": ["lost_delta"]},
    {"odd": ["odd_trades"]},
    {"odd": ["duplicates", "late", "odd_trades"]},
)


def victim_trouble(name: str) -> tuple[dict[str, Any], ...]:
    """Return trouble of one market, which must not affect the others."""
    victim = VICTIM_IDS[name]
    return (
        {"error": "pair_limit" if name == "kraken" else "no_symbol", "pair": victim},
        {"error": "no_symbol", "pair": victim},
        {"delisted": [victim]},
        {"halted": [victim]},
        {"still": [victim]},
        *({"odd": [word], "pair": victim} for word in VICTIM_ODDITIES),
    )


@dataclass
class Report:
    """What the oracle found."""

    problems: list[str] = field(default_factory=list)
    checked: Counter[str] = field(default_factory=Counter)
    changes: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_CHANGES))
    """The last changes of knobs."""

    def __str__(self) -> str:
        lines = [f"{len(self.problems)} problems:", *self.problems[:MAX_PROBLEMS]]
        return "\n".join([*lines, "after these changes of knobs:", *self.changes])

    def add(self, what: str, problems: list[str], at: float) -> None:
        source, *_, kind, _exchange, _symbol = what.split()
        self.checked[f"{source} {kind}"] += 1
        self.problems += [f"{at:.2f} {what}: {problem}" for problem in problems]


@dataclass
class Soak:
    """One run: a gateway, simulated exchanges, and one exchange with trouble of one market only."""

    live: Live
    sandbox: Sandbox
    clock: FakeClock
    chance: random.Random
    protected: str
    report: Report = field(default_factory=Report)
    newest: dict[str, float] = field(default_factory=dict)
    """By stream: the exchange's time of the newest value."""
    trades: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """By stream: the ids of all pushed trades. A late trade may follow newer ones."""

    def __post_init__(self) -> None:
        listeners = self.sandbox.listeners
        self.oracles = {name: Oracle(listeners[name].exchange) for name in NAMES}

    async def pass_time(self) -> None:
        """Advance the clock, never faster than the event loop works."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self.clock.advance(TICK_SECONDS)

    def add(self, what: str, problems: list[str]) -> None:
        self.report.add(what, problems, self.clock.time())

    async def trouble(self) -> None:
        """Change the knobs of a random exchange every few seconds."""
        while True:
            name = self.chance.choice(NAMES)
            kinds = victim_trouble(name)
            if name != self.protected and self.chance.random() < 0.7:
                kinds = TROUBLE
            await self.change(name, self.chance.choice(kinds))
            await asyncio.sleep(self.chance.uniform(*CHANGE_SECONDS))
            if self.chance.random() < 0.5:
                await self.change(name, {})

    async def change(self, name: str, knobs: dict[str, Any]) -> None:
        await self.sandbox.set(name, **(STEADY | knobs))
        self.report.changes.append(f"{self.clock.time():.2f} {name} {knobs}")

    async def ask(self) -> None:
        """Ask all REST endpoints in random order, and check the answers."""
        while True:
            name = self.chance.choice(NAMES)
            symbols = (*SPOT, VICTIM) if name == "kraken" else (*SPOT, SWAP, VICTIM)
            symbol = self.chance.choice(symbols)
            kind, path = self.chance.choice(PATHS)
            past = int(self.clock.time() - 7_200) // 60 * 60_000
            response = await self.live.get(path.format(symbol.replace("/", "-"), name, past))
            what = f"REST {kind} {name} {symbol}"
            self.check_answer(what, kind, response, self.clock.time())
            await asyncio.sleep(0.1)

    def check_answer(self, what: str, kind: str, response: httpx.Response, received: float) -> None:
        body = response.json()
        if response.status_code == 500:
            self.add(what, [f"internal error: {body}"])
        is_affected = VICTIM in what or self.protected not in what
        if not is_affected and response.status_code != 200:
            self.add(what, [f"{response.status_code} because of another market: {body}"])
        if response.status_code != 200:
            return
        is_past = "since" in response.url.params
        values = list(body["tickers"].values()) if "tickers" in body else [body]
        for value in values:
            self.check(what, kind, value, received, is_past=is_past)

    def check(
        self, what: str, kind: str, value: dict[str, Any], received: float, *, is_past: bool = False
    ) -> None:
        if value["symbol"] == VICTIM:
            return
        oracle = self.oracles[value["exchange"]]
        self.add(what, oracle.problems(kind, value, received, is_past=is_past))

    async def listen(self) -> None:
        """Subscribe to everything on `/ws`, and check all pushed values."""
        url = self.live.url.replace("http", "ws") + "/ws"
        async with connect(url, compression=None, close_timeout=0.1) as connection:
            for channel in CHANNELS:
                for name in NAMES:
                    symbols: tuple[str, ...] = (*SPOT, VICTIM)
                    if channel == "book":  # an exchange pushes ten books per second
                        symbols = SPOT[:1]
                    if name != "kraken":
                        symbols = (*symbols, SWAP)
                    command: dict[str, Any] = {"op": "subscribe", "channel": channel}
                    command |= {"symbols": symbols, "exchange": name}
                    if channel == "book":
                        command["levels"] = 5
                    await connection.send(json.dumps(command))
            async for text in connection:
                message = json.loads(text)
                if message["type"] in {"snapshot", "update"}:
                    kind = CHANNELS[message["channel"]]
                    what = f"/ws {message['type']} {kind} {message['exchange']} {message['symbol']}"
                    self.check(what, kind, message["data"], self.clock.time())
                    self.check_order(what, message)

    def check_order(self, what: str, message: dict[str, Any]) -> None:
        """Check that no trade is repeated, and that no value is older than the one before."""
        data = message["data"]
        stream = f"{message['channel']} {message['exchange']} {message['symbol']}"
        is_update = message["type"] == "update"
        if message["channel"] == "trades":
            trades = {trade["id"] for trade in data["trades"]}
            if is_update and trades & self.trades[stream]:
                self.add(what, [f"repeats {trades & self.trades[stream]}"])
            self.trades[stream] |= trades
            return
        newest = self.newest.get(stream, 0)
        current = data.get("timestamp") or newest
        if is_update and current < newest:
            self.add(what, [f"{current} comes after {newest}"])
        self.newest[stream] = max(newest, current)


PATHS = (
    ("ticker", "/ticker/{}?exchange={}"),
    ("ticker", "/ticker/{}?exchange={}&max_age=0"),
    ("ticker", "/ticker/{}?max_age=5"),
    ("ticker", "/tickers?exchange={1}&symbols={0},BTC-USDT,ETH-USDT"),
    ("orderbook", "/orderbook/{}?exchange={}&limit=5"),
    ("trades", "/trades/{}?exchange={}&limit=20"),
    ("ohlcv", "/ohlcv/{}?exchange={}&timeframe=1m&limit=5"),
    ("ohlcv", "/ohlcv/{}?exchange={}&timeframe=5m&limit=3"),
    ("ohlcv", "/ohlcv/{}?exchange={}&timeframe=1m&since={}&limit=5"),
    ("ohlcv", "/ohlcv/{}?exchange={}&timeframe=1m&closed=true&limit=3"),
)


@contextmanager
def without_logs() -> Iterator[None]:
    """Do not keep log records: pytest stores all of them."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


async def soak(sandbox: Sandbox, clock: FakeClock, seconds: float) -> None:
    """Run all clients for some time, and fail if a served number was wrong."""
    seed = int(os.environ.get("VIRTUOSO_SOAK_SEED") or random.randrange(10**6))
    chance = random.Random(seed)
    protected = chance.choice(NAMES)
    settings = make_settings(
        sandbox,
        market_types="spot,swap",
        exchange_timeout_seconds=15,  # of the system's clock
        request_timeout=30,
        stream_idle_seconds=60,
        rate_limit_requests=0,
    )
    with ExitStack() as stack:
        stack.enter_context(without_logs())
        async with serve(settings, clock) as live:
            await eventually(lambda: len(live.gateway.markets.loaded_at) == len(NAMES))
            run = Soak(live, sandbox, clock, chance, protected)
            works = [
                run.pass_time(),
                run.trouble(),
                run.listen(),
                *(run.ask() for _ in range(ASKERS)),
            ]
            await run_for(seconds, [asyncio.create_task(work) for work in works], run.report)
    counts = ", ".join(f"{count} {source}" for source, count in sorted(run.report.checked.items()))
    print(f"seed {seed}, {protected} protected: checked {counts}")  # noqa: T201
    assert not run.report.problems, f"seed {seed}, {run.report}"


async def run_for(seconds: float, works: list[asyncio.Task[None]], report: Report) -> None:
    """Run tasks, until one fails or the oracle has found enough."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and len(report.problems) < MAX_PROBLEMS:
        done, _ = await asyncio.wait(works, timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
        if done:
            break
    for work in works:
        work.cancel()
    for work in works:
        with suppress(asyncio.CancelledError):
            await work


async def test_every_served_number_is_true_for_a_short_time(
    sandbox: Sandbox, clock: FakeClock
) -> None:
    """Prices, books, trades and candles are those of the market; one bad market harms no other."""
    await soak(sandbox, clock, SHORT_SECONDS)


@pytest.mark.full
@pytest.mark.timeout(LONG_SECONDS + 300)
async def test_every_served_number_is_true_for_a_long_time(
    sandbox: Sandbox, clock: FakeClock
) -> None:
    """The same as the short test, with more trouble."""
    await soak(sandbox, clock, LONG_SECONDS)
