"""A strategy for freqtrade that never trades. It prints each new candle and when it arrived."""

import json
import time
from typing import Any

from freqtrade.strategy import IStrategy
from pandas import DataFrame


class DropIn(IStrategy):  # type: ignore[misc] # the package is not installed here
    """Print candles as JSON lines: pair, start (UTC seconds), close, and time of arrival."""

    INTERFACE_VERSION = 3
    timeframe = "1m"
    stoploss = -0.99
    process_only_new_candles = True

    def populate_indicators(self, dataframe: DataFrame, metadata: dict[str, Any]) -> DataFrame:
        """Print the newest candle of a pair."""
        last = dataframe.iloc[-1]
        row = [metadata["pair"], last["date"].timestamp(), last["close"], time.time()]
        print(json.dumps(row), flush=True)
        return dataframe

    def populate_entry_trend(self, dataframe: DataFrame, metadata: dict[str, Any]) -> DataFrame:
        """Enter no trade."""
        return dataframe

    def populate_exit_trend(self, dataframe: DataFrame, metadata: dict[str, Any]) -> DataFrame:
        """Exit no trade."""
        return dataframe
