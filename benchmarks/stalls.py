"""Notes when the machine stood still: a process that does nothing but sleep, and woke up late, could not have run."""

import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import Popen

SLEEP_SECONDS = 0.005
LATE_SECONDS = 0.02  # for what sleeps 5 ms and needs a core for microseconds
RECOVERY_SECONDS = 0.25  # after it, while what has gathered is worked off


class Stalls:
    """When the machine stood still: begins and ends, as UTC milliseconds."""

    def __init__(self, spans: list[tuple[float, float]]) -> None:
        self._begins = [begin for begin, _ in spans]
        self._ends = [end for _, end in spans]

    def touch(self, begin: float, end: float) -> bool:
        """Whether the machine stood still at some time between, or has not recovered from that."""
        at = bisect_left(self._ends, begin)  # the first that ended later
        return at < len(self._ends) and self._begins[at] <= end

    def share(self, begin: float, end: float) -> float:
        """Return which part of this time is lost to them, recovery included."""
        lost, until = 0.0, begin
        for start, stop in zip(self._begins, self._ends, strict=True):
            first, last = max(start, until), min(stop, end)
            lost, until = lost + max(0.0, last - first), max(until, last)
        return lost / (end - begin)


@contextmanager
def noted() -> Iterator["Noted"]:
    """Note stalls from now on."""
    with tempfile.NamedTemporaryFile() as file, Popen([sys.executable, "-m", __name__], stdout=file) as process:
        try:
            yield Noted(file.name)
        finally:
            process.kill()


class Noted:
    """What the process wrote down so far."""

    def __init__(self, name: str) -> None:
        self._name = name

    def read(self) -> Stalls:
        """Return all stalls up to now."""
        with open(self._name) as file:  # noqa: PTH123
            pairs = [line.split() for line in file]
        return Stalls([(float(begin), float(end) + 1000 * RECOVERY_SECONDS) for begin, end in pairs])


def main() -> None:
    """Sleep, for ever."""
    while True:
        began = time.time()
        time.sleep(SLEEP_SECONDS)
        if (ended := time.time()) - began > SLEEP_SECONDS + LATE_SECONDS:
            sys.stdout.write(f"{began * 1000} {ended * 1000}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
