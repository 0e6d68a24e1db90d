"""Training of a configuration: driver, workers, monitoring and publishing."""
