"""`make bench`: what is claimed, measured against something else in the same run."""
