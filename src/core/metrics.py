"""Every metric the gateway exports. Labels are route templates and fixed words, never a symbol: there are few.

Gauges that mirror a state are set at each scrape (`status.update_gauges`), so they are true without any traffic.
What was not measured is not exported.
"""

import asyncio
import platform
from bisect import bisect_left
from collections import Counter as Counts
from collections.abc import Iterable
from itertools import product

import prometheus_client
from prometheus_client import REGISTRY, Counter, Gauge, disable_created_metrics
from prometheus_client.registry import Collector

from src.core.circuit_breaker import STATES
from src.core.clock import Clock

disable_created_metrics()  # type: ignore[no-untyped-call]  # the time each child was made doubles the series and tells nothing

VERSION = "0.1.0"
OPERATIONS = ("ticker", "tickers", "orderbook", "ohlcv", "trades", "markets", "time")
CACHE_RESULTS = ("hit_memory", "hit_redis", "miss", "stale_revalidate", "stale_error", "negative", "coalesced")
EVICTIONS = ("size", "expired", "cleared")
STREAM_CAUSES = ("closed", "junk", "lost", "refused", "silent", "timeout")  # why a socket was lost, or not had
STREAM_DROPS = ("slow_client", "implausible", "bus")
STREAM_REFUSALS = ("max_clients", "max_per_client")  # the settings whose bound was reached
LEASE_CHANGES = ("taken", "lost")
REFRESHES = ("success", "error", "skipped")
DATA_ROUTES = ("/ticker/{symbol}", "/tickers", "/orderbook/{symbol}", "/ohlcv/{symbol}", "/trades/{symbol}")
CODES = ("200", "500", "502", "503", "504")  # a code first seen with a burst would be no increase
TASKS = ("daily", "check", "warm")
COMPONENTS = (  # what runs beside requests, for the count of unexpected errors
    "breaker_probe", "cache_clears", "dashboard", "delivery", "loads", "loop_lag", "markets", "redis",
    "refresh_ahead", "shutdown", "streams",
)  # fmt: skip
LAG_INTERVAL_SECONDS = 0.025  # how often the loop is asked to wake up; a stall shorter than this may hide

FAST = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
AGES = (0.1, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300)


class Histogram(prometheus_client.Histogram):
    """A histogram that also takes what was counted elsewhere."""

    def add(self, counts: Iterable[int], total: float) -> None:
        """Add observations by bucket, the last one being the unbounded, and their sum."""
        for bucket, count in zip(self._buckets, counts, strict=True):
            bucket.inc(count)
        self._sum.inc(total)


class Hits:
    """Counts the memory hits of one route in plain numbers, which reach the metrics when those are read.

    The five metrics a hit shows in would cost as much time as the whole rest of a hit.
    """

    __slots__ = ("_age", "_ages", "_codes", "_durations", "_route", "_seconds", "_values")

    def __init__(self, route: str) -> None:
        self._route = route
        self._clear()

    def _clear(self) -> None:
        self._values, self._seconds, self._age = 0, 0.0, 0.0
        self._codes: dict[int, int] = {200: 0, 304: 0}
        self._durations, self._ages = [0] * (len(FAST) + 1), [0] * (len(AGES) + 1)

    def count(self, code: int, age: float, seconds: float, values: int) -> None:
        """Count one answer, made of so many values, and how long it took."""
        self._values += values
        self._codes[code] += 1
        self._seconds += seconds
        self._durations[bisect_left(FAST, seconds)] += 1
        self._age += age
        self._ages[bisect_left(AGES, age)] += 1

    def flush(self) -> None:
        """Add what was counted since the last time to the metrics."""
        for code, count in self._codes.items():
            if count:
                http_requests_total.labels(self._route, "GET", str(code)).inc(count)
        http_request_duration_seconds.labels(self._route).add(self._durations, self._seconds)
        cache_served_age_seconds.labels(self._route).add(self._ages, self._age)
        cache_requests_total.labels("hit_memory").inc(self._values)
        cache_tier_operations_total.labels("memory", "get", "hit").inc(self._values)
        self._clear()


def flush() -> None:
    """Bring what was counted in plain numbers into the metrics, for whoever reads one of them alone."""
    for counted in hits.values():
        counted.flush()
    for (client, outcome), count in clients.items():
        client_requests_total.labels(client, outcome).inc(count)
    clients.clear()
    for channel, count in streamed.items():
        stream_messages_sent_total.labels(channel).inc(count)
    streamed.clear()


class _Flush(Collector):
    """Has nothing of its own; registered first, so that whoever reads the metrics finds the hits in them."""

    def collect(self) -> Iterable[prometheus_client.Metric]:
        flush()
        return ()


class InProgress:
    """The requests being answered now."""

    count = 0


hits: dict[str, Hits] = {}  # by route; as many as there are routes
clients: Counts[tuple[str, str]] = Counts()  # by name of the key and outcome
streamed: Counts[str] = Counts()  # snapshots and updates, by channel
in_progress = InProgress()
REGISTRY.register(_Flush())

build_info = Gauge("virtuoso_build_info", "The running version; always 1.", ["version", "python"])
http_requests_total = Counter("virtuoso_http_requests_total", "Answers sent.", ["route", "method", "code"])
http_request_duration_seconds = Histogram(
    "virtuoso_http_request_duration_seconds", "Time from request to last byte.", ["route"], buckets=FAST
)
http_requests_in_progress = Gauge("virtuoso_http_requests_in_progress", "Requests being answered now.")
http_requests_in_progress.set_function(lambda: in_progress.count)
client_requests_total = Counter(
    "virtuoso_client_requests_total", "Requests held against the keys and the client limit.", ["client", "outcome"]
)
exchange_requests_total = Counter(
    "virtuoso_exchange_requests_total", "Calls made to an exchange.", ["exchange", "operation", "outcome"]
)
exchange_request_duration_seconds = Histogram(
    "virtuoso_exchange_request_duration_seconds", "Time of a call to an exchange.", ["exchange", "operation"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)  # fmt: skip
exchange_in_flight = Gauge("virtuoso_exchange_in_flight", "Calls to an exchange under way.", ["exchange"])
exchange_last_success_timestamp_seconds = Gauge(
    "virtuoso_exchange_last_success_timestamp_seconds", "When an exchange last answered well.", ["exchange"]
)
exchange_budget_used_ratio = Gauge(
    "virtuoso_exchange_budget_used_ratio", "Share of the request budget used in its window.", ["exchange"]
)
exchange_markets = Gauge("virtuoso_exchange_markets", "Markets listed by an exchange.", ["exchange"])
circuit_state = Gauge("virtuoso_circuit_state", "1 for the state a breaker is in, else 0.", ["exchange", "state"])
circuit_transitions_total = Counter("virtuoso_circuit_transitions_total", "Changes into a state.", ["exchange", "to"])
circuit_rejected_total = Counter(
    "virtuoso_circuit_rejected_total", "Calls a breaker did not let through.", ["exchange"]
)
cache_requests_total = Counter(
    "virtuoso_cache_requests_total", "Values asked for, by how they were answered.", ["result"]
)
cache_served_age_seconds = Histogram(
    "virtuoso_cache_served_age_seconds", "Age of the data when it was served.", ["route"], buckets=AGES
)
cache_tier_operations_total = Counter(
    "virtuoso_cache_tier_operations_total", "Operations on a cache tier.", ["tier", "operation", "outcome"]
)
cache_tier_operation_duration_seconds = Histogram(
    "virtuoso_cache_tier_operation_duration_seconds", "Time of an operation on a tier.", ["tier", "operation"],
    buckets=FAST[:-3],
)  # fmt: skip
cache_tier_up = Gauge(
    "virtuoso_cache_tier_up", "Whether a tier beyond this process answers; absent when it is not configured.", ["tier"]
)
cache_refreshes_total = Counter(
    "virtuoso_cache_refreshes_total", "Entries asked for often that came due for a refresh before expiry.", ["outcome"]
)
cache_entries = Gauge("virtuoso_cache_entries", "Entries in memory.")
cache_evictions_total = Counter("virtuoso_cache_evictions_total", "Entries that left memory.", ["reason"])
stream_sockets = Gauge("virtuoso_stream_sockets", "Sockets to an exchange that are open.", ["exchange", "channel"])
stream_reconnects_total = Counter(
    "virtuoso_stream_reconnects_total",
    "Times a socket to an exchange was lost, or could not be had.",
    ["exchange", "cause"],
)
stream_watched = Gauge("virtuoso_stream_watched", "Streams that are watched.", ["exchange", "channel"])
stream_stale = Gauge("virtuoso_stream_stale", "Watched streams whose exchange pushes nothing.", ["exchange"])
stream_subscribers = Gauge("virtuoso_stream_subscribers", "Clients connected for streams.", ["transport"])
stream_refused_total = Counter(
    "virtuoso_stream_refused_total", "Connections of clients refused because a bound was reached.", ["reason"]
)
stream_messages_received_total = Counter(
    "virtuoso_stream_messages_received_total", "Messages an exchange pushed.", ["exchange", "channel"]
)
stream_messages_sent_total = Counter(
    "virtuoso_stream_messages_sent_total", "Snapshots and updates given to clients.", ["channel"]
)
stream_conflated_total = Counter(
    "virtuoso_stream_conflated_total", "Updates a slow client did not get because a newer one came."
)
stream_dropped_total = Counter("virtuoso_stream_dropped_total", "What was thrown away.", ["reason"])
stream_event_age_seconds = Histogram(
    "virtuoso_stream_event_age_seconds", "Time from an exchange's message to clients.", buckets=FAST
)
stream_lease_changes_total = Counter(
    "virtuoso_stream_lease_changes_total", "Streams this replica began or ceased to watch for all.", ["to"]
)
event_loop_lag_seconds = Histogram(
    "virtuoso_event_loop_lag_seconds", "How late the event loop woke up.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1),
)  # fmt: skip
internal_errors_total = Counter(
    "virtuoso_internal_errors_total",
    "Unexpected errors of the gateway's own code in work beside requests.",
    ["component"],
)
maintenance_last_success_timestamp_seconds = Gauge(
    "virtuoso_maintenance_last_success_timestamp_seconds", "When a maintenance task last succeeded.", ["task"]
)


def initialise(exchanges: tuple[str, ...]) -> None:
    """Create the label sets that are known beforehand, so that a rate over them begins at zero."""
    build_info.labels(version=VERSION, python=platform.python_version()).set(1)
    for counter, values in (
        (cache_requests_total, CACHE_RESULTS), (cache_refreshes_total, REFRESHES), (cache_evictions_total, EVICTIONS),
        (stream_dropped_total, STREAM_DROPS), (stream_lease_changes_total, LEASE_CHANGES),
        (stream_refused_total, STREAM_REFUSALS), (internal_errors_total, COMPONENTS),
    ):  # fmt: skip
        for value in values:
            counter.labels(value)
    for route, code in product(DATA_ROUTES, CODES):
        http_requests_total.labels(route, "GET", code)
        http_request_duration_seconds.labels(route)
    for exchange in exchanges:
        circuit_rejected_total.labels(exchange)
        for state in STATES:
            circuit_transitions_total.labels(exchange, state)
        for operation in OPERATIONS:
            exchange_requests_total.labels(exchange, operation, "success")
        for cause in STREAM_CAUSES:
            stream_reconnects_total.labels(exchange, cause)


async def measure_loop_lag(clock: Clock) -> None:
    """Record once how late this task is woken: every other task waits as long."""
    before = clock.monotonic()
    await asyncio.sleep(LAG_INTERVAL_SECONDS)
    event_loop_lag_seconds.observe(max(0.0, clock.monotonic() - before - LAG_INTERVAL_SECONDS))
