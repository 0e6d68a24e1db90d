"""`dmtg sweep`: the settings of a sweep as trials, in a pool of processes or on Ray Tune."""
