"""The subscriptions of one exchange socket: what the next messages to the exchange contain."""

import random
from collections.abc import Callable

from src.core.circuit_breaker import exponential_backoff
from src.exchanges.profiles import Profile
from src.streams.liveness import Liveness

RETRY_INITIAL_SECONDS = 0.5  # doubled after each failure; each pause is reduced by up to half
RETRY_MAX_SECONDS = 30.0  # before a symbol is subscribed again
REFUSED_SPLIT = 4  # a refused message is repeated in messages with a fourth of its symbols


class Subscriptions:
    """Symbols to subscribe and to unsubscribe, in groups that the exchange accepts."""

    def __init__(self, profile: Profile, kind: str, market_type: str) -> None:
        self.limits = profile.socket_limits[market_type]
        self.watched: dict[str, Liveness] = {}
        self.ended: set[str] = set()  # not yet unsubscribed
        self._topics_per_symbol = len(profile.topics[kind])

    def remove(self, symbol: str) -> None:
        """Unsubscribe from a symbol."""
        liveness = self.watched.pop(symbol, None)
        if liveness is not None and liveness.subscribed_at is not None:
            liveness.subscribed_at = None
            self.ended.add(symbol)

    def repeat(self, symbol: str, now: float) -> None:
        """Unsubscribe from a symbol, and subscribe again after a pause."""
        liveness = self.watched.get(symbol)
        if liveness is not None and liveness.subscribed_at is not None:
            liveness.subscribed_at = None
            liveness.retry_at = now + retry_pause(liveness.failures)
            liveness.failures += 1
            self.ended.add(symbol)

    def take_ended(self) -> list[str]:
        """Return symbols for the next message that unsubscribes."""
        size = max(1, self.limits.frame_topics // self._topics_per_symbol)
        group = sorted(self.ended)[:size]
        self.ended.difference_update(group)
        return group

    def find_due(self, now: float, is_listed: Callable[[str], object]) -> list[str]:
        """Return symbols for the next message that subscribes.

        Symbols whose last message was refused are sent apart from others and in smaller groups, so
        that one refused symbol does not affect others for long.
        """
        due = [symbol for symbol, liveness in self.watched.items() if liveness.is_due(now)]
        due = [symbol for symbol in due if is_listed(symbol)]
        if not due:
            return []
        refusals = self.watched[due[0]].refusals
        size = max(1, self.limits.frame_topics // REFUSED_SPLIT**refusals)
        group = [symbol for symbol in due if self.watched[symbol].refusals == refusals]
        return group[: min(size, self._free_symbols())]

    def _free_symbols(self) -> int:
        """Return how many more symbols the socket can carry. The others are polled by REST."""
        subscribed = sum(liveness.subscribed_at is not None for liveness in self.watched.values())
        return max(0, self.limits.socket_topics // self._topics_per_symbol - subscribed)


def retry_pause(failures: int, maximum: float = RETRY_MAX_SECONDS) -> float:
    """Return the seconds before the next attempt, reduced at random by up to half."""
    longest = exponential_backoff(failures, RETRY_INITIAL_SECONDS, maximum)
    return longest * random.uniform(0.5, 1.0)  # noqa: S311 - not a secret
