"""Tickers by REST, completed so that each member means the same as in the stream."""

from collections.abc import Mapping, Sequence
from typing import Any

from src.exchanges.ccxt_client import CcxtClient
from src.exchanges.profiles import Profile

TOP_FIELDS = ("bid", "bidVolume", "ask", "askVolume")
TIME_FIELDS = ("timestamp", "datetime")
LAST_TRADE = "lastTradeTimestamp"
"""Member that `with_last_trade` adds to ccxt's ticker: UTC milliseconds."""
Raw = dict[str, Any]
"""ccxt's ticker."""


async def fetch_ticker(profile: Profile, symbol: str, client: CcxtClient) -> Raw:
    """Fetch one ticker."""
    ticker = await client.fetch_ticker(symbol)
    return (await _complete(profile, [symbol], client, {symbol: ticker}))[symbol]


async def fetch_tickers(
    profile: Profile, symbols: Sequence[str], client: CcxtClient
) -> dict[str, Raw]:
    """Fetch tickers of one market type."""
    tickers = await client.fetch_tickers(list(symbols))
    return await _complete(profile, symbols, client, tickers)


def join_top(ticker: Raw, top: Mapping[str, Any]) -> Raw:
    """Return a ticker with bid and ask of `top`, and the later time of both."""
    newest = top if (top["timestamp"] or 0) > (ticker["timestamp"] or 0) else ticker
    joined = ticker | {name: top[name] for name in TOP_FIELDS}
    return joined | {name: newest[name] for name in TIME_FIELDS}


def with_last_trade(profile: Profile, ticker: Raw) -> Raw:
    """Return a ticker with the time of the last trade, if the exchange sends the time."""
    info = ticker.get("info")
    if not isinstance(info, Mapping):  # of an answer that is no ticker
        return ticker
    times = [info[name] for name in profile.last_trade_fields if name in info]
    return ticker | {LAST_TRADE: times[0]} if times else ticker


async def _complete(
    profile: Profile, symbols: Sequence[str], client: CcxtClient, tickers: Mapping[str, Raw]
) -> dict[str, Raw]:
    market_type = "swap" if ":" in symbols[0] else "spot"
    tops: Mapping[str, Raw] = {}
    if market_type in profile.separate_rest_top_types:
        tops = await client.fetch_bids_asks(list(symbols))
    undefined = dict.fromkeys(profile.undefined_rest_fields)
    completed = {}
    for symbol, ticker in tickers.items():
        known = with_last_trade(profile, ticker) | undefined
        completed[symbol] = join_top(known, tops[symbol]) if symbol in tops else known
    return completed
