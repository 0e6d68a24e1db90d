"""The `dmtg` command: one module for each group of commands, the options and the output."""
