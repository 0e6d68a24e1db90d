"""Opens the exporters that a configuration asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from pipelines.config.sections import TrackSection
from pipelines.monitoring.exporter import Exporter
from pipelines.monitoring.opentelemetry import OpenTelemetryExporter
from pipelines.monitoring.prometheus import PrometheusEndpoint


@contextmanager
def open_exporters(section: TrackSection) -> Iterator[list[Exporter]]:
    """The exporters of a configuration, for the time of the block.

    Raises:
        UserError: When one of them cannot be opened.
    """
    with ExitStack() as opened:
        exporters: list[Exporter] = []
        if section.metrics_port:
            exporters.append(PrometheusEndpoint(section.metrics_port))
            opened.callback(exporters[-1].close)
        if section.opentelemetry:
            exporters.append(OpenTelemetryExporter())
            opened.callback(exporters[-1].close)
        yield exporters
