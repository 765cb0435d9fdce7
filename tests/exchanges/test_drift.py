"""Shapes of answers: words for differences, and the newest recorded answers."""

import copy
from typing import Any

import pytest

from src.exchanges.drift import compare
from tests.recordings.recording import Recording, of_kind
from tests.recordings.replay import PATHS

ROW: dict[str, Any] = {name: ["1"] for name in "abcvplh"} | {"t": [1], "o": "1"}
KRAKEN = "http://127.0.0.1/0/public/"


def texts(url: str, body: object) -> list[str]:
    """Return the differences of an answer of Kraken in words."""
    return [difference.text for difference in compare("kraken", KRAKEN + url, body)]


def ticker(**members: object) -> dict[str, Any]:
    return {"error": [], "result": {"XBTUSDT": copy.deepcopy(ROW) | members}}


def test_missing_and_new_members_are_named() -> None:
    """A renamed member is missing, and a new one, which breaks nothing."""
    body = ticker(open="1")
    del body["result"]["XBTUSDT"]["o"]
    assert texts("Ticker?pair=XBTUSDT", body) == [
        "kraken Ticker: new member 'open'",
        "kraken Ticker: member 'o' is missing",
    ]
    found = compare("kraken", KRAKEN + "Ticker", body)
    assert [difference.is_breaking for difference in found] == [False, True]


def test_types_and_columns_are_compared() -> None:
    """A number in place of a text is a difference, and so is a column of another type."""
    assert texts("Ticker", ticker(o=1)) == ["kraken Ticker: member 'o' is number instead of text"]
    row = [1796000000, "1", "1", "1", "1", "1", "1", 5]
    candles: dict[str, Any] = {"error": [], "result": {"XBTUSDT": [row], "last": 1}}
    assert texts("OHLC", candles) == []
    candles["result"]["XBTUSDT"] = [[*row, "new"]]
    assert texts("OHLC", candles) == ["kraken OHLC: a row has 9 columns instead of 8"]
    candles["result"]["XBTUSDT"] = [row[1:]]
    assert texts("OHLC", candles)[0].startswith("kraken OHLC: a row has text, text")


def test_unknown_words_are_named_once() -> None:
    """A status that many markets have is one difference."""
    pair = {"altname": "A", "base": "A", "quote": "B", "wsname": "A/B", "tick_size": "1"}
    pair |= {"status": "auction", "pair_decimals": 1, "lot_decimals": 1}  # type: ignore[dict-item]
    body = {"error": [], "result": dict.fromkeys(("AB", "AC"), pair)}
    assert texts("AssetPairs", body) == ["kraken AssetPairs: new status 'auction'"]


def test_bodies_of_another_shape_are_described() -> None:
    """A list in place of an object, a missing root member and an unknown endpoint."""
    assert texts("Ticker", []) == ["kraken Ticker: a row is a list instead of an object"]
    assert texts("Ticker", {"error": []}) == ["kraken Ticker: member 'result' is missing"]
    assert texts("Spread", {}) == [
        "kraken Spread: no shape is known of http://127.0.0.1/0/public/Spread"
    ]


@pytest.mark.parametrize(
    "recording", of_kind("list", "ticker", "orderbook", "trades", "ohlcv", newest=True)
)
def test_newest_recordings_have_their_shapes(recording: Recording) -> None:
    """The newest recorded answer of an endpoint is not different from its shape."""
    exchange, market_type, kind = recording.exchange, recording.type, recording.kind
    known = ((exchange, market_type, kind), (exchange, "", kind))
    path = next(path for path, endpoint in PATHS.items() if endpoint in known)
    category = "linear" if market_type == "swap" else "spot"
    url = f"http://127.0.0.1{path}?symbols=x&category={category}"
    assert compare(exchange, url, recording.body) == []
