"""Time as an argument: everything that ages, expires or waits asks a clock it was given."""

import time
from typing import Protocol


class Clock(Protocol):
    """Where the time comes from; tests hand in one they can move."""

    def monotonic(self) -> float:
        """Seconds from an unknown start, never going back: for durations."""

    def time(self) -> float:
        """UTC seconds since 1970: for what a client or another replica sees."""


class SystemClock:
    """The machine's own clocks."""

    monotonic = staticmethod(time.monotonic)
    time = staticmethod(time.time)
