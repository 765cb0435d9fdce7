"""The configuration and commands of freqtrade, as docs/drop-in.md describes them."""

import json
import sys
from pathlib import Path
from typing import Any

from tests.raw.clients.ccxt_client import drop_in_urls
from tests.raw.clients.environments import python_of

STRATEGIES = Path(__file__).parent / "strategies"
PAIRS = ("BTC/USDT", "ETH/USDT", "SOL/USDT")


def configuration(exchange: str, url: str) -> dict[str, Any]:
    """Return the settings of a bot in dry-run mode. `url` is that of the exchange or of /raw."""
    prices = {"price_side": "same", "use_order_book": True, "order_book_top": 1}
    return {
        "dry_run": True,
        "dry_run_wallet": 1_000,
        "stake_currency": "USDT",
        "stake_amount": 50,
        "max_open_trades": 1,
        "timeframe": "1m",
        "trading_mode": "spot",
        "initial_state": "running",
        "db_url": "sqlite://",
        "entry_pricing": prices,
        "exit_pricing": prices,
        "pairlists": [{"method": "StaticPairList"}],
        "exchange": {
            "name": exchange,
            "enable_ws": False,
            "only_from_ccxt": True,
            "pair_whitelist": list(PAIRS),
            "ccxt_config": {
                "urls": {"api": drop_in_urls(exchange, url)},
                "options": {"fetchMarkets": {"types": ["spot"]}},
            },
        },
    }


def command(folder: Path, exchange: str, url: str, *arguments: str) -> list[str]:
    """Write the configuration into a folder. Return the command line of freqtrade."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    config = folder / "config.json"
    config.write_text(json.dumps(configuration(exchange, url)))
    program = str(python_of("freqtrade").parent / "freqtrade")
    return [program, *arguments, "--config", str(config), "--userdir", str(folder)]


def candles(output: str) -> list[tuple[str, float, float, float]]:
    """Return the candles that the strategy printed: pair, start, close and time of arrival."""
    rows = [json.loads(line) for line in output.splitlines() if line.startswith('["')]
    return [tuple(row) for row in rows]


if __name__ == "__main__":
    folder, exchange, url, *arguments = sys.argv[1:]
    print(" ".join(command(Path(folder), exchange, url, *arguments)))
