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
from pathlib import Path

from src.demo import free_port
from tests.processes import children

ROOT = Path(__file__).parents[1]


def free_ports() -> tuple[int, int]:
    """A port for the gateway, and one for the sandbox that is free together with the three behind it.

    Those lie below the range from which the system takes ports for outgoing connections, so none is taken meanwhile.
    """
    begin = 20_000 + os.getpid() % 1000 * 10
    return free_port(), next(port for port in range(begin, 32_000, 4) if all(map(_is_free, range(port, port + 4))))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def test_the_demo_starts_answers_and_stops_everything() -> None:
    """One command starts all parts and prints a curl line that works; it outlives its Redis; Ctrl-C ends all of it."""
    port, sandbox_port = free_ports()
    command = [sys.executable, "-m", "src.demo", "--port", str(port), "--sandbox-port", str(sandbox_port)]
    demo = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert demo.stdout is not None
    curl = next((line for line in demo.stdout if line.strip().startswith("curl -i")), None)
    assert curl is not None, demo.communicate(timeout=20)[1]
    with urllib.request.urlopen(curl.split()[-1], timeout=10) as answer:
        assert json.load(answer)["symbol"] == "BTC/USDT"
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
        assert json.load(answer)["parts"]["redis"]["status"] == "healthy"
    pids = children(demo.pid)
    assert len(pids) == 3
    redis = next(pid for pid, command in pids.items() if "valkey-server" in command)
    os.kill(redis, signal.SIGKILL)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/ticker/ETH/USDT", timeout=10) as answer:
        assert json.load(answer)["symbol"] == "ETH/USDT"
    demo.send_signal(signal.SIGINT)
    _, told = demo.communicate(timeout=20)
    assert demo.returncode == 0, told
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_the_demo_says_when_a_port_is_taken() -> None:
    """With a port in use it ends, with a line that says so and an exit code."""
    _, sandbox_port = free_ports()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "src.demo", "--port", str(port), "--sandbox-port", str(sandbox_port)]
        demo = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert demo.returncode == 1
    assert "is one of its ports in use?" in demo.stderr


def test_the_app_starts_without_anything_reachable_and_stops_on_a_signal() -> None:
    """No exchange, no Redis: `uvicorn src.api:app` is live all the same, logs why it is not ready, and stops."""
    port = free_port()
    dead = {f"{name}_REST_URL": "http://127.0.0.1:9" for name in ("BYBIT", "BINANCE", "KRAKEN")}
    environment = os.environ | dead | {"REDIS_PORT": "9", "LOG_FORMAT": "json"}
    command = [sys.executable, "-m", "uvicorn", "src.api:app", "--port", str(port)]
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health/live", timeout=1).close()
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    awaited, watchdog = {"market list not loaded", "redis breaker changed"}, threading.Timer(20, server.kill)
    watchdog.start()
    assert server.stderr is not None
    while awaited:
        awaited.discard(json.loads(server.stderr.readline())["event"])
    watchdog.cancel()
    server.send_signal(signal.SIGTERM)
    _, log = server.communicate(timeout=15)
    assert [json.loads(line) for line in log.splitlines()]
    assert server.returncode in (0, -signal.SIGTERM)
