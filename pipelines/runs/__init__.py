"""The run folder: names and contents of its files, what it belongs to, and who may write it."""
