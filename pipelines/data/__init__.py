"""Data: raw sources to shards, statistics of shards, and shards to batches."""
