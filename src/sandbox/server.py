"""The simulated exchanges as servers, for the demo, tests and benchmarks.

`python -m src.sandbox --port 9100` listens on 9100 (control), 9101 (bybit), 9102 (binance) and 9103
(kraken). Each exchange has a port of its own, so that this port can be closed. A GET of /control
returns the knobs of all exchanges and their calls by path. A POST to /control/reset clears the
knobs of all exchanges. A POST to an exchange replaces its knobs, see `Knobs`:

    curl localhost:9100/control/bybit -d '{"status": 503, "only": "ticker", "times": 3}'
"""

import argparse
import asyncio
import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from email.utils import formatdate

import orjson
from aiohttp import web

from src.sandbox.binance import Binance
from src.sandbox.bybit import Bybit
from src.sandbox.exchange import Exchange, Headers, RefusalError, Request, names_in
from src.sandbox.knobs import Knobs
from src.sandbox.kraken import Kraken
from src.sandbox.market import Market
from src.sandbox.sockets import Socket

logger = logging.getLogger(__name__)


def respond(status: int, text: str, headers: Headers = None) -> web.Response:
    """Send a text as JSON if it starts like an object or list, and else as HTML."""
    content_type = "application/json" if text.startswith(("{", "[")) else "text/html"
    return web.Response(text=text, status=status, headers=headers, content_type=content_type)


@dataclass(eq=False)
class Listener:
    """One exchange on its own port."""

    exchange: Exchange
    host: str
    port: int
    now: Callable[[], float]
    knobs: Knobs = field(default_factory=Knobs)
    set_at: float = 0.0
    """Unix time at which the knobs were set."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the knobs change. Each change of the knobs creates a new event."""
    calls: Counter[str] = field(default_factory=Counter)
    """Requests by path, and messages of sockets by path and " asked"."""
    requests: deque[tuple[str, dict[str, str]]] = field(default_factory=lambda: deque(maxlen=1_000))
    """The last requests: path with query, and headers."""
    runner: web.AppRunner | None = None
    sockets: dict[Socket, web.Request] = field(default_factory=dict)
    connections: list[float] = field(default_factory=list)
    """Times of the last handshakes."""

    async def open(self) -> None:
        """Listen. Once the port is known, it stays the same."""
        if self.runner is None:
            app = web.Application()
            app.router.add_route("*", "/{path:.*}", self.handle)
            self.runner, self.port = await listen(app, self.host, self.port)

    async def close(self) -> None:
        """Stop listening and end all connections."""
        if self.runner is not None:
            await self.runner.cleanup()
            self.runner = None

    async def set(self, knobs: Knobs) -> None:
        """Replace the knobs, and reset the rate limit."""
        self.replace_knobs(knobs)
        self.exchange.reset_limits()
        self.connections.clear()
        if knobs.drop:
            await self.drop_sockets(knobs)
        await (self.close() if knobs.refuse else self.open())
        self.changed.set()
        self.changed = asyncio.Event()

    def replace_knobs(self, knobs: Knobs) -> None:
        self.knobs = knobs
        self.set_at = self.now()
        self.exchange.configure(knobs)

    async def drop_sockets(self, knobs: Knobs) -> None:
        for socket, request in list(self.sockets.items()):
            if knobs.only not in socket.path:
                continue
            if knobs.drop == "close":
                await socket.ws.close()
            elif request.transport is not None:
                request.transport.abort()

    def knobs_for(self, path: str) -> Knobs:
        return self.knobs if self.knobs.only in path else Knobs()

    def take_knobs(self, request: web.Request) -> Knobs:
        """Return the knobs for a request, and count it towards `times`."""
        knobs = self.knobs_for(request.path)
        if knobs.pair not in ("", *names_in(request.query)):
            return knobs
        if knobs.times == 1:
            self.replace_knobs(Knobs())
        elif knobs.times:
            self.knobs = knobs.model_copy(update={"times": knobs.times - 1})
        return knobs

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Count a request and answer as the knobs say."""
        self.calls[request.path] += 1
        self.requests.append((request.path_qs, dict(request.headers)))
        knobs = self.take_knobs(request)
        changed = self.changed  # the knobs may change during the latency
        await asyncio.sleep(knobs.latency_ms / 1000)
        if knobs.hang:
            await changed.wait()
        if knobs.reset and request.transport is not None:
            request.transport.abort()
        is_socket = request.headers.get("Upgrade", "").lower() == "websocket"
        response = self.override(knobs, is_socket)
        if response is None and is_socket:
            if not self.has_too_many_connections():
                return await self.serve_socket(request)
            response = self.refuse(RefusalError("connection_limit"))
        response = response or self.answer(request, knobs)
        exchange_time = self.now() + knobs.clock_skew_ms / 1000
        response.headers.update({"Date": formatdate(exchange_time, usegmt=True), **knobs.headers})
        return await drip(request, response) if knobs.drip else response

    def has_too_many_connections(self) -> bool:
        """Count a handshake."""
        count, seconds = self.exchange.connection_limit
        now = self.now()
        self.connections = [at for at in self.connections if at > now - seconds] + [now]
        return len(self.connections) > count

    def override(self, knobs: Knobs, is_socket: bool) -> web.Response | None:
        """Return what the knobs answer in place of the exchange, if anything."""
        if knobs.geo_block:
            return self.refuse(RefusalError("geo_block"))
        if knobs.redirect:
            return respond(302, "", {"Location": knobs.redirect})
        if knobs.size:
            return respond(knobs.status or 200, f'["{"x" * (knobs.size - 4)}"]')
        if knobs.body is not None and (knobs.status or not is_socket):
            return respond(knobs.status or 200, knobs.body)
        return respond(knobs.status, f"status {knobs.status}") if knobs.status else None

    def answer(self, request: web.Request, knobs: Knobs) -> web.Response:
        market = self.market(knobs)
        ms = int(market.now * 1000) + knobs.clock_skew_ms
        call = Request(request.path, request.query, market, ms, knobs, len(request.raw_path))
        try:
            text, headers = self.exchange.answer(call)
        except RefusalError as refusal:
            return self.refuse(refusal)
        return respond(200, text, headers)

    def refuse(self, refusal: RefusalError) -> web.Response:
        return respond(*self.exchange.error(refusal, self.now()))

    def market(self, knobs: Knobs) -> Market:
        return self.exchange.market(self.now(), knobs, self.set_at)

    async def serve_socket(self, request: web.Request) -> web.StreamResponse:
        """Serve a socket until it ends."""
        socket = Socket(self.exchange, request.path, self.calls)
        await socket.ws.prepare(request)
        self.sockets[socket] = request
        pushing = asyncio.create_task(self.push(socket))
        try:
            await socket.serve()
        finally:
            pushing.cancel()
            del self.sockets[socket]
        return socket.ws

    async def push(self, socket: Socket) -> None:
        """Push what is new, every `push_ms`. The time that a push takes does not delay the next."""
        due = time.monotonic()
        while True:
            # A late push moves all later ones. So does a change of the knobs, which ends the wait.
            now = time.monotonic()
            due = max(min(due, now) + self.knobs_for(socket.path).push_ms / 1000, now)
            await self.pause((due - now) * 1000)
            knobs = self.knobs_for(socket.path)
            messages = []
            if not knobs.freeze:
                messages = socket.new_messages(self.market(knobs), knobs.mute)
            await self.pause(knobs.latency_ms)
            for message in messages:
                await socket.send(message if knobs.body is None else knobs.body)

    async def pause(self, ms: float) -> None:
        """Wait for some time, or until the knobs change."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ms / 1000):
                await self.changed.wait()


async def listen(app: web.Application, host: str, port: int) -> tuple[web.AppRunner, int]:
    """Start a server on a port, or on a free port if it is 0. Return its runner and port."""
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.01)
    await runner.setup()
    site = web.TCPSite(runner, host, port)
    await site.start()
    return runner, site.port


async def drip(request: web.Request, response: web.Response) -> web.StreamResponse:
    slow = web.StreamResponse(status=response.status, headers=response.headers)
    await slow.prepare(request)
    for byte in response.body if isinstance(response.body, bytes) else b"":
        await slow.write(bytes([byte]))
        await asyncio.sleep(0.1)
    return slow


class Sandbox:
    """All exchanges, and the control server."""

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        now: Callable[[], float] = time.time,
        filler: int = 0,
    ) -> None:
        """Use free ports if `port` is 0. Each exchange lists `filler` additional markets."""
        self.host = host
        self.port = port
        self.listeners = {
            kind.name: Listener(kind(filler), host, port and port + offset, now)
            for offset, kind in enumerate((Bybit, Binance, Kraken), start=1)
        }
        self.calls = {name: listener.calls for name, listener in self.listeners.items()}
        self.requests = {name: listener.requests for name, listener in self.listeners.items()}
        self.app = web.Application()
        self.app.router.add_get("/control", self.show_state)
        self.app.router.add_post("/control/{name}", self.set_knobs)
        self.app.cleanup_ctx.append(self.serve_exchanges)

    async def start(self) -> None:
        self.control, self.port = await listen(self.app, self.host, self.port)

    async def stop(self) -> None:
        """Close all ports and connections."""
        await self.control.cleanup()

    async def serve_exchanges(self, _app: web.Application) -> AsyncIterator[None]:
        """Listen as long as the control server."""
        await asyncio.gather(*[listener.open() for listener in self.listeners.values()])
        logger.info("sandbox listens: control %s, exchanges %s", self.control_url, self.urls)
        yield
        await asyncio.gather(*[listener.close() for listener in self.listeners.values()])

    @property
    def urls(self) -> dict[str, str]:
        listeners = self.listeners.items()
        return {name: f"http://{self.host}:{listener.port}" for name, listener in listeners}

    @property
    def settings(self) -> dict[str, str]:
        """Return the settings with which the gateway uses these exchanges."""
        rest = {f"{name.upper()}_REST_URL": url for name, url in self.urls.items()}
        return rest | {
            name.replace("REST", "WS"): url.replace("http", "ws") for name, url in rest.items()
        }

    @property
    def control_url(self) -> str:
        return f"http://{self.host}:{self.port}/control"

    def count(self, exchange: str, text: str = "") -> int:
        """Return the number of calls with a text in their path."""
        return sum(count for path, count in self.calls[exchange].items() if text in path)

    def clear_counts(self) -> None:
        for listener in self.listeners.values():
            listener.calls.clear()
            listener.requests.clear()

    async def set(self, exchange: str, **knobs: object) -> None:
        """Replace the knobs of one exchange. None is the default of a knob."""
        given = {name: value for name, value in knobs.items() if value is not None}
        await self.listeners[exchange].set(Knobs.model_validate(given))

    async def reset(self) -> None:
        """Clear the knobs of all exchanges."""
        for name in self.listeners:
            await self.set(name)

    async def show_state(self, _request: web.Request) -> web.Response:
        state = {}
        for name, listener in self.listeners.items():
            state[name] = {"knobs": listener.knobs.model_dump(mode="json"), "calls": listener.calls}
        return web.json_response(state)

    async def set_knobs(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        try:
            if name == "reset":
                await self.reset()
            else:
                await self.set(name, **orjson.loads(await request.read()))
        except KeyError:
            error = f"the exchanges are {', '.join(self.listeners)}"
            return web.json_response({"error": error}, status=404)
        except (ValueError, TypeError):
            error = f"the knobs are {', '.join(Knobs.model_fields)}; see the module's text"
            return web.json_response({"error": error}, status=400)
        return await self.show_state(request)


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulate exchanges.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=9100, help="control; exchanges use the next 3")
    parser.add_argument("--filler", type=int, default=0, help="additional markets per exchange")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    options = parser.parse_args()
    sandbox = Sandbox(options.host, options.port, filler=options.filler)
    try:
        web.run_app(sandbox.app, host=options.host, port=options.port, access_log=None, print=None)
    except OSError as error:
        raise SystemExit(f"the sandbox cannot listen: {error}") from None
