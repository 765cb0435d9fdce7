"""Requests per second of one URL: by wrk where it is installed, else by a small client of our own."""

import argparse
import asyncio
import re
import shutil
import subprocess
import sys
import time
from urllib.parse import urlsplit

WRK = shutil.which("wrk")
NAME = "wrk" if WRK else "bundled client (its own cost flatters the slower side; install wrk for real figures)"


def requests_per_second(url: str, connections: int, seconds: float) -> float:
    """Ask as fast as answers come, over so many kept connections. Raises `RuntimeError` for anything but 200s."""
    if WRK is None:
        command = [sys.executable, "-m", "benchmarks.load", url, str(connections), str(seconds)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    command = [WRK, "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", url]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"Requests/sec:\s*([\d.]+)", report)
    if found is None or "Non-2xx" in report:
        raise RuntimeError(f"not every answer was a 200:\n{report}")
    return float(found[1])


async def _ask(url: str, until: float) -> int:
    """Ask over one connection until the time is up; returns the number of answers."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    request = f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n\r\n".encode()
    count = 0
    while time.perf_counter() < until:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        if not head.startswith(b"HTTP/1.1 200") or length is None:
            raise RuntimeError(f"not every answer was a 200:\n{head!r}")
        await reader.readexactly(int(length[1]))
        count += 1
    writer.close()
    return count


async def _main(url: str, connections: int, seconds: float) -> float:
    until = time.perf_counter() + seconds
    return sum(await asyncio.gather(*(_ask(url, until) for _ in range(connections)))) / seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print the requests per second of one URL.")
    parser.add_argument("url")
    parser.add_argument("connections", type=int)
    parser.add_argument("seconds", type=float)
    chosen = parser.parse_args()
    print(asyncio.run(_main(chosen.url, chosen.connections, chosen.seconds)))
