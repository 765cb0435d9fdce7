"""Freqtrade, unmodified, with its public data from the gateway."""

import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from src.core.clock import SystemClock
from src.sandbox.server import Sandbox
from tests.conftest import make_settings, serve
from tests.page.browser import missing
from tests.raw.clients import environments, freqtrade_bot
from tests.raw.clients.freqtrade_bot import PAIRS, candles, command

pytestmark = [pytest.mark.full, pytest.mark.xdist_group("clients")]
SECONDS = 300  # timeout of one command, on a busy machine
BOTS = 3
CLOSES = 2
MAX_LATE = 2.0  # seconds after the close
PAST_SECONDS = 20 * 3_600
"""How long ago the downloaded candles end. Freqtrade stores all 1,000 candles of an answer, so an
answer must not reach the present."""
NEVER_CACHED = "/api/v3/time"  # requested by each bot when it starts


async def run(folder: Path, exchange: str, url: str, *arguments: str) -> str:
    """Run a command of freqtrade until it ends, and return its output."""
    line = await asyncio.to_thread(command, folder, exchange, url, *arguments)
    process = await asyncio.create_subprocess_exec(
        *line, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, error = await asyncio.wait_for(process.communicate(), SECONDS)
    assert process.returncode == 0, error.decode()[-2_000:]
    return output.decode()


@pytest.fixture(scope="module", autouse=True)
def freqtrade() -> None:
    """Install freqtrade."""
    try:
        environments.python_of("freqtrade")
    except environments.InstallError as error:
        missing(f"freqtrade could not be installed: {error}")


@pytest.fixture
async def addresses(lively: Sandbox) -> AsyncIterator[dict[str, dict[str, str]]]:
    """The URLs of the exchanges, directly and through a gateway."""
    async with serve(make_settings(lively), SystemClock(), load_markets=True) as live:
        lively.clear_counts()
        through = {name: f"{live.url}/raw/{name}" for name in lively.urls}
        yield {"direct": lively.urls, "through": through}


@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.parametrize("exchange", ["binance", "bybit"])
async def test_downloads_are_the_same_through_the_gateway(
    addresses: dict[str, dict[str, str]], exchange: str, tmp_path: Path
) -> None:
    """`download-data` writes the same files directly and through the gateway."""
    end = int(time.time()) // 60 * 60 - PAST_SECONDS
    period = ("--timerange", f"{end - 7_200}-{end}", "--timeframes", "1m")
    digests = []
    for name, urls in addresses.items():
        folder = tmp_path / name
        await run(folder, exchange, urls[exchange], "download-data", *period)
        files = sorted((folder / "data" / exchange).glob("*.feather"))
        digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert digests[0] == digests[1]
    assert len(digests[0]) == len(PAIRS)


@pytest.mark.timeout(SECONDS)
async def test_pair_list_is_read_through_the_gateway(
    lively: Sandbox, addresses: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """`test-pairlist` prints the pairs of the configuration that the exchange lists."""
    output = await run(
        tmp_path, "kraken", addresses["through"]["kraken"], "test-pairlist", "--print-json"
    )
    assert json.loads(output.splitlines()[-1]) == list(PAIRS)
    assert lively.count("kraken") > 0


@pytest.mark.timeout(3 * SECONDS)
async def test_three_bots_cost_the_calls_of_one(
    lively: Sandbox, addresses: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    """Every bot sees every closed candle within 2 s, and the exchange answers one request."""
    url = addresses["through"]["binance"]
    arguments = ("trade", "--strategy", "DropIn", "--strategy-path", str(freqtrade_bot.STRATEGIES))
    async with AsyncExitStack() as stack:
        outputs = []
        for number in range(BOTS):
            folder = tmp_path / str(number)
            line = await asyncio.to_thread(command, folder, "binance", url, *arguments)
            output = stack.enter_context((folder / "output").open("w"))
            process = await asyncio.create_subprocess_exec(
                *line, stdout=output, stderr=asyncio.subprocess.DEVNULL
            )
            stack.push_async_callback(process.wait)
            stack.callback(process.kill)
            outputs.append(folder / "output")
        async with asyncio.timeout(SECONDS):
            while not all(len(closed_candles(output)) >= CLOSES for output in outputs):  # noqa: ASYNC110
                await asyncio.sleep(0.5)
    per_bot = [closed_candles(output) for output in outputs]
    common = set.intersection(*(set(found) for found in per_bot))
    assert len(common) >= CLOSES
    for found in per_bot:
        for start in common:
            assert set(found[start]) == set(PAIRS)
            assert max(found[start].values()) - (start + 60) < MAX_LATE
    calls = Counter(path for path, _ in lively.requests["binance"] if NEVER_CACHED not in path)
    closes = {start for found in per_bot for start in found}
    for path, count in calls.items():
        assert count <= len(closes) + 1, path


def closed_candles(output: Path) -> dict[float, dict[str, float]]:
    """Return when each pair of each candle arrived, without the candle that a bot starts with."""
    found: dict[float, dict[str, float]] = {}
    for pair, start, _, arrived in candles(output.read_text()):
        found.setdefault(start, {})[pair] = arrived
    first = min(found, default=0.0)
    return {
        start: arrivals
        for start, arrivals in found.items()
        if start > first and len(arrivals) == len(PAIRS)
    }
