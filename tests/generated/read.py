"""Fetch a ticker, an order book and an error with a client from openapi-python-client."""

import json
import sys

from virtuoso_client import Client
from virtuoso_client.api.market_data import get_order_book, get_ticker
from virtuoso_client.models import ErrorCode, OrderBook, Problem, Ticker


def read(url: str) -> dict[str, object]:
    """Return values that a test compares with the responses of the gateway."""
    with Client(base_url=url) as client:
        ticker = get_ticker.sync("BTC-USDT", client=client)
        book = get_order_book.sync("BTC/USDT", client=client, limit=5)
        problem = get_ticker.sync("BTC-USTD", client=client)
    assert isinstance(ticker, Ticker)
    assert isinstance(book, OrderBook)
    assert isinstance(problem, Problem)
    code = problem.code if problem.code is ErrorCode.UNKNOWN_SYMBOL else None
    return {
        "price": ticker.price,
        "bids": book.bids,
        "code": code,
        "suggestions": problem.suggestions,
    }


sys.stdout.write(json.dumps(read(sys.argv[1])))
