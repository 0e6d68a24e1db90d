"""Figures of a run that are measured beside its result."""
