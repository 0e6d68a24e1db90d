"""A door in front of a server on loopback: open, shut, or with nobody behind it who answers."""

from __future__ import annotations

import contextlib
import select
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Door:
    """What is asked of its port goes to another one, or is hung up on, or waits for ever.

    Args:
        target: Port of the server.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.way = "open"
        self.refused = 0
        self.waiting: set[socket.socket] = set()  # connections that nobody answers
        self.inside: set[socket.socket] = set()
        self.port = 0

    def open(self) -> None:
        """Let through what comes."""
        self.way = "open"

    def shut(self) -> None:
        """Hang up on what is inside, and on what comes."""
        self.way = "shut"
        for connection in list(self.inside):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def silence(self) -> None:
        """Take what comes and answer nothing."""
        self.shut()
        self.way = "silent"

    def let(self, client: socket.socket) -> None:
        """What happens to a connection, until it ends."""
        self.inside.add(client)
        try:
            if self.way == "shut":
                self.refused += 1
            elif self.way == "silent":
                self.waiting.add(client)
                while client.recv(65536):
                    pass
                self.waiting.discard(client)
            else:
                self._relay(client)
        finally:
            self.inside.discard(client)

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
def door_to(target: int) -> Iterator[Door]:
    """A `Door`, for the time of the block."""
    door = Door(target)

    class Way(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):  # a side that has gone is what this is for
                door.let(self.request)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        block_on_close = False

    with Server(("127.0.0.1", 0), Way) as server:
        door.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield door
        finally:
            door.shut()
            server.shutdown()
            thread.join()
