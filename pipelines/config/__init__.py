"""Strict configuration: its sections, and how YAML and overrides become one."""
