"""Where the work of a command runs: in its own process (embedded), or on Ray."""
