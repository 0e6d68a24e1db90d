"""`dmtg config`: a configuration for a file, and the schema of a configuration."""
