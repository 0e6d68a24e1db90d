"""Ray application metrics: each node of a cluster has an endpoint for Prometheus."""

from __future__ import annotations

from typing import Any

from pipelines.monitoring.exporter import Values, labels_of
from pipelines.monitoring.names import Metric


class RayExporter:
    """An `Exporter` to Ray. The endpoint of the node of this process has the metrics, with `ray_` in front.

    Ray's agent forgets a value that is not set again.
    """

    def __init__(self) -> None:
        self.gauges: dict[Metric, Any] = {}

    def export(self, values: Values) -> None:
        """See `Exporter.export`."""
        from ray.util.metrics import Gauge

        for series, value in values.items():
            metric = series[0]
            if metric not in self.gauges:
                self.gauges[metric] = Gauge(metric.name, metric.description, metric.labels)
            self.gauges[metric].set(value, labels_of(series))

    def close(self) -> None:
        """See `Exporter.close`: Ray sends the values itself."""
