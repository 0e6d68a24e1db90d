"""The webhook of a nightly run, which gets the verdict as JSON.

The address is often a secret. No message of this module contains a part of it, and none of a library is passed on.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from email.message import Message
from typing import IO, Any
from urllib.parse import urlsplit

from pipelines.errors import UserError
from pipelines.storage import finite

TRIES, PAUSE_S = 3, 2.0
DEADLINE_S = 60.0  # of all tries together, with name resolution and a receiver that sends one byte at a time
ADDRESS = re.compile(r"[!-~]+")  # the characters of an address: printable ASCII without spaces


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follow no redirect: it would send the verdict to another host, as GET and without its body."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        """Return no request, so that the answer is an `HTTPError`."""


def check_address(address: str, key: str = "regroup.webhook") -> None:
    """Check the whole address of a webhook, or of another receiver.

    Args:
        address: The address.
        key: The key of the configuration that has it.

    Raises:
        UserError: If it is no http(s) address, has no host or no valid port, or carries a user and a password.
    """
    problem = _problem(address)
    if problem:
        raise UserError(
            f"expected an http(s) address, got one with {problem}",
            where=key,
            remedy="write https://host/path, with other characters than ASCII percent-encoded",
            wrong_use=True,
        )


def _problem(address: str) -> str:
    """What is wrong with an address, without a part of it; empty if nothing is."""
    if not ADDRESS.fullmatch(address):
        return "spaces, control characters or other characters than ASCII"
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        return "a host or a port that is not valid"
    if parts.scheme not in ("http", "https"):
        return "another scheme" if parts.scheme else "no scheme"
    if not host or port == 0 or any(not 0 < len(label) < 64 for label in host.rstrip(".").split(".")):
        return "a host or a port that is not valid"
    return "a user and a password, which are not sent" if "@" in parts.netloc else ""


def send(address: str, verdict: Mapping[str, Any]) -> str:
    """POST a verdict as JSON, with retries, within `DEADLINE_S`.

    A receiver can get a verdict twice if the job was killed. `name` and `night` identify it.

    Returns:
        The reason of a failure; empty after success. It does not contain the address.

    Raises:
        UserError: As `check_address`.
    """
    check_address(address)
    body = json.dumps(finite(dict(verdict)), allow_nan=False).encode()
    answers: queue.Queue[str] = queue.Queue()
    until, problem = time.monotonic() + DEADLINE_S, ""
    for attempt in range(TRIES):
        # a thread, because the timeout of a socket is that of one read, and name resolution has none
        threading.Thread(target=_post, args=(address, body, answers), daemon=True).start()
        try:
            problem = answers.get(timeout=max(until - time.monotonic(), 0))
        except queue.Empty:
            return f"no answer within {DEADLINE_S:g} s"
        if not problem or problem.startswith("it answered") or attempt + 1 == TRIES:
            break
        time.sleep(min(PAUSE_S, max(until - time.monotonic(), 0)))
    return problem


def _post(address: str, body: bytes, answers: queue.Queue[str]) -> None:
    """Send the request and put the reason of its failure, or an empty text, into the queue."""
    request = urllib.request.Request(  # noqa: S310 - the scheme has been checked
        address, data=body, headers={"Content-Type": "application/json"}, method="POST"
    )
    problem = "the request failed"
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=DEADLINE_S):
            problem = ""
    except (OSError, http.client.HTTPException, ValueError) as error:
        problem = _reason(error)
    finally:
        answers.put(problem)


def _reason(error: Exception) -> str:
    """The reason of a failure, in words that do not depend on the address."""
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        if error.code >= 500:
            return f"the receiver failed with {error.code}"
        return f"it answered {error.code}" + (", a redirect, which is not followed" if error.code < 400 else "")
    cause = getattr(error, "reason", error)
    if isinstance(cause, socket.gaierror):
        return "the name of its host is not known"
    if isinstance(cause, ssl.SSLError):
        return f"its TLS connection failed ({cause.reason or 'unknown reason'})"
    if isinstance(cause, OSError) and cause.errno:
        return os.strerror(cause.errno)
    return f"the request failed ({type(cause).__name__})"
