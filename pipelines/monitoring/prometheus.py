"""Prometheus: an HTTP endpoint for the time of a command, and the metrics that a command leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.errors import UserError
from pipelines.monitoring.exporter import Values
from pipelines.monitoring.names import Metric

HOST = "127.0.0.1"
JOB = "dmtg_regroup"  # of a Pushgateway
PUSH_S = 10.0
TEXTFILE = ".prom"  # node_exporter reads no other files


class Collector:
    """The current values, as a collector of `prometheus_client`."""

    def __init__(self, values: Values | None = None) -> None:
        self.values: Values = values or {}

    def collect(self) -> Iterator[Any]:
        """One family for each metric."""
        from prometheus_client.core import GaugeMetricFamily

        families: dict[Metric, Any] = {}
        for (metric, labels), value in self.values.items():
            if metric not in families:
                families[metric] = GaugeMetricFamily(metric.name, metric.description, labels=metric.labels)
            families[metric].add_metric(labels, value)
        yield from families.values()


def _registry(collector: Collector) -> Any:
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    registry.register(collector)
    return registry


class PrometheusEndpoint:
    """An `Exporter` with an HTTP endpoint in Prometheus' text format, on the loopback interface.

    Args:
        port: Its port.

    Raises:
        UserError: When the port is in use, or this user may not open it.
    """

    def __init__(self, port: int) -> None:
        from prometheus_client import start_http_server

        self.collector = Collector()
        try:
            self.server, self.thread = start_http_server(port, HOST, _registry(self.collector))
        except OSError as error:
            raise UserError(
                f"the metrics endpoint cannot be opened: {error.strerror}",
                where=f"track.metrics_port={port} on {HOST}",
                remedy="choose a free port from 1024 on, or end the command that uses it; 0 is no endpoint",
                wrong_use=True,
            ) from error

    def export(self, values: Values) -> None:
        """See `Exporter.export`."""
        self.collector.values = dict(values)

    def close(self) -> None:
        """See `Exporter.close`."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def leave(values: Values, place: str, group: dict[str, str]) -> None:
    """Leave metrics for Prometheus when the command ends.

    Args:
        values: The metrics.
        place: The address of a Pushgateway, or a file of node_exporter's textfile collector.
        group: Labels of the group of metrics that is replaced on a Pushgateway.

    Raises:
        OSError: When the Pushgateway does not accept them, or the file cannot be written.
    """
    from prometheus_client import push_to_gateway, write_to_textfile

    registry = _registry(Collector(values))
    if is_address(place):
        push_to_gateway(place, JOB, registry, group, timeout=PUSH_S)
    else:
        write_to_textfile(str(Path(place).expanduser()), registry)


def is_address(place: str) -> bool:
    """Whether metrics are left on a Pushgateway, not in a file."""
    return place.startswith(("http://", "https://"))
