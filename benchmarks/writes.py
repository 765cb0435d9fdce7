"""The least a push costs: the same bytes, written to one socket after the other by a process that does nothing else.

What this machine's kernel does not write in a second, no gateway on it can push.
"""

import select
import socket
import sys
import time
from contextlib import suppress

PAYLOAD = b"x" * 370  # with it a message is as long as the update of a ticker
PATIENCE_SECONDS = 5.0  # for a client to read


def main(port: int) -> None:
    """Write to everybody who connects, for ever, as fast as it goes."""
    clients: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", port), backlog=1000) as server:
        while True:
            while select.select([server], [], [], 0 if clients else None)[0]:
                clients += greet(server.accept()[0])
            frame = message(time.time_ns() // 1_000_000)
            clients = [client for client in clients if write(client, frame)]


def greet(client: socket.socket) -> list[socket.socket]:
    """Shake hands, as far as a client looks at it; returns the client unless it left."""
    client.settimeout(PATIENCE_SECONDS)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with suppress(OSError):
        client.recv(65536)
        client.sendall(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
        return [client]
    return []


def message(now: int) -> bytes:
    """Return a message of that time, in UTC milliseconds, framed as a gateway frames it."""
    text = b'{"timestamp":%d,"sent_at":%d,"data":"%b"}' % (now, now, PAYLOAD)
    return b"\x81\x7e%b%b" % (len(text).to_bytes(2, "big"), text)


def write(client: socket.socket, frame: bytes) -> bool:
    """Write one message; returns whether the client is still there."""
    try:
        client.sendall(frame)
    except OSError:
        client.close()
        return False
    return True


if __name__ == "__main__":
    main(int(sys.argv[1]))
