"""Whether memory grows under a long mixed load: hits, misses, batches, order books, and queries never asked before.

`make soak MINUTES=10`. Writes SOAK.md and soak.svg: resident memory over time, and its slope over the second half.
"""

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import uvloop

from benchmarks.bench import FOLDER, machine
from benchmarks.figures import chart, number, slope, table
from benchmarks.load import Answer, at_rate
from benchmarks.servers import Server, Servers

SYMBOLS, RATE, SAMPLE_SECONDS = 100, 200, 5.0
KINDS = {  # share of the requests in percent; together they stay below the exchanges' budgets
    "ticker": 55, "miss": 10, "batch": 2, "order book": 10, "candles": 4, "distinct query": 16, "unknown symbol": 3,
}  # fmt: skip


def requests(until: float) -> Iterator[str]:
    """Draw paths, without end until the time is up; the same ones on every run."""
    draw = random.Random(1)
    names = [f"F{rank:04d}-USDT" for rank in range(1, SYMBOLS + 1)]
    weights = [1 / rank for rank in range(1, SYMBOLS + 1)]
    while time.monotonic() < until:
        (kind,), (name,) = draw.choices(list(KINDS), list(KINDS.values())), draw.choices(names, weights)
        nonce = draw.randrange(10**9)
        yield {
            "ticker": f"/ticker/{name}",
            "miss": f"/ticker/{name}?max_age=0",
            "batch": f"/tickers?symbols={','.join(draw.sample(names, 20))}",
            "order book": f"/orderbook/{name}?limit={nonce % 200 + 1}",
            "candles": f"/ohlcv/{name}?limit={nonce % 100 + 1}",
            "distinct query": f"/ticker/{name}?nonce={nonce}",
            "unknown symbol": f"/ticker/X{nonce}-USDT",
        }[kind]


async def soak(gateway: Server, seconds: float) -> tuple[list[Answer], list[tuple[float, float]]]:
    """Drive the load; returns the answers, and the memory in MB by the minute it was looked at."""
    began, samples = time.monotonic(), list[tuple[float, float]]()
    load = asyncio.create_task(at_rate(gateway.url, requests(began + seconds), RATE))
    while not load.done():
        samples.append((round((time.monotonic() - began) / 60, 3), gateway.rss_mb()))
        await asyncio.wait([load], timeout=min(SAMPLE_SECONDS, seconds / 10))
    return await load, samples


def report(answers: list[Answer], samples: list[tuple[float, float]]) -> str:
    """Write what was seen as Markdown."""
    times, memory = zip(*samples, strict=True)
    half = len(samples) // 2
    statuses = Counter(answer.status for answer in answers)
    errors = sum(count for status, count in statuses.items() if not 200 <= status < 500)
    hits = sum(answer.is_hit for answer in answers)
    rows = {
        "growth over the second half": f"{number(60 * slope(times[half:], memory[half:]))} MB/hour",
        "RSS at the start, at half time, at the end": ", ".join(f"{memory[at]:.1f} MB" for at in (0, half, -1)),
        "requests": f"{len(answers):,}, {100 * hits / len(answers):.1f} % of them hits",
        "errors (5xx, or no answer)": f"{errors:,}",
        "by status": ", ".join(f"{status}: {count:,}" for status, count in sorted(statuses.items())),
    }
    lines = [
        "# Soak\n",
        f"Written by `make soak MINUTES={times[-1]:.3g}` on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, on {machine()}.",
        f"{RATE} requests/s in percent: {', '.join(f'{kind} {share}' for kind, share in KINDS.items())}.\n",
        table(["", ""], [[name, value] for name, value in rows.items()]),
        "![resident memory](soak.svg)\n",
    ]
    return "\n".join(lines)


def main() -> None:
    """Start the parts, drive the load, print and write the report."""
    parser = argparse.ArgumentParser(description="See whether memory grows under a long mixed load.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--out", type=Path, default=FOLDER, help="the folder to write to")
    options = parser.parse_args()
    with Servers() as servers:
        gateway = servers.gateway(servers.sandbox(SYMBOLS), {"REDIS_URL": servers.redis()})
        answers, samples = uvloop.run(soak(gateway, options.minutes * 60))
    text = report(answers, samples)
    print(text)
    times, memory = zip(*samples, strict=True)
    (options.out / "SOAK.md").write_text(text)
    plot = chart("Memory under a mixed load", "minutes", "RSS (MB)", times, {"gateway": memory}, log=False)
    (options.out / "soak.svg").write_text(plot)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
