"""One cached answer and its name: bytes that can be sent as they are, and how old they are."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import orjson

from src.core.clock import Clock
from src.core.models import MarketData
from src.store.redis import PREFIX

# A replica whose clock is further ahead writes values that would be new again at every look: they are a miss.
MAX_SKEW_SECONDS = 1.0
_FRESH_TAIL, _STALE_TAIL = b'"stale":false}', b'"stale":true}'


class Key(NamedTuple):
    """Names one answer by validated, canonical values."""

    exchange: str
    kind: str
    symbol: str
    variant: str = ""  # the parameters of the kind, such as `1m:100`

    def redis(self, what: str = "data") -> str:
        """The key in Redis; the part in braces keeps a value and its lock in one slot of a cluster."""
        return f"{PREFIX}{what}:{{{self.exchange}|{self.kind}|{self.symbol}|{self.variant}}}"


@dataclass(frozen=True, slots=True)
class Entry:
    """A ready answer: a JSON object in bytes whose last member is `stale`. Its moments are monotonic seconds."""

    body: bytes
    etag: str
    born: float  # when the request for it began: age counts from here (RFC 9111 section 4.2.3)
    received: float
    ttl: float

    @classmethod
    def of(cls, body: bytes, born: float, received: float, ttl: float, jitter: float = 0.0) -> Self:
        """Make an entry; `jitter` is the largest share of the TTL taken off."""
        etag = etag_of(body)
        # Spread by content, not by chance: replicas agree, and entries loaded together do not expire together.
        return cls(body, etag, born, received, ttl * (1 - jitter * int(etag[1:5], 16) / 0xFFFF))

    @classmethod
    def joined(cls, body: bytes, parts: Sequence["Entry"]) -> Self:
        """Make an entry of others: as old as the oldest of them, and fresh as long as all of them are."""
        born = min(part.born for part in parts)
        received = min(part.received for part in parts)
        return cls(body, etag_of(body), born, received, min(part.born - born + part.ttl for part in parts))

    def age(self, now: float) -> float:
        """Seconds since it was asked for."""
        return max(0.0, now - self.born)

    def is_fresh(self, now: float, limit: float | None = None) -> bool:
        """Whether it is younger than its TTL and the limit; at exactly the limit it is not."""
        return self.age(now) < (self.ttl if limit is None else min(self.ttl, limit))

    def marked_stale(self) -> bytes:
        """The body saying that it is old."""
        return self.body[: -len(_FRESH_TAIL)] + _STALE_TAIL

    def dump(self, clock: Clock) -> bytes:
        """Write it for Redis: born and received as 16 digits of UTC ms each, the tag as a checksum, then the body."""
        offset = clock.time() - clock.monotonic()
        moments = ((self.born + offset) * 1000, (self.received + offset) * 1000)
        return b"%016d%016d%b%b" % (*moments, self.etag.encode(), self.body)

    @classmethod
    def parse(cls, raw: object, ttl: float, jitter: float, clock: Clock) -> Self | None:
        """Read what `dump` wrote; anything else, however broken, is None."""
        if not isinstance(raw, bytes) or not raw[:32].isdigit() or etag_of(raw[50:]).encode() != raw[32:50]:
            return None
        now = clock.monotonic()
        offset = now - clock.time()
        born, received = (int(raw[at : at + 16]) / 1000 + offset for at in (0, 16))
        if received > now + MAX_SKEW_SECONDS:
            return None
        return cls.of(raw[50:], min(born, now), min(received, now), ttl, jitter)


def encode(data: MarketData) -> bytes:
    """Encode an answer once, as it will be sent: members that were not given are left out, `stale` comes last."""
    document = data.model_dump(exclude_unset=True, exclude={"source", "stale"})
    return orjson.dumps(document | {"source": data.source, "stale": False})


def etag_of(body: bytes) -> str:
    """Return the strong entity tag of a body (RFC 9110 section 8.8.3)."""
    return f'"{hashlib.blake2b(body, digest_size=8).hexdigest()}"'
