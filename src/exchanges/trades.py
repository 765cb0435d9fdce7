"""Public trades of an exchange, from REST and from its sockets: only those of the market."""

from collections.abc import Sequence

from src.core import metrics
from src.core.models import Raw, Trades
from src.exchanges.profiles import PROFILES


def build_trades(raw: Sequence[Raw], exchange: str, symbol: str, fetched_at: int) -> Trades:
    """Convert ccxt's trades to the model, without rows that are not trades of the market.

    Such rows are counted. Raises the errors of `Trades.from_ccxt`.
    """
    is_market_trade = PROFILES[exchange].is_market_trade
    rows = [row for row in raw if is_market_trade(row.get("info") or {})]
    dropped = len(raw) - len(rows)
    if dropped:
        metrics.trades_dropped_total.labels(exchange, "not_market").inc(dropped)
    return Trades.from_ccxt(rows, exchange, symbol, fetched_at)
