"""Who may ask, and how often: keys, addresses behind proxies, and a limit per client that all replicas share.

A wrong key or admin token is counted by address, in this process. Past `MAX_FAILED_LOGINS` in a window the answer is
429 instead of 401. A right one is accepted all the same: otherwise one client could lock out everybody behind its
address. Guessing is prevented by the length of keys, not by this limit.

Asking Redis about every request would cost more than answering it. So a replica takes permits in lots of a second's
worth of the limit and spends them by itself: no more than the limit is given out in a window, but a permit counts from
when it was taken, and may be spent up to a window later. While Redis is away each replica counts for itself.
"""

import asyncio
import hmac
import math
from collections import OrderedDict
from functools import lru_cache
from ipaddress import ip_address, ip_network
from itertools import takewhile

from starlette.datastructures import Headers, QueryParams
from starlette.types import Scope

from config import Settings
from src.core import metrics
from src.core.clock import Clock
from src.core.errors import AdminTokenMissing, NotFound, TooManyFailedLogins, TooManyRequests, Unauthorized
from src.store.redis import PREFIX, RedisStore
from src.store.window import SharedWindow, Window

WINDOW_SECONDS = 60
WINDOW_BUCKETS = 60  # a client waits a second too long at most
MAX_CLIENTS = 10_000  # clients counted at once; the least recently seen is forgotten first
MAX_FAILED_LOGINS = 20  # of one address in a window; a person mistypes a key less often, a program should stop
MAX_FORWARDED = 512  # characters of X-Forwarded-For that are read, from its end: what is nearest is what is trusted
IPV6_PREFIX = 64  # who has one IPv6 address has all of its network
ADMIN = "/admin"  # the client in the metrics that sends an admin token; no key can have this name

Told = dict[str, str]


class ClientLimit:
    """What a replica knows of one client's limit."""

    __slots__ = ("free_at", "left", "permits", "permits_until", "refused_until", "shared", "taking")

    def __init__(self, shared: SharedWindow) -> None:
        self.shared = shared
        self.permits, self.permits_until = 0, 0.0  # taken and not spent yet
        self.left, self.free_at = 0, 0.0  # beside those permits; when all of the limit is free again
        self.refused_until = 0.0
        self.taking = asyncio.Lock()


class Gate:
    """Lets in who has a key, as often as the limit allows; without keys or limit it lets everybody in."""

    def __init__(self, settings: Settings, clock: Clock) -> None:
        self.open = not settings.api_keys and not settings.client_rate_limit
        self.limit = settings.client_rate_limit
        self._keys = {name: key.get_secret_value().encode() for name, key in settings.api_keys.items()}
        self._admin_token = settings.admin_token.get_secret_value().encode()
        self._trusted = [ip_network(network) for network in settings.trusted_proxies]
        self._clock = clock
        self._clients: OrderedDict[str, ClientLimit] = OrderedDict()
        self._lot = max(1, self.limit // WINDOW_SECONDS)
        self._address = lru_cache(1024)(self._find_address)

    def at_once(self, scope: Scope, key: str, forwarded: str, store: RedisStore) -> Told | None:
        """Admit a request if that takes no word from Redis; returns as `admit` does, or None when that has to judge."""
        if (name := self._name(key)) is None:
            return None
        if self.limit:
            client = self._client(self._whose(name, scope, forwarded), store, self.limit)
            if not self._spend_permit(client) and (store.up or not self._spend_alone(client)):
                return None
            told = self._told(client)
        else:
            told = {}
        metrics.clients[name, "admitted"] += 1
        return told

    async def admit(self, scope: Scope, store: RedisStore) -> Told:
        """Count a request and return the headers that tell what is left of its client's limit.

        Raises `Unauthorized`, `TooManyFailedLogins`, or `TooManyRequests`, which counts as nothing.
        """
        key, forwarded = credentials(scope)
        if (name := self._name(key)) is None:
            error = Unauthorized("send one of the configured keys in the header X-API-Key")
            raise self._refuse("unknown", key, scope, store, error)
        client = self._client(self._whose(name, scope, forwarded), store, self.limit) if self.limit else None
        try:
            told = await self._take(client) if client else {}
        except TooManyRequests:
            metrics.clients[name, "limited"] += 1
            raise
        metrics.clients[name, "admitted"] += 1
        return told

    def check_admin(self, scope: Scope, store: RedisStore) -> None:
        """Count a request to /admin, which has no limit.

        Raises `NotFound` when no admin token is configured, `AdminTokenMissing` or `TooManyFailedLogins`.
        """
        if not self._admin_token:
            raise NotFound("the admin API is off; set ADMIN_TOKEN to switch it on")
        given = Headers(scope=scope).get("authorization", "")
        scheme, _, token = given.partition(" ")
        if not hmac.compare_digest(token.encode(), self._admin_token) or scheme.lower() != "bearer":
            error = AdminTokenMissing("send the header Authorization: Bearer with the admin token")
            raise self._refuse(ADMIN, given, scope, store, error)
        metrics.clients[ADMIN, "admitted"] += 1

    def client_of(self, scope: Scope) -> str:
        """Return whose limits a request counts against: those of its key, or of its address."""
        key, forwarded = credentials(scope)
        return self._whose(self._name(key), scope, forwarded)

    def _refuse(self, name: str, given: str, scope: Scope, store: RedisStore, error: Unauthorized) -> Exception:
        """Count a missing or wrong credential; return `error`, or `TooManyFailedLogins` past the limit.

        A missing credential is no attempt, so its answer stays 401: by that a page knows that it has to ask for a key.
        """
        address = f"failed:{self._whose(None, scope, credentials(scope)[1])}"
        wait = self._client(address, store, MAX_FAILED_LOGINS).shared.spend_alone(1).wait_seconds if given else 0.0
        metrics.clients[name, "limited" if wait else "unauthorized"] += 1
        if not wait:
            return error
        most = f"more than {MAX_FAILED_LOGINS} wrong keys or tokens in {WINDOW_SECONDS} s"
        return TooManyFailedLogins(f"{most} came from this address; send a right one, or wait", retry_after=wait)

    def refused(self, seconds: float) -> Told:
        """Return the headers that tell of a limit that is used up for so many seconds."""
        return self._headers(0, seconds)

    def _name(self, given: str) -> str | None:
        """Return the name of the key, `anonymous` where there are none, None for a wrong one."""
        if not self._keys:
            return "anonymous"
        # Every key is compared, in constant time, so that time tells nothing.
        names = [name for name, key in self._keys.items() if hmac.compare_digest(given.encode(), key)]
        return names[0] if names else None

    def _whose(self, name: str | None, scope: Scope, forwarded: str) -> str:
        """Return whose limit a request counts against: that of its key, or of its address."""
        if self._keys and name is not None:
            return f"key:{name}"
        return self._address(_peer(scope), forwarded[-MAX_FORWARDED:])

    def _find_address(self, host: str, forwarded: str) -> str:
        """Return the address of a client whose connection comes from `host`; of IPv6 the network.

        Only a trusted proxy is asked for another address: the nearest one that is no trusted proxy itself, or the
        nearest one where all are trusted. What stands before something that is no address is not read: a proxy that
        does not tell the address it saw would let the client choose its own.
        """
        if self._trusts(host):
            parts = [part.strip() for part in reversed(forwarded.split(",")) if part.strip()]
            nearest = list(takewhile(bool, map(_bare, parts)))
            strangers = (address for address in nearest if not self._trusts(address))
            host = next(strangers, nearest[0] if nearest else host)
        bare = _bare(host)
        return str(ip_network((bare, IPV6_PREFIX), strict=False)) if ":" in bare else bare or host

    def _trusts(self, host: str) -> bool:
        bare = _bare(host)
        return bool(bare) and any(ip_address(bare) in network for network in self._trusted)

    def _client(self, whose: str, store: RedisStore, limit: int) -> ClientLimit:
        client = self._clients.pop(whose, None)
        if client is None:
            window = Window(limit, WINDOW_SECONDS, self._clock, WINDOW_BUCKETS)
            client = ClientLimit(SharedWindow(f"{PREFIX}client:{{{whose}}}", window, store, "limit"))
            if len(self._clients) >= MAX_CLIENTS:
                self._clients.popitem(last=False)
        self._clients[whose] = client  # at the end, so that who asks often is not who is forgotten
        return client

    async def _take(self, client: ClientLimit) -> Told:
        """Spend a permit, of those at hand or of a new lot; returns the headers. Raises `TooManyRequests`."""
        async with client.taking:  # or a burst would take a lot for each of its requests
            if not self._spend_permit(client):
                wait = client.refused_until - self._clock.monotonic()
                if wait <= 0 and (wait := await self._take_lot(client)):
                    client.refused_until = self._clock.monotonic() + wait
                if wait > 0:
                    raise TooManyRequests(
                        f"more than {self.limit} requests in {WINDOW_SECONDS} s; wait and ask again", retry_after=wait
                    )
        return self._told(client)

    async def _take_lot(self, client: ClientLimit) -> float:
        """Take a lot and spend its first permit, or one alone where no more is left; returns seconds to wait, or 0."""
        for lot in dict.fromkeys((self._lot, 1)):
            reply = await client.shared.spend(lot)
            if reply.admitted:
                client.permits, client.permits_until = lot - 1, self._clock.monotonic() + WINDOW_SECONDS
                self._note(client)
                return 0.0
        return reply.wait_seconds

    def _spend_permit(self, client: ClientLimit) -> bool:
        if client.permits <= 0 or self._clock.monotonic() >= client.permits_until:
            client.permits = 0
            return False
        client.permits -= 1
        return True

    def _spend_alone(self, client: ClientLimit) -> bool:
        """Spend one without Redis."""
        if not client.shared.spend_alone(1).admitted:
            return False
        self._note(client)
        return True

    def _note(self, client: ClientLimit) -> None:
        window = client.shared.window
        client.left = self.limit - window.used()
        client.free_at = self._clock.monotonic() + window.wait_for(self.limit)

    def _told(self, client: ClientLimit) -> Told:
        return self._headers(client.left + client.permits, client.free_at - self._clock.monotonic())

    def _headers(self, left: int, seconds: float) -> Told:
        """Tell how many requests are left, and the seconds until all of the limit is free again."""
        return {
            "RateLimit-Policy": f'"client";q={self.limit};w={WINDOW_SECONDS}',
            "RateLimit": f'"client";r={max(left, 0)};t={math.ceil(max(seconds, 0))}',
        }


def credentials(scope: Scope) -> tuple[str, str]:
    """Return the API key and the X-Forwarded-For of a request.

    Browsers cannot send a header with `/ws` and `/stream`: there the key may be in the query as `token`.
    """
    headers = Headers(scope=scope)
    key = headers.get("x-api-key", "")
    if not key and (scope["type"] == "websocket" or scope["path"].startswith("/stream/")):
        key = QueryParams(scope["query_string"]).get("token", "")
    return key, ",".join(headers.getlist("x-forwarded-for"))


def _peer(scope: Scope) -> str:
    """Return the address at the other end of the connection.

    The transport knows it. `scope["client"]` may be from X-Forwarded-For: by default uvicorn trusts its own machine.
    """
    transport = getattr(scope.get("virtuoso.server"), "transport", None)
    peer = scope.get("client") if transport is None else transport.get_extra_info("peername")
    return peer[0] if isinstance(peer, tuple | list) else "unknown"


def _bare(text: str) -> str:
    """Return the IP address in a text, without brackets, port and zone; nothing when there is none."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text.partition("%")[0])
    except ValueError:
        return ""
    return str(getattr(address, "ipv4_mapped", None) or address)
