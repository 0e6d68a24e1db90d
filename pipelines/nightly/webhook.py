"""The webhook of a nightly run, which gets the verdict as JSON."""

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
    """Check the address of a webhook.

    Raises:
        UserError: If the scheme is not http(s) or the host is missing.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"expected an http(s) address, got one with the scheme {parts.scheme or '(none)'}",
            where="regroup.webhook",
            remedy="write https://host/path",
            wrong_use=True,
        )


def send(address: str, verdict: Mapping[str, Any]) -> str:
    """POST a verdict as JSON, with retries.

    A receiver can get a verdict twice if the job was killed. `name` and `night` identify it.

    Returns:
        The reason of a failure; empty after success. It does not contain the address, which is often a secret.
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
