"""An S3 server on loopback, and a faulty proxy in front of it.

The server is OpenStack Swift where the script that installs it is beside the checkout, else that of moto.
"""

from __future__ import annotations

import logging
import os
import random
import select
import socket
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.paths import SHARED

SCRIPT = SHARED / "tools" / "s3_server.sh"
BUCKET = "dmtg-test"
METHODS = (b"GET ", b"PUT ", b"POST ", b"HEAD ", b"DELETE ")
CHECKS_CREDENTIALS = SCRIPT.exists()  # moto accepts all of them
SECRET = "only-for-tests-1b9f"  # noqa: S105 - of a server that lives as long as the tests


def free_port() -> int:
    """A free port outside the range that the kernel assigns to connections.

    A server may be started on it half an hour later: no connection of another process may have taken it by then.
    """
    first, last = (int(word) for word in Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    candidates = range(20000, first) if first > 20100 else range(last + 1, 65000)
    for port in random.sample(candidates, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"none of 100 ports between {candidates.start} and {candidates.stop} is free")


def settings(port: int) -> dict[str, str]:
    """Environment variables for AWS clients."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test:tester",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


@contextmanager
def serving(port: int, folder: Path) -> Iterator[None]:
    """The server, for the time of the block, with an empty bucket."""
    if not SCRIPT.exists():
        with _moto(port):
            yield
        return
    own = environment(port, folder)
    installed = subprocess.run([str(SCRIPT), "install"], env=own, capture_output=True, text=True, check=False)
    if installed.returncode:
        pytest.skip(f"no S3 server can be installed here: {installed.stderr.strip().splitlines()[-1]}")
    begin(port, folder)
    try:
        create_bucket()
        yield
    finally:
        end(port, folder)


def create_bucket() -> None:
    import boto3

    boto3.client("s3").create_bucket(Bucket=BUCKET)


@contextmanager
def _moto(port: int) -> Iterator[None]:
    """moto's server in a thread of this process."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    try:
        create_bucket()
        yield
    finally:
        server.stop()


def environment(port: int, folder: Path) -> dict[str, str]:
    """Environment variables of the server's script."""
    own = {"S3_PORT": str(port), "S3_DATA_DIR": str(folder / "data"), "S3_SECRET_KEY": SECRET}
    return {**os.environ, **own, "S3_START_TIMEOUT": "300"}


def begin(port: int, folder: Path) -> None:
    """Start the server with its former contents."""
    path = folder / "start.log"
    with path.open("w") as log:
        # the server writes to the log until it ends, so its output is not a pipe
        done = subprocess.run(
            [str(SCRIPT), "start"], env=environment(port, folder), stdout=log, stderr=log, check=False
        )
    assert done.returncode == 0, path.read_text()


def end(port: int, folder: Path) -> None:
    """Stop the server; its contents stay."""
    subprocess.run([str(SCRIPT), "stop"], env=environment(port, folder), capture_output=True, check=False)


@dataclass
class FaultyProxy:
    """A proxy in front of a server that closes the connection at every `drop`th request."""

    target: int
    drop: int
    seen: int = 0
    dropped: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fails(self, data: bytes) -> bool:
        """Whether these bytes are the start of a request that is dropped."""
        if not data.startswith(METHODS):
            return False
        with self.lock:
            self.seen += 1
            fails = self.seen % self.drop == 0
            self.dropped += fails
            return fails


@contextmanager
def faulty(target: int, drop: int) -> Iterator[tuple[FaultyProxy, int]]:
    """A `FaultyProxy` of a server on loopback, and the port it listens on."""
    proxy = FaultyProxy(target, drop)

    class Relay(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection(("127.0.0.1", proxy.target)) as server:
                other = {self.request: server, server: self.request}
                while True:
                    for source in select.select(list(other), [], [])[0]:
                        data = source.recv(65536)
                        if not data or (source is self.request and proxy.fails(data)):
                            return
                        other[source].sendall(data)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """Ignore a closed connection."""

    with Server(("127.0.0.1", 0), Relay) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield proxy, server.server_address[1]
        finally:
            server.shutdown()
            thread.join()
