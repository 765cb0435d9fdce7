"""Call the public methods of pybit.

The argument is `{"url": URL, "calls": []}`. The URL is that of Bybit or of the gateway's
`/raw/bybit`. The output maps each method to its outcome.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from pybit.unified_trading import HTTP

from tests.raw.clients.outcomes import argument, outcome_of, selected, show

SYMBOL = "BTCUSDT"
ROWS = 20


def calls_of(session: Any) -> dict[str, Callable[[], Any]]:
    """Return the public calls, by name."""
    calls: dict[str, Callable[[], Any]] = {"get_server_time": session.get_server_time}
    for category in ("spot", "linear"):
        options = {"category": category}
        market = options | {"symbol": SYMBOL}
        rows = market | {"limit": ROWS}
        calls |= {
            f"get_tickers_{category}": partial(session.get_tickers, **market),
            f"get_all_tickers_{category}": partial(session.get_tickers, **options),
            f"get_orderbook_{category}": partial(session.get_orderbook, **rows),
            f"get_kline_{category}": partial(session.get_kline, interval="1", **rows),
            f"get_public_trade_history_{category}": partial(
                session.get_public_trade_history, **rows
            ),
            f"get_instruments_info_{category}": partial(session.get_instruments_info, **options),
        }
    return calls | swap_calls(session)


def swap_calls(session: Any) -> dict[str, Callable[[], Any]]:
    """Return the calls that only swaps have."""
    rows = {"category": "linear", "symbol": SYMBOL, "limit": ROWS}
    candles = rows | {"interval": "1"}
    return {
        "get_mark_price_kline": partial(session.get_mark_price_kline, **candles),
        "get_index_price_kline": partial(session.get_index_price_kline, **candles),
        "get_premium_index_price_kline": partial(session.get_premium_index_price_kline, **candles),
        "get_funding_rate_history": partial(session.get_funding_rate_history, **rows),
        "get_open_interest": partial(session.get_open_interest, intervalTime="1h", **rows),
        "get_long_short_ratio": partial(session.get_long_short_ratio, period="1h", **rows),
    }


def main() -> None:
    """Write the outcomes of all calls."""
    options = argument()
    session = HTTP()
    session.endpoint = options["url"]
    calls = selected(calls_of(session), options.get("calls", []))
    show({name: outcome_of(call) for name, call in calls.items()})


if __name__ == "__main__":
    main()
