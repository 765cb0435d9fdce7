"""The first cache tier: entries in this process, least recently used out first.

The tier counts how often each entry is requested. An entry that was requested `HOT_HITS` times is
hot and may be refreshed before it expires. Half of its hits pass to the entry that replaces it, so
keys that are no longer requested stop being hot after a few TTLs.
"""

from collections import OrderedDict

from src.cache.entry import Entry, Key
from src.core import metrics
from src.core.clock import Clock

HOT_HITS = 2
MAX_INHERITED_HITS = 4  # enough for two more TTLs without a single request
MAX_HOT = 1000  # hot keys at once; the refresh loop checks each of them several times a second


class Memory:
    """At most `size` entries with `max_bytes` in all, each kept until `keep_seconds` after its TTL.

    Counts the reasons why entries leave. No entry that can change is fresh at an age of
    `fresh_seconds` or more, whatever its TTL.
    """

    def __init__(
        self, size: int, max_bytes: int, fresh_seconds: float, keep_seconds: float, clock: Clock
    ) -> None:
        self.hot: dict[Key, Entry] = {}
        self.bytes = 0
        self._max_bytes = max_bytes
        self._fresh_seconds = fresh_seconds
        self._size = size
        self._keep_seconds = keep_seconds
        self._clock = clock
        self._entries: OrderedDict[Key, Entry] = OrderedDict()

    def __len__(self) -> int:
        self._expire()
        return len(self._entries)

    def get(self, key: Key) -> Entry | None:
        """Return the entry, however old, and mark it as recently used."""
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def find_fresh(self, key: Key, max_age: float | None = None) -> Entry | None:
        """Return the entry if it is fresh and younger than `max_age` seconds. Counts nothing."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        age = self._clock.monotonic() - entry.born
        if age >= entry.ttl or (age >= self._fresh_seconds and not entry.is_final):
            return None
        if max_age is not None and max(age, 0.0) >= max_age:
            return None
        return entry

    def count_hit(self, entry: Entry) -> None:
        """Count a request for an entry of `find_fresh`.

        Call it at once, before the entry can be replaced.
        """
        self._entries.move_to_end(entry.key)
        entry.hits += 1
        if entry.hits == HOT_HITS:
            self._add_hot(entry)

    def put(self, entry: Entry) -> None:
        """Store an entry in place of the one before.

        Over the size, the least recently used entries leave.
        """
        key = entry.key
        known = self._entries.pop(key, None)
        if known is not None:
            entry.hits = min(known.hits // 2, MAX_INHERITED_HITS)
            entry.earlier_hits = known.earlier_hits + known.hits - entry.hits
            self.bytes -= known.size
        self._expire()
        while len(self._entries) >= self._size or self._is_over(entry):
            self.remove(next(iter(self._entries)), "size")
        self._entries[key] = entry
        self.bytes += entry.size
        self.hot.pop(key, None)
        if entry.hits >= HOT_HITS:
            self._add_hot(entry)

    def remove(self, key: Key, reason: str) -> None:
        """Remove the entry, if there is one, for one of the reasons in `metrics.EVICTIONS`."""
        self.hot.pop(key, None)
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.bytes -= entry.size
            metrics.cache_evictions_total.labels(reason).inc()

    def request_count(self, key: Key) -> int | None:
        """Return how often the key was requested since it has had an entry without a break."""
        entry = self._entries.get(key)
        return None if entry is None else entry.earlier_hits + entry.hits

    def keys(self) -> list[Key]:
        """Return the keys of all entries."""
        return list(self._entries)

    def has_usable(self) -> bool:
        """Return True if any entry could still be served as stale."""
        now = self._clock.monotonic()
        return any(
            now < entry.born + entry.ttl + self._keep_seconds
            for entry in reversed(self._entries.values())
        )

    def _add_hot(self, entry: Entry) -> None:
        if len(self.hot) < MAX_HOT:
            self.hot[entry.key] = entry

    def _is_over(self, entry: Entry) -> bool:
        """Return True if an entry does not fit. The newest entry always stays."""
        return bool(self._entries) and self.bytes + entry.size > self._max_bytes

    def _expire(self) -> None:
        """Remove expired entries at the front, where entries that are not used gather."""
        now = self._clock.monotonic()
        while self._entries:
            entry = next(iter(self._entries.values()))
            if now < entry.born + entry.keep_seconds(self._keep_seconds):
                return
            self.remove(entry.key, "expired")
