"""The three exchanges, simulated in their own wire formats over real HTTP, for the demo, tests and benchmarks.

Each has a listener of its own, so that one can really be killed: `python -m src.sandbox --port 9100` puts the control
on 9100, bybit on 9101, binance on 9102 and kraken on 9103. `curl localhost:9100/control` shows knobs and calls by path,
a POST to /control/reset clears all knobs, and this spoils one exchange, in place of the knobs it had:

    curl localhost:9100/control/bybit -d '{"status": 503, "only": "ticker", "times": 3}'

latency_ms answers late, hang never; refuse closes the port and all connections, reset aborts the request's own; status,
body, size (bytes of JSON), redirect (an address) and geo_block replace the answer; headers come on top; drip sends a
byte per 100 ms; rate_limit is what a window allows (0 as documented, -1 no limit); price multiplies all prices;
clock_skew_ms shifts the time it tells. They hold for paths that contain `only`, and for so many requests as `times`.

Sockets push every push_ms. freeze pushes nothing, pings being answered, mute nothing of topics with that text in their
name; latency_ms pushes late, body pushes that; drop ends those that are open now, by a "cut" or a "close" in order, as
binance does after 24 hours; status, geo_block and refuse keep new ones out.
"""

import argparse
import asyncio
import contextlib
import logging
import signal
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Literal

import orjson
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field

from src.sandbox.market import Market
from src.sandbox.sockets import DIALECTS, Socket
from src.sandbox.wire import Binance, Bybit, Call, Exchange, Kraken, RefusalError

logger = logging.getLogger(__name__)


class Knobs(BaseModel):
    """What is spoiled at one exchange; the module's text explains each."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    latency_ms: float = 0.0
    status: int = 0
    headers: dict[str, str] = {}
    body: str | None = None
    hang: bool = False
    drip: bool = False
    size: int = 0
    redirect: str = ""
    refuse: bool = False
    reset: bool = False
    geo_block: bool = False
    rate_limit: int = 0
    only: str = ""
    times: int = 0
    price: float = 1.0
    clock_skew_ms: int = 0
    push_ms: float = Field(250, ge=1)
    freeze: bool = False
    mute: str = ""
    drop: Literal["", "cut", "close"] = ""


KNOBS = web.RequestKey("knobs", Knobs)
Next = Callable[[web.Request], Awaitable[web.StreamResponse]]


def respond(status: int, body: object, headers: Mapping[str, str] | None = None) -> web.Response:
    """Send texts as HTML and all else as JSON."""
    kind, payload = ("text/html", body.encode()) if isinstance(body, str) else ("application/json", orjson.dumps(body))
    return web.Response(body=payload, status=status, headers={"Content-Type": kind, **(headers or {})})


class Listener:
    """One exchange on its own TCP port, with the knobs that spoil it."""

    def __init__(self, exchange: Exchange, host: str, port: int, now: Callable[[], float]) -> None:
        self.exchange, self.host, self.port, self.now = exchange, host, port, now
        self.knobs, self.changed = Knobs(), asyncio.Event()
        self.calls: Counter[str] = Counter()
        self.requests: deque[tuple[str, dict[str, str]]] = deque(maxlen=1_000)
        self.runner: web.AppRunner | None = None
        self.sockets: dict[Socket, web.Request] = {}

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self.spoil])
        app.router.add_route("*", "/{path:.*}", self.answer)
        return app

    def market(self, knobs: Knobs) -> Market:
        return Market(self.now(), (1 + self.exchange.bias) * knobs.price, self.exchange.half_spread)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Upgrade", "").lower() == "websocket":
            return await self.stream(request)
        knobs, exchange = request[KNOBS], self.exchange
        market = self.market(knobs)
        told = int(market.now * 1000) + knobs.clock_skew_ms
        try:
            text, headers = exchange.answer(Call(request.path, request.query, market, told, knobs.rate_limit))
        except RefusalError as refusal:
            return respond(*refusal.args)
        return respond(200, orjson.Fragment(text), headers)

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """Serve a socket until it ends."""
        socket = Socket(DIALECTS[self.exchange.name](self.exchange), request.path, self.calls)
        await socket.ws.prepare(request)
        self.sockets[socket] = request
        pushing = asyncio.create_task(self.push(socket))
        try:
            await socket.answer()
        finally:
            pushing.cancel()
            del self.sockets[socket]
        return socket.ws

    async def push(self, socket: Socket) -> None:
        """Push what is new, at the pace and in the way of the knobs."""
        due = time.monotonic()
        while True:
            # At that pace whatever a push takes; what was late is not made up for, what the knobs cut short is over.
            now = time.monotonic()
            due = max(min(due, now) + self.bound(socket.path).push_ms / 1000, now)
            await self.pause((due - now) * 1000)
            knobs = self.bound(socket.path)
            messages = [] if knobs.freeze else socket.news(self.market(knobs), knobs.mute)
            await self.pause(knobs.latency_ms)
            for message in messages:
                await socket.send(message if knobs.body is None else knobs.body)

    async def pause(self, ms: float) -> None:
        """Wait for so long, or until the knobs change."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ms / 1000):
                await self.changed.wait()

    async def drop(self, knobs: Knobs) -> None:
        """End the sockets that are open."""
        for socket, request in list(self.sockets.items()):
            if knobs.only not in socket.path:
                continue
            if knobs.drop == "close":
                await socket.ws.close()
            elif request.transport is not None:
                request.transport.abort()

    @web.middleware
    async def spoil(self, request: web.Request, handler: Next) -> web.StreamResponse:
        """Count the request, then do what the knobs say."""
        self.calls[request.path] += 1
        self.requests.append((request.path_qs, dict(request.headers)))
        knobs, changed = self.take(request.path), self.changed  # together: the knobs may change during the latency
        request[KNOBS] = knobs
        await asyncio.sleep(knobs.latency_ms / 1000)
        if knobs.hang:
            await changed.wait()
        if knobs.reset and request.transport is not None:
            request.transport.abort()
        response = self.canned(knobs, "Upgrade" in request.headers) or await handler(request)
        response.headers.update(knobs.headers)
        return await drip(request, response) if knobs.drip and isinstance(response, web.Response) else response

    def canned(self, knobs: Knobs, is_socket: bool) -> web.Response | None:
        """Return what the knobs answer in place of the exchange, if anything."""
        status = knobs.status or 200
        if knobs.geo_block:
            return respond(*self.exchange.geo_block)
        if knobs.redirect:
            return respond(302, "", {"Location": knobs.redirect})
        if knobs.size:
            return respond(status, ["x" * (knobs.size - 4)])
        if knobs.status or (knobs.body is not None and not is_socket):
            return respond(status, f"status {status}" if knobs.body is None else knobs.body)
        return None

    def bound(self, path: str) -> Knobs:
        """Return the knobs that apply to this path."""
        return self.knobs if self.knobs.only in path else Knobs()

    def take(self, path: str) -> Knobs:
        """Return the knobs that apply to this path, and use up one of their times."""
        knobs = self.bound(path)
        if knobs.times:
            self.knobs = knobs.model_copy(update={"times": knobs.times - 1}) if knobs.times > 1 else Knobs()
        return knobs

    async def set(self, knobs: Knobs) -> None:
        """Replace the knobs, forgive the rate limit, open or close the port, and wake what hangs."""
        self.knobs = knobs
        self.exchange.forgive()
        if knobs.drop:
            await self.drop(knobs)
        await (self.close() if knobs.refuse else self.open())
        self.changed.set()
        self.changed = asyncio.Event()

    async def open(self) -> None:
        """Listen, always on the same port once it is known."""
        if self.runner is None:
            self.runner, self.port = await listen(self.app(), self.host, self.port)

    async def close(self) -> None:
        """Stop listening and end the open connections."""
        if self.runner is not None:
            await self.runner.cleanup()
            self.runner = None


async def listen(app: web.Application, host: str, port: int) -> tuple[web.AppRunner, int]:
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.01)
    await runner.setup()
    site = web.TCPSite(runner, host, port)
    await site.start()
    return runner, site.port


async def drip(request: web.Request, whole: web.Response) -> web.StreamResponse:
    slow = web.StreamResponse(status=whole.status, headers=whole.headers)
    await slow.prepare(request)
    for byte in whole.body if isinstance(whole.body, bytes) else b"":
        await slow.write(bytes([byte]))
        await asyncio.sleep(0.1)
    return slow


class Sandbox:
    """All exchanges and the control listener."""

    def __init__(
        self, host: str = "127.0.0.1", port: int = 0, now: Callable[[], float] = time.time, filler: int = 0
    ) -> None:
        self.host, self.port = host, port
        exchanges: list[Exchange] = [Bybit(filler), Binance(filler), Kraken(filler)]
        numbered = enumerate(exchanges, port + 1)
        self.listeners = {own.name: Listener(own, host, port and number, now) for number, own in numbered}
        self.calls = {name: listener.calls for name, listener in self.listeners.items()}
        self.requests = {name: listener.requests for name, listener in self.listeners.items()}

    async def start(self) -> None:
        app = web.Application()
        app.add_routes([web.get("/control", self.show), web.post("/control/{name}", self.turn)])
        self.control, self.port = await listen(app, self.host, self.port)
        await asyncio.gather(*(listener.open() for listener in self.listeners.values()))

    async def stop(self) -> None:
        """Close all listeners and end what hangs."""
        await asyncio.gather(self.control.cleanup(), *(listener.close() for listener in self.listeners.values()))

    @property
    def urls(self) -> dict[str, str]:
        return {name: f"http://{self.host}:{listener.port}" for name, listener in self.listeners.items()}

    @property
    def settings(self) -> dict[str, str]:
        """Return the settings that point a gateway here."""
        told = {f"{name.upper()}_REST_URL": url for name, url in self.urls.items()}
        return told | {f"{name.upper()}_WS_URL": url.replace("http", "ws") for name, url in self.urls.items()}

    @property
    def control_url(self) -> str:
        return f"http://{self.host}:{self.port}/control"

    def count(self, exchange: str, text: str = "") -> int:
        return sum(number for path, number in self.calls[exchange].items() if text in path)

    def clear_counts(self) -> None:
        for listener in self.listeners.values():
            listener.calls.clear()
            listener.requests.clear()

    async def set(self, exchange: str, **knobs: object) -> None:
        """Replace the knobs of one exchange; None means the default."""
        given = {name: value for name, value in knobs.items() if value is not None}
        await self.listeners[exchange].set(Knobs.model_validate(given))

    async def reset(self) -> None:
        for name in self.listeners:
            await self.set(name)

    async def show(self, request: web.Request) -> web.Response:
        own = self.listeners.items()
        return respond(200, {name: {"knobs": it.knobs.model_dump(), "calls": it.calls} for name, it in own})

    async def turn(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        try:
            await (self.reset() if name == "reset" else self.set(name, **orjson.loads(await request.read())))
        except KeyError:
            return respond(404, {"error": f"the exchanges are {', '.join(self.listeners)}"})
        except (ValueError, TypeError):
            return respond(400, {"error": f"the knobs are {', '.join(Knobs.model_fields)}; see the module's text"})
        return await self.show(request)


async def serve(host: str, port: int, filler: int) -> None:
    """Run until SIGINT or SIGTERM."""
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    sandbox = Sandbox(host, port, filler=filler)
    await sandbox.start()
    logger.info("sandbox listens: control %s, exchanges %s", sandbox.control_url, sandbox.urls)
    await stopped.wait()
    await sandbox.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description="The exchanges, simulated.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9100, help="control port; the exchanges take the next three")
    parser.add_argument("--filler", type=int, default=0, help="this many extra markets on every exchange")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        asyncio.run(serve(**vars(parser.parse_args())))
    except OSError as error:
        raise SystemExit(f"the sandbox cannot listen: {error}") from None
