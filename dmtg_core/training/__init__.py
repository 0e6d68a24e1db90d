"""Training: settings, data, losses, metrics, the step, the loop, and checkpoints."""
