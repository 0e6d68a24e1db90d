"""OpenTelemetry: metrics go where the standard variables OTEL_* say."""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from typing import Any

from pipelines.errors import UserError
from pipelines.monitoring.exporter import Values, labels_of
from pipelines.monitoring.names import Metric

EXPORTER = "OTEL_METRICS_EXPORTER"
PROTOCOLS = ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
OTLP = {"grpc": "otlp_proto_grpc", "http/protobuf": "otlp_proto_http"}
ENTRY_POINTS = "opentelemetry_metrics_exporter"


class OpenTelemetryExporter:
    """An `Exporter` to an exporter of OpenTelemetry's SDK.

    OTEL_METRICS_EXPORTER names it; the default is `otlp`, whose package is installed by the user. The exporter and
    the SDK read the other variables, such as OTEL_EXPORTER_OTLP_ENDPOINT and OTEL_METRIC_EXPORT_INTERVAL.

    Raises:
        UserError: When there is no such exporter.
    """

    def __init__(self) -> None:
        exporter = _exporter_class()()
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

        self.provider = MeterProvider([PeriodicExportingMetricReader(exporter)])
        self.meter = self.provider.get_meter("dmtg")
        self.gauges: dict[Metric, Any] = {}

    def export(self, values: Values) -> None:
        """See `Exporter.export`."""
        for series, value in values.items():
            metric = series[0]
            if metric not in self.gauges:
                self.gauges[metric] = self.meter.create_gauge(metric.name, metric.unit, metric.description)
            self.gauges[metric].set(value, labels_of(series))

    def close(self) -> None:
        """See `Exporter.close`."""
        self.provider.shutdown()


def _exporter_class() -> Any:
    """The class of the exporter that the environment names."""
    given = os.environ.get(EXPORTER) or "otlp"
    protocol = next(filter(None, map(os.environ.get, PROTOCOLS)), "grpc")
    name = OTLP.get(protocol, given) if given == "otlp" else given
    found = entry_points(group=ENTRY_POINTS)
    if name not in found.names:
        remedy = f"set {EXPORTER} to one of those that are installed: {', '.join(sorted(found.names)) or 'none'}"
        if given.startswith("otlp"):
            remedy = f"pip install opentelemetry-exporter-{name.replace('_', '-')}, or {remedy}"
        raise UserError(
            f"there is no OpenTelemetry exporter {name!r}",
            where=f"track.opentelemetry=true, {EXPORTER}={given}", remedy=remedy, wrong_use=True,
        )  # fmt: skip
    return found[name].load()
