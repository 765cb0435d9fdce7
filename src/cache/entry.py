"""One cached answer: ready bytes, their age, and the key that names them."""

import gzip
import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Self

import orjson

from src.core.clock import Clock
from src.core.models import MarketData
from src.store.redis import PREFIX

# A replica whose clock is further ahead writes entries that would look new again and again. They
# count as a miss.
MAX_SKEW_SECONDS = 1.0
FINAL_TTL_SECONDS = 86_400.0  # TTL of data that never changes; the TTLs of settings are shorter
MEDIA_TYPE = "application/json"
HEADER_BYTES = 7 * 16  # the numbers in front of the entity tag, see `Entry.dump`
ETAG_BYTES = 18
LARGE_BYTES = 65_536  # from here on, packing costs less than the transfer
OVERHEAD_BYTES = 1_000  # of an entry's objects, besides its body
GZIP_MAGIC = b"\x1f\x8b"  # no JSON begins so
_FRESH_TAIL = b'"stale":false}'
_STALE_TAIL = b'"stale":true}'
ROUNDING_SECONDS = 0.002  # the times of an entry that comes from Redis are rounded
# Data that is older by more than this means that the exchange corrected its clock or its numbers.
MAX_LATE_MS = 60_000
Param = int | str | None


class Key(NamedTuple):
    """The name of one answer, made of validated, canonical values."""

    exchange: str
    kind: str
    symbol: str
    params: tuple[Param, ...] = ()
    """The parameters of the kind, such as `("1m", 100, None)` for candles."""

    def redis_name(self, purpose: str = "data") -> str:
        """Return the key in Redis.

        The braces keep an entry and its lock in one slot of a cluster.
        """
        params = ":".join("" if param is None else str(param) for param in self.params)
        return f"{PREFIX}{purpose}:{{{self.exchange}|{self.kind}|{self.symbol}|{params}}}"


class Freshness(NamedTuple):
    """How long an answer is fresh."""

    ttl: float
    """Seconds from the request."""
    closed_until: int = 0
    """UTC milliseconds: what the data says about the time before is final. 0 if nothing is."""


NO_KEY = Key("", "", "")  # of answers that are not cached under a key, such as batches


@dataclass(slots=True, eq=False)
class Entry:
    """A ready answer: a JSON object in bytes whose last member is `stale`.

    Times are monotonic seconds.
    """

    key: Key
    body: bytes
    etag: str
    born: float
    """When the request for the data began. Age counts from here (RFC 9111 section 4.2.3)."""
    received: float
    ttl: float
    closed_until: int = 0
    """UTC milliseconds: what the data says about the time before is final. 0 if nothing is."""
    nonce: int = 0
    """The exchange's sequence number of the data, or the start of the newest candle. 0: none."""
    data_time: int = 0
    """The exchange's time of the data in UTC milliseconds. 0 if there is none."""
    hits: int = 0
    """Requests answered from memory, including those inherited from the entry before."""
    earlier_hits: int = 0
    """Requests answered by the entries before this one that are not part of `hits`."""
    status: int = 200
    media_type: str = MEDIA_TYPE
    encoding: str = ""
    """The content coding of the body: `gzip`, or empty."""
    packed: bytes = b""
    """The body in gzip, as soon as it was packed."""
    price: float = 0.0
    """The current price in the answer, as soon as it was read: see `kinds.price_of`."""
    views: dict[tuple[Param, ...], "Entry"] = field(default_factory=dict)
    """Parts of the entry that answer other parameters, see `kinds.view`."""
    head: tuple[float, object, int, bytes] = field(default=(0.0, None, 0, b""), init=False)
    """The head of the last whole answer: see `wire_path`."""

    @classmethod
    def create(cls, key: Key, body: bytes, born: float, received: float, ttl: float) -> Self:
        """Create an entry with the tag of its body."""
        return cls(key, body, etag_of(body), born, received, ttl)

    @classmethod
    def join(cls, body: bytes, parts: Sequence["Entry"]) -> Self:
        """Create an entry from others: as old as the oldest, fresh while all of them are."""
        born = min(part.born for part in parts)
        received = min(part.received for part in parts)
        ttl = min(part.born - born + part.ttl for part in parts)
        return cls.create(NO_KEY, body, born, received, ttl)

    def shorten_ttl(self, jitter: float) -> None:
        """Shorten the TTL by up to the share `jitter`.

        The share depends on the content, so that entries that were loaded together do not expire
        together.
        """
        self.ttl *= 1 - jitter * int(self.etag[1:5], 16) / 0xFFFF

    def with_body(self, body: bytes) -> Self:
        """Return a part of the entry, with the same times."""
        return replace(self, body=body, etag=etag_of(body), packed=b"", views={})

    @property
    def size(self) -> int:
        """Return the bytes that count for the entry. Half of a large body is reserved for gzip."""
        length = len(self.body)
        return OVERHEAD_BYTES + (length if length < LARGE_BYTES else length * 3 // 2)

    def pack(self) -> bytes:
        """Return the body in gzip. Takes 10 ms per megabyte: call it in a thread."""
        if not self.packed:
            self.packed = gzip.compress(self.body, 1)
        return self.packed

    def as_gzip(self) -> Self:
        """Return the packed entry as it is sent. Its tag differs (RFC 9110 section 8.8.3.3)."""
        etag = f'{self.etag[:-1]}-gzip"'
        return replace(self, body=self.packed, etag=etag, encoding="gzip", views={})

    @property
    def is_final(self) -> bool:
        """Return True if the data never changes."""
        return self.ttl >= FINAL_TTL_SECONDS

    def keep_seconds(self, after_ttl: float) -> float:
        """Return how long after its birth a tier keeps the entry; `after_ttl` of others.

        The final part of an entry answers requests for the past until it leaves.
        """
        return max(self.ttl + after_ttl, FINAL_TTL_SECONDS if self.closed_until else 0.0)

    def age(self, now: float) -> float:
        """Return the seconds since the data was requested."""
        return max(0.0, now - self.born)

    def is_fresh(self, now: float) -> bool:
        """Return True if the entry is younger than its TTL."""
        return self.age(now) < self.ttl

    def is_newer_than(self, other: "Entry") -> bool:
        """Return True if the data is newer than that of an entry that was received now.

        The exchange's own order decides while this entry is fresh, else the order of the requests.
        """
        if self.is_fresh(other.born) and 0 != self.nonce != other.nonce != 0:
            return self.nonce > other.nonce
        if self.is_fresh(other.born) and self.data_time and other.data_time:
            late_ms = self.data_time - other.data_time
            if late_ms and late_ms <= MAX_LATE_MS:
                return late_ms > 0
        return self.born - other.born > ROUNDING_SECONDS

    def marked_stale(self) -> bytes:
        """Return the body with `"stale":true`."""
        return self.body[: -len(_FRESH_TAIL)] + _STALE_TAIL

    def dump(self, clock: Clock) -> bytes:
        """Return the entry as Redis stores it.

        16 digits each for `born` and `received` (UTC ms), the TTL (ms), `closed_until`, `nonce` and
        `data_time`, which `redis_tier.STORE` reads, and the status, then the entity tag, which is
        also a checksum, then a line with the media type, then the body, in gzip if it is large.
        """
        offset = clock.time() - clock.monotonic()
        born_ms = (self.born + offset) * 1000
        received_ms = (self.received + offset) * 1000
        times = (born_ms, received_ms, self.ttl * 1000, self.closed_until)
        numbers = (*times, self.nonce, self.data_time, self.status)
        media_type = self.media_type.encode("latin-1") + b"\n"
        body = self.pack() if len(self.body) >= LARGE_BYTES else self.body
        return b"".join([b"%016d" * 7 % numbers, self.etag.encode(), media_type, body])

    @classmethod
    def parse(cls, key: Key, raw: object, clock: Clock) -> Self | None:
        """Return the entry that `dump` wrote.

        Returns None for any other data, and for an entry from the future.
        """
        if not isinstance(raw, bytes) or not raw[:HEADER_BYTES].isdigit():
            return None
        media_type, _, body = raw[HEADER_BYTES + ETAG_BYTES :].partition(b"\n")
        packed = body if body.startswith(GZIP_MAGIC) else b""
        if packed:
            try:
                body = gzip.decompress(packed)
            except (OSError, EOFError, zlib.error):
                return None
        etag = etag_of(body)
        if etag.encode() != raw[HEADER_BYTES : HEADER_BYTES + ETAG_BYTES]:
            return None
        numbers = (int(raw[start : start + 16]) for start in range(0, HEADER_BYTES, 16))
        born_ms, received_ms, ttl_ms, closed_until, nonce, data_time, status = numbers
        now = clock.monotonic()
        offset = now - clock.time()
        born = born_ms / 1000 + offset
        received = received_ms / 1000 + offset
        if received > now + MAX_SKEW_SECONDS:
            return None
        ttl = ttl_ms / 1000
        times = (min(born, now), min(received, now))
        entry = cls(key, body, etag, *times, ttl, closed_until, nonce, data_time)
        entry.packed = packed
        entry.status = status
        entry.media_type = media_type.decode("latin-1")
        return entry


class Served(NamedTuple):
    """An answer as it is sent to a client."""

    body: bytes
    etag: str | None
    """None if the body was changed and its tag is not known yet."""
    age: float
    ttl: float
    """Seconds the answer stays fresh; negative if it is stale."""
    result: str
    """How the answer was found: one of `metrics.CACHE_RESULTS`."""
    entry: Entry | None = None
    """None if the answer was not made from one entry."""
    keys: tuple[Key, ...] = ()
    """All keys that could have answered, most preferred first. Empty if `max_age` was given."""
    params: tuple[Param, ...] = ()
    """The client's parameters; the entry may have more rows."""

    @classmethod
    def from_entry(cls, entry: Entry, result: str, now: float) -> Self:
        """Return an entry as it is sent at `now`, marked as stale if the `result` says so."""
        age = entry.age(now)
        if result.startswith("stale"):
            return cls(entry.marked_stale(), None, age, min(entry.ttl - age, -1.0), result, entry)
        return cls(entry.body, entry.etag, age, entry.ttl - age, result, entry)


def encode(data: MarketData) -> bytes:
    """Encode an answer as it is sent. Members that were not given are left out; `stale` is last."""
    document = data.model_dump(exclude_unset=True, exclude={"source", "stale"})
    return orjson.dumps(document | {"source": data.source, "stale": False})


def etag_of(body: bytes) -> str:
    """Return the strong entity tag of a body (RFC 9110 section 8.8.3)."""
    return f'"{hashlib.blake2b(body, digest_size=8).hexdigest()}"'
