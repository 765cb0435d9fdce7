"""What the counters have gained of late: the page shows rates, and has no Prometheus to ask."""

from collections import deque
from typing import NamedTuple

from src.core import metrics
from src.core.background import repeat
from src.core.clock import Clock

SAMPLE_SECONDS, KEEP_SECONDS = 5.0, 600.0
COUNTED = (  # with the labels that are kept apart, one at least: a sample is some fifty numbers so
    (metrics.http_requests_total, ("code",)),
    (metrics.cache_requests_total, ("result",)),
    (metrics.cache_served_age_seconds, ("route",)),
    (metrics.stream_messages_sent_total, ("channel",)),
    (metrics.exchange_requests_total, ("exchange", "outcome")),
)
Counts = dict[tuple[str, ...], float]  # by the name of a sample without `virtuoso_`, and those labels


class Gained(NamedTuple):
    """What has grown, by how much, and in how many seconds; only what has is there."""

    counts: Counts
    seconds: float

    def total(self, name: str, *labels: str) -> float:
        """Sum up what a counter has gained, all of it or with one of these as its first label."""
        return sum(n for key, n in self.counts.items() if key[0] == name and (not labels or key[1] in labels))


class Recent:
    """Samples of the counters, the first taken when it is made."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._samples = deque([(clock.monotonic(), _read())], maxlen=int(KEEP_SECONDS / SAMPLE_SECONDS) + 1)

    async def run(self) -> None:
        """Take samples, for ever."""
        await repeat("dashboard", self._take_sample, SAMPLE_SECONDS)

    async def _take_sample(self) -> None:
        self._samples.append((self._clock.monotonic(), _read()))

    def gained(self, seconds: float) -> Gained:
        """Tell what was gained in the last `seconds`, or a sample's time more; less after a start, when it may be 0."""
        now, counts = self._clock.monotonic(), _read()
        old = (sample for sample in reversed(self._samples) if now - sample[0] >= seconds)
        since, before = next(old, self._samples[0])
        return Gained({key: n - was for key, n in counts.items() if n > (was := before.get(key, 0.0))}, now - since)


def _read() -> Counts:
    metrics.flush()
    counts: Counts = {}
    for metric, labels in COUNTED:
        for sample in (sample for family in metric.collect() for sample in family.samples):
            if not sample.name.endswith("_bucket"):
                key = (sample.name.removeprefix("virtuoso_"), *(sample.labels[label] for label in labels))
                counts[key] = counts.get(key, 0.0) + sample.value
    return counts
