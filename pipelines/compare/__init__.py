"""`dmtg compare` and `dmtg signal`: methods beside each other, over seeds."""
