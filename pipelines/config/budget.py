"""The budget of a search in numbers."""

from __future__ import annotations

from typing import Literal

CEILING = 4  # the most training with `search.budget=auto`, in default budgets


def runs_of(budget: float | Literal["auto"] | None, groups: int) -> float | None:
    """The most training of a search in runs of naive MTL; None for the default of the core.

    Args:
        budget: Value of `search.budget`.
        groups: Value of `network.groups`.
    """
    if budget != "auto":
        return budget
    from dmtg_core.search.budget import default_budget

    return CEILING * default_budget(groups)
