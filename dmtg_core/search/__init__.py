"""The search for a grouping: candidates, affinities between tasks, selection of groups, and baselines."""
