"""The circuit breaker: one state machine with the states closed, open and half-open.

Closed, the breaker admits every call. After `threshold` failures in a row it opens and rejects
every call. When the open time is over it is half-open and admits one call, the probe, whose outcome
closes or opens the breaker.

If all failures that opened the breaker were about one subject (a market), a call about another one
is admitted as a second opinion. Its success closes the breaker; its failure keeps it open.

A call ends in success, failure or no verdict (cancelled, or an error that says nothing about the
other side). A change of state begins a new generation. The outcome of a call from an older
generation is ignored. The rules are those of resilience4j, Polly and gobreaker where these agree.
"""

import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar, TypeVarTuple

from src.core.clock import Clock
from src.core.errors import RETRY_ADVICE, CircuitOpen

log = logging.getLogger(__name__)
T = TypeVar("T")
Ts = TypeVarTuple("Ts")

CLOSED = "closed"
OPEN = "open"
HALF_OPEN = "half_open"
STATES = (CLOSED, OPEN, HALF_OPEN)
REJECTION_SECONDS = 1.0  # retry_after of a rejection when the end of the open time is unknown
MAX_DOUBLINGS = 32  # avoids an overflow; the maximum decides long before

OnChange = Callable[[str, str, str | None], object]
"""Receives the old state, the new state and the cause."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """When a breaker opens, and for how long.

    Raises `ValueError` for a threshold or a duration that is not positive.
    """

    threshold: int = 5
    """Failures in a row that open the breaker."""
    window_seconds: float = 60
    """Older failures do not count."""
    reset_seconds: float = 60
    """First open time. Each further trip in a row doubles the open time."""
    max_open_seconds: float = 600
    """Longest open time. If it is shorter than `reset_seconds`, that is the longest."""
    neutral: tuple[type[Exception], ...] = ()
    """Errors without a verdict, besides those whose `scope` is not the exchange."""

    def __post_init__(self) -> None:
        durations = (self.window_seconds, self.reset_seconds, self.max_open_seconds)
        if self.threshold < 1 or min(durations) <= 0:
            raise ValueError("a breaker needs a threshold of at least 1 and positive durations")

    def is_failure(self, error: BaseException) -> bool:
        """True if an error counts as a failure. A cancellation has no verdict."""
        is_about_exchange = getattr(error, "scope", "exchange") == "exchange"
        is_neutral = isinstance(error, self.neutral) or not is_about_exchange
        return isinstance(error, Exception) and not is_neutral

    def is_exceeded(self, failures: deque[tuple[float, str]]) -> bool:
        """True if the last `threshold` failures in a row are within the window."""
        is_row = len(failures) == self.threshold
        return is_row and failures[-1][0] - failures[0][0] < self.window_seconds


@dataclass(eq=False, slots=True)
class _Generation:
    """The time between two changes of state."""

    state: str = CLOSED
    is_probing: bool = False


class CircuitBreaker:
    """Guard calls to another system.

    Times are those of the monotonic clock, except `opened_at` (UTC seconds).
    """

    def __init__(self, name: str, clock: Clock, policy: Policy, on_change: OnChange) -> None:
        self.name = name
        self.cause: str | None = None
        self.opened_at: float | None = None
        self.open_until = 0.0
        self.trips = 0  # in a row
        self.suspect = ""
        """The only subject whose calls failed. Empty if there is none, or if others failed, too."""
        self._clock = clock
        self._policy = policy
        self.on_change = on_change
        self._generation = _Generation()
        # Times and subjects of the last ones.
        self._failures: deque[tuple[float, str]] = deque(maxlen=policy.threshold)

    @property
    def state(self) -> str:
        """The current state. An open breaker becomes half-open by time, without a call."""
        if self._generation.state == OPEN and self._clock.monotonic() >= self.open_until:
            self._change(HALF_OPEN)
        return self._generation.state

    def admits(self, subject: str = "") -> bool:
        """True if a call would be admitted now: about a subject, or without one."""
        is_other = "" not in (subject, self.suspect) and subject != self.suspect
        return (self.state != OPEN or is_other) and not self._generation.is_probing

    @property
    def retry_after(self) -> float:
        """Seconds until a call may be admitted. 0 if the breaker is not open."""
        return self.open_until - self._clock.monotonic() if self.state == OPEN else 0.0

    async def call(
        self, function: Callable[[*Ts], Awaitable[T]], *args: *Ts, subject: str = ""
    ) -> T:
        """Call the function and record the outcome. Raises `CircuitOpen` if it is not admitted.

        `subject` is what the call is about, if it is about one of several.
        """
        if not self.admits(subject):
            raise self._rejection()
        generation = self._generation
        generation.is_probing = generation.state != CLOSED
        try:
            result = await function(*args)
        except BaseException as error:
            generation.is_probing = False
            if generation is self._generation and self._policy.is_failure(error):
                self._record_failure(str(getattr(error, "cause", "error")), subject)
            raise
        if generation is self._generation:
            self.reset()
        return result

    def trip(self, until: float, cause: str) -> None:
        """Open until the monotonic time `until`, from any state."""
        self.suspect = ""
        self.open_until = until
        self.cause = cause
        if self._generation.state != OPEN:
            self.opened_at = self._clock.time()
            self._change(OPEN)

    def reset(self) -> None:
        """Close, and forget all failures and trips."""
        self._failures.clear()
        self.trips = 0
        self.cause = None
        self.opened_at = None
        if self._generation.state != CLOSED:
            self._change(CLOSED)
        self.suspect = ""

    def _record_failure(self, cause: str, subject: str) -> None:
        if self._generation.state == OPEN:  # a second opinion
            self.suspect = ""
            return
        now = self._clock.monotonic()
        self._failures.append((now, subject))
        if self._generation.state == HALF_OPEN or self._policy.is_exceeded(self._failures):
            longest = self._policy.max_open_seconds
            seconds = exponential_backoff(self.trips, self._policy.reset_seconds, longest)
            self.trips += 1
            self.trip(now + seconds, cause)
            is_alone = len({failed for _, failed in self._failures}) == 1
            self.suspect = subject if is_alone else ""

    def _change(self, new: str) -> None:
        old = self._generation.state
        self._generation = _Generation(new)
        try:
            self.on_change(old, new, self.cause)
        except Exception:
            log.exception("breaker callback failed", extra={"breaker": self.name})

    def _rejection(self) -> CircuitOpen:
        seconds = self.retry_after
        return CircuitOpen(
            f"the circuit breaker of {self.name} is {self.state} ({self.cause}); {RETRY_ADVICE}",
            exchange=self.name,
            retry_after=seconds if 0 < seconds < math.inf else REJECTION_SECONDS,
            cause=self.cause,
        )


def hold(breaker: CircuitBreaker, until: float, cause: str) -> None:
    """Keep a breaker open until the monotonic time `until`, as a ban or Retry-After asks.

    A hold never shortens the open time. When it ends the breaker is half-open.
    """
    breaker.suspect = ""  # a hold is about all markets
    if breaker.state != OPEN or until > breaker.open_until:
        breaker.trip(until, cause)


def exponential_backoff(failures: int, initial: float, maximum: float) -> float:
    """Return `initial`, doubled for each of the `failures`, up to `maximum`."""
    return min(initial * 2.0 ** min(failures, MAX_DOUBLINGS), max(initial, maximum))
