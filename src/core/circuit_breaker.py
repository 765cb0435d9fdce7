"""The circuit breaker: after failures in a row it stops asking for a while, then lets one call try.

One state machine with three outcomes: success, failure, and no verdict (cancelled, or an error that says nothing about
the other side). Every outcome carries the generation it began in; one from an older generation changes nothing.
The rules are those of resilience4j, Polly and gobreaker where these agree.
"""

import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

from src.core.clock import Clock
from src.core.errors import CircuitOpen

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

CLOSED, OPEN, HALF_OPEN = "closed", "open", "half_open"
STATES = (CLOSED, OPEN, HALF_OPEN)
OnChange = Callable[[str, str, str | None], None]  # called with the old state, the new state and the cause


class CircuitBreaker:
    """Guards calls to one other side; durations are seconds of the monotonic clock.

    `threshold` failures in a row within `window_seconds` open it for `reset_seconds`, doubled for each trip in a row
    up to `max_open_seconds`. Errors of the classes in `neutral` pass through without a verdict.
    Raises `ValueError` for settings that cannot work.
    """

    def __init__(
        self,
        name: str,
        *,
        clock: Clock,
        threshold: int = 5,
        reset_seconds: float = 60,
        window_seconds: float = 60,
        max_open_seconds: float = 600,
        neutral: tuple[type[Exception], ...] = (),
        on_change: OnChange | None = None,
    ) -> None:
        if threshold < 1 or not (reset_seconds > 0 and window_seconds > 0 and max_open_seconds > 0):
            raise ValueError("a breaker needs a threshold of at least 1 and positive durations")
        self.name = name
        self.cause: str | None = None
        self.opened_at: float | None = None  # UTC seconds, for people
        self._clock = clock
        self._threshold = threshold
        self._reset_seconds = reset_seconds
        self._window_seconds = window_seconds
        self._max_open_seconds = max(max_open_seconds, reset_seconds)
        self._neutral = neutral
        self._on_change = on_change
        self._state = CLOSED
        self._generation = 0
        self._failures: deque[float] = deque(maxlen=threshold)
        self.trips = 0  # in a row; the open time doubles with each
        self._open_until = 0.0
        self._probing = False

    @property
    def state(self) -> str:
        """The state now; reading it takes no permit, and sees that the open time is over without any traffic."""
        if self._state == OPEN and self._clock.monotonic() >= self._open_until:
            self._change(HALF_OPEN)
        return self._state

    @property
    def admits(self) -> bool:
        """Whether a call would be let through now."""
        return self.state == CLOSED or (self._state == HALF_OPEN and not self._probing)

    @property
    def retry_after(self) -> float:
        """Seconds until a call may be let through; 0 when one may be now."""
        return max(0.0, self._open_until - self._clock.monotonic()) if self.state == OPEN else 0.0

    def is_idle(self, seconds: float) -> bool:
        """True if it has been half-open for `seconds` and no call is trying the other side."""
        waited = self._clock.monotonic() - self._open_until
        return self.state == HALF_OPEN and not self._probing and waited >= seconds

    async def call(self, function: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call the function if the breaker admits it, and learn from the outcome.

        Raises `CircuitOpen` without calling it otherwise; its own errors come through as they are.
        """
        generation = self._admit()
        try:
            result = await function(*args, **kwargs)
        except self._neutral:
            self._no_verdict(generation)
            raise
        except Exception as error:
            self._failure(generation, str(getattr(error, "cause", "error")))
            raise
        except BaseException:  # cancelled: the caller left, the other side is not to blame
            self._no_verdict(generation)
            raise
        self._success(generation)
        return result

    def open_until(self, until: float, cause: str) -> None:
        """Keep it open at least until the monotonic time `until`, as a ban or a `Retry-After` demands."""
        if self.state != OPEN:
            self._open_until, self.cause = until, cause
            self._change(OPEN)
        elif until > self._open_until:
            self._open_until, self.cause = until, cause

    def reset(self) -> None:
        """Close it with a full failure budget."""
        self._failures.clear()
        self.trips = 0
        if self._state != CLOSED:
            self._change(CLOSED)

    def _admit(self) -> int:
        if not self.admits:
            wait = self.retry_after
            raise CircuitOpen(
                f"the circuit breaker of {self.name} is {self._state} ({self.cause}); wait, or ask another exchange",
                exchange=self.name,
                retry_after=wait if 0 < wait < math.inf else 1.0,
                cause=self.cause,
            )
        self._probing = self._state == HALF_OPEN
        return self._generation

    def _success(self, generation: int) -> None:
        if generation == self._generation:
            self.reset()

    def _failure(self, generation: int, cause: str) -> None:
        if generation != self._generation:
            return
        now = self._clock.monotonic()
        self._failures.append(now)  # holds the last `threshold` failures, so only the oldest needs a look
        recent = self._failures[0] > now - self._window_seconds
        if self._state == HALF_OPEN or (len(self._failures) == self._threshold and recent):
            self.trips += 1
            self.open_until(now + self._open_seconds(), cause)

    def _open_seconds(self) -> float:
        growth = 2.0 ** min(self.trips - 1, 32)  # a longer exponent only risks overflow: the cap decides
        return min(self._reset_seconds * growth, self._max_open_seconds)

    def _no_verdict(self, generation: int) -> None:
        if generation == self._generation:
            self._probing = False

    def _change(self, new: str) -> None:
        old, self._state = self._state, new
        self._generation += 1
        self._probing = False
        if new == OPEN:
            self.opened_at = self._clock.time()
        elif new == CLOSED:
            self.cause = self.opened_at = None
            self._open_until = 0.0
        if self._on_change is not None:
            try:
                self._on_change(old, new, self.cause)
            except Exception:
                log.exception("a breaker's listener failed", extra={"breaker": self.name})
