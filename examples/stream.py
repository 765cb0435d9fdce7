"""Print pushed tickers and reconnect: `python examples/stream.py BTC-USDT ETH-USDT`.

Requires the package `websockets`. GATEWAY is the address (ws://127.0.0.1:8000/ws), API_KEY the key
if the gateway requires one.
"""

import asyncio
import json
import os
import random
import sys
from typing import Any

from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI

URL = os.environ.get("GATEWAY", "ws://127.0.0.1:8000/ws")
HEADERS = {"X-API-Key": os.environ["API_KEY"]} if "API_KEY" in os.environ else {}
SILENT_SECONDS = 35  # two missed heartbeats: the connection is dead, even if TCP is open


def show(message: dict[str, Any]) -> None:
    """Print a message. A snapshot replaces all data; an update follows the previous message."""
    where = f"{message.get('exchange', '')} {message.get('symbol', '')}"
    match message["type"]:
        case "snapshot" | "update" as kind:
            data = message["data"]
            age = message["sent_at"] - message["fetched_at"]
            source = f"{age} ms in the gateway, by {data['source']}"
            print(kind, where, message["seq"], data["price"], source, flush=True)
        case "status":
            advice = "- do not trade on it" if message["state"] == "stale" else ""
            print("status", where, message["state"], advice, flush=True)
        case "error":
            print("error", message["code"], message["detail"], flush=True)
        case "subscribed":
            print("subscribed", message["symbols"], message["errors"], flush=True)


async def watch(symbols: list[str]) -> None:
    """Connect, subscribe and print. Reconnect after a pause that doubles with each failure."""
    pause = 0.5
    while True:
        try:
            async with connect(URL, additional_headers=HEADERS) as socket:
                command = {"op": "subscribe", "channel": "ticker", "symbols": symbols}
                await socket.send(json.dumps(command))
                while True:
                    async with asyncio.timeout(SILENT_SECONDS):
                        text = await socket.recv()
                    message = json.loads(text)
                    show(message)
                    if message["type"] != "error":
                        pause = 0.5
        except InvalidURI as error:
            sys.exit(
                f"GATEWAY={URL} is invalid ({error}): expected a URL such as ws://127.0.0.1:8000/ws"
            )
        except (OSError, TimeoutError, InvalidHandshake, ConnectionClosed) as error:
            close = error.rcvd if isinstance(error, ConnectionClosed) else None
            if close is not None and close.code == 1008:  # a retry would be refused, too
                sys.exit(f"refused: {close.reason}")
            print("lost:", error, flush=True)
        await asyncio.sleep(pause * random.uniform(0.5, 1))  # spread clients
        pause = min(2 * pause, 30)


if __name__ == "__main__":
    asyncio.run(watch(sys.argv[1:] or ["BTC-USDT"]))
