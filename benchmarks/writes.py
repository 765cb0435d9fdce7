"""A bare writer: writes messages of the size of a ticker update to all clients without a pause.

Its rate is the upper limit of what the kernel of this machine lets one process push.
"""

import select
import socket
import sys
import time
from contextlib import suppress

PAYLOAD = b"x" * 370  # makes a message as long as a ticker update
CLIENT_TIMEOUT_SECONDS = 5.0


def main(port: int) -> None:
    """Accept clients and write to all of them, until the process ends."""
    clients: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", port), backlog=1000) as server:
        while True:
            while select.select([server], [], [], 0 if clients else None)[0]:
                client, _ = server.accept()
                if accept_handshake(client):
                    clients.append(client)
            frame = message_frame(time.time_ns() // 1_000_000)
            clients = [client for client in clients if write(client, frame)]


def accept_handshake(client: socket.socket) -> bool:
    """Answer the WebSocket handshake. Return False if the client has disconnected.

    The accept key is left out, because the clients of this benchmark do not check it.
    """
    client.settimeout(CLIENT_TIMEOUT_SECONDS)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with suppress(OSError):
        client.recv(65536)
        client.sendall(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")
        return True
    return False


def message_frame(now_ms: int) -> bytes:
    """Return a WebSocket frame with a message of this time (UTC milliseconds)."""
    text = b'{"timestamp":%d,"sent_at":%d,"data":"%b"}' % (now_ms, now_ms, PAYLOAD)
    return b"\x81\x7e%b%b" % (len(text).to_bytes(2, "big"), text)


def write(client: socket.socket, frame: bytes) -> bool:
    """Write one frame. Close the client and return False if it has disconnected or hangs."""
    try:
        client.sendall(frame)
    except OSError:
        client.close()
        return False
    return True


if __name__ == "__main__":
    main(int(sys.argv[1]))
