"""The last price of each market, with which the prices of other exchanges are compared.

The same symbol can mean another coin on another exchange. A fallback is then a wrong price.
"""

from collections.abc import Sequence

from cachetools import TTLCache

from src.cache.cache import Outcome
from src.cache.entry import Entry, Key, Served
from src.core.clock import Clock
from src.core.errors import PriceMismatch
from src.kinds import price_of

MAX_PRICES = 20_000  # three exchanges list about 5,000 markets
# Within this time a price rarely moves by the bound; after it a fallback is no longer compared.
KEEP_SECONDS = 6 * 3600.0


class LastPrices:
    """The last price of each market by exchange and symbol."""

    def __init__(self, max_deviation: float, clock: Clock) -> None:
        """Prices may differ by the ratio `max_deviation`. 0 turns the comparison off."""
        self._max_deviation = max_deviation
        self._prices: TTLCache[tuple[str, str], float] = TTLCache(
            MAX_PRICES, KEEP_SECONDS, timer=clock.monotonic
        )

    def record(self, entry: Entry) -> None:
        """Remember the price of an answer that an exchange sent."""
        price = price_of(entry)
        if price is not None:
            self._prices[entry.key.exchange, entry.key.symbol] = price

    def is_known(self, key: Key) -> bool:
        """Return True if a price of the market is remembered."""
        return (key.exchange, key.symbol) in self._prices

    def check(self, outcome: Outcome, keys: Sequence[Key]) -> Outcome:
        """Return the outcome, or the error if the outcome may be of another coin."""
        if isinstance(outcome, Served) and outcome.entry is not None:
            return self.find_mismatch(outcome.entry, keys) or outcome
        return outcome

    def find_mismatch(self, entry: Entry, keys: Sequence[Key]) -> PriceMismatch | None:
        """Return the error if an entry must not replace that of a more preferred key."""
        if entry.key == keys[0]:
            return None
        return self.compare(entry.key, keys, price_of(entry))

    def compare(
        self, key: Key, keys: Sequence[Key], price: float | None = None
    ) -> PriceMismatch | None:
        """Return the error if the price of `key` is not that of a more preferred key.

        Without `price`, the last known price is compared.
        """
        known = [other for other in keys[: keys.index(key)] if self.is_known(other)]
        price = price or self._prices.get((key.exchange, key.symbol))
        if not (known and price and self._max_deviation):
            return None
        preferred = known[0].exchange
        last = self._prices[preferred, key.symbol]
        if max(price, last) / min(price, last) - 1 <= self._max_deviation:
            return None
        detail = (
            f"{key.symbol} costs {price:g} on {key.exchange} and last cost {last:g} on {preferred},"
            " which differs by more than FALLBACK_MAX_DEVIATION: it may be another coin; request"
            f" exchange={key.exchange} if it is the right one"
        )
        return PriceMismatch(detail, exchange=key.exchange, symbol=key.symbol)
