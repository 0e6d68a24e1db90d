"""`dmtg serve`: a model over HTTP, for the time of the command."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pipelines.config.loading import load_ray
from pipelines.config.ray_section import RaySection
from pipelines.config.validation import checked
from pipelines.errors import UserError
from pipelines.execution.session import session
from pipelines.serving.fitting import Served
from pipelines.serving.proxy import fast_proxy
from pipelines.serving.records import RowReader

NAME = "dmtg"
QUIET = {"enable_access_log": False}
LOOPBACK = ("127.0.0.1", "localhost", "::1")
LEAST = 0.01  # CPUs, as a section has no zero
EVERY_S = 10.0  # between two checks whether the application runs
logger = logging.getLogger(__name__)


def serve_model(values: Mapping[str, Any], host: str, port: int, log: Callable[[str], None] = logger.info) -> None:
    """Serve a model until the command is interrupted.

    Args:
        values: Values of `pipelines.serving.ray_serve.ServeOptions`.
        host, port: Where the server listens.
        log: Called with each line of progress.

    Raises:
        UserError: As `serving`, and when the application has ended.
    """
    with serving(values, host, port) as (served, url):
        log(f"{served.address} is served at {url}: POST /predict, GET /healthz, GET /docs")
        if host not in LOOPBACK:
            log("note: the server has no authentication: put a proxy that has it before the server")
        try:
            _wait()
        except KeyboardInterrupt:
            log("the server ends")


@contextmanager
def serving(values: Mapping[str, Any], host: str, port: int) -> Iterator[tuple[Served, str]]:
    """A server that accepts requests; the model and the address.

    Raises:
        UserError: When the extra is missing, the model cannot be loaded, the port is taken, or the cluster has
            another application.
    """
    section = load_ray(str(values.get("ray_config", "")))
    with fast_proxy(section):
        serve, ray_serve = _ray_serve()
        options = checked(ray_serve.ServeOptions, values)
        _check_port(host, port)
        served = options.open()
        RowReader(served)  # checks the names of the columns
        logging.getLogger("ray.serve").setLevel(logging.ERROR)  # its notes on its own start-up
        with session(_section(section, options, len(served.groups))):
            _check_unused(serve)
            try:
                serve.start("HeadOnly", {"host": host, "port": port}, logging_config=QUIET)
                serve.run(ray_serve.application_of(served, options), name=NAME, route_prefix="/")
                yield served, f"http://{f'[{host}]' if ':' in host else host}:{port}"
            finally:
                serve.shutdown()


def _ray_serve() -> tuple[Any, Any]:
    """The modules of Ray Serve and of the application."""
    try:
        from ray import serve

        from pipelines.serving import ray_serve
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name in ("", "pipelines", "dmtg_core"):
            raise
        raise UserError(
            f"the server needs the package {name}", where="dmtg serve", remedy="pip install 'dmtg[serve]'"
        ) from error
    return serve, ray_serve


def _section(section: RaySection, options: Any, groups: int) -> RaySection:
    """The section of a session that has room for all replicas."""
    replicas = options.replicas * (1 + groups if options.per_group else 1)
    needs = {"cpus_per_worker": max(options.cpus, LEAST), "gpus_per_worker": options.gpus, "data_cpus": LEAST}
    return section.model_copy(update={"workers": replicas, **needs})


def _check_port(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        raise UserError(
            f"the server cannot listen at {host}:{port}: {error.strerror or error}", where="--host, --port",
            remedy="give another --port, or end the other server", wrong_use=True,
        ) from error  # fmt: skip


def _check_unused(serve: Any) -> None:
    """Check that the cluster has no application, as the host and the port of Ray Serve cannot be changed.

    Raises:
        UserError: When it has one.
    """
    found = serve.status()
    if found.applications or found.proxies:
        raise UserError(
            f"Ray Serve runs on the cluster already: {', '.join(found.applications) or 'without applications'}",
            where="ray.address",
            remedy="add pipelines.serving.ray_serve:build to its configuration, or run serve shutdown",
        )


def _wait() -> None:
    """Wait until the command is interrupted.

    Raises:
        UserError: When the application has ended.
    """
    from ray import serve

    ended = threading.Event()
    while not ended.wait(EVERY_S):
        found = serve.status().applications.get(NAME)
        if found is None or found.status in ("DEPLOY_FAILED", "DELETING", "NOT_STARTED"):
            raise UserError(
                f"the application has ended: {found.message if found else 'it is gone'}", where="Ray Serve",
                remedy="run the same command again",
            )  # fmt: skip
