"""All metrics of the gateway.

Labels are route templates and fixed words, never symbols, so the number of series is bounded.
Gauges that mirror a state are set at each scrape (`status.update_gauges`), so they are correct
without traffic. A value that was not measured is not exported.
"""

import asyncio
import platform
from bisect import bisect_left
from collections import Counter as Counts
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import product
from types import SimpleNamespace

import prometheus_client
from prometheus_client import Counter, Gauge, disable_created_metrics

from src.core.circuit_breaker import STATES
from src.core.clock import Clock

# A `_created` time for each series would double the number of series.
disable_created_metrics()  # type: ignore[no-untyped-call]

VERSION = "0.2.0"
CACHE_RESULTS = (
    "hit_memory", "hit_redis", "miss", "stale_revalidate", "stale_error", "negative", "coalesced",
)  # fmt: skip
EVICTIONS = ("size", "expired", "cleared")
STREAM_CAUSES = ("closed", "junk", "lost", "refused", "silent", "timeout")
REFRESHES = ("success", "error", "skipped")
TASKS = ("daily", "check", "deep_check", "warm")
COMPONENTS = (
    "breaker_probe", "cache_clears", "dashboard", "delivery", "loads", "loop_lag", "markets",
    "redis", "refresh_ahead", "shutdown", "streams",
)  # fmt: skip
LAG_INTERVAL_SECONDS = 0.025  # pause between two measurements; shorter stalls may be missed

# Upper bounds of histogram buckets, in seconds.
FAST = (1e-4, 2.5e-4, 5e-4, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
LAGS = FAST[3:13]
AGES = (0.1, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300)


class Histogram(prometheus_client.Histogram):
    """A histogram that also accepts observations counted elsewhere."""

    def add(self, counts: Iterable[int], total: float) -> None:
        """Add the number of observations per bucket, the unbounded bucket last, and their sum."""
        for bucket, count in zip(self._buckets, counts, strict=True):
            bucket.inc(count)
        self._sum.inc(total)


class Hits:
    """Memory hits of one route, counted in plain numbers until the next scrape.

    Updating the five metrics of a hit would take as long as the rest of the hit.
    """

    def __init__(self) -> None:
        self._values = 0
        self._codes = {200: 0, 304: 0}
        self._durations = [0] * (len(FAST) + 1)
        self._ages = [0] * (len(AGES) + 1)
        self._total_duration = 0.0
        self._total_age = 0.0

    def count(self, code: int, age: float, seconds: float, values: int) -> None:
        """Count one answer with `values` values. `age` and `seconds` (duration) are in seconds."""
        self._values += values
        self._codes[code] += 1
        self._durations[bisect_left(FAST, seconds)] += 1
        self._ages[bisect_left(AGES, age)] += 1
        self._total_duration += seconds
        self._total_age += age

    def add_to_metrics(self, route: str) -> None:
        """Add the counts to the metrics of `route`."""
        for code, count in self._codes.items():
            if count:
                http_requests_total.labels(route, "GET", str(code)).inc(count)
        http_request_duration_seconds.labels(route).add(self._durations, self._total_duration)
        cache_served_age_seconds.labels(route).add(self._ages, self._total_age)
        cache_requests_total.labels("hit_memory").inc(self._values)
        cache_tier_operations_total.labels("memory", "get", "hit").inc(self._values)


hits: defaultdict[str, Hits] = defaultdict(Hits)  # by route
clients: Counts[tuple[str, str]] = Counts()  # by name of the key, and outcome
raw_hits: defaultdict[tuple[str, str], list[int]] = defaultdict(lambda: [0])  # by exchange and path
streamed: Counts[str] = Counts()  # snapshots and updates, by channel
in_progress = SimpleNamespace(count=0)  # requests in progress


def flush() -> None:
    """Add everything that is counted in plain numbers to the metrics, before they are read."""
    for route, route_hits in hits.items():
        route_hits.add_to_metrics(route)
    hits.clear()
    for (client, outcome), count in clients.items():
        client_requests_total.labels(client, outcome).inc(count)
    clients.clear()
    for (exchange, path), hits_of_path in raw_hits.items():
        raw_requests_total.labels(exchange, path, "hit_memory").inc(hits_of_path[0])
        hits_of_path[0] = 0
    for channel, count in streamed.items():
        stream_messages_sent_total.labels(channel).inc(count)
    streamed.clear()


def _counter(name: str, text: str, *labels: str, **values: Iterable[str]) -> Counter:
    """Create a counter. prometheus_client adds `_total` to its name.

    `values` are further labels, whose series exist from the start for all of their values.
    """
    counter = Counter(f"virtuoso_{name}", text, (*labels, *values))
    if values:
        _create_series(counter, *values.values())
    return counter


def _gauge(name: str, text: str, *labels: str) -> Gauge:
    return Gauge(f"virtuoso_{name}", text, labels)


def _histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
    return Histogram(f"virtuoso_{name}", text, labels, buckets=buckets)


def _create_series(metric: Counter | Histogram, *values: Iterable[str]) -> None:
    """Create the series of all combinations, so that their rates start at zero."""
    for labels in product(*values):
        metric.labels(*labels)


build_info = _gauge("build_info", "The running version. Always 1.", "version", "python")
http_requests_total = _counter("http_requests", "Requests answered.", "route", "method", "code")
http_request_duration_seconds = _histogram(
    "http_request_duration_seconds", "Time from request to last byte.", FAST, "route"
)
http_requests_in_progress = _gauge("http_requests_in_progress", "Requests in progress.")
http_requests_in_progress.set_function(lambda: in_progress.count)
client_requests_total = _counter(
    "client_requests", "Requests checked for keys and client limits.", "client", "outcome"
)
exchange_requests_total = _counter(
    "exchange_requests", "Calls to an exchange.", "exchange", "operation", "outcome"
)
exchange_request_duration_seconds = _histogram(
    "exchange_request_duration_seconds",
    "Duration of a call to an exchange.",
    FAST[5:],
    "exchange",
    "operation",
)
rows_dropped_total = _counter(
    "rows_dropped", "Implausible rows of an answer that were left out.", "exchange", "operation"
)
exchange_in_flight = _gauge("exchange_in_flight", "Exchange calls in progress.", "exchange")
exchange_last_success_timestamp_seconds = _gauge(
    "exchange_last_success_timestamp_seconds", "Time of the last successful call.", "exchange"
)
exchange_budget_used_ratio = _gauge(
    "exchange_budget_used_ratio",
    "Used share of a request budget in its window.",
    *("exchange", "pool"),
)
exchange_markets = _gauge("exchange_markets", "Markets listed by an exchange.", "exchange")
circuit_state = _gauge("circuit_state", "1 for a breaker's state, else 0.", "exchange", "state")
circuit_transitions_total = _counter(
    "circuit_transitions", "Breaker transitions.", "exchange", "to"
)
circuit_rejected_total = _counter("circuit_rejected", "Calls rejected by a breaker.", "exchange")
raw_requests_total = _counter(
    "raw_requests", "Raw requests answered.", "exchange", "path", "outcome"
)
cache_requests_total = _counter(
    "cache_requests", "Requested values by result.", result=CACHE_RESULTS
)
cache_served_age_seconds = _histogram(
    "cache_served_age_seconds", "Age of the data when it was served.", AGES, "route"
)
cache_tier_operations_total = _counter(
    "cache_tier_operations", "Operations on a tier.", "tier", "operation", "outcome"
)
cache_tier_operation_duration_seconds = _histogram(
    "cache_tier_operation_duration_seconds",
    "Duration of an operation on a tier.",
    FAST[:-3],
    "tier",
    "operation",
)
cache_tier_up = _gauge(
    "cache_tier_up", "1 if an external tier answers, else 0. Absent if not configured.", "tier"
)
cache_refreshes_total = _counter(
    "cache_refreshes", "Hot entries due for a refresh before expiry.", outcome=REFRESHES
)
cache_entries = _gauge("cache_entries", "Entries in memory.")
cache_bytes = _gauge("cache_bytes", "Size of the entries in memory.")
cache_evictions_total = _counter("cache_evictions", "Entries that left memory.", reason=EVICTIONS)
stream_sockets = _gauge("stream_sockets", "Open sockets to an exchange.", "exchange", "channel")
stream_reconnects_total = _counter(
    "stream_reconnects", "Lost or failed sockets to an exchange.", "exchange", "cause"
)
stream_watched = _gauge("stream_watched", "Topics that are watched.", "exchange", "channel")
stream_stale = _gauge("stream_stale", "Watched topics without updates.", "exchange")
stream_subscribers = _gauge("stream_subscribers", "Streaming connections.", "transport")
stream_refused_total = _counter(  # the reason is the setting that was reached: STREAM_...
    "stream_refused", "Refused streaming connections.", reason=("max_clients", "max_per_client")
)
stream_messages_received_total = _counter(
    "stream_messages_received", "Messages from an exchange.", "exchange", "channel"
)
stream_messages_sent_total = _counter("stream_messages_sent", "Messages to clients.", "channel")
stream_conflated_total = _counter("stream_conflated", "Updates that slow clients skipped.")
stream_dropped_total = _counter(
    "stream_dropped",
    "Messages dropped.",
    reason=("slow_client", "implausible", "bus", "late", "incomplete"),
)
trades_dropped_total = _counter(
    "trades_dropped", "Rows left out of lists of trades.", "exchange", "reason"
)
stream_event_age_seconds = _histogram(
    "stream_event_age_seconds", "Time from receipt until publishing to a feed.", FAST
)
receipt_lag_seconds = _histogram(
    "receipt_lag_seconds", "Time from the exchange's own time to receipt.", FAST[3:], "exchange"
)
delivery_lag_seconds = _histogram(
    "delivery_lag_seconds",
    "Time from the exchange's own time of a pushed value to publishing to feeds.",
    FAST[3:],
    "exchange",
)
stream_lease_changes_total = _counter(
    "stream_lease_changes",
    "Topics that this replica began or stopped to watch for all.",
    to=("taken", "lost"),
)
event_loop_lag_seconds = _histogram("event_loop_lag_seconds", "Event loop delay.", LAGS)
internal_errors_total = _counter(
    "internal_errors", "Unexpected background errors.", component=COMPONENTS
)
maintenance_last_success_timestamp_seconds = _gauge(
    "maintenance_last_success_timestamp_seconds", "Last success of a maintenance task.", "task"
)


def initialise(exchanges: Sequence[str], kinds: Sequence[str], routes: Sequence[str]) -> None:
    """Create the series of the enabled exchanges, the kinds of data and the routes of data."""
    build_info.labels(version=VERSION, python=platform.python_version()).set(1)
    codes = ("200", "500", "502", "503", "504")  # a series that starts with a burst has no increase
    _create_series(http_requests_total, routes, ("GET",), codes)
    _create_series(http_request_duration_seconds, routes)
    operations = (*kinds, "tickers", "markets", "time")
    _create_series(exchange_requests_total, exchanges, operations, ("success",))
    _create_series(rows_dropped_total, exchanges, ("ohlcv",))
    _create_series(circuit_rejected_total, exchanges)
    _create_series(circuit_transitions_total, exchanges, STATES)
    _create_series(stream_reconnects_total, exchanges, STREAM_CAUSES)
    _create_series(receipt_lag_seconds, exchanges)
    _create_series(delivery_lag_seconds, exchanges)


def observe_lag(histogram: Histogram, exchange: str, time_ms: int, now: float) -> None:
    """Record the time since `time_ms` of an exchange's clock; 0 if that clock is ahead of ours."""
    histogram.labels(exchange).observe(max(0.0, now - time_ms / 1000))


async def measure_loop_lag(clock: Clock) -> None:
    """Measure once how late the event loop wakes this task. Other tasks are as late."""
    start = clock.monotonic()
    await asyncio.sleep(LAG_INTERVAL_SECONDS)
    event_loop_lag_seconds.observe(max(0.0, clock.monotonic() - start - LAG_INTERVAL_SECONDS))
