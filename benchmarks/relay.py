"""The bare relay: what an exchange pushes, sent on to everybody as it is by the library `websockets`."""

import json
import sys

import uvloop
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, broadcast, serve


async def main(upstream: str, port: int) -> None:
    """Relay one stream of binance for ever."""
    clients: set[ServerConnection] = set()

    async def hold(client: ServerConnection) -> None:
        clients.add(client)
        try:
            await client.wait_closed()
        finally:
            clients.discard(client)

    async with serve(hold, "127.0.0.1", port, compression=None), connect(upstream, compression=None) as exchange:
        await exchange.send(json.dumps({"method": "SUBSCRIBE", "params": ["btcusdt@ticker"], "id": 1}))
        async for message in exchange:
            broadcast(clients, message)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2])))
