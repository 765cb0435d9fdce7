"""Detects missing, late and repeated updates of streamed order books.

An update changes the levels of an earlier book. If one is lost, the book is wrong from then on. The
exchanges number the updates, or send a checksum of the best levels.
"""

from collections.abc import Sequence
from typing import Any
from zlib import crc32

from src.exchanges.profiles import BookUpdate, FindBookUpdate

CHECKSUM_LEVELS = 10
MAX_EXACT = 2**53  # digits of larger numbers are lost when JSON is decoded


class BookGuard:
    """Checks the updates of the order books of one socket. Books are named as on the socket."""

    def __init__(self, find_update: FindBookUpdate | None) -> None:
        self._find_update = find_update
        self._updates: dict[str, BookUpdate] = {}  # last update of each complete book

    def forget(self, name: str) -> None:
        """Ignore the updates of a book until its next snapshot."""
        self._updates.pop(name, None)

    def is_next(self, message: Any) -> bool:
        """Return True if a message contains the next update of a complete book, or no update.

        Raises `MissingUpdateError` if updates before this one are missing.
        """
        update = self._find_update(message) if self._find_update else None
        if update is None:
            return True
        if not update.is_snapshot and not self._continues(update):
            return False
        self._updates[update.name] = update
        return True

    def _continues(self, update: BookUpdate) -> bool:
        last = self._updates.get(update.name)
        if last is None:
            return False  # no snapshot yet: the update changes an unknown book
        if last.number is None or update.number is None or update.number == last.number + 1:
            return True
        if update.number > last.number:
            self.forget(update.name)
            raise MissingUpdateError(update.name)
        return False  # repeated or late

    def time_of(self, name: str) -> str:
        """Return the time of the last update of a book, empty if ccxt reads it."""
        return self._updates[name].time if name in self._updates else ""

    def is_correct(self, name: str, book: Any, decimals: Sequence[int] | None) -> bool:
        """Return False if a book differs from the checksum of its last update.

        `decimals` are those of prices and amounts. Without them, nothing can be checked.
        """
        expected = self._updates[name].checksum if name in self._updates else None
        computed = None if expected is None or not decimals else checksum(book, *decimals)
        if computed in (None, expected):
            return True
        self.forget(name)
        return False


class MissingUpdateError(Exception):
    """Updates of the named book are missing."""


def checksum(book: Any, price_decimals: int, amount_decimals: int) -> int | None:
    """Return Kraken's checksum of a book: CRC32 of the digits of the best ten asks and bids.

    https://docs.kraken.com/exchange/guides/websockets/spot-ws-book-v2. Returns None if a number is
    too large to have all its digits.
    """
    digits = ""
    for price, amount, *_ in [*book["asks"][:CHECKSUM_LEVELS], *book["bids"][:CHECKSUM_LEVELS]]:
        for number, decimals in ((price, price_decimals), (amount, amount_decimals)):
            if number * 10**decimals > MAX_EXACT:
                return None
            digits += f"{number:.{decimals}f}".replace(".", "").lstrip("0")
    return crc32(digits.encode())
