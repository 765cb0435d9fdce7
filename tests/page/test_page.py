"""The page in a real browser, against simulated exchanges that push updates.

tests/web/test_dashboard.py covers the files and their data, test_page_code.py the code itself.
"""

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Literal

import pytest
from playwright.async_api import Browser, Locator, Page, Route, WebSocketRoute, expect

from src.core.clock import SystemClock
from src.sandbox.server import Sandbox
from src.streams.hub import StreamHub
from tests.conftest import Live, eventually, make_settings, serve
from tests.page.browser import ROOT, PageErrors, axe, browser, open_page

__all__ = ["browser"]  # a fixture, which pytest finds by its name

pytestmark = pytest.mark.full
DESK, PHONE = (1440, 900), (390, 844)
WIDTHS = (390, 1024, 1280, 1440, 1920)
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
EXCHANGES = ["bybit", "binance", "kraken"]
# Few symbols: each costs the sandbox and the gateway 25 messages per second.
DEFAULTS = ["SOL/USDT", "BTC/USDT", "ETH/USDT"]
VIEWS = ["/", "/#BTC-USDT", "/#gateway"]
SECONDS = 120.0  # timeout on a busy machine
MIN_TARGET = 24  # CSS pixels, required by WCAG 2.2
MIN_TOUCH_TARGET = 44  # CSS pixels, set by the style sheet for phones
REFUSED = r"status of 40[0-9]"  # the console reports an expected error response, too
LEFT = "ERR_ABORTED"  # requests in flight when the page is left
# Read every row of the price table: the text of its cells, and its marks.
READ = """() => {
 const groups = [...document.querySelectorAll("#market .prices tbody")];
 return Object.fromEntries(groups.map((body) => {
  const texts = ([...cells]) => cells.map((cell) => [cell.dataset.cell, cell.textContent]);
  const rows = [...body.querySelectorAll("tr[data-exchange]")].map((row) => [row.dataset.exchange, {
    ...Object.fromEntries(texts(row.querySelectorAll("td"))),
    stale: "stale" in row.dataset,
    best: [...row.querySelectorAll("[data-best]")].map((cell) => cell.dataset.cell),
    flag: row.querySelector(".flag").textContent,
  }]);
  return [body.querySelector("a").textContent, Object.fromEntries(rows)];
 }));
}"""
INK = """(canvas) => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return new Set(new Uint32Array(data.buffer)).size;
}"""
SHOW = """(isVisible) => {
  Object.defineProperty(document, "hidden", { configurable: true, get: () => !isVisible });
  document.dispatchEvent(new Event("visibilitychange"));
}"""
MOVING = """() => [...document.querySelectorAll("*")].filter((element) => {
  const { transitionDuration, animationName, scrollBehavior } = getComputedStyle(element);
  return transitionDuration !== "0s" || animationName !== "none" || scrollBehavior === "smooth";
}).map((element) => element.outerHTML.slice(0, 99))"""
FOCUSED = """() => {
  const element = document.activeElement;
  const box = element.getBoundingClientRect();
  const style = getComputedStyle(element);
  const top = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
  return {
    name: element.id || element.dataset.view || element.closest("[data-cell]")?.dataset.cell
      || element.textContent.trim(),
    kind: element.className || element.tagName.toLowerCase(),
    outlined: element.matches(":focus-visible") && style.outlineStyle !== "none"
      && parseFloat(style.outlineWidth) >= 2,
    errors: element === top || element.contains(top),
  };
}"""
# Multiply all prices and amounts that the page receives, to get longer numbers.
SCALE = """(() => {
  const [price, amount] = [%s, %s];
  const factors = { amount, baseVolume: amount, quoteVolume: amount };
  const prices = ["last", "bid", "ask", "open", "high", "low", "close", "price"];
  for (const name of prices) factors[name] = price;
  const pairs = (levels) => levels.map(([at, size]) => [at * price, size * amount]);
  const scaled = (value, key) => {
    if (typeof value === "number") return value * (factors[key] ?? 1);
    if (key === "bids" || key === "asks") return pairs(value);
    const candle = ([start, ...values]) => [start, ...values.map((item) => item * price)];
    if (key === "candles") return value.map(candle);
    if (Array.isArray(value)) return value.map((item) => scaled(item));
    if (value === null || typeof value !== "object") return value;
    const entries = Object.entries(value);
    return Object.fromEntries(entries.map(([name, member]) => [name, scaled(member, name)]));
  };
  const { parse } = JSON, { json } = Response.prototype;
  JSON.parse = (text) => scaled(parse(text));
  Response.prototype.json = async function () { return scaled(await json.call(this)); };
})()"""
# Find visible texts that are wider than their cell, or outside of their ancestors.
CUT_OFF = """() => [
  ...document.querySelectorAll("main :is(td, th, dt, dd, .gap)"),
].flatMap((cell) => {
  if (!cell.checkVisibility()) return [];
  const walker = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
  const range = document.createRange(), texts = [];
  while (walker.nextNode()) {
    if (walker.currentNode.parentElement.closest(".sr-only")) continue;
    range.selectNodeContents(walker.currentNode);
    texts.push(...range.getClientRects());
  }
  if (!texts.length) return [];
  let left = 0, right = document.documentElement.clientWidth;
  for (let place = cell; place.tagName !== "MAIN"; place = place.parentElement) {
    if (!place.getClientRects().length) continue; // display: contents
    const box = place.getBoundingClientRect();
    left = Math.max(left, box.left + place.clientLeft);
    right = Math.min(right, box.left + place.clientLeft + place.clientWidth);
  }
  const isInside = texts.every((text) => text.left >= left - 1 && text.right <= right + 1);
  if (isInside && cell.scrollWidth <= cell.clientWidth) return [];
  const place = cell.closest("table, .panel, section");
  const name = `${place.ariaLabel ?? place.className} ${cell.dataset.cell ?? cell.tagName}`;
  return [`${name}: ${cell.innerText}`];
})"""
# Count the colours at the right edge of the chart. A number that is cut off has many colours.
EDGE = """() => {
  const canvas = document.querySelector("#candles");
  if (canvas.width !== Math.round(canvas.clientWidth * devicePixelRatio)) return 0;
  const { data } = canvas.getContext("2d").getImageData(canvas.width - 1, 0, 1, canvas.height);
  return new Set(new Uint32Array(data.buffer)).size;
}"""
# Read the text beside the chart and the chart's label at once: both change with every price.
READING = (
    """(line) => [line.innerText, document.querySelector("#candles").getAttribute("aria-label")]"""
)
# Return true if the label of the cursor's price reaches the right edge of the chart.
CURSOR_LABEL = """(canvas) => {
  const { data } = canvas.getContext("2d").getImageData(canvas.width - 1, 0, 1, canvas.height);
  const wanted = getComputedStyle(document.body).color.match(/\\d+/g).map(Number).join();
  const rows = [...new Array(canvas.height).keys()];
  return rows.some((y) => data.slice(4 * y, 4 * y + 3).join() === wanted);
}"""
EDGE_COLOURS = 4  # background, label of the newest price, and both edges of the label
Row = dict[str, Any]
Prices = dict[str, dict[str, Row]]  # by symbol and exchange


@asynccontextmanager
async def gateway(
    sandbox: Sandbox, port: int = 0, *, load_markets: bool = False, **settings: object
) -> AsyncIterator[Live]:
    """Run a gateway in real time with all market lists. By default the page shows DEFAULTS."""
    known = make_settings(sandbox, **({"dashboard_symbols": ",".join(DEFAULTS)} | settings))
    async with serve(known, SystemClock(), port=port, load_markets=load_markets) as live:
        await eventually(
            lambda: len(live.gateway.markets.loaded_at) == len(live.gateway.manager.names)
        )
        try:
            yield live
        finally:
            for client in getattr(live.server.lifespan.state["streams"], "connections", ()):
                if client.transport == "sse":
                    # As a signal does: otherwise the server waits for the event streams.
                    client.close_for_shutdown()


@pytest.fixture
def port() -> Iterator[int]:
    """Reserve a port for several gateways that run one after the other."""
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


async def until(condition: Callable[[], Awaitable[object]]) -> None:
    """Wait until the condition is true."""
    async with asyncio.timeout(SECONDS):
        while not await condition():  # noqa: ASYNC110 - the browser is another process
            await asyncio.sleep(0.05)


async def blank(
    browser: Browser, width: int = DESK[0], height: int = DESK[1]
) -> tuple[Page, PageErrors]:
    """Open an empty page, to prepare it before it opens the gateway."""
    return await open_page(browser, "about:blank", width, height)


async def is_live(page: Page, words: str = "Live") -> None:
    """Wait until the page shows that prices are live."""
    await expect(page.locator("body")).to_have_attribute("data-state", "live")
    await expect(page.locator("#connection")).to_have_text(words)


async def read(page: Page) -> Prices:
    found: Prices = await page.evaluate(READ)
    return found


def number(text: str) -> float:
    """Parse a number as the page formats numbers."""
    found = re.search(r"[+-]?[\d,]*\.?\d+", text)
    assert found, text
    return float(found[0].replace(",", ""))


def lasts(prices: Prices) -> dict[tuple[str, str], float]:
    """Return the last prices by symbol and exchange."""
    flat = {
        (symbol, exchange): row for symbol, rows in prices.items() for exchange, row in rows.items()
    }
    return {place: number(row["last"]) for place, row in flat.items() if row["last"]}


async def has_moved(page: Page, *symbols: str) -> None:
    """Wait until the page shows prices of these symbols, and then until all of them changed."""

    async def has_prices() -> bool:
        return {symbol for symbol, _ in lasts(await read(page))} >= set(symbols)

    await until(has_prices)
    before = lasts(await read(page))

    async def has_changed() -> bool:
        now = lasts(await read(page))
        return all(
            now.get(place, last) != last for place, last in before.items() if place[0] in symbols
        )

    await until(has_changed)


def row(page: Page, symbol: str, exchange: str) -> Locator:
    """Return the row of one exchange in the group of a symbol."""
    group = page.locator(
        "#market tbody", has=page.locator(f'a[href="#{symbol.replace("/", "-")}"]')
    )
    return group.locator(f"tr[data-exchange={exchange}]")


def cell(page: Page, symbol: str, exchange: str, name: str) -> Locator:
    return row(page, symbol, exchange).locator(f"[data-cell={name}]")


def streams(live: Live) -> StreamHub:
    """Return the gateway's stream hub: its subscribers are not visible from outside."""
    found = live.server.lifespan.state["streams"]
    assert isinstance(found, StreamHub)
    return found


async def block_sockets(page: Page) -> None:
    """Close every WebSocket immediately, like a proxy without support for WebSockets."""

    async def close(route: WebSocketRoute) -> None:
        await route.close(code=1011, reason="blocked")

    await page.route_web_socket(re.compile("/ws"), close)


# Prices.


async def test_first_document_is_shown_before_any_update(browser: Browser, lively: Sandbox) -> None:
    """The page shows the prices of the first document while the WebSocket is silent."""
    async with gateway(lively, ticker_ttl_seconds=60) as live:

        async def is_complete() -> bool:
            """Return true if all prices are cached: the document leaves out slow exchanges."""
            tickers = (await live.get("/api/dashboard/data")).json()["market"]["tickers"]
            return all(len(tickers.get(symbol, ())) == len(EXCHANGES) for symbol in DEFAULTS)

        await until(is_complete)
        page, errors = await blank(browser)
        await page.route_web_socket(re.compile("/ws"), lambda _: None)  # opens and stays silent
        async with page.expect_response("**/api/dashboard/data") as response:
            await page.goto(live.url)
        document = await (await response.value).json()
        await expect(
            page.locator("[data-cell=last] > span:first-of-type", has_text=re.compile(r"\d"))
        ).to_have_count(len(DEFAULTS) * len(EXCHANGES))
        shown = lasts(await read(page))
        tickers = document["market"]["tickers"]
        assert shown == {
            (symbol, name): tickers[symbol][name]["last"]
            for symbol in DEFAULTS
            for name in EXCHANGES
        }
        assert list(await read(page)) == DEFAULTS
        await expect(page.locator("body")).to_have_attribute("data-state", "connecting")
        await expect(page.locator("#health")).to_have_attribute("data-state", "healthy")
        errors.assert_none()


async def test_prices_update_and_exchanges_are_compared(browser: Browser, lively: Sandbox) -> None:
    """Updates appear without a reload. Best bid, best ask and outliers are marked.

    Nothing is animated with reduced motion, and all requests go to the gateway.
    """
    symbols = [*DEFAULTS, "PEPE/USDT"]
    async with gateway(lively, dashboard_symbols=",".join(symbols)) as live:
        page, errors = await blank(browser)
        await page.emulate_media(reduced_motion="reduce")
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        await page.goto(live.url)
        await is_live(page)
        assert await page.evaluate(MOVING) == []
        await page.evaluate("window.isSame = true")
        await has_moved(page, "BTC/USDT")
        await has_moved(page, "BTC/USDT")  # the first change may be the snapshot of the stream
        await expect(cell(page, "BTC/USDT", "kraken", "last").locator("i")).to_have_text(
            re.compile("[▲▼]")
        )
        assert await page.evaluate("window.isSame")

        async def is_compared() -> bool:
            """Return true if bybit has the best bid and kraken the best ask, as in the sandbox."""
            prices = await read(page)
            found = [
                {name: (row["best"], row["stale"], row["flag"]) for name, row in rows.items()}
                for rows in map(prices.__getitem__, DEFAULTS)
            ]
            best = {
                "bybit": (["bid"], False, ""),
                "binance": ([], False, ""),
                "kraken": (["ask"], False, ""),
            }
            return found == [best] * len(DEFAULTS)

        await until(is_compared)
        for name, others in {"bid": "kraken", "ask": "bybit"}.items():
            marked = page.locator(f"#market [data-cell={name}][data-best]")
            await expect(marked.first).to_have_text(re.compile(", best$"))  # for screen readers
            await expect(
                row(page, "BTC/USDT", others).locator(f"[data-cell={name}]")
            ).not_to_contain_text("best")
        pepe = (await read(page))["PEPE/USDT"]
        assert pepe.keys() == {"bybit", "binance"}  # not listed on kraken
        for figures in pepe.values():
            for name in ("last", "bid", "ask"):
                assert re.fullmatch(r"[▲▼]?0\.0000\d{4,}(, best)?", figures[name]), figures

        await lively.set("kraken", rate_limit=-1, price=1.05)
        flag = row(page, "BTC/USDT", "kraken").locator(".flag")
        await expect(flag).to_have_text(re.compile(r"^\+(4\.9|5\.0)\d % off$"))
        await expect(flag).to_be_visible()
        assert [rows["bybit"]["flag"] for rows in (await read(page)).values()] == [""] * len(
            symbols
        )
        assert not [url for url in requests if not re.match(f"(http|ws){live.url[4:]}/", url)]
        errors.assert_none()


async def test_silent_and_unreachable_exchange_is_shown_until_it_recovers(
    browser: Browser, lively: Sandbox
) -> None:
    """A silent feed is marked while REST replaces it. The price is stale when REST fails, too.

    The gateway view shows the cause and the recovery. Other exchanges keep updating.
    """
    knobs: dict[str, Any] = {"ticker_ttl_seconds": 4, "cb_threshold": 2, "cb_reset_seconds": 2}
    async with gateway(lively, dashboard_symbols="BTC/USDT", **knobs) as live:
        page, errors = await open_page(browser, live.url, *DESK)
        await is_live(page)
        await expect(page.locator("#health")).to_have_text("Healthy")
        age = cell(page, "BTC/USDT", "bybit", "age")
        await expect(age).to_have_text(re.compile(r"^(now|\d s)$"))
        for _ in range(4):
            await has_moved(page, "BTC/USDT")  # the gateway learns the usual interval
        await lively.set("bybit", rate_limit=-1, freeze=True)
        await expect(age).to_have_text(re.compile(r"^stale feed, REST (now|\d s)$"))
        await expect(row(page, "BTC/USDT", "bybit")).not_to_have_attribute("data-stale", "")

        await lively.set("bybit", rate_limit=-1, freeze=True, refuse=True)
        await expect(age).to_have_text(re.compile(r"^stale, \d+ s$"))
        await expect(row(page, "BTC/USDT", "bybit")).to_have_attribute("data-stale", "")
        await expect(row(page, "BTC/USDT", "bybit")).to_have_attribute("data-fade", "3")

        async def others_continue() -> bool:
            rows = (await read(page))["BTC/USDT"]
            marks = {name: (row["stale"], row["best"]) for name, row in rows.items()}
            return marks == {
                "bybit": (True, []),
                "binance": (False, ["bid"]),
                "kraken": (False, ["ask"]),
            }

        await until(others_continue)
        health = page.locator("#health")
        await expect(health).to_have_text("Degraded: bybit circuit open")
        await expect(health).to_have_attribute("data-state", "degraded")

        await health.click()
        card = page.locator(".card[data-exchange=bybit]")
        await expect(card).to_have_attribute("data-state", "open")
        await expect(card.locator(".cause")).to_have_text(
            re.compile(r"^no connection; next try in \d+ s$")
        )
        action = page.locator(".actions li", has_text="bybit fails: no connection.")
        await expect(action.locator("code")).to_have_text("docs/runbook.md#virtuosocircuitopen")
        await expect(page.locator(".card[data-exchange=kraken]")).to_have_attribute(
            "data-state", "closed"
        )
        calls = page.locator("#gateway tr", has_text="calls to bybit")
        await expect(calls).to_contain_text("unavailable")

        await lively.set("bybit", rate_limit=-1)
        await expect(card).to_have_attribute("data-state", re.compile("half_open|closed"))
        await live.get(
            "/ticker/BTC-USDT?exchange=bybit&max_age=0"
        )  # a half-open breaker waits for a request
        await expect(card).to_have_attribute("data-state", "closed")
        await expect(card.locator(".cause")).to_be_empty()
        await expect(card).to_contain_text(re.compile(r"stream, \d watched"))
        await expect(page.locator(".actions li")).to_have_text("Nothing: all exchanges respond.")
        await expect(health).to_have_text("Healthy")
        await page.locator("nav [data-view=market]").click()
        await expect(age).to_have_text(re.compile(r"^(now|\d s)$"))
        await expect(row(page, "BTC/USDT", "bybit")).not_to_have_attribute("data-stale", "")
        await has_moved(page, "BTC/USDT")
        errors.assert_none()


async def test_gateway_view_shows_figures_and_links_to_grafana(
    browser: Browser, lively: Sandbox
) -> None:
    """The view shows subscribers and cache tiers. Its links match the provisioned dashboards."""
    async with gateway(lively, grafana_url="https://grafana.example/") as live:
        page, errors = await open_page(browser, f"{live.url}/#gateway", *DESK)
        await expect(page.locator("[data-fact=subscribers]")).to_have_text("1 WebSocket, 0 SSE")
        await expect(page.locator("[data-fact=memory]")).to_have_text(re.compile(r"^[\d.]+ %$"))
        await expect(page.locator("[data-fact='requests per second']")).to_have_text(
            re.compile(r"^[\d.]+$")
        )
        saved = page.locator("[data-fact='calls saved']")
        await expect(saved).to_have_text(re.compile(r"^\d+ of \d+ in the last \d+ s$"))
        links = page.locator(".links a")
        await expect(links).to_have_count(3)
        targets = {await link.get_attribute("href") for link in await links.all()}
        dashboards = (ROOT / "deploy" / "grafana" / "dashboards").glob("*.json")
        uids = [json.loads(path.read_text())["uid"] for path in dashboards]
        assert targets == {f"https://grafana.example/d/{uid}" for uid in uids}
        errors.assert_none()


async def test_unlisted_symbol_is_explained(browser: Browser, lively: Sandbox) -> None:
    """The table and the symbol view show a reason instead of prices. Other symbols update."""
    async with gateway(lively, dashboard_symbols="BTC/USDT,NOPE/USDT") as live:
        page, errors = await open_page(browser, live.url, *DESK)
        await is_live(page)
        group = page.locator("#market tbody", has=page.locator('a[href="#NOPE-USDT"]'))
        await expect(group.locator(".none")).to_have_text("not listed")
        await expect(group.locator("[data-exchange]")).to_have_count(0)
        await has_moved(page, "BTC/USDT")
        await group.locator("a").click()
        await expect(page.locator("#symbol h1")).to_have_text("NOPE/USDT")
        await expect(page.locator("#symbol")).to_contain_text(
            "NOPE/USDT is not listed on bybit or binance or kraken"
        )
        await expect(page.locator("#symbol .none")).to_have_text("not listed")
        await is_live(page)
        errors.assert_none(but=REFUSED)
        await page.context.close()
    async with gateway(lively, streaming=False) as live:
        page, errors = await blank(browser)
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        await page.goto(f"{live.url}/#NOPE-USDT")
        await is_live(page, "Polling every 2 s")
        async with page.expect_request(lambda request: "BTC" in request.url):
            pass
        async with page.expect_request(lambda request: "BTC" in request.url):
            pass  # after the first round the page knows that the symbol is not listed
        assert len([url for url in requests if "/orderbook/" in url or "/trades/" in url]) <= 2


async def test_polling_shows_other_exchanges_while_one_hangs(
    browser: Browser, lively: Sandbox
) -> None:
    """Without streaming the page polls. A slow exchange shows a reason, the others prices."""
    await lively.set("bybit", rate_limit=-1, hang=True, only="tickers")
    async with gateway(lively, streaming=False, ticker_ttl_seconds=1) as live:
        page, errors = await open_page(browser, live.url, *DESK)
        await is_live(page, "Polling every 2 s")

        async def others_have_prices() -> bool:
            places = lasts(await read(page)).keys()
            return places == {
                (symbol, name) for symbol in DEFAULTS for name in ("binance", "kraken")
            }

        await until(others_have_prices)
        for symbol, rows in (await read(page)).items():
            assert re.fullmatch(r"[a-z ]+", rows["bybit"]["age"]), symbol  # a reason, no age
            assert rows["bybit"]["stale"], symbol
        await has_moved(page, "BTC/USDT")
        await lively.set("bybit", rate_limit=-1)
        await expect(cell(page, "BTC/USDT", "bybit", "age")).to_have_text(
            re.compile(r"^(now|\d s)$")
        )
        await page.goto(f"{live.url}/#gateway")
        await expect(page.locator(".card").first).to_contain_text("REST only: streaming is off")
        errors.assert_none()


# Connections.


async def test_disabled_exchange_disappears(browser: Browser, lively: Sandbox, port: int) -> None:
    """After a restart of the gateway without an exchange, its rows disappear without a reload."""
    page, _ = await blank(browser)
    knobs: dict[str, Any] = {"dashboard_symbols": "BTC/USDT,ETH/USDT"}
    exchanges = page.locator("#market tbody").first.locator("[data-cell=exchange]")
    async with gateway(lively, port, **knobs) as live:
        await page.goto(live.url)
        await is_live(page)
        await expect(exchanges).to_have_text(EXCHANGES)
    async with gateway(lively, port, bybit_enabled=False, **knobs):
        await is_live(page)
        await expect(exchanges).to_have_text(EXCHANGES[1:])
        await expect(
            page.locator('#market a[href="#BTC-USDT"]')
        ).to_be_visible()  # the link was in the row of bybit
        await expect(cell(page, "BTC/USDT", "binance", "bid")).to_have_attribute("data-best", "")
        await page.goto(f"{live.url}/#BTC-USDT")
        await expect(page.locator("#symbol tr[data-exchange]")).to_have_count(2)


async def test_page_reports_a_lost_gateway_and_reconnects(
    browser: Browser, lively: Sandbox, port: int
) -> None:
    """Without the gateway no row is live. The page recovers without a reload."""
    page, errors = await blank(browser)
    async with gateway(lively, port, dashboard_symbols="BTC/USDT,ETH/USDT") as live:
        await page.goto(live.url)
        await is_live(page)
        await page.evaluate("window.isSame = true")
        await expect(page.locator("tr[data-stale]")).to_have_count(0)
        errors.assert_none()  # before the stop, which may interrupt a request
    await expect(page.locator("body")).to_have_attribute("data-state", "reconnecting")
    await expect(page.locator("#notice")).to_have_text(re.compile("No connection.*is not live"))
    await expect(page.locator("#health")).to_have_text("Unknown")
    await expect(page.locator("[data-best]")).to_have_count(0)
    await expect(page.locator("#announcement")).to_have_text("Reconnecting: prices are not live")
    await expect(page.locator("tr[data-exchange]:not([data-stale])")).to_have_count(0)
    before = lasts(await read(page))
    failed: list[str] = []
    page.on("requestfailed", lambda request: failed.append(request.url))

    async def has_tried() -> bool:
        """Return true after several attempts. No row may be live until then."""
        rows = [row for group in (await read(page)).values() for row in group.values()]
        assert len(rows) == 2 * len(EXCHANGES)
        assert all(row["stale"] and row["age"].startswith("not live, ") for row in rows), rows
        await expect(page.locator("#connection")).to_have_text(
            re.compile(r"^Reconnecting in \d+ s$")
        )
        return len(failed) >= 2

    await until(has_tried)
    assert lasts(await read(page)) == before
    async with gateway(lively, port, dashboard_symbols="BTC/USDT,ETH/USDT"):
        await is_live(page)
        await expect(page.locator("#notice")).to_be_hidden()
        await expect(page.locator("tr[data-stale]")).to_have_count(0)
        await has_moved(page, "BTC/USDT")
        assert await page.evaluate("window.isSame")
        errors.assert_none(but="ERR_CONNECTION|health/live")


async def test_page_falls_back_to_events_then_to_polling(browser: Browser, lively: Sandbox) -> None:
    """Server-sent events replace a blocked /ws, polling replaces both. /ws is tried again."""
    async with gateway(lively, dashboard_symbols="BTC/USDT,ETH/USDT", ticker_ttl_seconds=1) as live:
        page, errors = await blank(browser)
        is_blocked = True

        async def block(route: WebSocketRoute) -> None:
            if is_blocked:
                await route.close(code=1011, reason="blocked")
            else:
                route.connect_to_server()

        await page.clock.install()
        await page.route_web_socket(re.compile("/ws"), block)
        await page.goto(live.url)
        await is_live(page, "Live by SSE")
        assert {client.transport for client in streams(live).connections} == {"sse"}
        await has_moved(page, "BTC/USDT")
        is_blocked = False
        await page.clock.fast_forward(31_000)  # the page tries /ws again
        await is_live(page)
        await eventually(
            lambda: {client.transport for client in streams(live).connections} == {"ws"}
        )
        await has_moved(page, "BTC/USDT")
        errors.assert_none(but="health/live|/stream/")  # responses that were not read completely
        await page.context.close()

        page, errors = await blank(browser)
        await block_sockets(page)

        async def abort(route: Route) -> None:
            await route.abort()

        await page.route("**/stream/**", abort)
        await page.goto(live.url)
        await is_live(page, "Polling every 2 s")
        assert not streams(live).connections
        await has_moved(page, "BTC/USDT")
        await has_moved(page, "BTC/USDT")
        errors.assert_none(but="health/live|/stream/")


async def test_events_continue_for_a_symbol_that_one_exchange_does_not_list(
    browser: Browser, lively: Sandbox
) -> None:
    """An address with a symbol that not all exchanges list does not cause polling."""
    async with gateway(lively, dashboard_symbols="BTC/USDT") as live:
        page, _ = await blank(browser)
        await block_sockets(page)
        await page.goto(f"{live.url}/#PEPE-USDT")
        await is_live(page, "Live by SSE")
        await expect(page.locator("#symbol tr[data-exchange]")).to_have_count(2)


async def test_subscriptions_beyond_the_limit_are_polled(browser: Browser, lively: Sandbox) -> None:
    """Prices beyond STREAM_MAX_SUBSCRIPTIONS appear and update, too."""
    async with gateway(lively, stream_max_subscriptions=6, ticker_ttl_seconds=1) as live:
        page, errors = await open_page(browser, live.url, *DESK)
        await is_live(page)
        (client,) = streams(live).connections
        await eventually(lambda: len(client.subscriptions) == 6)

        async def all_have_prices() -> bool:
            return len(lasts(await read(page))) == len(DEFAULTS) * len(EXCHANGES)

        await until(all_have_prices)
        await has_moved(page, *DEFAULTS)  # kraken is polled
        await has_moved(page, *DEFAULTS)
        await expect(page.locator("tr[data-stale]")).to_have_count(0)
        errors.assert_none()


async def test_long_watch_list_needs_one_connection(browser: Browser) -> None:
    """A list far beyond the default STREAM_MAX_SUBSCRIPTIONS is live over one connection."""
    sandbox = Sandbox(filler=100)
    await sandbox.start()
    for name in sandbox.urls:
        await sandbox.set(name, rate_limit=-1, push_ms=10_000)  # few updates suffice
    symbols = [f"F{number:04d}/USDT" for number in range(1, 101)]
    async with AsyncExitStack() as stack:
        stack.push_async_callback(sandbox.stop)
        live = await stack.enter_async_context(
            gateway(
                sandbox,
                load_markets=True,
                dashboard_symbols=",".join(symbols),
                ticker_ttl_seconds=2,
            )
        )
        page, errors = await blank(browser)
        opened: list[str] = []
        page.on("websocket", lambda socket: opened.append(socket.url))
        await page.goto(live.url)
        await is_live(page)
        await page.evaluate("scrollTo(0, document.body.scrollHeight)")
        await has_moved(page, symbols[-1])
        await has_moved(page, symbols[-1])
        await is_live(page)
        assert len(opened) == 1
        errors.assert_none()


async def test_hidden_page_sends_no_requests(browser: Browser, lively: Sandbox) -> None:
    """A hidden tab closes its subscriptions and sends nothing until it is visible again.

    A headless browser cannot hide a window, so that the test overrides `document.hidden`.
    """
    async with gateway(lively, dashboard_symbols="BTC/USDT") as live:
        page, errors = await blank(browser)
        await page.clock.install()
        await page.goto(live.url)
        await is_live(page)
        assert len(streams(live).connections) == 1
        await page.evaluate(SHOW, False)
        await expect(page.locator("body")).to_have_attribute("data-state", "paused")
        await expect(page.locator("#connection")).to_have_text("Paused")
        await eventually(lambda: not streams(live).connections)
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.on("websocket", lambda socket: requests.append(socket.url))
        await page.clock.run_for(120_000)
        assert (requests, len(streams(live).connections)) == ([], 0)
        await page.evaluate(SHOW, True)
        await is_live(page)
        await expect(page.locator("tr[data-stale]")).to_have_count(0)
        await has_moved(page, "BTC/USDT")
        assert len(streams(live).connections) == 1
        errors.assert_none()


# Untrusted text.


async def test_untrusted_text_is_never_markup(browser: Browser, lively: Sandbox) -> None:
    """Markup in the address, in stored data or in an error creates no element and never runs."""
    evil = "<img/src=x/onerror=alert(1)>"
    async with gateway(lively, dashboard_symbols="BTC/USDT") as live:
        page, errors = await blank(browser)
        dialogs: list[str] = []
        page.on("dialog", lambda dialog: dialogs.append(dialog.message))
        strange = page.locator(
            "main :is(img, script, iframe, [onerror], [onload], [src], svg:not(.prices svg))"
        )
        error = page.locator("#symbol .chart .error")

        await page.goto(f"{live.url}/#<img src=x onerror=alert(1)>")
        await expect(page.locator("#symbol h1")).to_have_text("<IMG SRC=X ONERROR=ALERT(1)>")
        await expect(error).to_contain_text("Cannot load candles")
        await is_live(page)
        await page.locator("#symbol button", has_text="Add to the watch list").click()
        await expect(strange).to_have_count(0)
        await page.goto(f"{live.url}/#BTC-USDT/<svg onload=alert(2)>/5m")
        await expect(error).to_contain_text("<svg onload=alert(2)>")  # the unknown exchange
        await expect(strange).to_have_count(0)
        for odd in ("%E0%A4%A", "__proto__", "a,b", "javascript:alert(3)"):
            await page.goto(f"{live.url}/#{odd}")
            await expect(page.locator("#symbol")).to_be_visible()
        await page.goto(f"{live.url}/#BTC-USDT/kraken/constructor")  # a property of every object
        await expect(page.locator(".timeframes [aria-pressed=true]")).to_have_text("1m")
        await page.goto(f"{live.url}/#//")
        watched = page.locator("#market th[data-cell=symbol] a")
        await expect(watched).to_have_text(["BTC/USDT", "<IMG SRC=X ONERROR=ALERT(1)>"])
        await expect(strange).to_have_count(0)

        store = "(text) => localStorage.setItem('virtuoso.watch', text)"
        await page.evaluate(store, f"{evil} BTC/USDT __proto__")
        await page.reload()
        await expect(watched).to_have_text([evil, "BTC/USDT", "__proto__"])
        await expect(page.locator(".none").first).to_have_text("not listed")
        await is_live(page)
        await has_moved(page, "BTC/USDT")
        await page.locator("#search").fill(evil)
        await expect(watched).to_have_text([evil])
        await expect(strange).to_have_count(0)
        for junk in ("[1, {", '{"length": 5}', "\u0000", "x" * 5000):
            await page.evaluate(store, junk)
            await page.reload()
            await is_live(page)
        assert dialogs == []
        errors.assert_none(but=f"{REFUSED}|{LEFT}")


# The symbol view.


async def test_address_contains_symbol_exchange_and_timeframe(
    browser: Browser, lively: Sandbox
) -> None:
    """Choices change the address, the back button works, and an address restores its view."""
    async with gateway(lively) as live:
        page, errors = await open_page(browser, live.url, *DESK)
        await is_live(page)
        await page.locator('th[data-cell=symbol] a[href="#ETH-USDT"]').click()
        await expect(page.locator("#symbol h1")).to_have_text("ETH/USDT")
        await expect(page.locator("#market")).to_be_hidden()
        await expect(page).to_have_title(re.compile(r"^ETH/USDT [\d,.]+.* · Virtuoso$"))
        await page.go_back()
        await expect(page.locator("#market")).to_be_visible()
        await expect(page.locator("#symbol")).to_be_hidden()
        await expect(page).to_have_title("Market · Virtuoso")
        await page.context.close()

        page, errors = await blank(browser)
        async with page.expect_response("**/ohlcv/**") as response:
            await page.goto(f"{live.url}/#BTC-USDT/kraken/5m")
        assert "timeframe=5m" in (await response.value).url
        assert "exchange=kraken" in (await response.value).url
        pressed, chosen = (
            page.locator(".timeframes [aria-pressed=true]"),
            page.locator("#exchange-choice"),
        )
        await expect(page.locator("#symbol h1")).to_have_text("BTC/USDT")
        await expect(pressed).to_have_text("5m")
        await expect(chosen).to_have_value("kraken")
        await expect(page.locator(".book h2")).to_have_text(
            re.compile(r"^Order book kraken, (now|\d s)$")
        )
        async with page.expect_response(re.compile("timeframe=30m")):
            await page.locator(".timeframes button", has_text="30m").click()
        await expect(page).to_have_url(f"{live.url}/#BTC-USDT/kraken/30m")
        await expect(pressed).to_have_text("30m")
        await chosen.select_option("binance")
        await expect(page).to_have_url(f"{live.url}/#BTC-USDT/binance/30m")
        await expect(page.locator(".book h2")).to_have_text(
            re.compile(r"^Order book binance, (now|\d s)$")
        )
        await page.go_back()
        await expect(chosen).to_have_value("kraken")
        await expect(pressed).to_have_text("30m")
        await page.locator("#symbol a[href='#']").first.click()
        await expect(page.locator("#market")).to_be_visible()
        errors.assert_none()


async def test_candles_are_drawn_and_readable_by_keyboard_and_mouse(
    browser: Browser, lively: Sandbox
) -> None:
    """The text shows the newest candle, or the candle that keyboard or mouse select."""
    async with gateway(lively) as live:
        page, errors = await blank(browser)
        async with page.expect_response("**/ohlcv/**") as response:
            await page.goto(f"{live.url}/#BTC-USDT/kraken/5m")
        candles = (await (await response.value).json())["candles"]
        await is_live(page)
        canvas, reading = page.locator("#candles"), page.locator("#reading")

        async def selected() -> int:
            """Return the index of the candle in the text, or -1 for the running candle."""
            text, label = await reading.evaluate(READING)
            found = re.search(r"open (\S+) high (\S+) low (\S+) close (\S+) ", text)
            assert found, text
            assert found[0] in label
            values = [number(text) for text in found.groups()]
            complete = [candle[1:5] for candle in candles[:-1]]
            return complete.index(values) if values in complete else -1

        await expect(reading).to_contain_text("open")
        assert await canvas.evaluate(INK) > 3
        assert await selected() == -1
        assert not await canvas.evaluate(CURSOR_LABEL)
        await expect(page.locator(".book tbody tr:visible")).to_have_count(20)
        await lively.set(
            "kraken", rate_limit=-1, freeze=True
        )  # the width of the book depends on its numbers
        await canvas.focus()
        await page.keyboard.press("Home")
        first = await selected()  # the first candle that fits beside the book
        assert 0 <= first < 20
        for key, wanted in (
            ("ArrowRight", 1),
            ("ArrowRight", 2),
            ("ArrowLeft", 1),
            ("ArrowLeft", 0),
            ("ArrowLeft", 0),
        ):
            await page.keyboard.press(key)
            assert await selected() == first + wanted, key
            assert await page.locator("#announcement").inner_text() == await reading.inner_text()
        assert await canvas.evaluate(CURSOR_LABEL)
        await page.keyboard.press("End")
        assert await selected() == -1
        box = await canvas.bounding_box()
        assert box
        middle = box["y"] + box["height"] / 2
        for share in (0.1, 0.3, 0.6):
            await page.mouse.move(box["x"] + share * box["width"], middle)
            position = (await selected() - first + 1) / (len(candles) - first)
            assert share < position < share * 1.25  # the price axis is on the right
        await page.mouse.move(5, 5)
        assert await selected() == -1
        errors.assert_none(but="willReadFrequently")  # the test reads the canvas, not the page


async def test_book_trades_and_comparison_update(browser: Browser, lively: Sandbox) -> None:
    """The view shows depth, levels, trades and all exchanges, and follows the market."""
    async with gateway(lively) as live:
        page, errors = await open_page(browser, f"{live.url}/#BTC-USDT/kraken/5m", *DESK)
        await is_live(page)
        await expect(page.locator(".book tbody tr:visible")).to_have_count(20)
        assert await page.locator("#depth").evaluate(INK) > 3
        await expect(page.locator("#depth")).to_have_attribute(
            "aria-label", re.compile(r"[\d,.]+ between [\d,.]+ and [\d,.]+")
        )
        levels = [
            number(text)
            for text in await page.locator(".book tbody td:first-child").all_inner_texts()
        ]
        assert (len(levels), levels) == (20, sorted(levels, reverse=True))
        trades = page.locator(".scroll tbody tr:visible")
        await expect(trades).to_have_count(30)
        await expect(trades.first).to_have_text(
            re.compile(r"^\d\d:\d\d:\d\d[▲▼] (buy|sell)\d{2,3},\d{3}\.\d")
        )
        compared = page.locator("#symbol .prices tr[data-exchange]")
        await expect(compared).to_have_count(3)
        first, gap = await trades.first.inner_text(), await page.locator(".gap").inner_text()
        await expect(trades.first).not_to_have_text(first)
        await expect(page.locator(".gap")).not_to_have_text(gap)
        await expect(trades).to_have_count(30)
        errors.assert_none()
        # A new stream starts with few trades; the page fetches the earlier ones.
        later, errors = await open_page(browser, f"{live.url}/#BTC-USDT/kraken", *PHONE)
        await expect(later.locator(".scroll tbody tr:visible")).to_have_count(30)
        errors.assert_none()


async def test_timeframe_change_keeps_book_and_trades(browser: Browser, lively: Sandbox) -> None:
    """Only the candles are loaded again."""
    async with gateway(lively) as live:
        page, errors = await open_page(browser, f"{live.url}/#BTC-USDT/kraken/1m", *DESK)
        trades = page.locator(".scroll tbody tr:visible")
        await expect(trades).to_have_count(30)
        await lively.set("kraken", rate_limit=-1, freeze=True)  # no new trades arrive
        button = page.locator(".timeframes button", has_text="5m")
        await button.focus()
        await page.keyboard.press("Enter")
        await expect(page.locator(".timeframes [aria-pressed=true]")).to_have_text("5m")
        await expect(page.locator(".book tbody tr:visible")).to_have_count(20)
        await expect(trades).to_have_count(30)
        await expect(button).to_be_focused()
        errors.assert_none()


async def test_late_candles_of_another_timeframe_are_ignored(
    browser: Browser, lively: Sandbox
) -> None:
    """The chart shows the timeframe that was chosen last."""
    async with gateway(lively) as live:
        page, errors = await blank(browser)
        release = asyncio.Event()

        async def hold(route: Route) -> None:
            answer = await route.fetch()
            await release.wait()
            await route.fulfill(response=answer)

        await page.route(re.compile("timeframe=1m"), hold)
        await page.goto(f"{live.url}/#BTC-USDT/kraken/1m")
        await is_live(page)
        await page.locator(".timeframes button", has_text="4h").click()
        reading = page.locator("#reading")
        await expect(reading).to_contain_text("open")
        await page.locator("#candles").focus()
        await page.keyboard.press("Home")
        oldest = await reading.inner_text()
        async with page.expect_response(re.compile("timeframe=1m")) as late:
            release.set()
        await (await late.value).finished()
        # The page has processed the late response when a further one is complete.
        await page.evaluate("() => fetch('/health/live').then((response) => response.text())")
        await page.keyboard.press("End")
        await page.keyboard.press("Home")
        await expect(reading).to_have_text(oldest)
        errors.assert_none()


# The watch list.


async def test_watch_list_is_searchable_editable_and_persistent(
    browser: Browser, lively: Sandbox
) -> None:
    """Added and removed symbols survive a reload. The default list can be restored."""
    async with gateway(lively) as live:
        page, errors = await open_page(browser, live.url, *DESK)
        await is_live(page)
        watched = page.locator("#market th[data-cell=symbol] a")
        search = page.locator("#search")
        reset = page.locator("#reset")
        await expect(watched).to_have_text(DEFAULTS)
        await expect(reset).to_be_hidden()
        await search.fill("eth")
        await expect(watched).to_have_text(["ETH/USDT"])
        await search.press("Enter")
        await expect(page).to_have_url(f"{live.url}/#ETH-USDT")
        await page.go_back()
        await search.fill("avax")
        suggestions = page.locator("#suggestions button")
        await expect(suggestions).to_have_text(["Add AVAX/USDT bybit, binance, kraken"])
        await suggestions.click()
        await expect(search).to_have_value("")
        await expect(watched).to_have_text([*DEFAULTS, "AVAX/USDT"])
        for name in EXCHANGES:
            await expect(cell(page, "AVAX/USDT", name, "last")).to_contain_text(re.compile(r"\d"))
        await has_moved(page, "BTC/USDT")
        await search.fill("mnt-usdt")
        await search.press("Enter")  # adds the first suggestion if no watched symbol matches
        await expect(page.locator("tr[data-exchange]").first).to_be_visible()
        await search.fill("")
        await expect(watched).to_have_text([*DEFAULTS, "AVAX/USDT", "MNT/USDT"])
        await expect(cell(page, "MNT/USDT", "bybit", "last")).to_contain_text(re.compile(r"\d"))

        await page.reload()
        await is_live(page)
        await expect(watched).to_have_text([*DEFAULTS, "AVAX/USDT", "MNT/USDT"])
        assert ("AVAX/USDT", "kraken") in lasts(await read(page))
        await page.get_by_role("button", name=f"Remove {DEFAULTS[0]} from the watch list").click()
        await page.get_by_role("button", name="Remove MNT/USDT from the watch list").click()
        await expect(watched).to_have_text([*DEFAULTS[1:], "AVAX/USDT"])
        (client,) = streams(live).connections
        await eventually(lambda: DEFAULTS[0] not in {want.symbol for want in client.subscriptions})
        await page.reload()
        await expect(watched).to_have_text([*DEFAULTS[1:], "AVAX/USDT"])
        await reset.click()
        await expect(watched).to_have_text(DEFAULTS)
        await expect(reset).to_be_hidden()
        await expect(cell(page, DEFAULTS[0], "kraken", "last")).to_contain_text(re.compile(r"\d"))
        await page.reload()
        await expect(watched).to_have_text(DEFAULTS)
        errors.assert_none(but=LEFT)


async def test_headings_sort_the_table_and_a_list_does_on_phones(
    browser: Browser, lively: Sandbox
) -> None:
    """The change of 24 hours sorts in both directions."""
    async with gateway(lively) as live:
        page, errors = await open_page(browser, live.url, *DESK)
        await is_live(page)

        async def changes() -> list[float]:
            return [number(rows["bybit"]["change"]) for rows in (await read(page)).values()]

        async def is_descending() -> bool:
            return (found := await changes()) == sorted(found, reverse=True)

        async def is_ascending() -> bool:
            return (found := await changes()) == sorted(found)

        head = page.locator("th[data-cell=change]")
        await head.get_by_role("button").click()
        await until(is_descending)
        await expect(head).to_have_attribute("aria-sort", "descending")
        await head.get_by_role("button").click()
        await until(is_ascending)
        await expect(head).to_have_attribute("aria-sort", "ascending")
        await head.get_by_role("button").click()
        await expect(page.locator("#market th[data-cell=symbol] a")).to_have_text(
            DEFAULTS
        )  # as listed
        await expect(head).not_to_have_attribute("aria-sort", re.compile(".*"))
        await page.locator("th[data-cell=symbol]").first.get_by_role("button").click()
        assert list(await read(page)) == sorted(DEFAULTS)

        await page.set_viewport_size({"width": PHONE[0], "height": PHONE[1]})
        choice = page.get_by_label("Sort")
        await expect(choice).to_have_value("symbol")
        await choice.select_option("24 h change")
        await until(is_descending)
        await choice.select_option("As listed")
        await expect(page.locator("#market th[data-cell=symbol] a")).to_have_text(DEFAULTS)
        errors.assert_none()


async def test_sort_order_is_reversible_on_phones(browser: Browser, lively: Sandbox) -> None:
    """A button shows the direction and reverses the order, by touch and by keyboard."""
    async with gateway(lively) as live:
        page, errors = await open_page(browser, live.url, *PHONE, is_mobile=True, has_touch=True)
        await is_live(page)
        reverse, choice = page.locator("#reverse"), page.get_by_label("Sort")
        symbols = page.locator("#market th[data-cell=symbol] a")
        await expect(reverse).to_be_hidden()  # the listed order has no direction
        await choice.select_option("Symbol")
        await expect(symbols).to_have_text(sorted(DEFAULTS))
        await expect(reverse).to_have_accessible_name("Ascending, reverse the order")
        await reverse.tap()
        await expect(symbols).to_have_text(sorted(DEFAULTS, reverse=True))
        await expect(reverse).to_have_accessible_name("Descending, reverse the order")
        await expect(choice).to_have_value("symbol")
        await expect(page.locator("#announcement")).to_have_text("Sorted by Symbol, descending")
        assert not await axe(page)
        assert not await touch_problems(page)
        await reverse.focus()
        await page.keyboard.press("Enter")
        await expect(symbols).to_have_text(sorted(DEFAULTS))
        await expect(reverse).to_be_focused()
        await choice.select_option("24 h change")
        await expect(reverse).to_have_text("Descending")
        await choice.select_option("As listed")
        await expect(symbols).to_have_text(DEFAULTS)
        await expect(reverse).to_be_hidden()
        await page.set_viewport_size({"width": DESK[0], "height": DESK[1]})
        await page.locator("th[data-cell=change] button").click()
        await expect(reverse).to_be_hidden()  # the headings sort
        errors.assert_none()


async def test_empty_watch_list_stays_empty(browser: Browser, lively: Sandbox) -> None:
    """The page explains an empty list, also after a reload. A button restores the default."""
    async with gateway(lively, dashboard_symbols="BTC/USDT,ETH/USDT") as live:
        page, errors = await open_page(browser, live.url, *PHONE)
        await is_live(page)
        symbols = page.locator("#market th[data-cell=symbol] a")
        empty, reset = (
            page.locator("#empty"),
            page.get_by_role("button", name="Restore the default list"),
        )
        await expect(symbols).to_have_count(2)
        await expect(empty).to_be_hidden()
        for symbol in ("BTC/USDT", "ETH/USDT"):
            await page.get_by_role("button", name=f"Remove {symbol} from the watch list").click()
        await expect(reset).to_be_focused()
        for is_reloaded in (False, True):
            if is_reloaded:
                await page.reload()
                await is_live(page)
            await expect(empty).to_have_text(
                "Your watch list is empty. Search for a symbol, or restore the default list."
            )
            await expect(symbols).to_have_count(0)
            await expect(page.locator("#table")).to_be_hidden()
            assert not await axe(page)
        await reset.click()
        await expect(symbols).to_have_text(["BTC/USDT", "ETH/USDT"])
        await expect(empty).to_be_hidden()
        await has_moved(page, "BTC/USDT")
        await page.reload()
        await expect(symbols).to_have_text(["BTC/USDT", "ETH/USDT"])
        errors.assert_none(but=LEFT)


# Layout and accessibility.


@pytest.mark.parametrize(
    ("price", "amount", "locale"),
    [(0.0123456789, 1e-6, "en-US"), (12.3456789, 1234.56789, "de-DE")],
)
async def test_long_numbers_are_not_cut_off(
    browser: Browser, lively: Sandbox, price: float, amount: float, locale: str
) -> None:
    """Long prices and amounts fit into all tables, at all widths and in both colour schemes."""
    await lively.set("kraken", rate_limit=-1, price=1.05)
    symbols = "BTC/USDT,PEPE/USDT,BTC/USDT:USDT,SHIB/USDT"
    knobs: dict[str, Any] = {
        "market_types": "spot,swap",
        "cb_threshold": 1,
        "cb_reset_seconds": 600,
    }
    async with gateway(lively, dashboard_symbols=symbols, **knobs) as live:
        await lively.set("binance", rate_limit=-1, refuse=True)
        page, errors = await open_page(browser, "about:blank", *DESK, locale=locale)
        await page.add_init_script(SCALE % (price, amount))
        found = []
        for view in ("/", "/#BTC-USDT/bybit", "/#PEPE-USDT/bybit", "/#gateway"):
            await page.goto(f"{live.url}/mobile{view[1:]}")
            await is_live(page)
            if view == "/":
                await expect(row(page, "BTC/USDT", "kraken").locator(".flag")).to_contain_text(
                    "off"
                )
            elif view == "/#gateway":
                await expect(
                    page.locator("#gateway tr", has_text="calls to binance")
                ).to_have_count(1)
            else:
                await expect(page.locator(".book tbody tr:visible")).to_have_count(20)
                await expect(page.locator(".scroll tbody tr:visible")).to_have_count(30)
                await expect(page.locator("#reading")).to_contain_text("open")
            for width in WIDTHS:
                await page.set_viewport_size({"width": width, "height": 900})
                for scheme in SCHEMES:
                    await page.emulate_media(color_scheme=scheme)
                    found += [
                        f"{view} {width} {scheme}: {cut}" for cut in await page.evaluate(CUT_OFF)
                    ]
                if "USDT" in view:
                    colours = await (await page.wait_for_function(EDGE)).json_value()
                    found += (
                        [f"{view} {width}: prices of the chart"] if colours > EDGE_COLOURS else []
                    )
        assert not found, "\n".join(found)
        errors.assert_none(but=f"{REFUSED}|{LEFT}|willReadFrequently")


@pytest.mark.parametrize(("width", "height"), [PHONE, DESK])
async def test_views_fit_the_screen_and_pass_axe(
    browser: Browser, lively: Sandbox, width: int, height: int
) -> None:
    """No view is too wide, touch targets are large enough, and axe finds nothing, dark or light.

    The content is as large as possible: an exchange is down, prices are outliers, names are long.
    """
    await lively.set("kraken", rate_limit=-1, price=1.05)
    symbols = "BTC/USDT,PEPE/USDT,BTC/USDT:USDT,SHIB/USDT,NOPE/USDT"
    knobs: dict[str, Any] = {
        "market_types": "spot,swap",
        "cb_threshold": 1,
        "cb_reset_seconds": 600,
    }
    async with gateway(lively, dashboard_symbols=symbols, **knobs) as live:
        await lively.set("binance", rate_limit=-1, refuse=True)
        page, errors = await open_page(browser, f"{live.url}/mobile", width, height)
        await is_live(page)
        await expect(row(page, "BTC/USDT", "kraken").locator(".flag")).to_contain_text("off")
        await expect(page.locator("#health")).to_contain_text("binance circuit open")
        found = []
        for view in VIEWS:
            await page.goto(f"{live.url}/mobile{view[1:]}")
            heading = page.locator("main section:visible :is(h1, th[data-cell=symbol])").first
            await expect(heading).to_be_attached()
            if view == VIEWS[1]:
                await expect(page.locator("#reading")).to_contain_text("open")
                await expect(page.locator(".scroll tbody tr:visible")).to_have_count(30)
            if view == VIEWS[2]:
                await expect(page.locator(".card[data-exchange=binance]")).to_have_attribute(
                    "data-state", "open"
                )
            wide = await page.evaluate("document.documentElement.scrollWidth")
            found += [f"{view} is {wide} pixels wide"] if wide > width else []
            if width == PHONE[0]:
                found += [f"{view}: {problem}" for problem in await touch_problems(page)]
            for scheme in SCHEMES:
                await page.emulate_media(color_scheme=scheme)
                if report := await axe(page):
                    found.append(f"{view}, {scheme}: {report}")
        assert not found, "\n".join(found)
        errors.assert_none(but=f"{REFUSED}|{LEFT}")


async def touch_problems(page: Page) -> list[str]:
    """Return controls that are too small, or hidden but focusable."""
    problems = await page.evaluate(
        """([least, touch]) => {
          const controls = [...document.querySelectorAll("a, button, select, input")];
          return controls.flatMap((control) => {
            const { width, height } = control.getBoundingClientRect();
            if (!control.checkVisibility() || control.matches(".skip")) return [];
            const name = `${control.tagName} ${control.className || control.textContent.trim()}`;
            const isHidden = control.closest("thead, .sr-only")?.offsetWidth <= 1;
            if (isHidden) return [`${name} is focusable but hidden`];
            const minHeight = control.tagName === "A" ? least : touch;
            const isSmall = width < least || height < minHeight - 0.5;
            return isSmall ? [`${name}: ${width.toFixed()} x ${height.toFixed()}`] : [];
          });
        }""",
        [MIN_TARGET, MIN_TOUCH_TARGET],
    )
    return [str(problem) for problem in problems]


async def test_keyboard_reaches_everything(browser: Browser, lively: Sandbox) -> None:
    """Tab follows the visual order, the focus is visible, and Enter activates."""
    async with gateway(lively, dashboard_symbols="BTC/USDT,ETH/USDT") as live:
        page, errors = await open_page(browser, live.url, *DESK)
        await is_live(page)

        async def tab(key: str = "Tab") -> dict[str, Any]:
            await page.keyboard.press(key)
            await expect(page.locator(":focus")).to_have_count(1)
            await until(lambda: page.evaluate("!document.getAnimations().length"))
            focused: dict[str, Any] = await page.evaluate(FOCUSED)
            assert focused["outlined"], focused
            assert focused["errors"], focused
            return focused

        stops = [await tab() for _ in range(15)]
        assert [(stop["kind"], stop["name"]) for stop in stops] == [
            ("skip", "skip"),
            ("brand", "Virtuoso"),
            ("a", "market"),
            ("a", "gateway"),
            ("pill", "health"),
            ("input", "search"),
            *(("button", name) for name in ("symbol", "spread", "change", "volume", "age")),
            *[("a", "symbol"), ("remove", "symbol")] * 2,
        ]
        await page.keyboard.press("Enter")  # on the last remove button
        await expect(page.locator("#market th[data-cell=symbol] a")).to_have_text(["BTC/USDT"])
        is_lost = await page.evaluate("document.activeElement === document.body")
        await page.evaluate("document.querySelector('th[data-cell=change] button').focus()")
        await page.keyboard.press("Enter")
        await expect(page.locator("th[data-cell=change]")).to_have_attribute(
            "aria-sort", "descending"
        )
        await page.evaluate("document.querySelector('.brand').focus()")
        assert (await tab("Shift+Tab"))["kind"] == "skip"
        await page.keyboard.press("Enter")
        assert await page.evaluate("document.activeElement.id") == "main"
        assert page.url == f"{live.url}/"
        await page.locator('a[href="#BTC-USDT"]').focus()
        await page.keyboard.press("Enter")
        await expect(page.locator("#symbol h1")).to_have_text("BTC/USDT")
        names = [(await tab())["name"] for _ in range(8)]
        assert names[-3:] == ["4h", "exchange-choice", "candles"]
        assert not is_lost, "the focus was lost with the removed row"
        errors.assert_none()


async def test_api_key_is_requested_and_kept_until_the_tab_is_closed(
    browser: Browser, lively: Sandbox
) -> None:
    """A wrong key is reported, the right key is accepted. It is stored for this tab only."""
    key = "right-key-0123456789"
    async with gateway(lively, api_keys=f"web:{key}", dashboard_symbols="BTC/USDT") as live:
        page, errors = await open_page(browser, live.url, *PHONE)
        dialog = page.locator("dialog#key")
        field = page.get_by_label("API key", exact=True)
        error = page.locator("#key-error")
        await expect(dialog).to_be_visible()
        await expect(page.locator("body")).to_have_attribute("data-state", "refused")
        await expect(page.locator("#connection")).to_have_text("Key needed")
        await expect(field).to_be_focused()
        await expect(error).to_be_empty()
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        for is_shown in (False, True):  # a tab that was hidden still waits for the key
            await page.evaluate(SHOW, is_shown)
        await expect(page.locator("#connection")).to_have_text("Paused")
        assert not await axe(page)
        assert not requests
        await field.fill("wrong-key-0123456789")
        await page.keyboard.press("Enter")
        await expect(error).to_have_text("The gateway does not accept this key.")
        await expect(dialog).to_be_visible()
        await field.fill(key)
        await page.get_by_role("button", name="Use this key").click()
        await is_live(page)
        await expect(dialog).to_be_hidden()
        await has_moved(page, "BTC/USDT")
        stored = await page.evaluate(
            "[JSON.stringify(sessionStorage), JSON.stringify(localStorage), location.href, "
            "document.cookie]"
        )
        assert [key in text for text in stored] == [True, False, False, False]
        assert key not in await page.content()
        await page.reload()
        await is_live(page)
        other, _ = await open_page(browser, live.url, *PHONE)
        await expect(other.locator("dialog#key")).to_be_visible()
        errors.assert_none(but=f"{REFUSED}|{LEFT}")


async def test_api_key_that_no_header_can_carry_is_wrong(browser: Browser, lively: Sandbox) -> None:
    """The page reports a key with invalid characters like any other wrong key."""
    async with gateway(lively, api_keys="web:right-key-0123456789") as live:
        page, _ = await open_page(browser, live.url, *DESK)
        await expect(page.locator("#key-error")).to_be_empty()
        for key in ("clé-secrète", "ключ-от-шлюза", "pass phrase €"):
            await page.get_by_label("API key", exact=True).fill(key)
            await page.keyboard.press("Enter")
            await expect(page.locator("#key-error")).to_have_text(
                "The gateway does not accept this key."
            )
            await expect(page.locator("dialog#key")).to_be_visible()
            await expect(page.get_by_label("API key", exact=True)).to_have_value("")
