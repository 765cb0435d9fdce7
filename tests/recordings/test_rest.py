"""Every number that REST serves is that of the recording."""

import pytest

from tests.recordings.recording import Recording, of_kind

VALUES = ("ticker", "orderbook", "trades", "ohlcv")


@pytest.mark.parametrize("recording", of_kind("list", *VALUES, "stream"))
def test_every_recording_is_recognised(recording: Recording) -> None:
    """A recording of an unknown shape fails here, and needs a row in `KINDS`."""
    assert recording.exchange in ("binance", "bybit", "kraken")
    assert recording.kind == "stream" or recording.type in ("spot", "swap")
