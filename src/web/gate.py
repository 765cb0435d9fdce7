"""API keys, client addresses behind proxies, and a rate limit per client that replicas share.

Wrong keys and wrong admin tokens are counted per address, in this process. After
`MAX_FAILED_LOGINS` of them in a window the answer is 429 instead of 401. A valid key is still
accepted: otherwise one client could lock out all others behind its address. The length of the keys
prevents guessing, not this limit.

Asking Redis about every request would cost more than the answer. A replica therefore takes permits
from Redis in lots of one second's share of the limit, and spends them locally. Redis never gives
out more than the limit in a window, but a permit may be spent up to one window after it was taken.
While Redis is unavailable, each replica counts for itself.
"""

import asyncio
import hmac
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from itertools import takewhile

from starlette.datastructures import Headers, QueryParams
from starlette.types import Scope

from config import Settings
from src.core import errors, metrics
from src.core.clock import Clock
from src.store.redis import PREFIX, RedisStore
from src.store.window import SharedWindow, Window
from src.web.uvicorn_edge import peer_of

WINDOW_SECONDS = 60
WINDOW_BUCKETS = 60  # a client waits at most one second too long
MAX_CLIENTS = 10_000  # clients counted at once; the least recently seen client is dropped first
MAX_FAILED_LOGINS = 20  # per address and window; more than a person's typing errors
MAX_FORWARDED = 512  # characters of X-Forwarded-For that are read, from the trusted end
IPV6_PREFIX = 64  # the owner of one IPv6 address usually has its whole network
ADMIN = "/admin"  # client name of admin requests in the metrics; no API key can have this name

RawHeaders = Mapping[bytes, bytes]
Address = IPv4Address | IPv6Address | None


@dataclass(slots=True, eq=False)
class ClientLimit:
    """The rate limit of one client, as this replica knows it. Times are monotonic seconds."""

    shared: SharedWindow
    limit: int
    clock: Clock
    permits: int = 0
    """Taken from the window, but not spent."""
    permits_until: float = 0.0
    left: int = 0
    """What is left of the limit besides the permits."""
    free_at: float = 0.0
    """When the whole limit is available again."""
    refused_until: float = 0.0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    def spend_permit(self) -> bool:
        """Spend a permit that was taken before. Returns False if there is none."""
        if self.permits <= 0 or self.clock.monotonic() >= self.permits_until:
            self.permits = 0
            return False
        self.permits -= 1
        return True

    def spend_locally(self) -> bool:
        """Spend from this replica's own window, without Redis. Returns False if it is used up."""
        if not self.shared.spend_locally(1).admitted:
            return False
        self._update()
        return True

    async def spend(self) -> float:
        """Spend a permit. If there is none, take a new lot, or one permit if less is left.

        Returns 0, or the seconds to wait if nothing is left.
        """
        async with self.lock:  # without it, every request of a burst would take a lot
            if self.spend_permit():
                return 0.0
            if self.clock.monotonic() < self.refused_until:
                return self.refused_until - self.clock.monotonic()
            for lot in dict.fromkeys((max(1, self.limit // WINDOW_SECONDS), 1)):
                reply = await self.shared.spend(lot)
                if reply.admitted:
                    self.permits = lot - 1
                    self.permits_until = self.clock.monotonic() + WINDOW_SECONDS
                    self._update()
                    return 0.0
            self.refused_until = self.clock.monotonic() + reply.wait_seconds
            return reply.wait_seconds

    def _update(self) -> None:
        self.left = self.limit - self.shared.window.used()
        self.free_at = self.clock.monotonic() + self.shared.window.wait_for(self.limit)

    def headers(self) -> dict[str, str]:
        """Return the headers for an admitted request."""
        seconds = self.free_at - self.clock.monotonic()
        return limit_headers(self.limit, self.left + self.permits, seconds)


class Gate:
    """Checks API keys, admin tokens and client limits. Without keys and limit, it is `open`."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self.open = not settings.api_keys and not settings.client_rate_limit
        self.limit = settings.client_rate_limit
        self._keys = {
            name: key.get_secret_value().encode() for name, key in settings.api_keys.items()
        }
        self._admin_token = settings.admin_token.get_secret_value().encode()
        self._trusted = settings.trusted_proxies
        self._clock = clock
        self._client = lru_cache(MAX_CLIENTS)(self._create_client)
        self._address = lru_cache(1024)(self._find_address)

    def try_admit(
        self, scope: Scope, headers: RawHeaders, store: RedisStore
    ) -> dict[str, str] | None:
        """Admit a request if that is possible without waiting for Redis.

        Returns the limit headers, or None if only `admit` can decide.
        """
        name = self._key_name(scope, headers)
        if name is None:
            return None
        limit_fields = {}
        if self.limit:
            client = self._client(self._client_id(name, scope, headers), store, self.limit)
            if not client.spend_permit() and (store.up or not client.spend_locally()):
                return None
            limit_fields = client.headers()
        metrics.clients[name, "admitted"] += 1
        return limit_fields

    async def admit(self, scope: Scope, store: RedisStore) -> dict[str, str]:
        """Count a request against its client's limit, and return the limit headers.

        Raises `Unauthorized`, `TooManyFailedLogins` or `TooManyRequests`. Refused requests do not
        count.
        """
        headers = raw_headers(scope)
        limit_fields = self.try_admit(scope, headers, store)
        if limit_fields is not None:
            return limit_fields
        name = self._key_name(scope, headers)
        if name is None:
            self._count_failure("unknown", _api_key(scope, headers), scope, store)
            raise errors.Unauthorized("send a configured API key in the header X-API-Key")
        client = self._client(self._client_id(name, scope, headers), store, self.limit)
        wait = await client.spend()
        metrics.clients[name, "limited" if wait else "admitted"] += 1
        if wait:
            limit = f"{self.limit} requests in {WINDOW_SECONDS} s"
            text = f"this client sent more than {limit}; wait for the time in Retry-After"
            raise errors.TooManyRequests(text, retry_after=wait)
        return client.headers()

    def check_admin(self, scope: Scope, store: RedisStore) -> None:
        """Check the admin token of a request. Requests to /admin have no rate limit.

        Raises `NotFound` if no admin token is configured, `AdminTokenMissing` or
        `TooManyFailedLogins`.
        """
        if not self._admin_token:
            raise errors.NotFound("the admin API is off; set ADMIN_TOKEN to switch it on")
        given = Headers(scope=scope).get("authorization", "")
        scheme, _, token = given.partition(" ")
        is_valid = hmac.compare_digest(token.encode(), self._admin_token)
        if not is_valid or scheme.lower() != "bearer":
            self._count_failure(ADMIN, given, scope, store)
            raise errors.AdminTokenMissing("send the header Authorization: Bearer <admin token>")
        metrics.clients[ADMIN, "admitted"] += 1

    def client_of(self, scope: Scope) -> str:
        """Return the client that a request counts against: its key, or its address."""
        headers = raw_headers(scope)
        return self._client_id(self._key_name(scope, headers), scope, headers)

    def _count_failure(self, name: str, given: str, scope: Scope, store: RedisStore) -> None:
        """Count a wrong credential. Raises `TooManyFailedLogins` beyond the limit of the address.

        A missing credential is not counted and always answered with 401, because the page asks for
        a key when it receives 401.
        """
        wait = 0.0
        if given:
            address = self._client_id(None, scope, raw_headers(scope))
            failures = self._client(f"failed:{address}", store, MAX_FAILED_LOGINS)
            wait = failures.shared.spend_locally(1).wait_seconds
        metrics.clients[name, "limited" if wait else "unauthorized"] += 1
        if wait:
            limit = f"{MAX_FAILED_LOGINS} wrong keys or tokens in {WINDOW_SECONDS} s"
            text = f"this address sent more than {limit}; send a valid one, or wait"
            raise errors.TooManyFailedLogins(text, retry_after=wait)

    def _key_name(self, scope: Scope, headers: RawHeaders) -> str | None:
        """Return the name of the request's key, or None if the key is wrong.

        The name is `anonymous` if no keys are configured.
        """
        if not self._keys:
            return "anonymous"
        given = _api_key(scope, headers).encode()
        # Every key is compared, each in constant time, so that timing reveals nothing.
        names = [name for name, key in self._keys.items() if hmac.compare_digest(given, key)]
        return names[0] if names else None

    def _client_id(self, name: str | None, scope: Scope, headers: RawHeaders) -> str:
        """Return the client of a request: its key's name, or its address."""
        if self._keys and name is not None:
            return f"key:{name}"
        forwarded = headers.get(b"x-forwarded-for", b"").decode("latin-1")
        return self._address(peer_of(scope), forwarded[-MAX_FORWARDED:])

    def _find_address(self, host: str, forwarded: str) -> str:
        """Return the client's address for a connection from `host`; for IPv6, its network.

        X-Forwarded-For is read only if `host` is a trusted proxy. The result is the nearest address
        that is not a trusted proxy, or the last one of the header if all are trusted. Reading stops
        at text that is not an address: a proxy that does not report the address it saw would let
        the client choose one.
        """
        address = _parse_address(host)
        if self._is_trusted(address):
            parts = filter(None, map(str.strip, reversed(forwarded.split(","))))
            addresses = list(takewhile(bool, map(_parse_address, parts))) or [address]
            untrusted = (known for known in addresses if not self._is_trusted(known))
            address = next(untrusted, addresses[0])
        if isinstance(address, IPv6Address):
            return str(ip_network((address, IPV6_PREFIX), strict=False))
        return str(address or host)

    def _is_trusted(self, address: Address) -> bool:
        return address is not None and any(address in network for network in self._trusted)

    def _create_client(self, client_id: str, store: RedisStore, limit: int) -> ClientLimit:
        window = Window(limit, WINDOW_SECONDS, self._clock, WINDOW_BUCKETS)
        shared = SharedWindow(f"{PREFIX}client:{{{client_id}}}", window, store, "limit")
        return ClientLimit(shared, limit, self._clock)


def limit_headers(limit: int, left: int, seconds: float) -> dict[str, str]:
    """Return the headers for `left` remaining requests and a full limit in `seconds`."""
    return {
        "RateLimit-Policy": f'"client";q={limit};w={WINDOW_SECONDS}',
        "RateLimit": f'"client";r={max(left, 0)};t={math.ceil(max(seconds, 0))}',
    }


def raw_headers(scope: Scope) -> dict[bytes, bytes]:
    """Return the header fields by name: the first of each, and all of X-Forwarded-For, joined."""
    headers = dict(reversed(scope["headers"]))
    forwarded = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
    headers[b"x-forwarded-for"] = b",".join(forwarded)
    return headers


def _api_key(scope: Scope, headers: RawHeaders) -> str:
    """Return the API key of a request.

    Browsers cannot send headers with `/ws` and `/stream`; there the query may hold it as `token`.
    """
    key = headers.get(b"x-api-key", b"").decode("latin-1")
    if not key and (scope["type"] == "websocket" or scope["path"].startswith("/stream/")):
        return QueryParams(scope["query_string"]).get("token", "")
    return key


def _parse_address(text: str) -> Address:
    """Return the IP address in a text, without brackets, port and zone; None if there is none."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
