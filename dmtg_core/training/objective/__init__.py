"""The objective of a step: losses of single labels, and weightings of the tasks."""
