"""Training on Ray Train: the only modules that import `ray.train`."""
