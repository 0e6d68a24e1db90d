"""`make bench`: measurements of claimed ratios, each of two costs in the same run."""
