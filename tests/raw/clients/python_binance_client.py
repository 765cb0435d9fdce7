"""Call the public methods of python-binance, in its sync or async version.

The argument is `{"mode": "sync", "url": URL, "calls": []}`. The URL is that of Binance or of the
gateway's `/raw/binance`. The output maps each method to its outcome.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from binance import AsyncClient, Client

from tests.raw.clients.outcomes import argument, outcome_of, outcome_of_async, selected, show

SYMBOL = "BTCUSDT"
ROWS = 20
PERIOD = "1h"


def configure(client_class: type[Any], url: str) -> None:
    """Set the base URLs of a class as docs/drop-in.md says, before a client is created."""
    client_class.API_URL = f"{url}/api"
    client_class.FUTURES_URL = f"{url}/fapi"
    client_class.FUTURES_DATA_URL = f"{url}/futures/data"


def calls_of(client: Any) -> dict[str, Callable[[], Any]]:
    """Return the public calls, by name."""
    return spot_calls(client) | swap_calls(client)


def spot_calls(client: Any) -> dict[str, Callable[[], Any]]:
    """Return the calls for spot markets."""
    market = {"symbol": SYMBOL}
    rows = market | {"limit": ROWS}
    candles = rows | {"interval": "1m"}
    return {
        "ping": client.ping,
        "get_server_time": client.get_server_time,
        "get_exchange_info": client.get_exchange_info,
        "get_symbol_info": partial(client.get_symbol_info, SYMBOL),
        "get_all_tickers": client.get_all_tickers,
        "get_orderbook_tickers": client.get_orderbook_tickers,
        "get_order_book": partial(client.get_order_book, **rows),
        "get_recent_trades": partial(client.get_recent_trades, **rows),
        "get_aggregate_trades": partial(client.get_aggregate_trades, **rows),
        "get_klines": partial(client.get_klines, **candles),
        "get_ui_klines": partial(client.get_ui_klines, **candles),
        "get_historical_klines": partial(
            client.get_historical_klines, SYMBOL, "1m", "3 hours ago UTC"
        ),
        "get_avg_price": partial(client.get_avg_price, **market),
        "get_ticker": partial(client.get_ticker, **market),
        "get_ticker_of_all": client.get_ticker,
        "get_symbol_ticker": partial(client.get_symbol_ticker, **market),
        "get_symbol_ticker_window": partial(client.get_symbol_ticker_window, **market),
        "get_orderbook_ticker": partial(client.get_orderbook_ticker, **market),
    }


def swap_calls(client: Any) -> dict[str, Callable[[], Any]]:
    """Return the calls for perpetual swaps."""
    market = {"symbol": SYMBOL}
    rows = market | {"limit": ROWS}
    candles = rows | {"interval": "1m"}
    period = rows | {"period": PERIOD}
    return {
        "futures_ping": client.futures_ping,
        "futures_time": client.futures_time,
        "futures_exchange_info": client.futures_exchange_info,
        "futures_order_book": partial(client.futures_order_book, **rows),
        "futures_recent_trades": partial(client.futures_recent_trades, **rows),
        "futures_aggregate_trades": partial(client.futures_aggregate_trades, **rows),
        "futures_klines": partial(client.futures_klines, **candles),
        "futures_mark_price_klines": partial(client.futures_mark_price_klines, **candles),
        "futures_mark_price": partial(client.futures_mark_price, **market),
        "futures_funding_rate": partial(client.futures_funding_rate, **rows),
        "futures_ticker": partial(client.futures_ticker, **market),
        "futures_symbol_ticker": partial(client.futures_symbol_ticker, **market),
        "futures_orderbook_ticker": partial(client.futures_orderbook_ticker, **market),
        "futures_open_interest": partial(client.futures_open_interest, **market),
        "futures_open_interest_hist": partial(client.futures_open_interest_hist, **period),
        "futures_top_longshort_account_ratio": partial(
            client.futures_top_longshort_account_ratio, **period
        ),
        "futures_top_longshort_position_ratio": partial(
            client.futures_top_longshort_position_ratio, **period
        ),
        "futures_global_longshort_ratio": partial(client.futures_global_longshort_ratio, **period),
        "futures_taker_longshort_ratio": partial(client.futures_taker_longshort_ratio, **period),
    }


def read(url: str, names: list[str]) -> dict[str, Any]:
    """Return the outcomes of the sync client, which pings when it is created."""
    configure(Client, url)
    created = outcome_of(Client)
    if "error" in created:
        return {"create": created}
    client = created["result"]
    return {name: outcome_of(call) for name, call in selected(calls_of(client), names).items()}


async def read_async(url: str, names: list[str]) -> dict[str, Any]:
    """Return the outcomes of the async client, which pings when it is created."""
    configure(AsyncClient, url)
    created = await outcome_of_async(AsyncClient.create)
    if "error" in created:
        return {"create": created}
    client = created["result"]
    outcomes = {}
    for name, call in selected(calls_of(client), names).items():
        outcomes[name] = await outcome_of_async(call)
    await client.close_connection()
    return outcomes


def main() -> None:
    """Write the outcomes of all calls."""
    options = argument()
    names = options.get("calls", [])
    if options["mode"] == "async":
        show(asyncio.run(read_async(options["url"], names)))
    else:
        show(read(options["url"], names))


if __name__ == "__main__":
    main()
