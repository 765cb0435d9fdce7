"""A gateway that uses a replay of recordings as its exchanges."""

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager

from src.exchanges.ccxt_client import ClientOptions, load_snapshot
from src.exchanges.http_client import MAX_MARKETS_BYTES, Answer
from tests.conftest import FakeClock, Live, make_settings, serve
from tests.recordings import expected
from tests.recordings.recording import NEWEST_TIME, Recording, every_recording
from tests.recordings.replay import Replay

_snapshots: dict[str, bytes] = {}


@asynccontextmanager
async def gateway(
    recording: Recording, others: Sequence[Recording] = ()
) -> AsyncIterator[tuple[Live, Replay]]:
    """Serve a recording at its own time, with others and with the markets of all recordings."""
    async with Replay(every_recording()) as replay:
        # Without a recording of a request, the exchange fails.
        settings = make_settings(
            None, market_types="spot,swap", cb_threshold=1000, **replay.settings
        )
        for name in settings.enabled_exchanges:
            if name not in _snapshots:
                options = ClientOptions.from_settings(name, settings)
                answer = Answer(max_bytes=MAX_MARKETS_BYTES)
                _snapshots[name] = await load_snapshot(options, answer, NEWEST_TIME)
        replay.recordings = [recording, *others]
        clock = FakeClock(recording.ms / 1000 + 1)
        async with serve(settings, clock, snapshots=_snapshots) as live:
            yield live, replay


def symbols(replay: Replay, exchange: str, market_type: str, ids: Iterable[str]) -> dict[str, str]:
    """Return the canonical symbols of market ids, without those that have no market."""
    markets = replay.markets[exchange, market_type]
    names = replay.ids[exchange, market_type]
    return {
        name: expected.symbol_of(exchange, market_type, markets[names[name]])
        for name in ids
        if name in names
    }
