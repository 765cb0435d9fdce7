"""The gateway lists the markets of recorded market lists that are trading."""

import pytest

from tests.conftest import FakeClock, eventually, make_settings, serve
from tests.recordings import expected
from tests.recordings.recording import Recording, of_kind
from tests.recordings.replay import ONLINE, Replay


@pytest.mark.parametrize("recording", of_kind("list"))
async def test_markets_are_listed_as_recorded(recording: Recording) -> None:
    """Every market with live prices is listed with its symbol, and no other."""
    key = (recording.exchange, recording.type)
    async with Replay([recording], as_recorded=True) as replay:
        others = {f"{name}_enabled": name == recording.exchange for name in ONLINE}
        settings = make_settings(None, market_types=recording.type, **others, **replay.settings)
        clock = FakeClock(recording.ms / 1000)
        async with serve(settings, clock, load_markets=True) as live:
            loader = live.gateway.loader
            await eventually(lambda: live.gateway.markets.loaded_at or loader.errors)
            answer = await live.get(f"/markets?exchange={recording.exchange}")
    wanted = expected.listed_symbols(*key, replay.markets[key].values())
    assert {market["symbol"] for market in answer.json()["markets"]} == wanted
