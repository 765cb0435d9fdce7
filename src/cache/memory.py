"""The first tier: entries in this process, least recently used out first, and a note of which are asked for often.

An entry asked for `HOT_HITS` times is hot: it may be refreshed before it expires. Half of its popularity passes to the
entry that takes its place, so what nobody asks for any more is forgotten within a few lives.
"""

from collections import OrderedDict

from src.cache.entry import Entry, Key
from src.core import metrics
from src.core.clock import Clock

HOT_HITS = 2
INHERITED_HITS = 4  # most that pass to the next entry: enough for two more lives without a single request
MAX_HOT = 1000  # hot keys known at once; each is looked at several times a second


class Held:
    """An entry in memory, under which key, and how often it was asked for."""

    __slots__ = ("before", "entry", "hits", "key")

    def __init__(self, key: Key, entry: Entry, hits: int, before: int) -> None:
        self.key = key
        self.entry = entry
        self.hits = hits
        self.before = before  # what the entries before it were asked for, less what passed to this one's hits


class Memory:
    """At most `size` entries, each until `keep_seconds` after its TTL; counts why entries leave.

    None is given out as fresh at `fresh_seconds` of age or later, whatever its TTL.
    """

    def __init__(self, size: int, fresh_seconds: float, keep_seconds: float, clock: Clock) -> None:
        self.hot: dict[Key, Entry] = {}
        self._fresh_seconds = fresh_seconds
        self._size = size
        self._keep_seconds = keep_seconds
        self._clock = clock
        self._held: OrderedDict[Key, Held] = OrderedDict()

    def __len__(self) -> int:
        self._expire()
        return len(self._held)

    def get(self, key: Key) -> Entry | None:
        """Return the entry, however old, and count it as used."""
        if (held := self._held.get(key)) is None:
            return None
        self._held.move_to_end(key)
        return held.entry

    def ready(self, key: Key, max_age: float | None = None) -> Entry | None:
        """Return the entry if it is fresh and younger than `max_age` seconds, and count that it was asked for."""
        if (held := self.fresh(key, max_age)) is None:
            return None
        self.use(held)
        return held.entry

    def fresh(self, key: Key, max_age: float | None = None) -> Held | None:
        """Return what `ready` would, without a trace."""
        if (held := self._held.get(key)) is None:
            return None
        age = self._clock.monotonic() - held.entry.born
        if age >= held.entry.ttl or age >= self._fresh_seconds or (max_age is not None and max(age, 0.0) >= max_age):
            return None
        return held

    def use(self, held: Held) -> None:
        """Count that what `fresh` returned was asked for; at once, before anything can have taken its place."""
        self._held.move_to_end(held.key)
        held.hits += 1
        if held.hits == HOT_HITS:
            self._heat(held.key, held.entry)

    def put(self, key: Key, entry: Entry) -> None:
        """Keep an entry in place of the one before it; what is over the size goes, the least recently used first."""
        known = self._held.pop(key, None)
        hits = min(known.hits // 2, INHERITED_HITS) if known else 0
        self._expire()
        while len(self._held) >= self._size:
            self.pop(next(iter(self._held)), "size")
        before = known.before + known.hits - hits if known else 0
        self._held[key] = Held(key, entry, hits, before)
        self.hot.pop(key, None)
        if hits >= HOT_HITS:
            self._heat(key, entry)

    def pop(self, key: Key, reason: str) -> None:
        """Forget an entry, if there is one, for one of `metrics.EVICTIONS`."""
        self.hot.pop(key, None)
        if self._held.pop(key, None) is not None:
            metrics.cache_evictions_total.labels(reason).inc()

    def asked(self, key: Key) -> int | None:
        """Return how often a key was asked for since there has been an entry of it without a break."""
        held = self._held.get(key)
        return None if held is None else held.before + held.hits

    def keys(self) -> list[Key]:
        """Every key there is an entry of."""
        return list(self._held)

    def has_any(self) -> bool:
        """Whether any entry could still stand in for a failed load."""
        now = self._clock.monotonic()
        return any(now < self._end(held.entry) for held in reversed(self._held.values()))

    def _heat(self, key: Key, entry: Entry) -> None:
        if len(self.hot) < MAX_HOT:
            self.hot[key] = entry

    def _end(self, entry: Entry) -> float:
        return entry.born + entry.ttl + self._keep_seconds

    def _expire(self) -> None:
        """Drop what is past its end. Only the front is looked at: what nobody uses any more gathers there."""
        now = self._clock.monotonic()
        while self._held:
            key, held = next(iter(self._held.items()))
            if now < self._end(held.entry):
                return
            self.pop(key, "expired")
