"""Checks of a cluster's address before Ray connects to it: Ray itself waits for minutes, and names no address."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import grpc

from pipelines.errors import UserError

ANSWER_S = 30.0  # how long a cluster may take to accept a connection
TOKEN_FILE = Path(".ray") / "auth_token"  # in the home folder: where Ray reads a token that no variable names


def check_cluster(address: str) -> None:
    """Check that a cluster accepts connections, and that there is a token if Ray is to send one.

    Args:
        address: `host:port`, `ray://host:port`, or a word with which Ray itself looks for a cluster ("auto").

    Raises:
        UserError: For an address of another kind, a missing token, or no connection within `ANSWER_S`.
    """
    if address.startswith(("http://", "https://")):
        raise UserError(
            "this is the address of a dashboard, to which jobs are submitted",
            where=f"ray.address = {address}",
            remedy="use ray job submit --address, or set ray.address to host:port of the cluster, often port 6379",
            wrong_use=True,
        )
    _check_token()
    found = re.fullmatch(r"(?:ray://)?(\[[0-9a-fA-F:]+\]|[^:/]+):(\d{1,5})/?", address)
    if found is None:
        return
    host, port = found.groups()
    problem = _problem(host, int(port))
    if problem:
        raise UserError(
            f"the Ray cluster at {address} does not answer: {problem}",
            where=f"ray.address = {address}",
            remedy="correct ray.address or RAY_ADDRESS, or start the cluster; dmtg doctor tests the address",
        )


def _check_token() -> None:
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return
    named = os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    file = Path(named) if named else Path.home() / TOKEN_FILE
    if not os.environ.get("RAY_AUTH_TOKEN") and not file.is_file():
        raise UserError(
            "the Ray cluster needs a token, and there is none",
            where=f"RAY_AUTH_MODE=token, RAY_AUTH_TOKEN is not set, no file {file}",
            remedy="set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with the token of the cluster",
        )


def _problem(host: str, port: int) -> str:
    """Why no connection can be made; empty if it can. With TLS only the port is tested."""
    if os.environ.get("RAY_USE_TLS", "0") == "1":
        try:
            socket.create_connection((host.strip("[]"), port), timeout=ANSWER_S).close()
        except OSError as error:
            return error.strerror or str(error)
        return ""
    with grpc.insecure_channel(f"{host}:{port}") as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=ANSWER_S)
        except grpc.FutureTimeoutError:
            return f"no connection within {ANSWER_S:g} s"
    return ""
