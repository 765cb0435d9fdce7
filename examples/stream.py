"""Print what is pushed, and stay connected: `python examples/stream.py BTC-USDT ETH-USDT`; needs `websockets`.

GATEWAY is the address (ws://127.0.0.1:8000/ws), API_KEY a key where one is needed.
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
SILENT_SECONDS = 35  # two heartbeats missed: the connection is dead, whatever TCP says


def show(message: dict[str, Any]) -> None:
    """Print one message. A snapshot replaces what is known; an update follows the one before it."""
    where = f"{message.get('exchange', '')} {message.get('symbol', '')}"
    match message["type"]:
        case "snapshot" | "update" as kind:
            data, age = message["data"], message["sent_at"] - message["fetched_at"]
            print(
                kind, where, message["seq"], data["price"], f"{age} ms in the gateway, by {data['source']}", flush=True
            )
        case "status":
            print("status", where, message["state"], "- do not trade on it" * (message["state"] == "stale"), flush=True)
        case "error":
            print("error", message["code"], message["detail"], flush=True)
        case "subscribed":
            print("subscribed", message["symbols"], message["errors"], flush=True)


async def watch(symbols: list[str]) -> None:
    """Connect, subscribe and print; again after a pause that doubles with each failure in a row."""
    pause = 0.5
    while True:
        try:
            async with connect(URL, additional_headers=HEADERS) as socket:
                await socket.send(json.dumps({"op": "subscribe", "channel": "ticker", "symbols": symbols}))
                while True:
                    message = json.loads(await asyncio.wait_for(socket.recv(), SILENT_SECONDS))
                    show(message)
                    pause = pause if message["type"] == "error" else 0.5
        except InvalidURI as error:
            sys.exit(f"GATEWAY has to be an address such as ws://127.0.0.1:8000/ws: {error}")
        except (OSError, TimeoutError, InvalidHandshake, ConnectionClosed) as error:
            if isinstance(error, ConnectionClosed) and error.rcvd is not None and error.rcvd.code == 1008:
                sys.exit(f"refused: {error.rcvd.reason}")  # it would be refused again
            print("lost:", error, flush=True)
        await asyncio.sleep(pause * random.uniform(0.5, 1))  # so that not all clients come back at once
        pause = min(2 * pause, 30)


if __name__ == "__main__":
    asyncio.run(watch(sys.argv[1:] or ["BTC-USDT"]))
