"""Record when the machine stood still, so that latencies of these times can be left out.

A process sleeps in a loop. If it wakes up late, no process of the machine could run meanwhile.
"""

import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen

SLEEP_SECONDS = 0.005
LATE_SECONDS = 0.02  # the process needs a core only for microseconds
RECOVERY_SECONDS = 0.25  # after a stall, while queued work is processed


class Stalls:
    """The times when the machine stood still, as pairs of begin and end in UTC milliseconds."""

    def __init__(self, spans: list[tuple[float, float]]) -> None:
        self._begins = [begin for begin, _ in spans]
        self._ends = [end for _, end in spans]

    def overlap(self, begin: float, end: float) -> bool:
        """Return True if a stall or the recovery after it overlaps with this time."""
        first = bisect_left(self._ends, begin)  # the first stall that ends later
        return first < len(self._ends) and self._begins[first] <= end

    def share(self, begin: float, end: float) -> float:
        """Return the share of this time, from 0 to 1, that is left out."""
        lost = 0.0
        counted_until = begin
        for stall_begin, stall_end in zip(self._begins, self._ends, strict=True):
            lost += max(0.0, min(stall_end, end) - max(stall_begin, counted_until))
            counted_until = max(counted_until, stall_end)
        return lost / (end - begin)


class StallLog:
    """The file in which the sleeping process records stalls."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> Stalls:
        """Return all stalls until now, each with the time of recovery."""
        pairs = [line.split() for line in self._path.read_text().splitlines()]
        return Stalls(
            [(float(begin), float(end) + 1000 * RECOVERY_SECONDS) for begin, end in pairs]
        )


@contextmanager
def record_stalls() -> Iterator[StallLog]:
    """Record stalls inside the context."""
    with (
        tempfile.NamedTemporaryFile() as file,
        Popen([sys.executable, "-m", __name__], stdout=file) as process,
    ):
        try:
            yield StallLog(Path(file.name))
        finally:
            process.kill()


def main() -> None:
    """Sleep in a loop and print the begin and end of each stall."""
    while True:
        began = time.time()
        time.sleep(SLEEP_SECONDS)
        ended = time.time()
        if ended - began > SLEEP_SECONDS + LATE_SECONDS:
            sys.stdout.write(f"{began * 1000} {ended * 1000}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
