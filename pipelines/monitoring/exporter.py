"""`Exporter`: sends the current values of metrics to a monitoring system."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from pipelines.monitoring.names import Metric

Series = tuple[Metric, tuple[str, ...]]  # a metric, and the values of its labels
Values = Mapping[Series, float]


class Exporter(Protocol):
    """Sends metrics to a monitoring system."""

    def export(self, values: Values) -> None:
        """Set the current values of all series. It is called again and again, also if nothing has changed."""
        ...

    def close(self) -> None:
        """Send what has not been sent, and end."""
        ...


def labels_of(series: Series) -> dict[str, str]:
    """The labels of a series with their values."""
    metric, values = series
    return dict(zip(metric.labels, values, strict=True))
