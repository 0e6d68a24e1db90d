"""Extra trees beside a run, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.report.formatting import figure
from pipelines.runs.tree_figures import TreeComparison, compare_trees

DIGITS, MORE_DIGITS = 3, 6  # significant digits; more if two different errors look the same


def better_trees(result: Mapping[str, Any]) -> str:
    """The sentence that extra trees are better than the grouping of a run; empty if they are not."""
    compared = compare_trees(result)
    if compared is None or not compared.better:
        return ""
    return f"Extra trees are better on these data: {_errors(compared)}{_conditions(result)}"


def trees_text(result: Mapping[str, Any]) -> str:
    """The figure of extra trees if they are not better, or why there is none although it was wanted.

    Args:
        result: As in `result.json`.
    """
    compared = compare_trees(result)
    if compared is None:
        reason = (result.get("trees") or {}).get("failed")
        return f"No extra trees for comparison: {reason}" if reason else ""
    return "" if compared.better else f"Extra trees: {_errors(compared)}{_conditions(result)}"


def _errors(compared: TreeComparison) -> str:
    trees, grouping = (figure(error, DIGITS) for error in (compared.trees, compared.grouping))
    if trees == grouping and compared.trees != compared.grouping:
        trees, grouping = (figure(error, MORE_DIGITS) for error in (compared.trees, compared.grouping))
    return f"mean error {trees}, this grouping {grouping}"


def _conditions(result: Mapping[str, Any]) -> str:
    """How the errors were measured, where it is not plain."""
    found, parts = result["trees"], []
    if any(scale != 1 for scale in found["scales"].values()):
        parts.append("rmse and mae in standard deviations")
    if found["rows"] < found["of"]:
        parts.append(f"trees trained on {found['rows']:,} of {found['of']:,} rows")
    return f" ({'; '.join(parts)})" if parts else ""
