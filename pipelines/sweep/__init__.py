"""`dmtg sweep`: many settings of one configuration on Ray Tune."""
