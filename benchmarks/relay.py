"""A bare relay: sends the messages of an exchange to all clients with the `websockets` library."""

import json
import sys

import uvloop
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, broadcast, serve

SUBSCRIBE = {"method": "SUBSCRIBE", "params": ["btcusdt@ticker"], "id": 1}


async def main(exchange_url: str, port: int) -> None:
    """Relay one binance stream until the process ends."""
    clients: set[ServerConnection] = set()

    async def serve_client(client: ServerConnection) -> None:
        clients.add(client)
        try:
            await client.wait_closed()
        finally:
            clients.discard(client)

    async with (
        serve(serve_client, "127.0.0.1", port, compression=None),
        connect(exchange_url, compression=None) as exchange,
    ):
        await exchange.send(json.dumps(SUBSCRIBE))
        async for message in exchange:
            broadcast(clients, message)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2])))
