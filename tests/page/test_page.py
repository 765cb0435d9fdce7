"""The page of the gateway in a real browser, against simulated exchanges that push.

The files and the document it is made of are in test_dashboard.py, its code without a browser in test_page_code.py.
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
from tests.page.browser import ROOT, Seen, axe, browser, open_page

__all__ = ["browser"]  # a fixture: pytest finds it here by its name

pytestmark = pytest.mark.full
DESK, PHONE = (1440, 900), (390, 844)
WIDTHS = (390, 1024, 1280, 1440, 1920)
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
EXCHANGES = ["bybit", "binance", "kraken"]
DEFAULTS = ["SOL/USDT", "BTC/USDT", "ETH/USDT"]  # few: each one costs the sandbox and the gateway 25 messages a second
VIEWS = ["/", "/#BTC-USDT", "/#gateway"]
SECONDS = 120.0  # for what is about to be seen, on a starved machine
LEAST_TARGET, THUMB = 24, 44  # CSS pixels: WCAG 2.2 for any pointer, and what the style gives to thumbs
REFUSED = r"status of 40[0-9]"  # an answer that the test is about is an error on the console, too
LEFT = "ERR_ABORTED"  # what was asked for when the page was left
# Every row of the table of prices as it is in the document: the text of its cells, and what its attributes tell.
READ = """() => Object.fromEntries([...document.querySelectorAll("#market .prices tbody")].map((body) => {
  const told = ([...cells]) => cells.map((cell) => [cell.dataset.cell, cell.textContent]);
  const rows = [...body.querySelectorAll("tr[data-exchange]")].map((row) => [row.dataset.exchange, {
    ...Object.fromEntries(told(row.querySelectorAll("td"))),
    stale: "stale" in row.dataset,
    best: [...row.querySelectorAll("[data-best]")].map((cell) => cell.dataset.cell),
    flag: row.querySelector(".flag").textContent,
  }]);
  return [body.querySelector("a").textContent, Object.fromEntries(rows)];
}))"""
INK = """(canvas) => {
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  return new Set(new Uint32Array(data.buffer)).size;
}"""
SHOW = """(is) => {
  Object.defineProperty(document, "hidden", { configurable: true, get: () => !is });
  document.dispatchEvent(new Event("visibilitychange"));
}"""
MOVING = """() => [...document.querySelectorAll("*")].filter((it) => {
  const { transitionDuration, animationName, scrollBehavior } = getComputedStyle(it);
  return transitionDuration !== "0s" || animationName !== "none" || scrollBehavior === "smooth";
}).map((it) => it.outerHTML.slice(0, 99))"""
FOCUSED = """() => {
  const it = document.activeElement, box = it.getBoundingClientRect(), style = getComputedStyle(it);
  const top = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
  return {
    name: it.id || it.dataset.view || it.closest("[data-cell]")?.dataset.cell || it.textContent.trim(),
    kind: it.className || it.tagName.toLowerCase(),
    outlined: it.matches(":focus-visible") && style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2,
    seen: it === top || it.contains(top),
  };
}"""
# Multiply all prices and amounts that the page receives, to get longer numbers than the sandbox has.
SCALE = """(() => {
  const [price, amount] = [%s, %s];
  const factors = { amount, baseVolume: amount, quoteVolume: amount };
  for (const name of ["last", "bid", "ask", "open", "high", "low", "close", "price"]) factors[name] = price;
  const pairs = (levels) => levels.map(([at, size]) => [at * price, size * amount]);
  const scaled = (value, key) => {
    if (typeof value === "number") return value * (factors[key] ?? 1);
    if (key === "bids" || key === "asks") return pairs(value);
    if (key === "candles") return value.map(([at, ...rest]) => [at, ...rest.map((one) => one * price)]);
    if (Array.isArray(value)) return value.map((one) => scaled(one));
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([name, member]) => [name, scaled(member, name)]));
  };
  const { parse } = JSON, { json } = Response.prototype;
  JSON.parse = (text) => scaled(parse(text));
  Response.prototype.json = async function () { return scaled(await json.call(this)); };
})()"""
# Every visible text of a table or list whose text is wider than its cell, or lies outside what its ancestors show.
CUT_OFF = """() => [...document.querySelectorAll("main :is(td, th, dt, dd, .gap)")].flatMap((cell) => {
  if (!cell.checkVisibility()) return [];
  const walker = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
  const range = document.createRange(), texts = [];
  while (walker.nextNode()) {
    if (walker.currentNode.parentElement.closest(".unseen")) continue;
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
  return [`${place.ariaLabel ?? place.className} ${cell.dataset.cell ?? cell.tagName}: ${cell.innerText}`];
})"""
# How many colours the right edge of the chart has, drawn at its present size: the parts of a number would have many.
EDGE = """() => {
  const canvas = document.querySelector("#candles");
  if (canvas.width !== Math.round(canvas.clientWidth * devicePixelRatio)) return 0;
  const { data } = canvas.getContext("2d").getImageData(canvas.width - 1, 0, 1, canvas.height);
  return new Set(new Uint32Array(data.buffer)).size;
}"""
# What is read beside the chart, and the chart's own label: together, as both change with every price.
READING = """(line) => [line.innerText, document.querySelector("#candles").getAttribute("aria-label")]"""
# Whether the label of the cursor's price reaches the right edge of the chart.
CURSOR_LABEL = """(canvas) => {
  const { data } = canvas.getContext("2d").getImageData(canvas.width - 1, 0, 1, canvas.height);
  const wanted = getComputedStyle(document.body).color.match(/\\d+/g).map(Number).join();
  return [...new Array(canvas.height).keys()].some((y) => data.slice(4 * y, 4 * y + 3).join() === wanted);
}"""
EDGE_COLOURS = 4  # the background, the label of the newest price, and its upper and lower edge
Row = dict[str, Any]
Prices = dict[str, dict[str, Row]]  # by symbol and exchange


@asynccontextmanager
async def gateway(
    sandbox: Sandbox, port: int = 0, *, load_markets: bool = False, **settings: object
) -> AsyncIterator[Live]:
    """Run a gateway in real time that has all market lists, and shows DEFAULTS unless `settings` say otherwise."""
    known = make_settings(sandbox, **({"dashboard_symbols": ",".join(DEFAULTS)} | settings))
    async with serve(known, SystemClock(), port=port, load_markets=load_markets) as live:
        await eventually(lambda: len(live.gateway.markets.loaded_at) == len(live.gateway.manager.names))
        try:
            yield live
        finally:
            for client in getattr(live.server.lifespan.state["streams"], "subscribers", ()):
                if client.transport == "sse":
                    client.goodbye()  # as a signal does; the server would wait for events to end


@pytest.fixture
def port() -> Iterator[int]:
    """Reserve a port for gateways that run one after the other: no other process gets it in between."""
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


async def until(holds: Callable[[], Awaitable[object]]) -> None:
    """Wait for what is about to be seen."""
    async with asyncio.timeout(SECONDS):
        while not await holds():  # noqa: ASYNC110 - what is waited for is in another process
            await asyncio.sleep(0.05)


async def blank(browser: Browser, width: int = DESK[0], height: int = DESK[1]) -> tuple[Page, Seen]:
    """Open a page with nothing in it, to prepare it before it goes to the gateway."""
    return await open_page(browser, "about:blank", width, height)


async def is_live(page: Page, words: str = "Live") -> None:
    """Wait until it says that prices are live."""
    await expect(page.locator("body")).to_have_attribute("data-state", "live")
    await expect(page.locator("#link")).to_have_text(words)


async def read(page: Page) -> Prices:
    found: Prices = await page.evaluate(READ)
    return found


def number(text: str) -> float:
    """Read the number in a text as the page writes them."""
    found = re.search(r"[+-]?[\d,]*\.?\d+", text)
    assert found, text
    return float(found[0].replace(",", ""))


def lasts(prices: Prices) -> dict[tuple[str, str], float]:
    """The last prices of those rows that have one."""
    flat = {(symbol, exchange): row for symbol, rows in prices.items() for exchange, row in rows.items()}
    return {place: number(row["last"]) for place, row in flat.items() if row["last"]}


async def has_moved(page: Page, *symbols: str) -> None:
    """Wait until the page shows prices of these symbols, and then until every one of them is another one."""

    async def are_shown() -> bool:
        return {symbol for symbol, _ in lasts(await read(page))} >= set(symbols)

    await until(are_shown)
    before = lasts(await read(page))

    async def moved() -> bool:
        now = lasts(await read(page))
        return all(now.get(place, last) != last for place, last in before.items() if place[0] in symbols)

    await until(moved)


def row(page: Page, symbol: str, exchange: str) -> Locator:
    """The line of one exchange in the group of a symbol."""
    group = page.locator("#market tbody", has=page.locator(f'a[href="#{symbol.replace("/", "-")}"]'))
    return group.locator(f"tr[data-exchange={exchange}]")


def cell(page: Page, symbol: str, exchange: str, name: str) -> Locator:
    return row(page, symbol, exchange).locator(f"[data-cell={name}]")


def streams(live: Live) -> StreamHub:
    """The gateway's streams: who subscribes cannot be seen from outside."""
    found = live.server.lifespan.state["streams"]
    assert isinstance(found, StreamHub)
    return found


async def block_sockets(page: Page) -> None:
    """Close every WebSocket at once, as a proxy does that knows none."""

    async def close(route: WebSocketRoute) -> None:
        await route.close(code=1011, reason="blocked")

    await page.route_web_socket(re.compile("/ws"), close)


# Prices.


async def test_the_first_picture_is_there_before_anything_is_pushed(browser: Browser, lively: Sandbox) -> None:
    """Every default symbol has every exchange's price, those of the first document, while no socket says a word."""
    async with gateway(lively, ticker_ttl_seconds=60) as live:

        async def is_complete() -> bool:
            """A document leaves out what an exchange does not send within 0.7 s; then all is in memory."""
            tickers = (await live.get("/api/dashboard/data")).json()["market"]["tickers"]
            return all(len(tickers.get(symbol, ())) == len(EXCHANGES) for symbol in DEFAULTS)

        await until(is_complete)
        page, seen = await blank(browser)
        await page.route_web_socket(re.compile("/ws"), lambda _: None)  # it opens, and is silent
        async with page.expect_response("**/api/dashboard/data") as asked:
            await page.goto(live.url)
        document = await (await asked.value).json()
        await expect(page.locator("[data-cell=last] > span:first-of-type", has_text=re.compile(r"\d"))).to_have_count(
            len(DEFAULTS) * len(EXCHANGES)
        )
        shown = lasts(await read(page))
        tickers = document["market"]["tickers"]
        assert shown == {(symbol, name): tickers[symbol][name]["last"] for symbol in DEFAULTS for name in EXCHANGES}
        assert list(await read(page)) == DEFAULTS
        await expect(page.locator("body")).to_have_attribute("data-state", "connecting")
        await expect(page.locator("#health")).to_have_attribute("data-state", "healthy")
        seen.clean()


async def test_prices_move_and_are_compared(browser: Browser, lively: Sandbox) -> None:
    """What is pushed is shown without a reload; the best bid and ask are marked, and who stands apart is.

    Nothing slides or flashes for those who want less motion, and nothing is fetched from anywhere else.
    """
    symbols = [*DEFAULTS, "PEPE/USDT"]
    async with gateway(lively, dashboard_symbols=",".join(symbols)) as live:
        page, seen = await blank(browser)
        await page.emulate_media(reduced_motion="reduce")
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        await page.goto(live.url)
        await is_live(page)
        assert await page.evaluate(MOVING) == []
        await page.evaluate("window.isSame = true")
        await has_moved(page, "BTC/USDT")
        await has_moved(page, "BTC/USDT")  # the first may have been the snapshot of the stream
        await expect(cell(page, "BTC/USDT", "kraken", "last").locator("i")).to_have_text(re.compile("[▲▼]"))
        assert await page.evaluate("window.isSame")

        async def is_compared() -> bool:
            """Whether bybit is the dearest of the simulated exchanges, and kraken the cheapest."""
            prices = await read(page)
            found = [
                {name: (row["best"], row["stale"], row["flag"]) for name, row in prices[it].items()} for it in DEFAULTS
            ]
            best = {"bybit": (["bid"], False, ""), "binance": ([], False, ""), "kraken": (["ask"], False, "")}
            return found == [best] * len(DEFAULTS)

        await until(is_compared)
        for name, others in {"bid": "kraken", "ask": "bybit"}.items():
            marked = page.locator(f"#market [data-cell={name}][data-best]")
            await expect(marked.first).to_have_text(re.compile(", best$"))  # for those who do not see the mark
            await expect(row(page, "BTC/USDT", others).locator(f"[data-cell={name}]")).not_to_contain_text("best")
        pepe = (await read(page))["PEPE/USDT"]
        assert pepe.keys() == {"bybit", "binance"}  # kraken has none
        for figures in pepe.values():
            for name in ("last", "bid", "ask"):
                assert re.fullmatch(r"[▲▼]?0\.0000\d{4,}(, best)?", figures[name]), figures

        await lively.set("kraken", rate_limit=-1, price=1.05)
        flag = row(page, "BTC/USDT", "kraken").locator(".flag")
        await expect(flag).to_have_text(re.compile(r"^\+(4\.9|5\.0)\d % off$"))
        await expect(flag).to_be_visible()
        assert [rows["bybit"]["flag"] for rows in (await read(page)).values()] == [""] * len(symbols)
        assert not [url for url in asked if not re.match(f"(http|ws){live.url[4:]}/", url)]
        seen.clean()


async def test_what_is_not_pushed_is_told_and_a_dead_exchange_shows_until_it_is_back(
    browser: Browser, lively: Sandbox
) -> None:
    """A feed without news is named while REST stands in, stale when that fails too; the views tell why, and when not.

    The other exchanges' prices go on meanwhile.
    """
    knobs: dict[str, Any] = {"ticker_ttl_seconds": 4, "cb_threshold": 2, "cb_reset_seconds": 2}
    async with gateway(lively, dashboard_symbols="BTC/USDT", **knobs) as live:
        page, seen = await open_page(browser, live.url, *DESK)
        await is_live(page)
        await expect(page.locator("#health")).to_have_text("All well")
        age = cell(page, "BTC/USDT", "bybit", "age")
        await expect(age).to_have_text(re.compile(r"^(now|\d s)$"))
        for _ in range(4):
            await has_moved(page, "BTC/USDT")  # from what came it is learnt how soon something is missing
        await lively.set("bybit", rate_limit=-1, freeze=True)
        await expect(age).to_have_text(re.compile(r"^stale feed, REST (now|\d s)$"))
        await expect(row(page, "BTC/USDT", "bybit")).not_to_have_attribute("data-stale", "")

        await lively.set("bybit", rate_limit=-1, freeze=True, refuse=True)
        await expect(age).to_have_text(re.compile(r"^stale, \d+ s$"))
        await expect(row(page, "BTC/USDT", "bybit")).to_have_attribute("data-stale", "")
        await expect(row(page, "BTC/USDT", "bybit")).to_have_attribute("data-fade", "3")

        async def go_on() -> bool:
            rows = {name: (it["stale"], it["best"]) for name, it in (await read(page))["BTC/USDT"].items()}
            return rows == {"bybit": (True, []), "binance": (False, ["bid"]), "kraken": (False, ["ask"])}

        await until(go_on)
        health = page.locator("#health")
        await expect(health).to_have_text("Degraded: bybit circuit open")
        await expect(health).to_have_attribute("data-state", "degraded")

        await health.click()
        card = page.locator(".card[data-exchange=bybit]")
        await expect(card).to_have_attribute("data-state", "open")
        await expect(card.locator(".cause")).to_have_text(re.compile(r"^it cannot be reached; next try in \d+ s$"))
        doing = page.locator(".doing li", has_text="bybit fails: it cannot be reached.")
        await expect(doing.locator("code")).to_have_text("docs/runbook.md#virtuosocircuitopen")
        await expect(page.locator(".card[data-exchange=kraken]")).to_have_attribute("data-state", "closed")
        calls = page.locator("#gateway tr", has_text="calls to bybit")
        await expect(calls).to_contain_text("unavailable")

        await lively.set("bybit", rate_limit=-1)
        await expect(card).to_have_attribute("data-state", re.compile("half_open|closed"))
        await live.get("/ticker/BTC-USDT?exchange=bybit&max_age=0")  # a half-open breaker waits for somebody who asks
        await expect(card).to_have_attribute("data-state", "closed")
        await expect(card.locator(".cause")).to_be_empty()
        await expect(card).to_contain_text(re.compile(r"stream, \d watched"))
        await expect(page.locator(".doing li")).to_have_text("Nothing: all exchanges answer.")
        await expect(health).to_have_text("All well")
        await page.locator("nav [data-view=market]").click()
        await expect(age).to_have_text(re.compile(r"^(now|\d s)$"))
        await expect(row(page, "BTC/USDT", "bybit")).not_to_have_attribute("data-stale", "")
        await has_moved(page, "BTC/USDT")
        seen.clean()


async def test_the_gateway_view_has_figures_and_leads_to_grafana(browser: Browser, lively: Sandbox) -> None:
    """It tells who is connected and where answers came from; its links lead to dashboards that are there."""
    async with gateway(lively, grafana_url="https://grafana.example/") as live:
        page, seen = await open_page(browser, f"{live.url}/#gateway", *DESK)
        await expect(page.locator("[data-fact=subscribers]")).to_have_text("1 WebSocket, 0 events")
        await expect(page.locator("[data-fact=memory]")).to_have_text(re.compile(r"^[\d.]+ %$"))
        await expect(page.locator("[data-fact='requests a second']")).to_have_text(re.compile(r"^[\d.]+$"))
        links = page.locator(".links a")
        await expect(links).to_have_count(3)
        led = {await link.get_attribute("href") for link in await links.all()}
        dashboards = (ROOT / "deploy" / "grafana" / "dashboards").glob("*.json")
        assert led == {f"https://grafana.example/d/{json.loads(path.read_text())['uid']}" for path in dashboards}
        seen.clean()


async def test_a_symbol_nobody_lists_is_told(browser: Browser, lively: Sandbox) -> None:
    """It has words instead of prices, in the table and in a view of its own; the others go on."""
    async with gateway(lively, dashboard_symbols="BTC/USDT,NOPE/USDT") as live:
        page, seen = await open_page(browser, live.url, *DESK)
        await is_live(page)
        group = page.locator("#market tbody", has=page.locator('a[href="#NOPE-USDT"]'))
        await expect(group.locator(".none")).to_have_text("no exchange lists it")
        await expect(group.locator("[data-exchange]")).to_have_count(0)
        await has_moved(page, "BTC/USDT")
        await group.locator("a").click()
        await expect(page.locator("#symbol h1")).to_have_text("NOPE/USDT")
        await expect(page.locator("#symbol")).to_contain_text("NOPE/USDT is not listed on bybit or binance or kraken")
        await expect(page.locator("#symbol .none")).to_have_text("no exchange lists it")
        await is_live(page)
        seen.clean(but=REFUSED)
        await page.context.close()
    async with gateway(lively, streaming=False) as live:
        page, seen = await blank(browser)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        await page.goto(f"{live.url}/#NOPE-USDT")
        await is_live(page, "Asking every 2 s")
        async with page.expect_request(lambda request: "BTC" in request.url):
            pass
        async with page.expect_request(lambda request: "BTC" in request.url):
            pass  # in the rounds after the first it is known that there is nothing to ask for
        assert len([url for url in asked if "/orderbook/" in url or "/trades/" in url]) <= 2


async def test_an_exchange_that_hangs_keeps_nothing_back_where_all_is_asked_for(
    browser: Browser, lively: Sandbox
) -> None:
    """Without streams the page asks again and again; who does not answer in time is named, the others have prices."""
    await lively.set("bybit", rate_limit=-1, hang=True, only="tickers")
    async with gateway(lively, streaming=False, ticker_ttl_seconds=1) as live:
        page, seen = await open_page(browser, live.url, *DESK)
        await is_live(page, "Asking every 2 s")

        async def have_prices() -> bool:
            found = lasts(await read(page)).keys()
            return found == {(symbol, name) for symbol in DEFAULTS for name in ("binance", "kraken")}

        await until(have_prices)
        for symbol, rows in (await read(page)).items():
            assert re.fullmatch(r"[a-z ]+", rows["bybit"]["age"]), symbol  # words, and no age
            assert rows["bybit"]["stale"], symbol
        await has_moved(page, "BTC/USDT")
        await lively.set("bybit", rate_limit=-1)
        await expect(cell(page, "BTC/USDT", "bybit", "age")).to_have_text(re.compile(r"^(now|\d s)$"))
        await page.goto(f"{live.url}/#gateway")
        await expect(page.locator(".card").first).to_contain_text("REST only: streaming is off")
        seen.clean()


# How they come.


async def test_an_exchange_that_was_switched_off_disappears(browser: Browser, lively: Sandbox, port: int) -> None:
    """After a restart of the gateway without an exchange, its rows are gone without a reload of the page."""
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
        await expect(page.locator('#market a[href="#BTC-USDT"]')).to_be_visible()  # which was in the row of bybit
        await expect(cell(page, "BTC/USDT", "binance", "bid")).to_have_attribute("data-best", "")
        await page.goto(f"{live.url}/#BTC-USDT")
        await expect(page.locator("#symbol tr[data-exchange]")).to_have_count(2)


async def test_a_gateway_that_is_gone_is_told_and_taken_up_again(browser: Browser, lively: Sandbox, port: int) -> None:
    """While it is away no row is shown as live, and the page says so; it goes on without a reload when it is back."""
    page, seen = await blank(browser)
    async with gateway(lively, port, dashboard_symbols="BTC/USDT,ETH/USDT") as live:
        await page.goto(live.url)
        await is_live(page)
        await page.evaluate("window.isSame = true")
        await expect(page.locator("tr[data-stale]")).to_have_count(0)
        seen.clean()  # now: a request of the page that meets the stop of the gateway is a fault on its console
    await expect(page.locator("body")).to_have_attribute("data-state", "reconnecting")
    await expect(page.locator("#trouble")).to_have_text(re.compile("No connection.*is not live"))
    await expect(page.locator("#health")).to_have_text("Unknown")
    await expect(page.locator("[data-best]")).to_have_count(0)
    await expect(page.locator("#said")).to_have_text("Reconnecting: prices are not live")
    await expect(page.locator("tr[data-exchange]:not([data-stale])")).to_have_count(0)
    before = lasts(await read(page))
    failed: list[str] = []
    page.on("requestfailed", lambda request: failed.append(request.url))

    async def has_tried() -> bool:
        """Whether it has tried several times; until then nothing may be shown as live."""
        rows = [it for them in (await read(page)).values() for it in them.values()]
        assert len(rows) == 2 * len(EXCHANGES)
        assert all(it["stale"] and it["age"].startswith("not live, ") for it in rows), rows
        await expect(page.locator("#link")).to_have_text(re.compile(r"^Reconnecting in \d+ s$"))
        return len(failed) >= 2

    await until(has_tried)
    assert lasts(await read(page)) == before
    async with gateway(lively, port, dashboard_symbols="BTC/USDT,ETH/USDT"):
        await is_live(page)
        await expect(page.locator("#trouble")).to_be_hidden()
        await expect(page.locator("tr[data-stale]")).to_have_count(0)
        await has_moved(page, "BTC/USDT")
        assert await page.evaluate("window.isSame")
        seen.clean(but="ERR_CONNECTION|health/live")


async def test_events_stand_in_for_sockets_and_questions_for_both(browser: Browser, lively: Sandbox) -> None:
    """Where no WebSocket gets through, events come; where these do not either, it is asked; /ws is tried again."""
    async with gateway(lively, dashboard_symbols="BTC/USDT,ETH/USDT", ticker_ttl_seconds=1) as live:
        page, seen = await blank(browser)
        is_blocked = True

        async def maybe(route: WebSocketRoute) -> None:
            if is_blocked:
                await route.close(code=1011, reason="blocked")
            else:
                route.connect_to_server()

        await page.clock.install()
        await page.route_web_socket(re.compile("/ws"), maybe)
        await page.goto(live.url)
        await is_live(page, "Live, by events")
        assert {client.transport for client in streams(live).subscribers} == {"sse"}
        await has_moved(page, "BTC/USDT")
        is_blocked = False
        await page.clock.fast_forward(31_000)  # to when /ws is tried again
        await is_live(page)
        await eventually(lambda: {client.transport for client in streams(live).subscribers} == {"ws"})
        await has_moved(page, "BTC/USDT")
        seen.clean(but="health/live|/stream/")  # whose answers it did not read to the end
        await page.context.close()

        page, seen = await blank(browser)
        await block_sockets(page)

        async def cut(route: Route) -> None:
            await route.abort()

        await page.route("**/stream/**", cut)
        await page.goto(live.url)
        await is_live(page, "Asking every 2 s")
        assert not streams(live).subscribers
        await has_moved(page, "BTC/USDT")
        await has_moved(page, "BTC/USDT")
        seen.clean(but="health/live|/stream/")


async def test_events_go_on_for_a_symbol_that_one_exchange_lacks(browser: Browser, lively: Sandbox) -> None:
    """An address may name a symbol that is not watched, and that not all list: it is no reason to fall to asking."""
    async with gateway(lively, dashboard_symbols="BTC/USDT") as live:
        page, _ = await blank(browser)
        await block_sockets(page)
        await page.goto(f"{live.url}/#PEPE-USDT")
        await is_live(page, "Live, by events")
        await expect(page.locator("#symbol tr[data-exchange]")).to_have_count(2)


async def test_more_than_may_be_subscribed_to_is_asked_for(browser: Browser, lively: Sandbox) -> None:
    """What is beyond STREAM_MAX_SUBSCRIPTIONS has prices too, and they go on."""
    async with gateway(lively, stream_max_subscriptions=6, ticker_ttl_seconds=1) as live:
        page, seen = await open_page(browser, live.url, *DESK)
        await is_live(page)
        (client,) = streams(live).subscribers
        await eventually(lambda: len(client.wants) == 6)

        async def all_have_prices() -> bool:
            return len(lasts(await read(page))) == len(DEFAULTS) * len(EXCHANGES)

        await until(all_have_prices)
        await has_moved(page, *DEFAULTS)  # kraken's are asked for
        await has_moved(page, *DEFAULTS)
        await expect(page.locator("tr[data-stale]")).to_have_count(0)
        seen.clean()


async def test_a_long_watch_list_stays_connected(browser: Browser) -> None:
    """A list far longer than STREAM_MAX_SUBSCRIPTIONS allows, as it is by default, is live over one connection."""
    sandbox = Sandbox(filler=100)
    await sandbox.start()
    for name in sandbox.urls:
        await sandbox.set(name, rate_limit=-1, push_ms=10_000)  # the number of updates is not what this is about
    symbols = [f"F{number:04d}/USDT" for number in range(1, 101)]
    async with AsyncExitStack() as stack:
        stack.push_async_callback(sandbox.stop)
        live = await stack.enter_async_context(
            gateway(sandbox, load_markets=True, dashboard_symbols=",".join(symbols), ticker_ttl_seconds=2)
        )
        page, seen = await blank(browser)
        opened: list[str] = []
        page.on("websocket", lambda socket: opened.append(socket.url))
        await page.goto(live.url)
        await is_live(page)
        await page.evaluate("scrollTo(0, document.body.scrollHeight)")
        await has_moved(page, symbols[-1])
        await has_moved(page, symbols[-1])
        await is_live(page)
        assert len(opened) == 1
        seen.clean()


async def test_a_page_nobody_sees_asks_for_nothing(browser: Browser, lively: Sandbox) -> None:
    """A hidden tab lets go of its subscriptions and asks for nothing; it goes on when it is shown.

    No window can be hidden without a screen: the document is told that it is.
    """
    async with gateway(lively, dashboard_symbols="BTC/USDT") as live:
        page, seen = await blank(browser)
        await page.clock.install()
        await page.goto(live.url)
        await is_live(page)
        assert len(streams(live).subscribers) == 1
        await page.evaluate(SHOW, False)
        await expect(page.locator("body")).to_have_attribute("data-state", "paused")
        await expect(page.locator("#link")).to_have_text("Paused")
        await eventually(lambda: not streams(live).subscribers)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("websocket", lambda socket: asked.append(socket.url))
        await page.clock.run_for(120_000)
        assert (asked, len(streams(live).subscribers)) == ([], 0)
        await page.evaluate(SHOW, True)
        await is_live(page)
        await expect(page.locator("tr[data-stale]")).to_have_count(0)
        await has_moved(page, "BTC/USDT")
        assert len(streams(live).subscribers) == 1
        seen.clean()


# What strangers write.


async def test_text_from_elsewhere_is_only_ever_text(browser: Browser, lively: Sandbox) -> None:
    """Markup in the address, in what the browser kept or in an error becomes no element, and nothing of it runs."""
    evil = "<img/src=x/onerror=alert(1)>"
    async with gateway(lively, dashboard_symbols="BTC/USDT") as live:
        page, seen = await blank(browser)
        spoken: list[str] = []
        page.on("dialog", lambda dialog: spoken.append(dialog.message))
        strange = page.locator("main :is(img, script, iframe, [onerror], [onload], [src], svg:not(.prices svg))")
        trouble = page.locator("#symbol .chart .wrong")

        await page.goto(f"{live.url}/#<img src=x onerror=alert(1)>")
        await expect(page.locator("#symbol h1")).to_have_text("<IMG SRC=X ONERROR=ALERT(1)>")
        await expect(trouble).to_contain_text("Candles cannot be had")
        await is_live(page)
        await page.locator("#symbol button", has_text="Add to the watch list").click()
        await expect(strange).to_have_count(0)
        await page.goto(f"{live.url}/#BTC-USDT/<svg onload=alert(2)>/5m")
        await expect(trouble).to_contain_text("<svg onload=alert(2)>")  # the error tells whom nobody knows
        await expect(strange).to_have_count(0)
        for odd in ("%E0%A4%A", "__proto__", "a,b", "javascript:alert(3)"):
            await page.goto(f"{live.url}/#{odd}")
            await expect(page.locator("#symbol")).to_be_visible()
        await page.goto(f"{live.url}/#BTC-USDT/kraken/constructor")  # every object has one, and it is no timeframe
        await expect(page.locator(".frames [aria-pressed=true]")).to_have_text("1m")
        await page.goto(f"{live.url}/#//")
        watched = page.locator("#market th[data-cell=symbol] a")
        await expect(watched).to_have_text(["BTC/USDT", "<IMG SRC=X ONERROR=ALERT(1)>"])
        await expect(strange).to_have_count(0)

        keep = "(text) => localStorage.setItem('virtuoso.watch', text)"
        await page.evaluate(keep, f"{evil} BTC/USDT __proto__")
        await page.reload()
        await expect(watched).to_have_text([evil, "BTC/USDT", "__proto__"])
        await expect(page.locator(".none").first).to_have_text("no exchange lists it")
        await is_live(page)
        await has_moved(page, "BTC/USDT")
        await page.locator("#search").fill(evil)
        await expect(watched).to_have_text([evil])
        await expect(strange).to_have_count(0)
        for junk in ("[1, {", '{"length": 5}', "\u0000", "x" * 5000):
            await page.evaluate(keep, junk)
            await page.reload()
            await is_live(page)
        assert spoken == []
        seen.clean(but=f"{REFUSED}|{LEFT}")


# The view of one symbol.


async def test_an_address_names_a_symbol_an_exchange_and_a_timeframe(browser: Browser, lively: Sandbox) -> None:
    """What is chosen goes into the address, the browser's way back leads back, and an address opens right."""
    async with gateway(lively) as live:
        page, seen = await open_page(browser, live.url, *DESK)
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

        page, seen = await blank(browser)
        async with page.expect_response("**/ohlcv/**") as asked:
            await page.goto(f"{live.url}/#BTC-USDT/kraken/5m")
        assert "timeframe=5m" in (await asked.value).url
        assert "exchange=kraken" in (await asked.value).url
        pressed, chosen = page.locator(".frames [aria-pressed=true]"), page.locator("#from")
        await expect(page.locator("#symbol h1")).to_have_text("BTC/USDT")
        await expect(pressed).to_have_text("5m")
        await expect(chosen).to_have_value("kraken")
        await expect(page.locator(".book h2")).to_have_text(re.compile(r"^Order book kraken, (now|\d s)$"))
        async with page.expect_response(re.compile("timeframe=30m")):
            await page.locator(".frames button", has_text="30m").click()
        await expect(page).to_have_url(f"{live.url}/#BTC-USDT/kraken/30m")
        await expect(pressed).to_have_text("30m")
        await chosen.select_option("binance")
        await expect(page).to_have_url(f"{live.url}/#BTC-USDT/binance/30m")
        await expect(page.locator(".book h2")).to_have_text(re.compile(r"^Order book binance, (now|\d s)$"))
        await page.go_back()
        await expect(chosen).to_have_value("kraken")
        await expect(pressed).to_have_text("30m")
        await page.locator("#symbol a[href='#']").first.click()
        await expect(page.locator("#market")).to_be_visible()
        seen.clean()


async def test_candles_are_drawn_and_can_be_read(browser: Browser, lively: Sandbox) -> None:
    """The newest candle is read out, or the one that the keyboard or the mouse points at."""
    async with gateway(lively) as live:
        page, seen = await blank(browser)
        async with page.expect_response("**/ohlcv/**") as asked:
            await page.goto(f"{live.url}/#BTC-USDT/kraken/5m")
        candles = (await (await asked.value).json())["candles"]
        await is_live(page)
        canvas, reading = page.locator("#candles"), page.locator("#reading")

        async def which() -> int:
            """The number of the candle whose values are told; -1 when it is none that was sent, so the running one."""
            text, label = await reading.evaluate(READING)
            told = re.search(r"open (\S+) high (\S+) low (\S+) close (\S+) ", text)
            assert told, text
            assert told[0] in label
            values = [number(text) for text in told.groups()]
            return (
                [candle[1:5] for candle in candles[:-1]].index(values)
                if values in [it[1:5] for it in candles[:-1]]
                else -1
            )

        await expect(reading).to_contain_text("open")
        assert await canvas.evaluate(INK) > 3
        assert await which() == -1
        assert not await canvas.evaluate(CURSOR_LABEL)
        await expect(page.locator(".book tbody tr:visible")).to_have_count(20)
        await lively.set("kraken", rate_limit=-1, freeze=True)  # the book is as wide as its numbers
        await canvas.focus()
        await page.keyboard.press("Home")
        first = await which()  # of the candles that there is room for beside the book
        assert 0 <= first < 20
        for key, wanted in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("ArrowLeft", 0), ("ArrowLeft", 0)):
            await page.keyboard.press(key)
            assert await which() == first + wanted, key
            assert await page.locator("#said").inner_text() == await reading.inner_text()
        assert await canvas.evaluate(CURSOR_LABEL)
        await page.keyboard.press("End")
        assert await which() == -1
        box = await canvas.bounding_box()
        assert box
        middle = box["y"] + box["height"] / 2
        for share in (0.1, 0.3, 0.6):
            await page.mouse.move(box["x"] + share * box["width"], middle)
            at = (await which() - first + 1) / (len(candles) - first)
            assert share < at < share * 1.25  # the axis has its room at the right
        await page.mouse.move(5, 5)
        assert await which() == -1
        seen.clean(but="willReadFrequently")  # the test reads the canvas, not the page


async def test_book_trades_and_comparison_are_shown_and_go_on(browser: Browser, lively: Sandbox) -> None:
    """Depth, levels, trades and the comparison of the exchanges are shown, and follow the market."""
    async with gateway(lively) as live:
        page, seen = await open_page(browser, f"{live.url}/#BTC-USDT/kraken/5m", *DESK)
        await is_live(page)
        await expect(page.locator(".book tbody tr:visible")).to_have_count(20)
        assert await page.locator("#depth").evaluate(INK) > 3
        await expect(page.locator("#depth")).to_have_attribute(
            "aria-label", re.compile(r"[\d,.]+ between [\d,.]+ and [\d,.]+")
        )
        levels = [number(text) for text in await page.locator(".book tbody td:first-child").all_inner_texts()]
        assert (len(levels), levels) == (20, sorted(levels, reverse=True))
        trades = page.locator(".scroll tbody tr:visible")
        await expect(trades).to_have_count(30)
        await expect(trades.first).to_have_text(re.compile(r"^\d\d:\d\d:\d\d[▲▼] (buy|sell)9\d,\d{3}\.\d"))
        compared = page.locator("#symbol .prices tr[data-exchange]")
        await expect(compared).to_have_count(3)
        first, gap = await trades.first.inner_text(), await page.locator(".gap").inner_text()
        await expect(trades.first).not_to_have_text(first)
        await expect(page.locator(".gap")).not_to_have_text(gap)
        await expect(trades).to_have_count(30)
        seen.clean()
        later, seen = await open_page(
            browser, f"{live.url}/#BTC-USDT/kraken", *PHONE
        )  # it is told of the last few only
        await expect(later.locator(".scroll tbody tr:visible")).to_have_count(30)
        seen.clean()


async def test_another_timeframe_takes_nothing_else_away(browser: Browser, lively: Sandbox) -> None:
    """The book and the trades that were there stay when only the candles are others."""
    async with gateway(lively) as live:
        page, seen = await open_page(browser, f"{live.url}/#BTC-USDT/kraken/1m", *DESK)
        trades = page.locator(".scroll tbody tr:visible")
        await expect(trades).to_have_count(30)
        await lively.set("kraken", rate_limit=-1, freeze=True)  # a quiet market pushes none to fill it up
        button = page.locator(".frames button", has_text="5m")
        await button.focus()
        await page.keyboard.press("Enter")
        await expect(page.locator(".frames [aria-pressed=true]")).to_have_text("5m")
        await expect(page.locator(".book tbody tr:visible")).to_have_count(20)
        await expect(trades).to_have_count(30)
        await expect(button).to_be_focused()
        seen.clean()


async def test_candles_that_come_late_are_not_taken_for_others(browser: Browser, lively: Sandbox) -> None:
    """Who chooses another timeframe before the first one's candles are here sees those that were chosen last."""
    async with gateway(lively) as live:
        page, seen = await blank(browser)
        let_go = asyncio.Event()

        async def hold(route: Route) -> None:
            answer = await route.fetch()
            await let_go.wait()
            await route.fulfill(response=answer)

        await page.route(re.compile("timeframe=1m"), hold)
        await page.goto(f"{live.url}/#BTC-USDT/kraken/1m")
        await is_live(page)
        await page.locator(".frames button", has_text="4h").click()
        reading = page.locator("#reading")
        await expect(reading).to_contain_text("open")
        await page.locator("#candles").focus()
        await page.keyboard.press("Home")
        oldest = await reading.inner_text()
        async with page.expect_response(re.compile("timeframe=1m")) as late:
            let_go.set()
        await (await late.value).finished()
        await page.evaluate("() => fetch('/health/live').then((answer) => answer.text())")  # by then the page has it
        await page.keyboard.press("End")
        await page.keyboard.press("Home")
        await expect(reading).to_have_text(oldest)
        seen.clean()


# The watch list.


async def test_the_watch_list_is_searched_added_to_and_kept(browser: Browser, lively: Sandbox) -> None:
    """A market that is found is added, and stays over a reload; what is removed is gone; the default comes back."""
    async with gateway(lively) as live:
        page, seen = await open_page(browser, live.url, *DESK)
        await is_live(page)
        watched, search, reset = (
            page.locator("#market th[data-cell=symbol] a"),
            page.locator("#search"),
            page.locator("#reset"),
        )
        await expect(watched).to_have_text(DEFAULTS)
        await expect(reset).to_be_hidden()
        await search.fill("eth")
        await expect(watched).to_have_text(["ETH/USDT"])
        await search.press("Enter")
        await expect(page).to_have_url(f"{live.url}/#ETH-USDT")
        await page.go_back()
        await search.fill("avax")
        offered = page.locator("#found button")
        await expect(offered).to_have_text(["Add AVAX/USDT bybit, binance, kraken"])
        await offered.click()
        await expect(search).to_have_value("")
        await expect(watched).to_have_text([*DEFAULTS, "AVAX/USDT"])
        for name in EXCHANGES:
            await expect(cell(page, "AVAX/USDT", name, "last")).to_contain_text(re.compile(r"\d"))
        await has_moved(page, "BTC/USDT")
        await search.fill("mnt-usdt")
        await search.press("Enter")  # what is offered first, where nothing is listed
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
        (client,) = streams(live).subscribers
        await eventually(lambda: DEFAULTS[0] not in {want.symbol for want in client.wants})
        await page.reload()
        await expect(watched).to_have_text([*DEFAULTS[1:], "AVAX/USDT"])
        await reset.click()
        await expect(watched).to_have_text(DEFAULTS)
        await expect(reset).to_be_hidden()
        await expect(cell(page, DEFAULTS[0], "kraken", "last")).to_contain_text(re.compile(r"\d"))
        await page.reload()
        await expect(watched).to_have_text(DEFAULTS)
        seen.clean(but=LEFT)


async def test_it_is_sorted_by_heads_and_on_a_phone_by_a_choice(browser: Browser, lively: Sandbox) -> None:
    """The change of 24 hours sorts, from the most to the least and the other way round."""
    async with gateway(lively) as live:
        page, seen = await open_page(browser, live.url, *DESK)
        await is_live(page)

        async def changes() -> list[float]:
            return [number(rows["bybit"]["change"]) for rows in (await read(page)).values()]

        async def falls() -> bool:
            return (found := await changes()) == sorted(found, reverse=True)

        async def rises() -> bool:
            return (found := await changes()) == sorted(found)

        head = page.locator("th[data-cell=change]")
        await head.get_by_role("button").click()
        await until(falls)
        await expect(head).to_have_attribute("aria-sort", "descending")
        await head.get_by_role("button").click()
        await until(rises)
        await expect(head).to_have_attribute("aria-sort", "ascending")
        await head.get_by_role("button").click()
        await expect(page.locator("#market th[data-cell=symbol] a")).to_have_text(DEFAULTS)  # as listed
        await expect(head).not_to_have_attribute("aria-sort", re.compile(".*"))
        await page.locator("th[data-cell=symbol]").first.get_by_role("button").click()
        assert list(await read(page)) == sorted(DEFAULTS)

        await page.set_viewport_size({"width": PHONE[0], "height": PHONE[1]})
        choice = page.get_by_label("Sort")
        await expect(choice).to_have_value("symbol")
        await choice.select_option("24 h change")
        await until(falls)
        await choice.select_option("As listed")
        await expect(page.locator("#market th[data-cell=symbol] a")).to_have_text(DEFAULTS)
        seen.clean()


async def test_a_sort_is_reversed_on_a_phone(browser: Browser, lively: Sandbox) -> None:
    """A button beside the choice says the direction and reverses it, by touch and by keyboard."""
    async with gateway(lively) as live:
        page, seen = await open_page(browser, live.url, *PHONE, is_mobile=True, has_touch=True)
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
        await expect(page.locator("#said")).to_have_text("Sorted by Symbol, descending")
        assert not await axe(page)
        assert not await hard_to_touch(page)
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
        await expect(reverse).to_be_hidden()  # the column heads do it
        seen.clean()


async def test_an_emptied_watch_list_stays_empty(browser: Browser, lively: Sandbox) -> None:
    """The page explains the empty list, also after a reload, and a button restores the default list."""
    async with gateway(lively, dashboard_symbols="BTC/USDT,ETH/USDT") as live:
        page, seen = await open_page(browser, live.url, *PHONE)
        await is_live(page)
        symbols = page.locator("#market th[data-cell=symbol] a")
        empty, reset = page.locator("#empty"), page.get_by_role("button", name="Restore the default list")
        await expect(symbols).to_have_count(2)
        await expect(empty).to_be_hidden()
        for symbol in ("BTC/USDT", "ETH/USDT"):
            await page.get_by_role("button", name=f"Remove {symbol} from the watch list").click()
        await expect(reset).to_be_focused()
        for is_reloaded in (False, True):
            if is_reloaded:
                await page.reload()
                await is_live(page)
            await expect(empty).to_have_text(re.compile("^Your watch list is empty.*restore the default list"))
            await expect(symbols).to_have_count(0)
            await expect(page.locator("#table")).to_be_hidden()
            assert not await axe(page)
        await reset.click()
        await expect(symbols).to_have_text(["BTC/USDT", "ETH/USDT"])
        await expect(empty).to_be_hidden()
        await has_moved(page, "BTC/USDT")
        await page.reload()
        await expect(symbols).to_have_text(["BTC/USDT", "ETH/USDT"])
        seen.clean(but=LEFT)


# For everybody.


@pytest.mark.parametrize(
    ("price", "amount", "locale"), [(0.0123456789, 1e-6, "en-US"), (12.3456789, 1234.56789, "de-DE")]
)
async def test_no_cell_is_cut_off(browser: Browser, lively: Sandbox, price: float, amount: float, locale: str) -> None:
    """Long prices and amounts fit into every table of every view, at every width and in both schemes."""
    await lively.set("kraken", rate_limit=-1, price=1.05)
    symbols = "BTC/USDT,PEPE/USDT,BTC/USDT:USDT,SHIB/USDT"
    knobs: dict[str, Any] = {"market_types": "spot,swap", "cb_threshold": 1, "cb_reset_seconds": 600}
    async with gateway(lively, dashboard_symbols=symbols, **knobs) as live:
        await lively.set("binance", rate_limit=-1, refuse=True)
        page, seen = await open_page(browser, "about:blank", *DESK, locale=locale)
        await page.add_init_script(SCALE % (price, amount))
        found = []
        for view in ("/", "/#BTC-USDT/bybit", "/#PEPE-USDT/bybit", "/#gateway"):
            await page.goto(f"{live.url}/mobile{view[1:]}")
            await is_live(page)
            if view == "/":
                await expect(row(page, "BTC/USDT", "kraken").locator(".flag")).to_contain_text("off")
            elif view == "/#gateway":
                await expect(page.locator("#gateway tr", has_text="calls to binance")).to_have_count(1)
            else:
                await expect(page.locator(".book tbody tr:visible")).to_have_count(20)
                await expect(page.locator(".scroll tbody tr:visible")).to_have_count(30)
                await expect(page.locator("#reading")).to_contain_text("open")
            for width in WIDTHS:
                await page.set_viewport_size({"width": width, "height": 900})
                for scheme in SCHEMES:
                    await page.emulate_media(color_scheme=scheme)
                    found += [f"{view} {width} {scheme}: {cut}" for cut in await page.evaluate(CUT_OFF)]
                if "USDT" in view:
                    colours = await (await page.wait_for_function(EDGE)).json_value()
                    found += [f"{view} {width}: prices of the chart"] if colours > EDGE_COLOURS else []
        assert not found, "\n".join(found)
        seen.clean(but=f"{REFUSED}|{LEFT}|willReadFrequently")


@pytest.mark.parametrize(("width", "height"), [PHONE, DESK])
async def test_every_view_fits_and_is_for_everybody(browser: Browser, lively: Sandbox, width: int, height: int) -> None:
    """No view is wider than the screen, what is touched is large enough, and axe finds nothing, dark or light.

    So it is with what makes views large, too: an exchange that is off, prices that stand apart, and long names.
    """
    await lively.set("kraken", rate_limit=-1, price=1.05)
    symbols = "BTC/USDT,PEPE/USDT,BTC/USDT:USDT,SHIB/USDT,NOPE/USDT"
    knobs: dict[str, Any] = {"market_types": "spot,swap", "cb_threshold": 1, "cb_reset_seconds": 600}
    async with gateway(lively, dashboard_symbols=symbols, **knobs) as live:
        await lively.set("binance", rate_limit=-1, refuse=True)
        page, seen = await open_page(browser, f"{live.url}/mobile", width, height)
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
                await expect(page.locator(".card[data-exchange=binance]")).to_have_attribute("data-state", "open")
            wide = await page.evaluate("document.documentElement.scrollWidth")
            found += [f"{view} is {wide} pixels wide"] if wide > width else []
            found += [f"{view}: {hard}" for hard in await hard_to_touch(page)] if width == PHONE[0] else []
            for scheme in ("light", "dark"):
                await page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
                found += [f"{view}, {scheme}: {told}" for told in [await axe(page)] if told]
        assert not found, "\n".join(found)
        seen.clean(but=f"{REFUSED}|{LEFT}")


async def hard_to_touch(page: Page) -> list[str]:
    """Name what can be touched and is smaller than it may be, or cannot be seen and takes the focus all the same."""
    told = await page.evaluate(
        """([least, thumb]) => [...document.querySelectorAll("a, button, select, input")].flatMap((it) => {
          const { width, height } = it.getBoundingClientRect();
          if (!it.checkVisibility() || it.matches(".skip")) return [];
          const name = `${it.tagName} ${it.className || it.textContent.trim()}`;
          if (it.closest("thead, .unseen")?.offsetWidth <= 1) return [`${name} takes the focus, and is not seen`];
          const isSmall = width < least || height < (it.tagName === "A" ? least : thumb) - 0.5;
          return isSmall ? [`${name}: ${width.toFixed()} x ${height.toFixed()}`] : [];
        })""",
        [LEAST_TARGET, THUMB],
    )
    return [str(one) for one in told]


async def test_a_keyboard_is_enough(browser: Browser, lively: Sandbox) -> None:
    """Tab reaches everything in the order it is seen, the focus shows and is not covered, and Enter does the rest."""
    async with gateway(lively, dashboard_symbols="BTC/USDT,ETH/USDT") as live:
        page, seen = await open_page(browser, live.url, *DESK)
        await is_live(page)

        async def tab(key: str = "Tab") -> dict[str, Any]:
            await page.keyboard.press(key)
            await expect(page.locator(":focus")).to_have_count(1)
            await until(lambda: page.evaluate("!document.getAnimations().length"))
            focused: dict[str, Any] = await page.evaluate(FOCUSED)
            assert focused["outlined"], focused
            assert focused["seen"], focused
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
        await page.keyboard.press("Enter")  # on what removes the last
        await expect(page.locator("#market th[data-cell=symbol] a")).to_have_text(["BTC/USDT"])
        lost = await page.evaluate("document.activeElement === document.body")
        await page.evaluate("document.querySelector('th[data-cell=change] button').focus()")
        await page.keyboard.press("Enter")
        await expect(page.locator("th[data-cell=change]")).to_have_attribute("aria-sort", "descending")
        await page.evaluate("document.querySelector('.brand').focus()")
        assert (await tab("Shift+Tab"))["kind"] == "skip"
        await page.keyboard.press("Enter")
        assert await page.evaluate("document.activeElement.id") == "main"
        assert page.url == f"{live.url}/"
        await page.locator('a[href="#BTC-USDT"]').focus()
        await page.keyboard.press("Enter")
        await expect(page.locator("#symbol h1")).to_have_text("BTC/USDT")
        names = [(await tab())["name"] for _ in range(8)]
        assert names[-3:] == ["4h", "from", "candles"]
        assert not lost, "the focus went with what was removed"
        seen.clean()


async def test_a_key_is_asked_for_and_kept_for_the_tab_only(browser: Browser, lively: Sandbox) -> None:
    """A wrong key is told, the right one opens everything; it is in no address and not kept beyond the tab."""
    key = "right-key-0123456789"
    async with gateway(lively, api_keys=f"web:{key}", dashboard_symbols="BTC/USDT") as live:
        page, seen = await open_page(browser, live.url, *PHONE)
        dialog, field, wrong = (
            page.locator("dialog#key"),
            page.get_by_label("Key", exact=True),
            page.locator("#key-wrong"),
        )
        await expect(dialog).to_be_visible()
        await expect(page.locator("body")).to_have_attribute("data-state", "refused")
        await expect(page.locator("#link")).to_have_text("Key needed")
        await expect(field).to_be_focused()
        await expect(wrong).to_be_empty()
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        for is_shown in (False, True):  # a tab that was hidden meanwhile still waits for the key
            await page.evaluate(SHOW, is_shown)
        await expect(page.locator("#link")).to_have_text("Paused")
        assert not await axe(page)
        assert not asked
        await field.fill("wrong-key-0123456789")
        await page.keyboard.press("Enter")
        await expect(wrong).to_have_text("The gateway does not know that key.")
        await expect(dialog).to_be_visible()
        await field.fill(key)
        await page.get_by_role("button", name="Use it").click()
        await is_live(page)
        await expect(dialog).to_be_hidden()
        await has_moved(page, "BTC/USDT")
        kept = await page.evaluate(
            "[JSON.stringify(sessionStorage), JSON.stringify(localStorage), location.href, document.cookie]"
        )
        assert [key in text for text in kept] == [True, False, False, False]
        assert key not in await page.content()
        await page.reload()
        await is_live(page)
        other, _ = await open_page(browser, live.url, *PHONE)
        await expect(other.locator("dialog#key")).to_be_visible()
        seen.clean(but=f"{REFUSED}|{LEFT}")


async def test_a_key_no_gateway_can_have_is_wrong(browser: Browser, lively: Sandbox) -> None:
    """What cannot even be sent in a header is told like any other wrong key."""
    async with gateway(lively, api_keys="web:right-key-0123456789") as live:
        page, _ = await open_page(browser, live.url, *DESK)
        await expect(page.locator("#key-wrong")).to_be_empty()
        for key in ("clé-secrète", "ключ-от-шлюза", "pass phrase €"):
            await page.get_by_label("Key", exact=True).fill(key)
            await page.keyboard.press("Enter")
            await expect(page.locator("#key-wrong")).to_have_text("The gateway does not know that key.")
            await expect(page.locator("dialog#key")).to_be_visible()
            await expect(page.get_by_label("Key", exact=True)).to_have_value("")
