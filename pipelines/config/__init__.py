"""Strict configuration: its sections, and loading it from YAML files and overrides."""
