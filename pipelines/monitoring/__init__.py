"""Metrics for monitoring systems: Prometheus, Ray's own metrics and OpenTelemetry."""
