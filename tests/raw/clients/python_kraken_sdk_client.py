"""Call the public methods of python-kraken-sdk.

The argument is `{"url": URL, "calls": []}`. The URL is that of Kraken or of the gateway's
`/raw/kraken`. The output maps each method to its outcome.
"""

from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from kraken.spot import Market

from tests.raw.clients.outcomes import argument, outcome_of, selected, show

PAIR = "XBTUSDT"
ROWS = 20


class DropInMarket(Market):  # type: ignore[misc] # the package is not installed here
    """A client whose URL may have a path, as docs/drop-in.md says. The original drops the path."""

    def request(self, method: str, uri: str, **options: Any) -> Any:
        """Request a path below that of the URL."""
        return super().request(method, urlsplit(self.URL).path + uri, **options)


def calls_of(market: Any) -> dict[str, Callable[[], Any]]:
    """Return the public calls, by name."""
    return {
        "get_system_status": market.get_system_status,
        "get_assets": market.get_assets,
        "get_asset_pairs": market.get_asset_pairs,
        "get_ticker": partial(market.get_ticker, pair=PAIR),
        "get_all_tickers": market.get_ticker,
        "get_ohlc": partial(market.get_ohlc, pair=PAIR, interval=1),
        "get_order_book": partial(market.get_order_book, pair=PAIR, count=ROWS),
        "get_recent_trades": partial(market.get_recent_trades, pair=PAIR, count=ROWS),
        "get_recent_spreads": partial(market.get_recent_spreads, pair=PAIR),
    }


def main() -> None:
    """Write the outcomes of all calls."""
    options = argument()
    market = DropInMarket(url=options["url"])
    calls = selected(calls_of(market), options.get("calls", []))
    show({name: outcome_of(call) for name, call in calls.items()})


if __name__ == "__main__":
    main()
