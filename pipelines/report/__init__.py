"""Pages: how they are rendered and drawn, and those of a run and of a data set."""
