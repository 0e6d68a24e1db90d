"""A verdict sent to where somebody waits for it."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from pipelines.errors import UserError
from pipelines.storage import finite

TRIES, PAUSE_S, TIMEOUT_S = 3, 2.0, 20.0


def check_address(address: str) -> None:
    """Stop at an address that nothing could be sent to.

    Raises:
        UserError: For another scheme than http(s), or no host.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"expected an http(s) address, got one of the kind {parts.scheme or 'without scheme'}",
            where="regroup.webhook",
            remedy="write https://host/path",
            wrong_use=True,
        )


def send(address: str, verdict: Mapping[str, Any]) -> str:
    """POST a verdict as JSON, a few times; why it was not taken, empty where it was.

    The address is not in the message: it often holds a secret. `name` and `night` tell a receiver that gets a
    verdict twice, after a job that was killed, that it is the same one.
    """
    check_address(address)
    body = json.dumps(finite(dict(verdict)), allow_nan=False).encode()
    request = urllib.request.Request(  # noqa: S310 - the scheme has been checked
        address, data=body, headers={"Content-Type": "application/json"}, method="POST"
    )
    problem = ""
    for attempt in range(TRIES):
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S):  # noqa: S310 - the scheme has been checked
                return ""
        except urllib.error.HTTPError as error:
            problem = f"it answered {error.code}"
            if error.code < 500:
                return problem
        except OSError as error:
            problem = str(getattr(error, "reason", error))
        if attempt + 1 < TRIES:
            time.sleep(PAUSE_S)
    return problem
