"""What the summary, the page and MLflow say on extra trees: first if they are better, else in a line."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pipelines.cli.train import _print_summary
from pipelines.config.loading import load_config
from pipelines.registry.records import final_metrics
from pipelines.report.run import facts, task_rows, verdict
from pipelines.report.trees import better_trees, trees_text
from pipelines.runs.tree_figures import compare_trees
from pipelines.storage import locate
from pipelines.training.driver import Trained


def result(trees: Any, grouping: float = 0.85) -> dict[str, Any]:
    """A result of two tasks whose scores are `grouping`."""
    return {
        "grouping": {"group_0": ["a", "b"]}, "grouping_name": "g1", "chosen": "guided", "split": "test",
        "metrics": {"a": {"auroc": grouping}, "b": {"auroc": grouping}}, "baseline": {},
        "headline": {"a": "auroc", "b": "auroc"}, "normalized_gain": None, "candidates": [], "notes": [],
        "inference": None, "training_cost": None, "distilled": {}, "trees": trees,
    }  # fmt: skip


def figures(a: float | None, b: float | None, **changes: Any) -> dict[str, Any]:
    """The figures of trees with two scores."""
    errors = {name: None if value is None else 1 - value for name, value in (("a", a), ("b", b))}
    found = {"method": "extra_trees", "count": 100, "rows": 80, "of": 80, "split": "test", "errors": errors}
    found |= {"metrics": {"a": {"auroc": a}, "b": {"auroc": b}}, "scales": {"a": 1.0, "b": 1.0}}
    return found | changes


BETTER = "Extra trees are better on these data: mean error 0.125, this grouping 0.15"
WORSE = "Extra trees: mean error 0.175, this grouping 0.15"


def summary(found: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines of the summary of `dmtg train`."""
    _print_summary(load_config("planted"), Trained(locate("run"), "", found, [], False))
    return capsys.readouterr().out.splitlines()


def test_trees_that_are_better_are_the_first_line_and_begin_the_verdict(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = result(figures(0.9, 0.85))
    lines = summary(found, capsys)
    assert lines[0] == BETTER
    assert sum("xtra trees" in line for line in lines) == 1
    assert verdict(found) == f"{BETTER}. No grouping helps here: one encoder."
    assert "trees" not in facts(found, {}, None)
    assert [row["trees"] for row in task_rows(found)] == [0.9, 0.85]


def test_trees_that_are_worse_or_equal_have_a_line_of_the_summary(capsys: pytest.CaptureFixture[str]) -> None:
    found = result(figures(0.85, 0.8))
    lines = summary(found, capsys)
    assert lines[0] == "No grouping helps here: one encoder."
    assert lines[1].startswith("Grouping g1")
    assert lines.count(WORSE) == 1
    assert verdict(found) == "No grouping helps here: one encoder."
    assert facts(found, {}, None)["trees"] == WORSE
    equal = result(figures(0.85, 0.85))
    assert better_trees(equal) == ""
    assert trees_text(equal) == "Extra trees: mean error 0.15, this grouping 0.15"


def test_the_conditions_are_told() -> None:
    few = result(figures(0.9, 0.85, rows=10_000, of=120_000))
    assert better_trees(few) == f"{BETTER} (trees trained on 10,000 of 120,000 rows)"
    close = result(figures(0.85004, 0.85))
    assert better_trees(close).endswith("mean error 0.14998, this grouping 0.15")


def test_errors_in_units_are_divided_by_the_scale_of_their_task() -> None:
    found = result(figures(0.9, 0.0, errors={"a": 0.1, "b": 0.5}, scales={"a": 1.0, "b": 1000.0}))
    found["metrics"]["b"] = {"rmse": 450.0}
    found["headline"]["b"] = "rmse"
    compared = compare_trees(found)
    assert compared is not None
    assert compared.trees == pytest.approx((0.1 + 0.5) / 2)
    assert compared.grouping == pytest.approx((0.15 + 0.45) / 2)
    assert trees_text(found).endswith("mean error 0.3, this grouping 0.3 (rmse and mae in standard deviations)")


def test_a_task_without_a_figure_is_left_out_of_both_means() -> None:
    compared = compare_trees(result(figures(0.9, None)))
    assert compared is not None
    assert (compared.trees, compared.grouping) == (pytest.approx(0.1), pytest.approx(0.15))
    assert compare_trees(result(figures(None, None))) is None


@pytest.mark.parametrize("trees", [None, {}, {"skipped": "train.trees=false"}])
def test_nothing_is_said_if_no_trees_were_wanted(trees: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = result(trees)
    assert not any("xtra trees" in line for line in summary(found, capsys))
    assert "trees" not in facts(found, {}, None)
    assert task_rows(found)[0]["trees"] is None
    assert {metric.key for metric in final_metrics(found, {})} == {"auroc/test/a", "auroc/test/b"}


def test_the_reason_of_a_failure_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    found = result({"failed": "scikit-learn is not installed: pip install 'dmtg[tables]'"})
    line = "No extra trees for comparison: scikit-learn is not installed: pip install 'dmtg[tables]'"
    assert line in summary(found, capsys)
    assert better_trees(found) == ""


def test_mlflow_has_a_metric_of_each_task_and_both_means() -> None:
    sent = {metric.key: metric.value for metric in final_metrics(result(figures(0.9, 0.85)), {})}
    assert sent["extra_trees/test/a/auroc"] == 0.9
    assert sent["extra_trees/test/b/auroc"] == 0.85
    assert sent["extra_trees/mean_error"] == pytest.approx(0.125)
    assert sent["mean_error"] == pytest.approx(0.15)
    assert all(math.isfinite(value) for value in sent.values())
