"""Known requests are answered by their bytes, exactly as uvicorn and the fast path answer them."""

import asyncio
import logging
import re
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from src.cache.entry import Entry, Key
from src.sandbox.server import Sandbox
from src.web import uvicorn_edge
from src.web.wire_path import MAX_JOINED_BYTES, MAX_REQUEST_BYTES, WirePath, WireProtocol
from tests.conftest import FakeClock, Live, eventually, make_settings, sample, serve

LONG_TTL: dict[str, Any] = {
    "ticker_ttl_seconds": 600,
    "orderbook_ttl_seconds": 600,
    "trades_ttl_seconds": 600,
}
TICKER = b"GET /ticker/BTC-USDT HTTP/1.1\r\nHost: a\r\nAccept: */*\r\n\r\n"
RAW = b"GET /raw/binance/api/v3/ticker/24hr?symbol=BTCUSDT HTTP/1.1\r\nHost: a\r\n\r\n"
BOOK = b"GET /orderbook/ETH-USDT?limit=5 HTTP/1.1\r\nhost: a\r\nConnection: keep-alive\r\n\r\n"
BATCH = b"GET /tickers?symbols=BTC-USDT,ETH-USDT HTTP/1.1\r\nHOST: a\r\n\r\n"
MISS = b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\n"
END = b"GET /health/live HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
STEPS = 50  # of the event loop: more than an answer takes
KNOWN = [TICKER, RAW, BOOK, BATCH]
POST = b"POST /ticker/BTC-USDT HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%b"
ODD = {
    "old": TICKER.replace(b"1.1", b"1.0"),
    "close": TICKER.replace(b"Accept: */*", b"Connection: close"),
    "with an id": TICKER.replace(b"Accept", b"X-Request-ID: mine\r\nAccept"),
    "head": TICKER.replace(b"GET", b"HEAD"),
    "lower case": TICKER.replace(b"Host: a", b"host: a"),
    "no host": TICKER.replace(b"Host: a\r\n", b""),
    "two hosts": TICKER.replace(b"Host: a", b"Host: a\r\nHost: b"),
    "line feeds": TICKER.replace(b"\r\n", b"\n"),
    "empty line before": b"\r\n" + TICKER,
    "empty line after": TICKER + b"\r\n",
    "body": POST % (len(TICKER), TICKER),
    "upgrade": TICKER.replace(b"Accept: */*", b"Connection: Upgrade\r\nUpgrade: h2c"),
    "expectation": TICKER.replace(b"Accept: */*", b"Expect: 100-continue"),
    "chunks": POST.replace(b"Content-Length: %d", b"Transfer-Encoding: chunked")
    % b"5\r\nhello\r\n0\r\n\r\n",
    "garbage": b"garbage\r\n\r\n",
    "null": b"\0",
    "condition": TICKER.replace(b"Accept", b"If-None-Match: *\r\nAccept"),
    "encoding": RAW.replace(b"Host: a", b"Host: a\r\nAccept-Encoding: gzip"),
    "signed": RAW.replace(b"Host: a", b"Host: a\r\nX-MBX-APIKEY: key"),
    "smuggled": POST.replace(b"Content-Length: %d", b"Content-Length: 0\r\nTransfer-Encoding: x")
    % TICKER,
}


class Receiver(asyncio.Protocol):
    """Keeps what a client receives, also if the server resets the connection after it."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.ended = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self.received += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended.set()


async def exchange(live: Live, pieces: Iterable[bytes]) -> bytes:
    """Send each piece in a write of its own, then a last request; return all received bytes.

    The server handles a piece before the next one is sent, as far as it is complete.
    """
    port = int(live.url.rsplit(":", 1)[1])
    loop = asyncio.get_running_loop()
    transport, receiver = await loop.create_connection(Receiver, "127.0.0.1", port)
    try:
        for piece in (*pieces, END):
            if transport.is_closing():  # the server has closed the connection
                break
            transport.write(piece)
            await asyncio.sleep(0.001)
            for _ in range(STEPS):
                await asyncio.sleep(0)
        async with asyncio.timeout(60):
            await receiver.ended.wait()
        return bytes(receiver.received)
    finally:
        transport.abort()


def without_changes(text: bytes) -> bytes:
    """Return answers without what differs from answer to answer."""
    text = re.sub(rb"x-request-id: [0-9a-f]{32}", b"x-request-id: made", text)
    text = re.sub(rb"\"request_id\":\"[0-9a-f]{32}\"", b"", text)
    return re.sub(rb"date: [^\r]*", b"date: now", text)


def in_order(text: bytes) -> list[bytes]:
    """Return the lines of answers in alphabetical order: the app sends its fields in another."""
    return sorted(without_changes(text).split(b"\r\n"))


def find(pattern: bytes, text: bytes) -> bytes:
    """Return the group of a pattern, which must match."""
    found = re.search(pattern, text)
    assert found, text
    return found[1]


class Paths:
    """Three gateways with one clock: all paths, without the wire path, the app alone."""

    def __init__(self, lives: Sequence[Live]) -> None:
        self.lives = lives

    async def compare(self, pieces: Sequence[bytes]) -> bytes:
        """Check that all three send the same bytes, and return them."""
        answers = await asyncio.gather(*(exchange(live, pieces) for live in self.lives))
        assert without_changes(answers[0]) == without_changes(answers[1]), pieces
        assert in_order(answers[0]) == in_order(answers[2]), pieces
        return answers[0]


@asynccontextmanager
async def three_paths() -> AsyncIterator[Paths]:
    clock = FakeClock()
    exchanges = Sandbox(now=clock.time)
    await exchanges.start()
    for name in exchanges.urls:
        await exchanges.set(name, rate_limit=-1)
    chosen = make_settings(exchanges, streaming=False, log_level="WARNING", **LONG_TTL)
    async with AsyncExitStack() as stack:
        lives = [
            await stack.enter_async_context(serve(chosen, clock, wire=wire, shortcut=shortcut))
            for wire, shortcut in ((True, True), (False, True), (False, False))
        ]
        paths = Paths(lives)
        for live in lives:
            for _ in range(3):
                await exchange(live, KNOWN * 2)
        clock.advance(0.25)  # prepared fields are not used at the age 0
        yield paths
    await exchanges.stop()


@pytest.fixture
async def paths() -> AsyncIterator[Paths]:
    async with three_paths() as started:
        yield started


@asynccontextmanager
async def running(
    sandbox: Sandbox, clock: FakeClock, cache_memory_size: int = 1000, **options: Any
) -> AsyncIterator[Live]:
    """Run a gateway that knows the requests of `KNOWN`. `options` are those of uvicorn."""
    fixed = LONG_TTL | {"streaming": False, "cache_memory_size": cache_memory_size}
    chosen = make_settings(sandbox, log_level="INFO", **fixed)
    async with serve(chosen, clock, **options) as live:
        for _ in range(3):
            await exchange(live, KNOWN * 2)
        clock.advance(0.25)  # prepared fields are not used at the age 0
        yield live


class Connection:
    """A client's connection, and the server's objects for it."""

    def __init__(
        self, live: Live, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.reader = reader
        self.writer = writer
        self.inner: Any
        (self.inner,) = live.server.server_state.connections

    @classmethod
    @asynccontextmanager
    async def open(
        cls, live: Live, context: ssl.SSLContext | None = None, limit: int = 65_536
    ) -> "AsyncIterator[Connection]":
        """Open the only connection. `limit` bounds what the client reads in advance."""
        port = int(live.url.rsplit(":", 1)[1])
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, limit=limit)
        try:
            await eventually(lambda: len(live.server.server_state.connections) == 1)
            yield cls(live, reader, writer)
        finally:
            writer.close()
            await asyncio.sleep(0.02)

    async def ask(self, request: bytes) -> tuple[bytes, bool]:
        """Return an answer, and whether it came without uvicorn's parser."""
        cycle = self.inner.cycle
        self.writer.write(request)
        return await self.read(), self.inner.cycle is cycle

    async def read(self) -> bytes:
        """Read one answer with a Content-Length, or one without a body."""
        async with asyncio.timeout(60):
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head)
            return head + await self.reader.readexactly(int(length[1]) if length else 0)


# ---- equal answers


@pytest.mark.parametrize("request_bytes", KNOWN)
async def test_known_requests_are_answered_without_the_parser(
    sandbox: Sandbox, clock: FakeClock, request_bytes: bytes
) -> None:
    async with running(sandbox, clock) as live, Connection.open(live) as connection:
        answers = [await connection.ask(request_bytes) for _ in range(4)]
        assert [is_direct for _, is_direct in answers] == [False, True, True, True]
        assert len({without_changes(answer) for answer, _ in answers}) == 1
        assert len({answer for answer, _ in answers}) == 4, "each has its own id"
        for request in KNOWN:  # in any order
            assert (await connection.ask(request))[1]
        assert not (await connection.ask(MISS))[1]
        assert (await connection.ask(request_bytes))[1]


async def test_split_requests_are_answered_equally(paths: Paths) -> None:
    """A request in two reads, split at every byte, behind a known one and before another."""
    splits = [
        [TICKER, TICKER, TICKER[:size], TICKER[size:], TICKER] for size in range(1, len(TICKER))
    ]
    for start in range(0, len(splits), 20):
        await asyncio.gather(*(paths.compare(pieces) for pieces in splits[start : start + 20]))


@pytest.mark.parametrize("name", ODD)
async def test_odd_requests_are_answered_equally(paths: Paths, name: str) -> None:
    """Before, between, behind and together with known ones; whole, and in pieces."""
    odd = ODD[name]
    half = len(odd) // 2
    for pieces in (
        [odd, TICKER],
        [TICKER, TICKER, odd, TICKER],
        [TICKER, TICKER + odd, TICKER],
        [TICKER, odd + TICKER, TICKER],
        [TICKER, odd[:half], odd[half:], TICKER],
        [TICKER, odd[:half], odd[half:] + TICKER, TICKER],
        [TICKER, TICKER + odd[:half], odd[half:], TICKER],
        [odd, odd, odd, TICKER],
    ):
        await paths.compare(pieces)


async def test_requests_in_one_read_are_answered_equally(paths: Paths) -> None:
    """Also if the last one is sent again behind a half request."""
    answers = await paths.compare([TICKER, TICKER + BOOK, BOOK + TICKER + RAW, BATCH])
    assert answers.count(b"HTTP/1.1 200 OK") == 8
    for pair in (TICKER + BOOK, MISS + TICKER, TICKER + MISS, TICKER + TICKER):
        await paths.compare([TICKER, *[pair] * 5])
    await paths.compare([TICKER, TICKER[:9], TICKER[9:] + BOOK[:-2], b"\r\n", BOOK])
    await paths.compare([TICKER, TICKER[:-1], b"\n", TICKER])
    await paths.compare([TICKER, b"GET /nothing HTTP/1.1\r\nHost: a\r\nX: ", TICKER, TICKER])


@contextmanager
def in_thread(run: Callable[[Coroutine[Any, Any, None]], None]) -> Iterator[Any]:
    """Run three gateways in a loop of a thread, and yield a function that compares them there."""
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event, Paths]] = Future()

    async def serve_until_stopped() -> None:
        async with three_paths() as paths:
            stop = asyncio.Event()
            started.set_result((asyncio.get_running_loop(), stop, paths))
            await stop.wait()

    thread = threading.Thread(target=lambda: run(serve_until_stopped()))
    thread.start()
    loop, stop, paths = started.result(120)
    try:
        yield lambda pieces: asyncio.run_coroutine_threadsafe(paths.compare(pieces), loop)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("examples", [20, pytest.param(300, marks=pytest.mark.full)])
def test_any_sequence_is_answered_equally(run: Any, examples: int) -> None:
    """Messages in any order, cut at any place into reads."""
    messages = st.lists(st.sampled_from([*KNOWN, *KNOWN, MISS, *ODD.values()]), max_size=6)
    cuts = st.lists(st.integers(0, 700), max_size=5)
    with in_thread(run) as compare:

        @given(messages, cuts, st.booleans())
        @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
        def check(messages: list[bytes], cuts: list[int], is_whole: bool) -> None:
            pieces = messages
            if not is_whole:
                text = b"".join(messages)
                ends = [*sorted({cut for cut in cuts if cut < len(text)}), len(text)]
                pieces = [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]
            compare(pieces).result(120)

        check()


async def test_known_request_waits_for_the_answer_before(
    sandbox: Sandbox, clock: FakeClock
) -> None:
    """A known request behind one that waits for an exchange is answered after it."""
    slow = b"GET /ticker/SOL-USDT?max_age=0 HTTP/1.1\r\nHost: a\r\n\r\n"
    async with running(sandbox, clock) as live, Connection.open(live) as connection:
        await connection.ask(TICKER)
        await sandbox.set("bybit", latency_ms=100, rate_limit=-1)
        for _ in range(4):
            assert (await connection.ask(TICKER))[1]
            connection.writer.write(slow)
            await asyncio.sleep(0.03)
            connection.writer.write(TICKER)
            assert b'"symbol":"SOL/USDT"' in await connection.read()
            assert b'"symbol":"BTC/USDT"' in await connection.read()


async def test_limit_fields_of_raw_answers_are_current(sandbox: Sandbox, clock: FakeClock) -> None:
    """Also within a second: the count includes the calls of all clients."""
    async with running(sandbox, clock) as live, Connection.open(live) as connection:
        await connection.ask(RAW)
        before, _ = await connection.ask(RAW)
        await live.get("/raw/binance/api/v3/exchangeInfo")
        after, is_direct = await connection.ask(RAW)
        assert is_direct
        used = [int(find(rb"x-mbx-used-weight-1m: (\d+)", text)) for text in (before, after)]
        assert used[1] == used[0] + 20


async def test_answers_change_with_age_and_data(sandbox: Sandbox, clock: FakeClock) -> None:
    """Prepared fields are used for one second only, and never for another answer."""
    async with running(sandbox, clock) as live, Connection.open(live) as connection:
        await connection.ask(TICKER)
        for age, left, pause in (
            (0, 599, 0.5),
            (0, 599, 0.25),
            (1, 599, 0.999),
            (1, 598, 0.001),
            (2, 598, 0.25),
        ):
            answer, is_direct = await connection.ask(TICKER)
            assert is_direct
            assert b"\r\nage: %d\r\ncache-control: max-age=%d\r\n" % (age, left) in answer
            clock.advance(pause)
        before = answer
        await live.get("/ticker/BTC-USDT?max_age=0")
        answer, is_direct = await connection.ask(TICKER)
        assert is_direct
        assert b"\r\nage: 0\r\n" in answer
        assert find(rb"etag: (\S+)", answer) != find(rb"etag: (\S+)", before)
        clock.advance(600)
        answer, is_direct = await connection.ask(TICKER)
        assert not is_direct
        assert b"fwd=miss" in answer


async def test_date_is_that_of_the_server(sandbox: Sandbox, clock: FakeClock) -> None:
    async with (
        running(sandbox, clock, headers=[("X-Site", "a")]) as live,
        Connection.open(live) as connection,
    ):
        await connection.ask(TICKER)
        first, _ = await connection.ask(TICKER)
        await asyncio.sleep(1.2)
        second, is_direct = await connection.ask(TICKER)
        assert is_direct
        assert find(rb"date: ([^\r]*)", first) != find(rb"date: ([^\r]*)", second)
        assert b"\r\nx-site: a\r\n" in second


async def test_conditions_and_limits_are_those_of_the_fast_path(
    sandbox: Sandbox, clock: FakeClock
) -> None:
    chosen = make_settings(sandbox, client_rate_limit=120, api_keys="desk:a-long-enough-key")
    key = b"Host: a\r\nX-API-Key: a-long-enough-key\r\n"
    plain = b"GET /ticker/BTC-USDT HTTP/1.1\r\n%b\r\n" % key
    any_tag = plain.replace(b"Host", b"If-None-Match: *\r\nHost")
    wrong = plain.replace(b"enough", b"wrong!")
    async with serve(chosen, clock) as live, Connection.open(live) as connection:
        await connection.ask(plain)
        clock.advance(0.25)
        for _ in range(4):
            answer, _ = await connection.ask(plain)
            empty, _ = await connection.ask(any_tag)
            refused, is_direct = await connection.ask(wrong)
            assert (refused[9:12], is_direct) == (b"401", False)
        left = [int(find(rb"ratelimit: \S+r=(\d+)", text)) for text in (answer, empty)]
        assert left[0] == left[1] + 1
        assert b"cache-control: private, max-age" in answer
        assert empty.startswith(b"HTTP/1.1 304 Not Modified\r\n")
        assert b"content-length" not in empty
        assert (await connection.ask(any_tag))[1]


async def test_metrics_and_totals_are_those_of_the_fast_path(
    sandbox: Sandbox, clock: FakeClock
) -> None:
    names = {"method": "GET", "route": "/raw/{exchange}/{path}", "code": "200"}
    raw = {"exchange": "binance", "path": "api/v3/ticker/24hr", "outcome": "hit_memory"}

    def counts_of(live: Live) -> list[float]:
        return [
            sample("http_requests_total", **names),
            sample("raw_requests_total", **raw),
            sample("cache_requests_total", result="hit_memory"),
            live.server.server_state.total_requests,
        ]

    counts = []
    for wire in (True, False):
        async with (
            running(sandbox, clock, wire=wire) as live,
            Connection.open(live) as connection,
        ):
            await connection.ask(RAW)
            before = counts_of(live)
            for _ in range(5):
                assert (await connection.ask(RAW))[1] == wire
            after = counts_of(live)
            counts.append([new - old for new, old in zip(after, before, strict=True)])
    assert counts[0] == counts[1] == [5, 5, 5, 5]


async def test_access_log_is_that_of_uvicorn(
    sandbox: Sandbox, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    spelled = b"GET /ticker/BTC%2FUSDT?exchange=kraken HTTP/1.1\r\nHost: a\r\n\r\n"
    async with running(sandbox, clock) as live, Connection.open(live) as connection:
        with caplog.at_level(logging.INFO, "uvicorn.access"):
            kinds = [(await connection.ask(spelled))[1] for _ in range(6)]
        lines = [
            record.getMessage() for record in caplog.records if record.name == "uvicorn.access"
        ]
        assert kinds[0] is False
        assert kinds[-1] is True
        assert len(lines) == 6
        assert len(set(lines)) == 1
        assert "GET /ticker/BTC/USDT?exchange=kraken HTTP/1.1" in lines[0]


# ---- connections


async def test_unread_answers_are_bounded_and_complete(sandbox: Sandbox, clock: FakeClock) -> None:
    """The server reads no more requests of a client that does not read, and loses no answer."""
    count = 500
    async with (
        running(sandbox, clock) as live,
        Connection.open(live, limit=1024) as connection,
    ):
        transport = connection.inner.transport
        peer = transport.get_extra_info("socket")
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32_768)
        await connection.ask(BATCH)
        answer, is_direct = await connection.ask(BATCH)
        assert is_direct
        largest = 0
        for _ in range(count):
            connection.writer.write(BATCH)
            await asyncio.sleep(0.001)  # so that the server reads requests one by one
            largest = max(largest, transport.get_write_buffer_size())
        assert connection.inner.flow.write_paused, "the client reads too fast for this test"
        assert 65_536 < largest < 65_536 + 2 * len(answer)
        for _ in range(count):
            assert without_changes(await connection.read()) == without_changes(answer)
        await connection.ask(BATCH)
        assert (await connection.ask(BATCH))[1]


async def test_connection_stays_open_as_long_as_it_is_used(
    sandbox: Sandbox, clock: FakeClock
) -> None:
    """It is closed `timeout_keep_alive` seconds after its last answer."""
    async with (
        running(sandbox, clock, timeout_keep_alive=1) as live,
        Connection.open(live) as connection,
    ):
        loop = asyncio.get_running_loop()
        await connection.ask(TICKER)
        for _ in range(4):
            await asyncio.sleep(0.5)
            assert (await connection.ask(TICKER))[1]
        last = loop.time()
        async with asyncio.timeout(60):
            assert await connection.reader.read() == b""
        assert loop.time() - last > 0.9


async def test_shutdown_completes_answers_and_ends(sandbox: Sandbox, clock: FakeClock) -> None:
    """Clients that send known requests without a pause get whole answers until the end."""
    async with running(sandbox, clock) as live:
        port = int(live.url.rsplit(":", 1)[1])
        counts = []

        async def load() -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            count = 0
            rest = b""
            while not reader.at_eof():
                writer.write(TICKER)
                count += 1
                try:
                    rest = await reader.readuntil(b"\r\n\r\n")
                except asyncio.IncompleteReadError as error:
                    rest = error.partial
                    break
                except ConnectionError:
                    rest = b""
                    break
                length = re.search(rb"content-length: (\d+)", rest)
                assert length
                await reader.readexactly(int(length[1]))
            assert rest == b""
            counts.append(count)
            writer.close()

        clients = [asyncio.create_task(load()) for _ in range(10)]
        await asyncio.sleep(0.3)
        live.server.should_exit = True
        async with asyncio.timeout(60):
            await asyncio.gather(*clients)
        assert min(counts) > 3
        await eventually(lambda: not live.server.server_state.connections)


async def test_large_bodies_are_whole(sandbox: Sandbox, clock: FakeClock) -> None:
    request = b"GET /raw/binance/api/v3/depth?symbol=BTCUSDT HTTP/1.1\r\nHost: a\r\n\r\n"
    async with running(sandbox, clock) as live, Connection.open(live) as connection:
        for _ in range(5):
            await connection.ask(request)
        keys = live.gateway.cache.memory.keys()
        (key,) = (key for key in keys if "api/v3/depth" in key.params)
        body = bytes(range(256)) * 4096
        assert len(body) > MAX_JOINED_BYTES
        now = clock.monotonic()
        live.gateway.cache.memory.put(Entry.create(key, body, now, now, 100))
        answer, is_direct = await connection.ask(request)
        assert is_direct
        assert answer.endswith(b"\r\n\r\n" + body)


async def test_known_requests_are_answered_over_tls(
    sandbox: Sandbox, clock: FakeClock, tmp_path: Path
) -> None:
    files: dict[str, Any] = {
        "ssl_keyfile": tmp_path / "key.pem",
        "ssl_certfile": tmp_path / "certificate.pem",
    }
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1"
    names = ["-keyout", files["ssl_keyfile"], "-out", files["ssl_certfile"]]
    process = await asyncio.create_subprocess_exec(*command.split(), "-subj", "/CN=a", *names)
    assert await process.wait() == 0
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    chosen = make_settings(sandbox, streaming=False, **LONG_TTL)
    async with (
        serve(chosen, clock, **files) as live,
        Connection.open(live, context) as connection,
    ):
        kinds = [(await connection.ask(TICKER))[1] for _ in range(6)]
        assert kinds[-2:] == [True, True]


# ---- what is not known


@pytest.mark.parametrize(
    "options", [{"http": "h11"}, {"limit_concurrency": 1000}], ids=["h11", "limit_concurrency"]
)
async def test_other_servers_parse_every_request(
    sandbox: Sandbox, clock: FakeClock, options: dict[str, Any]
) -> None:
    async with running(sandbox, clock, **options) as live, Connection.open(live) as connection:
        for _ in range(5):
            assert not (await connection.ask(TICKER))[1]


async def test_another_version_of_uvicorn_parses_every_request(
    sandbox: Sandbox, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("uvicorn.__version__", "0.99.0")
    uvicorn_edge._find_tested_protocol.cache_clear()
    try:
        async with running(sandbox, clock) as live, Connection.open(live) as connection:
            for _ in range(5):
                assert not (await connection.ask(TICKER))[1]
            assert not isinstance(connection.inner.transport.get_protocol(), WireProtocol)
    finally:
        uvicorn_edge._find_tested_protocol.cache_clear()


@pytest.mark.parametrize("field", [b"X-Request-ID: %d", b"X-Trace: %d"])
async def test_requests_with_a_unique_field_are_not_remembered(
    sandbox: Sandbox, clock: FakeClock, field: bytes
) -> None:
    async with running(sandbox, clock) as live:
        path: WirePath = live.front.on_hit.__self__  # type: ignore[attr-defined]
        before = len(path.table)
        async with Connection.open(live) as connection:
            for number in range(50):
                await connection.ask(TICKER.replace(b"Accept: */*", field % number))
            assert len(path.table) == before
            for _ in range(3):
                await connection.ask(TICKER.replace(b"Accept: */*", b"X-Request-ID: same"))
            assert len(path.table) == before


async def test_table_is_bounded(sandbox: Sandbox, clock: FakeClock) -> None:
    """As many requests are kept as the fast path keeps, and those that are in use stay."""
    async with running(sandbox, clock, cache_memory_size=20) as live:
        path: WirePath = live.front.on_hit.__self__  # type: ignore[attr-defined]
        async with Connection.open(live) as connection:
            for number in range(100):
                for _ in range(3):
                    await connection.ask(TICKER.replace(b"*/*", b"%d" % number))
                assert (await connection.ask(RAW))[1], number
                assert len(path.table) <= live.front.size == 40
                assert len(path._seen) <= 40
            assert (await connection.ask(TICKER.replace(b"*/*", b"99")))[1]
            long = TICKER.replace(b"*/*", b"x" * MAX_REQUEST_BYTES)
            assert not any([(await connection.ask(long))[1] for _ in range(4)])


def test_prepared_head_is_not_copied_to_other_answers() -> None:
    entry = Entry.create(Key("a", "b", "c"), b"{}", 0, 0, 1)
    entry.head = (9.0, None, 0, b"head")
    assert entry.with_body(b"[]").head[3] == b""
