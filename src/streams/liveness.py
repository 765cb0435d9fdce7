"""Silence detection: how long a symbol may send nothing before the gateway considers it lost.

A socket that answers pings may still push nothing. Each symbol therefore has its own pace, learned
from its messages, and is silent when nothing arrives for much longer than that.
"""

import math
from dataclasses import dataclass

from src.core.circuit_breaker import exponential_backoff

# A pushed value is fresh for this many times the pace: then some messages are missing, and REST is
# asked if a client wants the value. Clients of streams are told later, see below.
FRESH_PACES = 3
FRESH_MIN_SECONDS = 2.0
SILENT_PACES = 10  # a symbol is silent after this many times its pace, within the next two bounds
SILENT_MIN_SECONDS = 5.0
SILENT_MAX_SECONDS = 600.0
FIRST_MESSAGE_SECONDS = 15.0  # doubled after each failed attempt while the pace is unknown
PACE_DECAY = 0.2  # seconds by which the pace shrinks per second


@dataclass(slots=True)
class Liveness:
    """Message times of one watched symbol. All times are monotonic seconds."""

    created_at: float
    subscribed_at: float | None = None
    """None if this replica is not subscribed now."""

    is_resubscribed: bool = False
    """True from a subscription until its first message."""

    last_message_at: float | None = None
    has_new_message: bool = False
    """True if a message arrived since the last decision about the topic."""

    pace: float | None = None
    """Longest recent gap between two messages, in seconds."""

    failures: int = 0
    """Failed attempts to subscribe since the last message."""

    refusals: int = 0
    """Refused subscriptions since the last message."""

    retry_at: float = 0.0

    @property
    def timeout(self) -> float:
        """Return the seconds without a message after which the symbol counts as silent."""
        if self.pace is None:
            return exponential_backoff(self.failures, FIRST_MESSAGE_SECONDS, SILENT_MAX_SECONDS)
        return min(max(SILENT_PACES * self.pace, SILENT_MIN_SECONDS), SILENT_MAX_SECONDS)

    @property
    def fresh_seconds(self) -> float:
        """Return for how long a pushed value stands for the present."""
        return math.inf if self.pace is None else max(FRESH_PACES * self.pace, FRESH_MIN_SECONDS)

    def record_message(self, now: float) -> None:
        """Learn the pace from a message.

        Messages may arrive in bursts, so the pace is the longest gap, which decays over time. A gap
        beyond the timeout may be an outage: then the pace doubles at most.
        """
        if self.last_message_at is not None:
            self._learn(now - self.last_message_at)
        self.last_message_at = now
        self.failures = 0
        self.refusals = 0
        self.has_new_message = True

    def _learn(self, gap: float) -> None:
        longest = SILENT_MAX_SECONDS / SILENT_PACES
        if self.pace is None:
            self.pace = min(gap, self.timeout, longest)
            return
        if gap > self.timeout:
            gap = 2 * max(self.pace, SILENT_MIN_SECONDS / SILENT_PACES)
        self.pace = min(max(gap, self.pace - PACE_DECAY * gap), longest)

    def is_due(self, now: float) -> bool:
        """Return True if it is time to subscribe."""
        return self.subscribed_at is None and self.retry_at <= now

    def is_silent(self, now: float) -> bool:
        """Return True if this replica's subscription is overdue for a message."""
        if self.subscribed_at is None:
            return False
        if self.last_message_at is None or self.last_message_at < self.subscribed_at:
            return now - self.subscribed_at > max(self.timeout, FIRST_MESSAGE_SECONDS)
        return now - self.last_message_at > self.timeout

    def is_overdue(self, now: float) -> bool:
        """Return True if a message is overdue, whichever replica receives the messages."""
        latest = self.created_at if self.last_message_at is None else self.last_message_at
        return now - latest > self.timeout
