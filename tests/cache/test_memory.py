"""The memory tier: freshness, evictions, expiry and hot entries."""

import pytest

from src.cache.entry import Entry, Key
from src.cache.memory import HOT_HITS, MAX_HOT, MAX_INHERITED_HITS, Memory
from src.core.metrics import EVICTIONS
from tests.conftest import FakeClock, sample

TTL, FRESH_SECONDS, KEEP_SECONDS = 15.0, 30.0, 60.0
END = TTL + KEEP_SECONDS
A, B, C, D = (Key("bybit", "ticker", f"{coin}/USDT") for coin in ("BTC", "ETH", "SOL", "XRP"))

MAX_BYTES = 10_000_000


class Bench:
    """A memory with its clock, and the evictions since it was created."""

    def __init__(
        self, clock: FakeClock, size: int = 1000, fresh_seconds: float = FRESH_SECONDS
    ) -> None:
        self.clock = clock
        self.memory = Memory(size, MAX_BYTES, fresh_seconds, KEEP_SECONDS, clock)
        self._before = _evicted()

    def put(self, *keys: Key, ttl: float = TTL, late: float = 0.0) -> None:
        """Store a new entry for each key, born `late` seconds ago."""
        born = self.clock.monotonic() - late
        for key in keys:
            self.memory.put(Entry.create(key, b'{"stale":false}', born, born, ttl))

    def request(self, key: Key, max_age: float | None = None) -> Entry | None:
        """Return the entry if it is fresh, and count the request."""
        entry = self.memory.find_fresh(key, max_age)
        if entry is not None:
            self.memory.count_hit(entry)
        return entry

    def hit(self, key: Key, times: int = 1) -> None:
        """Request a fresh entry several times."""
        for _ in range(times):
            assert self.request(key) is not None

    def evicted(self) -> dict[str, float]:
        """Return the evictions by reason, without zeros."""
        evicted = {reason: count - self._before[reason] for reason, count in _evicted().items()}
        return {reason: count for reason, count in evicted.items() if count}

    def hot_ttls_without_a_request(self, key: Key) -> int:
        """Return how many entries in a row are hot without a single request."""
        for count in range(100):
            self.put(key)
            if key not in self.memory.hot:
                return count
        raise AssertionError("the key stays hot for ever")


def _evicted() -> dict[str, float]:
    return {reason: sample("cache_evictions_total", reason=reason) for reason in EVICTIONS}


def numbered(count: int) -> list[Key]:
    return [Key("kraken", "ticker", f"X{place}/USDT") for place in range(count)]


@pytest.fixture
def bench(clock: FakeClock) -> Bench:
    return Bench(clock)


@pytest.mark.parametrize("size", [1, 3, 10])
def test_memory_never_holds_more_than_its_size(clock: FakeClock, size: int) -> None:
    """Each entry over the size evicts one, with the reason `size`."""
    bench = Bench(clock, size)
    for number, key in enumerate(numbered(50), start=1):
        bench.put(key)
        assert len(bench.memory) == len(bench.memory.keys()) == min(number, size)
        assert bench.memory.get(key) is not None, "the newest entry is there"
    assert bench.evicted() == {"size": 50 - size}


def test_the_least_recently_used_entry_is_evicted_first(clock: FakeClock) -> None:
    """`put`, `get` and a counted hit are uses."""
    bench = Bench(clock, size=3)
    bench.put(A, B, C)
    bench.memory.get(A)
    bench.put(D)
    assert set(bench.memory.keys()) == {A, C, D}
    bench.hit(C)
    bench.put(B)
    assert set(bench.memory.keys()) == {B, C, D}
    bench.put(D)
    bench.put(A)
    assert set(bench.memory.keys()) == {A, B, D}


def test_a_miss_is_not_a_use(clock: FakeClock) -> None:
    """A request that finds no fresh entry does not protect it from eviction and adds no hit."""
    bench = Bench(clock, size=2)
    bench.put(A, B)
    clock.advance(5)
    for _ in range(10):
        assert bench.request(A, max_age=5) is None
    bench.hit(A, HOT_HITS - 1)
    assert not bench.memory.hot
    bench.hit(B)
    clock.advance(10)
    for _ in range(10):
        assert bench.request(A) is None
    assert not bench.memory.hot
    bench.put(C)
    assert set(bench.memory.keys()) == {B, C}


def test_replacing_an_entry_evicts_nothing(clock: FakeClock) -> None:
    """In a full memory a new entry replaces the old one of its key."""
    bench = Bench(clock, size=2)
    bench.put(A, B)
    clock.advance(1)
    bench.put(B)
    assert bench.memory.keys() == [A, B]
    entry = bench.memory.get(B)
    assert entry is not None
    assert (entry.born, bench.evicted()) == (clock.monotonic(), {})


@pytest.mark.parametrize(
    ("ttl", "fresh_seconds", "max_age"),
    [(4, 30, None), (30, 4, None), (4, 30, 5), (30, 4, 5), (30, 30, 4), (4, 4, 4)],
    ids=[
        "ttl",
        "fresh_seconds",
        "ttl below max_age",
        "fresh_seconds below max_age",
        "max_age",
        "all",
    ],
)
def test_the_shortest_limit_ends_freshness(
    clock: FakeClock, ttl: float, fresh_seconds: float, max_age: float | None
) -> None:
    """An entry is fresh below its TTL, memory's limit and `max_age`, and not at any of them."""
    bench = Bench(clock, fresh_seconds=fresh_seconds)
    bench.put(A, ttl=ttl)
    assert bench.request(A, max_age) is not None
    clock.advance(3.999)
    assert bench.request(A, max_age) is bench.memory.get(A)
    clock.advance(0.001)
    assert clock.elapsed == 4.0, "exactly the limit"
    assert bench.request(A, max_age) is None
    assert bench.memory.get(A) is not None, "it can still be served as stale"


def test_max_age_zero_is_always_a_miss(bench: Bench) -> None:
    """Even if the entry was born now, or in the future by a clock that is ahead."""
    for late in (0.0, -3.0):
        bench.put(A, late=late)
        assert bench.request(A, max_age=0) is None
        assert bench.request(A, max_age=0.001) is not None


def test_an_entry_born_in_the_future_is_fresh(bench: Bench) -> None:
    """It is fresh until its TTL after its birth, and kept for the usual time after that."""
    bench.put(A, late=-2)
    assert bench.request(A) is not None
    bench.clock.advance(TTL + 1.999)
    assert bench.request(A) is not None
    bench.clock.advance(0.001)
    assert bench.request(A) is None
    bench.clock.advance(KEEP_SECONDS - 0.001)
    assert len(bench.memory) == 1
    bench.clock.advance(0.001)
    assert len(bench.memory) == 0


def test_an_unknown_key_has_no_entry(bench: Bench) -> None:
    """A key without an entry is a miss, is never hot, and is not counted as evicted."""
    for _ in range(10):
        assert (bench.memory.get(A), bench.request(A)) == (None, None)
    for reason in EVICTIONS:
        bench.memory.remove(A, reason)
    assert (len(bench.memory), bench.memory.keys(), bench.memory.has_usable()) == (0, [], False)
    assert (bench.memory.hot, bench.evicted()) == ({}, {})


def test_an_entry_is_hot_from_its_second_hit(bench: Bench) -> None:
    """`get` does not count as a hit."""
    assert HOT_HITS == 2
    bench.put(A, B)
    for _ in range(10):
        bench.memory.get(A)
    bench.hit(A)
    assert not bench.memory.hot
    bench.hit(A)
    assert bench.memory.hot == {A: bench.memory.get(A)}
    bench.hit(A, 10)
    assert bench.memory.hot == {A: bench.memory.get(A)}


def test_an_entry_becomes_hot_only_once(bench: Bench) -> None:
    """More hits after its refresh has started do nothing. The next entry can become hot."""
    bench.put(A)
    bench.hit(A, HOT_HITS)
    del bench.memory.hot[A]
    bench.hit(A, 10)
    assert not bench.memory.hot
    bench.put(A)
    assert A in bench.memory.hot


@pytest.mark.parametrize(
    ("hits", "hot_ttls"),
    [(0, 0), (2, 0), (3, 0), (4, 1), (7, 1), (8, 2), (16, 2), (32, 2), (1000, 2)],
)
def test_hits_are_inherited_and_fade(bench: Bench, hits: int, hot_ttls: int) -> None:
    """Half of the hits pass to the next entry, bounded, so they are gone after two TTLs."""
    bench.put(A)
    bench.hit(A, hits)
    assert bench.hot_ttls_without_a_request(A) == hot_ttls
    assert not bench.memory.hot
    bench.hit(A)
    assert (A in bench.memory.hot) == (hits > 1), "half of the last hits is one hit"


def test_inherited_hits_are_bounded(bench: Bench) -> None:
    """Exactly `MAX_INHERITED_HITS` pass on: with three more the next entry is hot once."""
    assert MAX_INHERITED_HITS == 4
    bench.put(A)
    bench.hit(A, 1000)
    bench.put(A)
    bench.hit(A, 3)
    assert bench.hot_ttls_without_a_request(A) == 1


def test_one_request_per_ttl_makes_a_key_hot(bench: Bench) -> None:
    """The newest entry of the key is the hot one."""
    bench.put(A)
    bench.hit(A, HOT_HITS)
    old = bench.memory.get(A)
    bench.clock.advance(1)
    bench.put(A)
    assert not bench.memory.hot
    bench.hit(A)
    assert bench.memory.hot == {A: bench.memory.get(A)}
    assert bench.memory.hot[A] is not old


def test_the_newest_entry_of_a_key_is_hot(bench: Bench) -> None:
    """An entry that inherits enough hits replaces the hot one before it."""
    bench.put(A)
    bench.hit(A, 2 * HOT_HITS)
    old = bench.memory.hot[A]
    bench.clock.advance(1)
    bench.put(A)
    assert bench.memory.hot == {A: bench.memory.get(A)}
    assert bench.memory.hot[A] is not old


def test_a_replaced_entry_is_not_hot(bench: Bench) -> None:
    """Even if the new entry is not hot either."""
    bench.put(A)
    bench.hit(A, HOT_HITS)
    bench.put(A)
    assert not bench.memory.hot


def test_an_evicted_entry_is_not_hot(clock: FakeClock) -> None:
    """Its hits are lost, too."""
    bench = Bench(clock, size=2)
    bench.put(A)
    bench.hit(A, 100)
    bench.put(B, C)
    assert (bench.memory.hot, bench.evicted()) == ({}, {"size": 1})
    bench.put(A)
    assert not bench.memory.hot


def test_an_expired_entry_is_not_hot(bench: Bench) -> None:
    """An entry that expires leaves the hot entries."""
    bench.put(A)
    bench.hit(A, 100)
    bench.clock.advance(END - 0.001)
    assert (len(bench.memory), list(bench.memory.hot)) == (1, [A])
    bench.clock.advance(0.001)
    bench.put(B)
    assert (bench.memory.hot, bench.memory.keys(), bench.evicted()) == ({}, [B], {"expired": 1})


@pytest.mark.parametrize("reason", EVICTIONS)
def test_a_removed_entry_is_not_hot(bench: Bench, reason: str) -> None:
    """A removal is counted once, by its reason."""
    bench.put(A, B)
    bench.hit(A, 100)
    bench.hit(B, 100)
    for _ in range(2):
        bench.memory.remove(A, reason)
    assert (list(bench.memory.hot), bench.memory.keys(), bench.evicted()) == ([B], [B], {reason: 1})
    bench.put(A)
    assert list(bench.memory.hot) == [B]


def test_the_number_of_hot_entries_is_bounded(bench: Bench) -> None:
    """At most `MAX_HOT` are hot; one that leaves makes bench for another."""
    keys = numbered(MAX_HOT + 2)
    bench.memory = Memory(2 * MAX_HOT, MAX_BYTES, FRESH_SECONDS, KEEP_SECONDS, bench.clock)
    bench.put(*keys)
    for number, key in enumerate(keys, start=1):
        bench.hit(key, HOT_HITS)
        assert len(bench.memory.hot) == min(number, MAX_HOT)
    assert set(bench.memory.hot) == set(keys[:MAX_HOT])
    bench.hit(keys[-1], 2)
    bench.put(keys[-1])
    assert keys[-1] not in bench.memory.hot, "inherited hits respect the bound"
    bench.memory.remove(keys[0], "cleared")
    bench.hit(keys[-1], 2)
    bench.put(keys[-1])
    assert set(bench.memory.hot) == {*keys[1:MAX_HOT], keys[-1]}


def test_evictions_are_counted_by_reason(clock: FakeClock) -> None:
    """An expired entry is not counted as evicted for the size."""
    bench = Bench(clock, size=3)
    bench.put(A, B, C, D)
    assert bench.evicted() == {"size": 1}
    bench.memory.remove(B, "cleared")
    assert bench.evicted() == {"size": 1, "cleared": 1}
    bench.put(A)
    clock.advance(END)
    bench.put(B)
    assert bench.memory.keys() == [B]
    assert bench.evicted() == {"size": 1, "cleared": 1, "expired": 3}


def test_entries_expire_after_ttl_and_keep_time(bench: Bench) -> None:
    """An entry stays until exactly its TTL plus the keep time."""
    bench.put(A, ttl=5)
    bench.put(B)
    bench.clock.advance(5 + KEEP_SECONDS - 0.001)
    assert (len(bench.memory), bench.evicted()) == (2, {})
    bench.clock.advance(0.001)
    assert (len(bench.memory), bench.memory.keys(), bench.evicted()) == (1, [B], {"expired": 1})
    bench.clock.advance(10)
    assert (len(bench.memory), bench.memory.keys(), bench.evicted()) == (0, [], {"expired": 2})


def test_all_entries_expire_in_the_end(bench: Bench) -> None:
    """Entries of any TTL, used in any order, expire, and none before its time."""
    keys = numbered(40)
    for place, key in enumerate(keys):
        bench.put(key, ttl=1 + place * 7 % 40)
    for key in keys[::3]:
        bench.memory.get(key)
    for seconds in range(1, 41):
        alive = {key for place, key in enumerate(keys) if 1 + place * 7 % 40 > seconds}
        bench.clock.elapsed = seconds + KEEP_SECONDS
        assert alive <= set(bench.memory.keys())
        assert bench.memory.has_usable() == bool(alive)
        len(bench.memory)
    assert (len(bench.memory), bench.evicted()) == (0, {"expired": 40})


def test_has_usable_until_the_last_entry_expires(bench: Bench) -> None:
    """Wherever that entry is in the order of use."""
    assert not bench.memory.has_usable()
    bench.put(A, ttl=5)
    bench.put(B)
    bench.put(C, ttl=5)
    bench.clock.advance(END - 0.001)
    assert bench.memory.has_usable()
    bench.clock.advance(0.001)
    assert not bench.memory.has_usable()
    bench.put(D)
    assert bench.memory.has_usable()
    bench.memory.remove(D, "cleared")
    assert not bench.memory.has_usable()


def test_has_usable_changes_nothing(bench: Bench) -> None:
    """Health checks call it: it is no use, expires nothing and makes nothing hot."""
    bench.put(A, B)
    bench.clock.advance(END)
    assert not bench.memory.has_usable()
    assert (bench.memory.keys(), bench.memory.hot, bench.evicted()) == ([A, B], {}, {})


def test_large_entries_replace_others(bench: Bench) -> None:
    """All entries together have at most `max_bytes`. The newest one always stays."""
    bench.put(A, B)
    now = bench.clock.monotonic()
    large = [Key("bybit", "raw", "", (str(number),)) for number in range(4)]
    for key in large:
        bench.memory.put(Entry.create(key, b"x" * 2_400_000, now, now, TTL))
    assert bench.memory.keys() == large[2:]  # each counts one and a half times
    assert 0 < bench.memory.bytes <= MAX_BYTES
    bench.memory.put(Entry.create(A, b"x" * 2 * MAX_BYTES, now, now, TTL))
    assert bench.memory.keys() == [A]
    bench.memory.remove(A, "cleared")
    assert bench.memory.bytes == 0
