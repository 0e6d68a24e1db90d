"""The planted problem as training data."""

from dmtg_core import ArrayData, Grouping, InputSpec, Task
from dmtg_core.evaluation.planted import planted


def planted_data(seed: int, **options: int) -> tuple[InputSpec, tuple[Task, ...], ArrayData, Grouping]:
    """Input, tasks, data and the true grouping."""
    spec, tasks, splits, truth = planted(seed, **options)
    return spec, tasks, ArrayData(splits, tasks, seed=seed), truth
