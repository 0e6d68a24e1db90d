"""The run folder: names and contents of its files."""
