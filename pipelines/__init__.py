"""The drivers behind the `dmtg` command: shard, inspect, train, evaluate, register, report."""
