"""The run folder: the names of its files, and their contents."""
