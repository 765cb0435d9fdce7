"""The first tier by itself: what it holds, what it gives out as fresh, what leaves it and why, and what is hot."""

import pytest

from src.cache.entry import Entry, Key
from src.cache.memory import HOT_HITS, INHERITED_HITS, MAX_HOT, Memory
from src.core.metrics import EVICTIONS
from tests.conftest import FakeClock, sample

TTL, FRESH_SECONDS, KEEP_SECONDS = 15.0, 30.0, 60.0
END = TTL + KEEP_SECONDS
A, B, C, D = (Key("bybit", "ticker", f"{coin}/USDT") for coin in ("BTC", "ETH", "SOL", "XRP"))


class Room:
    """A memory, the clock it goes by, and what left it since it was made."""

    def __init__(self, clock: FakeClock, size: int = 1000, fresh_seconds: float = FRESH_SECONDS) -> None:
        self.clock = clock
        self.memory = Memory(size, fresh_seconds, KEEP_SECONDS, clock)
        self._before = _evicted()

    def put(self, *keys: Key, ttl: float = TTL, late: float = 0.0) -> None:
        """Keep a new entry of each key, whose value was asked for so long ago."""
        born = self.clock.monotonic() - late
        for key in keys:
            self.memory.put(key, Entry.of(b'{"stale":false}', born, born, ttl))

    def ask(self, key: Key, times: int = 1) -> None:
        for _ in range(times):
            assert self.memory.ready(key) is not None

    def evicted(self) -> dict[str, float]:
        """How many entries left, by reason; a reason that took none is left out."""
        gone = {reason: count - self._before[reason] for reason, count in _evicted().items()}
        return {reason: count for reason, count in gone.items() if count}

    def lives_without_a_request(self, key: Key) -> int:
        """How many entries that take each other's place are hot though nobody asks for them."""
        for lives in range(100):
            self.put(key)
            if key not in self.memory.hot:
                return lives
        raise AssertionError("it is never forgotten")


def _evicted() -> dict[str, float]:
    return {reason: sample("cache_evictions_total", reason=reason) for reason in EVICTIONS}


def numbered(count: int) -> list[Key]:
    return [Key("kraken", "ticker", f"X{place}/USDT") for place in range(count)]


@pytest.fixture
def room(clock: FakeClock) -> Room:
    return Room(clock)


@pytest.mark.parametrize("size", [1, 3, 10])
def test_the_bound_is_hard(clock: FakeClock, size: int) -> None:
    """There are never more entries than the size allows, each that is too much leaves for that reason, none earlier."""
    room = Room(clock, size)
    for number, key in enumerate(numbered(50), start=1):
        room.put(key)
        assert len(room.memory) == len(room.memory.keys()) == min(number, size)
        assert room.memory.get(key) is not None, "what has just come is there"
    assert room.evicted() == {"size": 50 - size}


def test_the_least_recently_used_leaves_first(clock: FakeClock) -> None:
    """Being put, got or asked for is a use, and room is made by what was not used for longest."""
    room = Room(clock, size=3)
    room.put(A, B, C)
    room.memory.get(A)
    room.put(D)
    assert set(room.memory.keys()) == {A, C, D}
    room.ask(C)
    room.put(B)
    assert set(room.memory.keys()) == {B, C, D}
    room.put(D)
    room.put(A)
    assert set(room.memory.keys()) == {A, B, D}


def test_an_entry_too_old_to_be_given_out_is_not_used(clock: FakeClock) -> None:
    """Asking for what is not fresh or not young enough neither keeps it from leaving nor makes it popular."""
    room = Room(clock, size=2)
    room.put(A, B)
    clock.advance(5)
    for _ in range(10):
        assert room.memory.ready(A, max_age=5) is None
    room.ask(A, HOT_HITS - 1)
    assert not room.memory.hot
    room.ask(B)
    clock.advance(10)
    for _ in range(10):
        assert room.memory.ready(A) is None
    assert not room.memory.hot
    room.put(C)
    assert set(room.memory.keys()) == {B, C}


def test_a_new_entry_of_a_key_drives_nobody_out(clock: FakeClock) -> None:
    """In a full memory an entry that takes another's place costs no third one its own, and evicts nothing."""
    room = Room(clock, size=2)
    room.put(A, B)
    clock.advance(1)
    room.put(B)
    assert room.memory.keys() == [A, B]
    entry = room.memory.get(B)
    assert entry is not None
    assert (entry.born, room.evicted()) == (clock.monotonic(), {})


@pytest.mark.parametrize(
    ("ttl", "fresh_seconds", "max_age"),
    [(4, 30, None), (30, 4, None), (4, 30, 5), (30, 4, 5), (30, 30, 4), (4, 4, 4)],
    ids=["ttl", "fresh_seconds", "ttl below max_age", "fresh_seconds below max_age", "max_age", "all"],
)
def test_what_ends_first_ends_freshness(
    clock: FakeClock, ttl: float, fresh_seconds: float, max_age: float | None
) -> None:
    """An entry is given out while it is younger than its TTL, memory's limit and the caller's, and at none of them."""
    room = Room(clock, fresh_seconds=fresh_seconds)
    room.put(A, ttl=ttl)
    assert room.memory.ready(A, max_age) is not None
    clock.advance(3.999)
    assert room.memory.ready(A, max_age) is room.memory.get(A)
    clock.advance(0.001)
    assert clock.elapsed == 4.0, "exactly the limit"
    assert room.memory.ready(A, max_age) is None
    assert room.memory.get(A) is not None, "it may still stand in"


def test_a_limit_of_no_seconds_takes_nothing(room: Room) -> None:
    """Who wants a value of this very moment gets none from memory, though one was born in it or seems to be younger."""
    for late in (0.0, -3.0):
        room.put(A, late=late)
        assert room.memory.ready(A, max_age=0) is None
        assert room.memory.ready(A, max_age=0.001) is not None


def test_an_entry_born_in_the_future_is_fresh(room: Room) -> None:
    """An entry ahead of the clock is fresh, and until its TTL and memory's time after it have passed from its birth."""
    room.put(A, late=-2)
    assert room.memory.ready(A) is not None
    room.clock.advance(TTL + 1.999)
    assert room.memory.ready(A) is not None
    room.clock.advance(0.001)
    assert room.memory.ready(A) is None
    room.clock.advance(KEEP_SECONDS - 0.001)
    assert len(room.memory) == 1
    room.clock.advance(0.001)
    assert len(room.memory) == 0


def test_nothing_is_made_of_nothing(room: Room) -> None:
    """What was never put is not there, is not hot for being asked for, and cannot leave."""
    for _ in range(10):
        assert (room.memory.get(A), room.memory.ready(A)) == (None, None)
    for reason in EVICTIONS:
        room.memory.pop(A, reason)
    assert (len(room.memory), room.memory.keys(), room.memory.has_any()) == (0, [], False)
    assert (room.memory.hot, room.evicted()) == ({}, {})


def test_it_is_hot_from_the_second_hit(room: Room) -> None:
    """An entry is hot from the moment it was given out `HOT_HITS` times, neither earlier nor by being looked at."""
    assert HOT_HITS == 2
    room.put(A, B)
    for _ in range(10):
        room.memory.get(A)
    room.ask(A)
    assert not room.memory.hot
    room.ask(A)
    assert room.memory.hot == {A: room.memory.get(A)}
    room.ask(A, 10)
    assert room.memory.hot == {A: room.memory.get(A)}


def test_what_was_taken_up_is_not_hot_again(room: Room) -> None:
    """An entry that was tried to be refreshed is hot no more, however often it is asked for; the next one may be."""
    room.put(A)
    room.ask(A, HOT_HITS)
    del room.memory.hot[A]
    room.ask(A, 10)
    assert not room.memory.hot
    room.put(A)
    assert A in room.memory.hot


@pytest.mark.parametrize(
    ("hits", "lives"), [(0, 0), (2, 0), (3, 0), (4, 1), (7, 1), (8, 2), (16, 2), (32, 2), (1000, 2)]
)
def test_popularity_is_inherited_and_fades(room: Room, hits: int, lives: int) -> None:
    """Half of the hits pass to the next entry, no more than a few, so that two lives later it is forgotten."""
    room.put(A)
    room.ask(A, hits)
    assert room.lives_without_a_request(A) == lives
    assert not room.memory.hot
    room.ask(A)
    assert (A in room.memory.hot) == (hits > 1), "the last half of a hit is one"


def test_only_so_many_hits_are_inherited(room: Room) -> None:
    """What passes on is exactly `INHERITED_HITS` of many: with three more it does for one life and not for two."""
    assert INHERITED_HITS == 4
    room.put(A)
    room.ask(A, 1000)
    room.put(A)
    room.ask(A, 3)
    assert room.lives_without_a_request(A) == 1


def test_an_inherited_hit_and_one_more_make_it_hot(room: Room) -> None:
    """A key that is asked for once in each of its lives becomes hot, and is so by the newest of its entries."""
    room.put(A)
    room.ask(A, HOT_HITS)
    old = room.memory.get(A)
    room.clock.advance(1)
    room.put(A)
    assert not room.memory.hot
    room.ask(A)
    assert room.memory.hot == {A: room.memory.get(A)}
    assert room.memory.hot[A] is not old


def test_hot_is_the_newest_entry(room: Room) -> None:
    """An entry that inherits enough is hot in place of the one before it."""
    room.put(A)
    room.ask(A, 2 * HOT_HITS)
    old = room.memory.hot[A]
    room.clock.advance(1)
    room.put(A)
    assert room.memory.hot == {A: room.memory.get(A)}
    assert room.memory.hot[A] is not old


def test_what_is_replaced_is_hot_no_more(room: Room) -> None:
    """An entry whose place another took is not hot, even when the new one is not hot either."""
    room.put(A)
    room.ask(A, HOT_HITS)
    room.put(A)
    assert not room.memory.hot


def test_what_is_driven_out_is_hot_no_more(clock: FakeClock) -> None:
    """An entry that leaves for want of room leaves the hot ones too, and its popularity is gone with it."""
    room = Room(clock, size=2)
    room.put(A)
    room.ask(A, 100)
    room.put(B, C)
    assert (room.memory.hot, room.evicted()) == ({}, {"size": 1})
    room.put(A)
    assert not room.memory.hot


def test_what_is_past_its_end_is_hot_no_more(room: Room) -> None:
    """An entry that is dropped for its age leaves the hot ones too."""
    room.put(A)
    room.ask(A, 100)
    room.clock.advance(END - 0.001)
    assert (len(room.memory), list(room.memory.hot)) == (1, [A])
    room.clock.advance(0.001)
    room.put(B)
    assert (room.memory.hot, room.memory.keys(), room.evicted()) == ({}, [B], {"expired": 1})


@pytest.mark.parametrize("reason", EVICTIONS)
def test_what_is_taken_out_is_hot_no_more(room: Room, reason: str) -> None:
    """An entry that is taken out leaves the hot ones too, and is counted once, for the reason given."""
    room.put(A, B)
    room.ask(A, 100)
    room.ask(B, 100)
    for _ in range(2):
        room.memory.pop(A, reason)
    assert (list(room.memory.hot), room.memory.keys(), room.evicted()) == ([B], [B], {reason: 1})
    room.put(A)
    assert list(room.memory.hot) == [B]


def test_there_are_only_so_many_hot_ones(room: Room) -> None:
    """No more than `MAX_HOT` are hot at once, others are given out all the same, and one that leaves makes room."""
    keys = numbered(MAX_HOT + 2)
    room.memory = Memory(2 * MAX_HOT, FRESH_SECONDS, KEEP_SECONDS, room.clock)
    room.put(*keys)
    for number, key in enumerate(keys, start=1):
        room.ask(key, HOT_HITS)
        assert len(room.memory.hot) == min(number, MAX_HOT)
    assert set(room.memory.hot) == set(keys[:MAX_HOT])
    room.ask(keys[-1], 2)
    room.put(keys[-1])
    assert keys[-1] not in room.memory.hot, "inherited popularity is bounded too"
    room.memory.pop(keys[0], "cleared")
    room.ask(keys[-1], 2)
    room.put(keys[-1])
    assert set(room.memory.hot) == {*keys[1:MAX_HOT], keys[-1]}


def test_why_entries_leave(clock: FakeClock) -> None:
    """Each entry that leaves is counted once by its reason; what is past its end is not counted as want of room."""
    room = Room(clock, size=3)
    room.put(A, B, C, D)
    assert room.evicted() == {"size": 1}
    room.memory.pop(B, "cleared")
    assert room.evicted() == {"size": 1, "cleared": 1}
    room.put(A)
    clock.advance(END)
    room.put(B)
    assert room.memory.keys() == [B]
    assert room.evicted() == {"size": 1, "cleared": 1, "expired": 3}


def test_only_what_is_past_its_end_expires(room: Room) -> None:
    """An entry stays until exactly its TTL and memory's time after it are over, and no longer once it is looked for."""
    room.put(A, ttl=5)
    room.put(B)
    room.clock.advance(5 + KEEP_SECONDS - 0.001)
    assert (len(room.memory), room.evicted()) == (2, {})
    room.clock.advance(0.001)
    assert (len(room.memory), room.memory.keys(), room.evicted()) == (1, [B], {"expired": 1})
    room.clock.advance(10)
    assert (len(room.memory), room.memory.keys(), room.evicted()) == (0, [], {"expired": 2})


def test_in_the_end_everything_expires(room: Room) -> None:
    """Entries of any TTL, used in any order, are all gone once the last is past its end, and none that is not."""
    keys = numbered(40)
    for place, key in enumerate(keys):
        room.put(key, ttl=1 + place * 7 % 40)
    for key in keys[::3]:
        room.memory.get(key)
    for seconds in range(1, 41):
        alive = {key for place, key in enumerate(keys) if 1 + place * 7 % 40 > seconds}
        room.clock.elapsed = seconds + KEEP_SECONDS
        assert alive <= set(room.memory.keys())
        assert room.memory.has_any() == bool(alive)
        len(room.memory)
    assert (len(room.memory), room.evicted()) == (0, {"expired": 40})


def test_whether_any_could_stand_in(room: Room) -> None:
    """There is something to stand in until exactly the end of the last entry, wherever in the order that is."""
    assert not room.memory.has_any()
    room.put(A, ttl=5)
    room.put(B)
    room.put(C, ttl=5)
    room.clock.advance(END - 0.001)
    assert room.memory.has_any()
    room.clock.advance(0.001)
    assert not room.memory.has_any()
    room.put(D)
    assert room.memory.has_any()
    room.memory.pop(D, "cleared")
    assert not room.memory.has_any()


def test_looking_for_something_that_could_stand_in_changes_nothing(room: Room) -> None:
    """It is asked at every probe of the health, and uses, expires and heats nothing."""
    room.put(A, B)
    room.clock.advance(END)
    assert not room.memory.has_any()
    assert (room.memory.keys(), room.memory.hot, room.evicted()) == ([A, B], {}, {})
