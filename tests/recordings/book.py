"""An order book that is built from recorded snapshots and updates, independently of ccxt."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Levels = Sequence[Sequence[str]]  # price and amount


class Book:
    """Bids and asks by price, with the recorded texts."""

    def __init__(self) -> None:
        self._sides: dict[str, dict[float, Sequence[str]]] = {"bids": {}, "asks": {}}

    def clear(self) -> None:
        """Forget all levels: a snapshot follows."""
        for side in self._sides.values():
            side.clear()

    def apply(self, bids: Levels, asks: Levels) -> None:
        """Set the amounts of some prices. The amount 0 removes a price."""
        for side, levels in (("bids", bids), ("asks", asks)):
            for level in levels:
                if float(level[1]):
                    self._sides[side][float(level[0])] = level
                else:
                    self._sides[side].pop(float(level[0]), None)

    def best(self, side: str, count: int) -> list[Sequence[str]]:
        """Return the best levels of a side."""
        prices: Iterable[float] = sorted(self._sides[side], reverse=side == "bids")
        return [self._sides[side][price] for price in list(prices)[:count]]


def apply_bybit(book: Book, message: Mapping[str, Any]) -> None:
    """Apply a message of Bybit's channel `orderbook`."""
    if message["type"] == "snapshot":
        book.clear()
    book.apply(message["data"]["b"], message["data"]["a"])
