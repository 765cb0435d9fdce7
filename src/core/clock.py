"""Clocks are passed as arguments, so that tests control the time."""

import time
from typing import Protocol


class Clock(Protocol):
    """A source of time."""

    def monotonic(self) -> float:
        """Return seconds since an arbitrary start that never decrease, for durations."""

    def time(self) -> float:
        """Return UTC seconds since 1970, for times that clients or other replicas see."""


class SystemClock:
    """The clock of the operating system."""

    monotonic = staticmethod(time.monotonic)
    time = staticmethod(time.time)
