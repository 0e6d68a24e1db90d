"""A proxy in front of a server on loopback, which can refuse connections or not answer them."""

from __future__ import annotations

import contextlib
import select
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Proxy:
    """Relays connections to a server, closes them, or leaves them without an answer.

    Args:
        target: Port of the server.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.mode = "open"
        self.refused = 0
        self.waiting: set[socket.socket] = set()  # connections without an answer
        self.open_connections: set[socket.socket] = set()
        self.port = 0

    def open(self) -> None:
        """Relay new connections."""
        self.mode = "open"

    def refuse(self) -> None:
        """Close all connections and refuse new ones."""
        self.mode = "refuse"
        for connection in list(self.open_connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def silence(self) -> None:
        """Close all connections; accept new ones and do not answer them."""
        self.refuse()
        self.mode = "silent"

    def handle(self, client: socket.socket) -> None:
        """Handle a connection until it ends."""
        self.open_connections.add(client)
        try:
            if self.mode == "refuse":
                self.refused += 1
            elif self.mode == "silent":
                self.waiting.add(client)
                while client.recv(65536):
                    pass
                self.waiting.discard(client)
            else:
                self._relay(client)
        finally:
            self.open_connections.discard(client)

    def _relay(self, client: socket.socket) -> None:
        with socket.create_connection(("127.0.0.1", self.target)) as server:
            other = {client: server, server: client}
            while True:
                for source in select.select(list(other), [], [])[0]:
                    data = source.recv(65536)
                    if not data:
                        return
                    other[source].sendall(data)


@contextmanager
def proxy_to(target: int) -> Iterator[Proxy]:
    """A `Proxy` of a server, for the time of the block."""
    proxy = Proxy(target)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):  # a closed connection
                proxy.handle(self.request)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False

    with Server(("127.0.0.1", 0), Handler) as server:
        proxy.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.refuse()
            server.shutdown()
            thread.join()
