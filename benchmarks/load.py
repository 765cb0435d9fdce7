"""HTTP clients: at full speed (wrk or a bundled client), one by one, and at a steady rate."""

import argparse
import asyncio
import json
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import uvloop

from benchmarks.figures import percentile

WRK = shutil.which("wrk")
CLIENT = (
    "wrk -t1"
    if WRK
    else "bundled client (its own cost makes ratios smaller; install wrk for exact figures)"
)
WRK_SCRIPT = Path(__file__).with_name("paths.lua")
_MILLISECONDS = {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60_000.0}  # by unit of wrk
_STATUS = re.compile(rb"HTTP/1\.1 (\d+)")
_CONTENT_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)
_CACHE_STATUS = re.compile(rb"cache-status: ([^\r]*)", re.IGNORECASE)
_HEAD_END = b"\r\n\r\n"


class Report(NamedTuple):
    """Result of a load at full speed: responses per second, and latencies in milliseconds."""

    rate: float
    p50: float
    p99: float


class Response(NamedTuple):
    """One response. The status is 0 if the server did not respond."""

    at: float  # seconds from the start of the load to the request
    seconds: float  # from the request to the response
    status: int
    cache_status: str

    @property
    def is_hit(self) -> bool:
        """Return True for a cached value, except one that replaces a failed load."""
        return "; hit;" in self.cache_status and "stale_error" not in self.cache_status


def drive(url: str, connections: int, seconds: float, paths: Path | None = None) -> Report:
    """Send requests at full speed, for the path of the URL or for the paths of a file in turn.

    Raise `RuntimeError` if a response is not a 200.
    """
    if WRK is None:
        arguments = [url, str(connections), str(seconds), str(paths or "")]
        output = _run([sys.executable, "-m", "benchmarks.load", *arguments])
        return Report(*json.loads(output))
    options = ["-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--latency"]
    if paths is None:
        return parse_wrk(_run([WRK, *options, url]))
    return parse_wrk(_run([WRK, *options, "-s", str(WRK_SCRIPT), url, "--", str(paths)]))


def parse_wrk(text: str) -> Report:
    """Parse the output of `wrk --latency`. Raise `RuntimeError` if it contains errors."""
    rate = re.search(r"Requests/sec:\s*([\d.]+)", text)
    latencies = {
        share: float(time) * _MILLISECONDS[unit]
        for share, time, unit in re.findall(r"(\d+)%\s+([\d.]+)(us|ms|s|m)\b", text)
    }
    has_errors = "Non-2xx" in text or "Socket errors" in text
    if rate is None or not {"50", "99"} <= latencies.keys() or has_errors:
        raise RuntimeError(f"wrk reports responses other than 200, or no result:\n{text}")
    return Report(float(rate[1]), latencies["50"], latencies["99"])


def _run(command: Sequence[str]) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def one_by_one(url: str, paths: Iterable[str]) -> list[Response]:
    """Request the paths one after another on one connection.

    The socket is blocking, so that the client adds as little time as possible.
    """
    parts = urlsplit(url)
    responses = []
    began = time.perf_counter()
    with socket.create_connection((parts.hostname or "", parts.port or 80)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for path in paths:
            sent_at = time.perf_counter()
            connection.sendall(_request(parts.netloc, path))
            head = _read_response(connection)
            seconds = time.perf_counter() - sent_at
            responses.append(_response(head, sent_at - began, seconds))
    return responses


def _read_response(connection: socket.socket) -> bytes:
    """Read a response including its body, and return its head."""
    data = b""
    missing = 1
    while missing > 0:
        chunk = connection.recv(65536)
        if not chunk:
            raise ConnectionError("the server closed the connection")
        data += chunk
        head, _, body = data.partition(_HEAD_END)
        missing = _content_length(head) - len(body) if _HEAD_END in data else 1
    return head


def expect(responses: Sequence[Response], cache_status: str) -> list[Response]:
    """Return the responses.

    Raise `RuntimeError` unless all are 200s whose `Cache-Status` contains this text.
    """
    for response in responses:
        if response.status != 200 or cache_status not in response.cache_status:
            raise RuntimeError(f"expected a 200 with '{cache_status}', got {response}")
    return list(responses)


async def at_rate(
    url: str, paths: Iterable[str], rate: float, connections: int = 16
) -> list[Response]:
    """Request the paths at a steady rate, without waiting for earlier responses.

    The number of connections limits how many requests are open at a time.
    """
    numbered_paths = enumerate(paths)
    responses: list[Response] = []
    began = time.perf_counter()

    async def work() -> None:
        connection = Connection(url)
        for number, path in numbered_paths:
            await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
            responses.append(await connection.request(path, began))
        connection.close()

    await asyncio.gather(*(work() for _ in range(connections)))
    return responses


class Connection:
    """A kept connection with one request at a time. It reconnects after an error."""

    def __init__(self, url: str) -> None:
        self._parts = urlsplit(url)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def request(self, path: str, began: float) -> Response:
        """Return the response, with status 0 if the server does not respond."""
        sent_at = time.perf_counter()
        try:
            if self._streams is None:
                self._streams = await asyncio.open_connection(
                    self._parts.hostname, self._parts.port
                )
            reader, writer = self._streams
            writer.write(_request(self._parts.netloc, path))
            head = await reader.readuntil(_HEAD_END)
            await reader.readexactly(_content_length(head))
        except (OSError, EOFError):
            self.close()
            return Response(sent_at - began, time.perf_counter() - sent_at, 0, "")
        return _response(head, sent_at - began, time.perf_counter() - sent_at)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
        self._streams = None


def zipf(items: Sequence[str], count: int, seed: int = 1) -> list[str]:
    """Draw items with the weights 1, 1/2, 1/3 and so on. The same seed draws the same items."""
    weights = [1 / rank for rank in range(1, len(items) + 1)]
    return random.Random(seed).choices(items, weights, k=count)


def _request(host: str, path: str) -> bytes:
    lines = [f"GET {path} HTTP/1.1", f"Host: {host}", "User-Agent: bench", "Accept: */*", "", ""]
    return "\r\n".join(lines).encode()


def _content_length(head: bytes) -> int:
    match = _CONTENT_LENGTH.search(head)
    return int(match[1]) if match else 0


def _response(head: bytes, at: float, seconds: float) -> Response:
    status = _STATUS.match(head)
    cache_status = _CACHE_STATUS.search(head)
    return Response(
        at,
        seconds,
        int(status[1]) if status else 0,
        cache_status[1].decode() if cache_status else "",
    )


async def _drive_without_wrk(
    url: str, connections: int, seconds: float, paths: Sequence[str]
) -> Report:
    """Send requests at full speed, as wrk does."""
    responses: list[Response] = []
    began = time.perf_counter()

    async def work(first: int) -> None:
        connection = Connection(url)
        number = first
        while time.perf_counter() < began + seconds:
            responses.append(await connection.request(paths[number % len(paths)], began))
            number += connections
        connection.close()

    await asyncio.gather(*(work(first) for first in range(connections)))
    elapsed = time.perf_counter() - began
    latencies = [response.seconds * 1000 for response in expect(responses, "")]
    return Report(
        len(latencies) / elapsed, percentile(latencies, 0.50), percentile(latencies, 0.99)
    )


def main() -> None:
    """Run the bundled client and print its report as JSON."""
    parser = argparse.ArgumentParser(
        description="Print requests per second, and p50 and p99 in milliseconds, as JSON."
    )
    parser.add_argument("url")
    parser.add_argument("connections", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("paths", help="file with paths, or '' to request the path of the URL")
    options = parser.parse_args()
    if options.paths:
        paths = Path(options.paths).read_text().split()
    else:
        paths = [urlsplit(options.url).path]
    load = _drive_without_wrk(options.url, options.connections, options.seconds, paths)
    print(json.dumps(uvloop.run(load)))


if __name__ == "__main__":
    main()
