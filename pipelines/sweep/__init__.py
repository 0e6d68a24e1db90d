"""`dmtg sweep`: the settings of a sweep as trials on Ray Tune."""
