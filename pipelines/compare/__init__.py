"""`dmtg compare` and `dmtg signal`: comparison of methods over seeds, and the grouping signal."""
