"""Connection attempts to one exchange: within its limit, and one after the other while they fail.

An exchange that accepts connections again is noticed within `interval` seconds. Then all sockets
connect at once.
"""

from collections import deque

from src.core.clock import Clock
from src.exchanges.profiles import Profile

INTERVAL_MIN_SECONDS = 2.0  # between two attempts while the exchange accepts no connection
# The part of the limit that attempts use while they fail. The rest is for the sockets that connect
# afterwards.
ATTEMPTS_RATIO = 0.95


class Dialer:
    """Decides when a socket of an exchange may connect. Times are monotonic seconds."""

    def __init__(self, profile: Profile, clock: Clock) -> None:
        self._count, self._seconds = profile.connection_limit
        self.interval = max(INTERVAL_MIN_SECONDS, self._seconds / self._count / ATTEMPTS_RATIO)
        self._clock = clock
        self._attempts: deque[float] = deque(maxlen=self._count)
        self.is_failing = False
        self.connected_at = 0.0
        """Time of the last connection that was opened."""

    def can_dial(self) -> bool:
        """Return True if a socket may connect now."""
        now = self._clock.monotonic()
        if self.is_failing and self._attempts and now - self._attempts[-1] < self.interval:
            return False
        is_full = len(self._attempts) == self._count
        return not is_full or now - self._attempts[0] > self._seconds

    def record_attempt(self) -> None:
        """Count a new connection towards the limit."""
        self._attempts.append(self._clock.monotonic())

    def record_success(self) -> None:
        """Let all sockets connect: the exchange accepts connections."""
        if self.is_failing:
            self.connected_at = self._clock.monotonic()
        self.is_failing = False
