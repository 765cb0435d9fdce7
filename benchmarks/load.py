"""Asking and timing: as fast as it goes (by wrk, else by a small client of our own), one by one, or at a given rate."""

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
CLIENT = "wrk -t1" if WRK else "bundled client (its own cost flatters the slower side; install wrk for real figures)"
SCRIPT = Path(__file__).with_name("paths.lua")
_UNITS = {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60_000.0}
_STATUS, _LENGTH = re.compile(rb"HTTP/1\.1 (\d+)"), re.compile(rb"content-length: (\d+)", re.IGNORECASE)
_CACHE_STATUS = re.compile(rb"cache-status: ([^\r]*)", re.IGNORECASE)


class Report(NamedTuple):
    """What a load brought: answers per second, and the time of one in milliseconds."""

    rate: float
    p50: float
    p99: float


class Answer(NamedTuple):
    """One answer: seconds from the start of the load, seconds it took, status (0: none came), `Cache-Status`."""

    at: float
    seconds: float
    status: int
    cache: str

    @property
    def is_hit(self) -> bool:
        """Whether a cached value was served, other than in place of a failed load."""
        return "; hit;" in self.cache and "stale_error" not in self.cache


def drive(url: str, connections: int, seconds: float, paths: Path | None = None) -> Report:
    """Ask as fast as answers come, for the path of the URL or for those of a file one after another.

    Raises `RuntimeError` when anything but a 200 comes.
    """
    if WRK is None:
        client = [sys.executable, "-m", "benchmarks.load", url, str(connections), str(seconds), str(paths or "")]
        return Report(*json.loads(_run(client)))
    listed = ["-s", str(SCRIPT)] if paths else []
    command = [WRK, "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--latency", *listed, url]
    return parse_wrk(_run([*command, *(["--", str(paths)] if paths else [])]))


def parse_wrk(text: str) -> Report:
    """Read what `wrk --latency` prints."""
    rate = re.search(r"Requests/sec:\s*([\d.]+)", text)
    times = {
        share: float(time) * _UNITS[unit] for share, time, unit in re.findall(r"(\d+)%\s+([\d.]+)(us|ms|s|m)\b", text)
    }
    if rate is None or not {"50", "99"} <= times.keys() or "Non-2xx" in text or "Socket errors" in text:
        raise RuntimeError(f"not every answer was a 200:\n{text}")
    return Report(float(rate[1]), times["50"], times["99"])


def _run(command: Sequence[str]) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def one_by_one(url: str, paths: Iterable[str]) -> list[Answer]:
    """Ask for one path after another on one kept connection; blocking, so that little but the answer is timed."""
    parts, answers, began = urlsplit(url), [], time.perf_counter()
    with socket.create_connection((parts.hostname or "", parts.port or 80)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for path in paths:
            asked, data, missing = time.perf_counter(), b"", 1
            connection.sendall(_request(parts.netloc, path))
            while missing > 0:
                if not (chunk := connection.recv(65536)):
                    raise ConnectionError("the server hung up")
                data += chunk
                head, _, body = data.partition(b"\r\n\r\n")
                missing = _length(head) - len(body) if b"\r\n\r\n" in data else 1
            answers.append(_answer(head, asked - began, time.perf_counter() - asked))
    return answers


def expect(answers: Sequence[Answer], cache: str) -> list[Answer]:
    """Return the answers; raises `RuntimeError` unless all are 200s that were found as `cache` says."""
    if odd := [answer for answer in answers if answer.status != 200 or cache not in answer.cache]:
        raise RuntimeError(f"not every answer was a 200 with '{cache}': {odd[0]}")
    return list(answers)


async def at_rate(url: str, paths: Iterable[str], rate: float, connections: int = 16) -> list[Answer]:
    """Ask for the paths at a steady rate, also while earlier answers are awaited, as far as the connections reach."""
    numbered, answers, began = enumerate(paths), list[Answer](), time.perf_counter()

    async def work() -> None:
        connection = Connection(url)
        for number, path in numbered:
            await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
            answers.append(await connection.ask(path, began))
        connection.close()

    await asyncio.gather(*(work() for _ in range(connections)))
    return answers


class Connection:
    """A kept connection that carries one request at a time, and is opened again after it broke."""

    def __init__(self, url: str) -> None:
        self._parts = urlsplit(url)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, path: str, began: float) -> Answer:
        """Return the answer, or one with status 0 when none came."""
        asked = time.perf_counter()
        try:
            self._streams = self._streams or await asyncio.open_connection(self._parts.hostname, self._parts.port)
            reader, writer = self._streams
            writer.write(_request(self._parts.netloc, path))
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(_length(head))
        except (OSError, EOFError):
            self.close()
            return Answer(asked - began, time.perf_counter() - asked, 0, "")
        return _answer(head, asked - began, time.perf_counter() - asked)

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
        self._streams = None


def zipf(items: Sequence[str], count: int, seed: int = 1) -> list[str]:
    """Draw items with weights 1, 1/2, 1/3 and so on; the same ones for the same seed."""
    return random.Random(seed).choices(items, [1 / rank for rank in range(1, len(items) + 1)], k=count)


def _request(host: str, path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: bench\r\nAccept: */*\r\n\r\n".encode()


def _length(head: bytes) -> int:
    found = _LENGTH.search(head)
    return int(found[1]) if found else 0


def _answer(head: bytes, at: float, seconds: float) -> Answer:
    status, cache = _STATUS.match(head), _CACHE_STATUS.search(head)
    return Answer(at, seconds, int(status[1]) if status else 0, cache[1].decode() if cache else "")


async def _flood(url: str, connections: int, seconds: float, paths: Sequence[str]) -> Report:
    """Do what wrk does."""
    answers, began = list[Answer](), time.perf_counter()

    async def work(offset: int) -> None:
        connection, number = Connection(url), offset
        while time.perf_counter() < began + seconds:
            answers.append(await connection.ask(paths[number % len(paths)], began))
            number += connections
        connection.close()

    await asyncio.gather(*(work(offset) for offset in range(connections)))
    times = [answer.seconds * 1000 for answer in expect(answers, "")]
    return Report(len(times) / (time.perf_counter() - began), percentile(times, 0.50), percentile(times, 0.99))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print requests per second, p50 and p99 in milliseconds as JSON.")
    parser.add_argument("url")
    parser.add_argument("connections", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("paths", help="a file of paths, or nothing for the one of the URL")
    chosen = parser.parse_args()
    wanted = Path(chosen.paths).read_text().split() if chosen.paths else [urlsplit(chosen.url).path]
    print(json.dumps(uvloop.run(_flood(chosen.url, chosen.connections, chosen.seconds, wanted))))
