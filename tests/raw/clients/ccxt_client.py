"""Call the public methods of ccxt, in its async or sync version.

The argument is `{"mode": "async", "calls": [], "exchanges": {"binance": {"public": URL,
"other": URL}}}`. Public market data is requested from the first URL, all other data from the
second. Without `calls`, all methods are called. The output maps exchange and method to the outcome.
"""

import asyncio
import importlib
from functools import partial
from typing import Any

from tests.raw.clients.outcomes import argument, outcome_of, outcome_of_async, selected, show

SPOT = "BTC/USDT"
SWAP = "BTC/USDT:USDT"
CANDLES = 20
LEVELS = 10
TIMEOUT_MS = 60_000
"""Longer than by default, for a busy machine."""


def drop_in_urls(exchange: str, url: str) -> dict[str, str]:
    """Return the settings of ccxt that docs/drop-in.md has: `urls["api"]` of public data."""
    if exchange != "binance":
        return {"public": url}
    return {
        "public": f"{url}/api/v3",
        "fapiPublic": f"{url}/fapi/v1",
        "fapiPublicV2": f"{url}/fapi/v2",
        "fapiPublicV3": f"{url}/fapi/v3",
        "fapiData": f"{url}/futures/data",
    }


def configuration(exchange: str, public: str, other: str) -> dict[str, Any]:
    """Return the configuration of a client."""
    urls = drop_in_urls(exchange, public)
    if exchange == "binance":
        urls["sapi"] = f"{other}/sapi/v1"
    return {
        "timeout": TIMEOUT_MS,
        "enableRateLimit": False,
        "urls": {"api": urls},
        "options": {"fetchMarkets": {"types": ["spot", "linear"]}},
    }


def calls_of(client: Any) -> dict[str, partial[Any]]:
    """Return the calls that a client supports, by name."""
    calls = {
        "fetch_time": partial(client.fetch_time),
        "fetch_status": partial(client.fetch_status),
        "fetch_markets": partial(client.fetch_markets),
        "fetch_currencies": partial(client.fetch_currencies),
    }
    calls |= market_calls(client, SPOT)
    calls["fetch_tickers"] = partial(client.fetch_tickers, [SPOT, "ETH/USDT"])
    calls["fetch_all_tickers"] = partial(client.fetch_tickers)
    calls["fetch_bids_asks"] = partial(client.fetch_bids_asks, [SPOT])
    calls["fetch_last_prices"] = partial(client.fetch_last_prices, [SPOT])
    if SWAP in client.markets:
        calls |= {f"{name}_swap": call for name, call in market_calls(client, SWAP).items()}
        calls |= swap_calls(client)
    names = {name: call.func.__name__ for name, call in calls.items()}
    return {name: call for name, call in calls.items() if is_supported(client, names[name])}


def market_calls(client: Any, symbol: str) -> dict[str, partial[Any]]:
    """Return the calls for one market, spot or swap."""
    return {
        "fetch_ticker": partial(client.fetch_ticker, symbol),
        "fetch_order_book": partial(client.fetch_order_book, symbol, LEVELS),
        "fetch_ohlcv": partial(client.fetch_ohlcv, symbol, "1m", None, CANDLES),
        "fetch_trades": partial(client.fetch_trades, symbol, None, CANDLES),
    }


def swap_calls(client: Any) -> dict[str, partial[Any]]:
    """Return the calls that only swaps have."""
    history = partial(client.fetch_funding_rate_history, SWAP, None, CANDLES)
    interest = partial(client.fetch_open_interest_history, SWAP, "1h", None, CANDLES)
    ratio = partial(client.fetch_long_short_ratio_history, SWAP, "1h", None, CANDLES)
    return {
        "fetch_funding_rate": partial(client.fetch_funding_rate, SWAP),
        "fetch_funding_rates": partial(client.fetch_funding_rates, [SWAP]),
        "fetch_funding_intervals": partial(client.fetch_funding_intervals, [SWAP]),
        "fetch_funding_rate_history": history,
        "fetch_open_interest": partial(client.fetch_open_interest, SWAP),
        "fetch_open_interest_history": interest,
        "fetch_long_short_ratio_history": ratio,
        "fetch_mark_price": partial(client.fetch_mark_price, SWAP),
        "fetch_mark_ohlcv": partial(client.fetch_mark_ohlcv, SWAP, "1m", None, CANDLES),
        "fetch_index_ohlcv": partial(client.fetch_index_ohlcv, SWAP, "1m", None, CANDLES),
    }


def is_supported(client: Any, method: str) -> bool:
    """Return True if a client has a method. The names in `has` are such as fetchOHLCV."""
    first, *words = method.split("_")
    name = first + "".join("OHLCV" if word == "ohlcv" else word.title() for word in words)
    return bool(client.has.get(name))


def read(exchange: str, urls: dict[str, str], names: list[str]) -> dict[str, Any]:
    """Return the outcomes of the sync client of an exchange."""
    module = importlib.import_module("ccxt")
    client = getattr(module, exchange)(configuration(exchange, **urls))
    outcomes = {"load_markets": outcome_of(client.load_markets)}
    if "error" in outcomes["load_markets"]:
        return outcomes
    outcomes["load_markets"] = {"result": client.symbols}
    for name, call in selected(calls_of(client), names).items():
        outcomes[name] = outcome_of(call)
    return outcomes


async def read_async(exchange: str, urls: dict[str, str], names: list[str]) -> dict[str, Any]:
    """Return the outcomes of the async client of an exchange."""
    module = importlib.import_module("ccxt.async_support")
    async with getattr(module, exchange)(configuration(exchange, **urls)) as client:
        outcomes = {"load_markets": await outcome_of_async(client.load_markets)}
        if "error" in outcomes["load_markets"]:
            return outcomes
        outcomes["load_markets"] = {"result": client.symbols}
        for name, call in selected(calls_of(client), names).items():
            outcomes[name] = await outcome_of_async(call)
    return outcomes


async def read_all_async(options: Any) -> dict[str, Any]:
    """Return the outcomes of the async clients of all exchanges."""
    return {
        exchange: await read_async(exchange, urls, options.get("calls", []))
        for exchange, urls in options["exchanges"].items()
    }


def main() -> None:
    """Write the outcomes of all exchanges."""
    options = argument()
    if options["mode"] == "async":
        show(asyncio.run(read_all_async(options)))
        return
    show(
        {
            exchange: read(exchange, urls, options.get("calls", []))
            for exchange, urls in options["exchanges"].items()
        }
    )


if __name__ == "__main__":
    main()
