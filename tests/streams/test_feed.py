"""Encoding of order books for subscribers with different numbers of levels."""

from typing import get_args

from src.cache.entry import encode
from src.core.models import OrderBook
from src.streams.feed import encode_levels
from src.streams.topics import CHANNELS, MAX_LEVELS, ChannelName, MarketDataEvent, Topic

TOPIC = Topic("kraken", "orderbook", "BTC/USDT")
RAW = {
    "timestamp": 1_700_000_000_000,
    "nonce": 7,
    "bids": [[100.5 - level, 0.25] for level in range(60)],
    "asks": [[101 + level, 1e-7] for level in range(55)],
}


def order_book(levels: int) -> OrderBook:
    return OrderBook.from_ccxt(RAW, TOPIC.exchange, TOPIC.symbol, 1_700_000_000_001, levels)


def test_each_depth_equals_the_rest_body() -> None:
    """A book with fewer levels has the bytes of REST."""
    book = order_book(MAX_LEVELS)
    event = MarketDataEvent(TOPIC, 1, book.timestamp, book.fetched_at, encode(book))
    depths = (1, 10, MAX_LEVELS)
    expected = {depth: encode(order_book(depth)) for depth in depths}
    assert encode_levels(event, depths) == expected


def test_every_channel_name_has_a_row() -> None:
    """The type of channel names and the table of channels have the same names."""
    assert list(get_args(ChannelName)) == list(CHANNELS)
