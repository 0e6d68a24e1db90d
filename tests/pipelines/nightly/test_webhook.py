"""The webhook: which addresses are refused, what counts as delivered, and that no message contains the secret."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import UserError
from pipelines.nightly import webhook
from pipelines.nightly.webhook import check_address, send

SECRET = "T0KEN"  # noqa: S105 - of no service


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "PAUSE_S", 0.0)


@contextmanager
def receiver(*codes: int, location: str = "") -> Iterator[tuple[str, list[str]]]:
    """A receiver that answers with the codes, one after the other, and the methods of its requests."""
    waiting, methods = list(codes), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def handle_one_request(self) -> None:
            self.raw_requestline = self.rfile.readline(65537)
            if not self.parse_request():
                return
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            methods.append(self.command)
            self.send_response(waiting.pop(0) if len(waiting) > 1 else waiting[0])
            if location:
                self.send_header("Location", location)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/{SECRET}", methods
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("codes", "problem", "requests"),
    [
        ((200,), "", 1),
        ((204,), "", 1),
        ((503, 200), "", 2),
        ((503,), "the receiver failed with 503", 3),
        ((404,), "it answered 404", 1),
        ((304,), "it answered 304", 1),
    ],
)
def test_only_an_answer_of_success_counts_as_delivered(
    codes: tuple[int, ...], problem: str, requests: int
) -> None:
    with receiver(*codes) as (address, methods):
        found = send(address, {"verdict": "kept"})
    assert found.startswith(problem)
    assert bool(found) == bool(problem)
    assert methods == ["POST"] * requests


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_neither_followed_nor_counted_as_delivered(code: int) -> None:
    with receiver(200) as (other, reached), receiver(code, location=other) as (address, methods):
        found = send(address, {"verdict": "kept"})
    assert "a redirect" in found
    assert methods == ["POST"]
    assert reached == []


def test_a_receiver_that_sends_a_byte_at_a_time_does_not_delay_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "DEADLINE_S", 1.0)
    ended = threading.Event()

    def drip(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            while not ended.wait(0.05):
                try:
                    connection.sendall(b"H")
                except OSError:
                    return

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=drip, args=(server,))
        thread.start()
        found = send(f"http://127.0.0.1:{server.getsockname()[1]}/{SECRET}", {})
        assert found == "no answer within 1 s"
        ended.set()
        thread.join()


def test_a_receiver_that_does_not_speak_http_is_a_failure() -> None:
    def answer(server: socket.socket) -> None:
        for _ in range(webhook.TRIES):
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"SSH-2.0 hello\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer, args=(server,))
        thread.start()
        found = send(f"http://127.0.0.1:{server.getsockname()[1]}/{SECRET}", {})
        thread.join()
    assert found.startswith("the request failed")


REFUSED = [
    "", "hook", "file:///etc/x", "ftp://host/x", "http://", "http:///x", "https://:443/x", "http://127.0.0.1:abc/x",
    "http://127.0.0.1:99999/x", "http://127.0.0.1:0/x", "http://127.0.0.1/a b", "http://127.0.0.1/\u00e9",
    "http://[::1/x", "http://ex\0ample/x", "http://host/a\nb", "http://user:T0KEN@host/x", "http://a..b/x",
    f"http://{'a' * 70}.test/x", "http://host/\x7f",
]  # fmt: skip


@pytest.mark.parametrize("address", REFUSED)
def test_an_address_is_checked_whole(address: str) -> None:
    with pytest.raises(UserError, match="expected an http") as found:
        check_address(address)
    assert SECRET not in str(found.value)


@given(
    st.text(max_size=30), st.sampled_from(["", "http://", "https://", "http://127.0.0.1:9/", "http://[::1]:9/"])
)
def test_no_address_raises_another_error_or_is_in_a_message(text: str, start: str) -> None:
    refused = ""
    try:
        check_address(f"{start}{text}/{SECRET}")
    except UserError as error:
        refused = str(error)
    assert SECRET not in refused


def _unknown(*_: object, **__: object) -> list[object]:
    raise socket.gaierror(-2, "Name or service not known")


@pytest.mark.parametrize("host", ["127.0.0.1:9", "[::1]:9", "unknown.test"])
def test_a_host_that_does_not_answer_is_a_reason_without_the_address(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if host == "unknown.test":
        monkeypatch.setattr("socket.getaddrinfo", _unknown)
    found = send(f"http://{host}/{SECRET}", {})
    assert found
    assert SECRET not in found
    assert host not in found
