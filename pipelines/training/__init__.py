"""Training a configuration to its end: the driver, the workers, and what is published."""
