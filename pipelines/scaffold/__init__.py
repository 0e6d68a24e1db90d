"""Scaffold of configurations: a new configuration file for a data set, and the JSON schema of configurations."""
