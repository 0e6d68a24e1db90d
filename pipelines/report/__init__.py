"""`report.html`: one page without a network, made from a run folder alone."""

from __future__ import annotations

from typing import Any

import yaml

from dmtg_core.metrics import error_of
from dmtg_core.search import WIDE
from pipelines.beforehand import said_before
from pipelines.config import Config
from pipelines.context import GATE, METRICS
from pipelines.errors import UserError
from pipelines.report import figures
from pipelines.report.render import render
from pipelines.sections import checked
from pipelines.storage import Location
from pipelines.worker import RESULT, read_jsonl


def write_report(run: Location) -> Location:
    """Make the page of a finished run, and a picture of its grouping, beside its results; where the page is.

    Raises:
        UserError: When the run is not finished.
    """
    if not (run / RESULT).exists():
        raise UserError(
            "no finished run here", where=str(run), remedy="run dmtg train to its end, or name another run folder"
        )
    target = run / "report.html"
    (run / "grouping.png").write_bytes(figures.grouping_png((run / RESULT).read_json()["grouping"]))
    target.write_text(page(run))
    return target


def page(run: Location) -> str:
    """The page of a finished run as HTML."""
    result = (run / RESULT).read_json()
    config = yaml.safe_load((run / "config.yaml").read_text())
    rows = task_rows(result)
    gate = [g for g in read_jsonl(run / GATE) if g["stage"] == shown_gate(result)]
    drawn = {
        "grouping": figures.grouping(result["grouping"]),
        "gate": figures.gate(gate, list(result["metrics"])) if gate else "",
        "metrics": figures.metrics(rows) if result["baseline"] else "",
        "learning": figures.learning(read_jsonl(run / METRICS)),
    }
    return render(
        "page.html",
        run=str(run),
        result=result,
        verdict=verdict(result),
        gate=shown_gate(result),
        signal=said_before(checked(Config, config)),
        rows=rows,
        config=yaml.safe_dump(config, sort_keys=False),
        figures=drawn,
    )


def shown_gate(result: dict[str, Any]) -> str:
    """The candidate whose gate is drawn: that of the result, or the best one where the result has none."""
    gated = [c for c in result["candidates"] if len(c["probabilities"][0]) > 1]
    if not gated or any(c["stage"] == result["chosen"] for c in gated):
        return str(result["chosen"]) if gated else ""
    return str(min(gated, key=lambda c: c["score"])["stage"])


def task_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A row a task: group, headline metric, its value, naive MTL's, and by how many per cent the error fell."""
    group_of = {task: name for name, tasks in result["grouping"].items() for task in tasks}
    rows = []
    for task, found in result["metrics"].items():
        metric = result["headline"][task]
        value, base = found[metric], result["baseline"].get(task, {}).get(metric)
        change = None
        if value is not None and base is not None and error_of(metric, base):
            change = 100 * (error_of(metric, base) - error_of(metric, value)) / error_of(metric, base)
        rows.append(
            {
                "task": task,
                "group": group_of[task],
                "metric": metric,
                "value": value,
                "baseline": base,
                "gain": change,
            }
        )
    return rows


def verdict(result: dict[str, Any]) -> str:
    """The result in one sentence, no stronger than one run allows."""
    count = len(result["grouping"])
    groups = f"{len(result['metrics'])} tasks in {count} {'group' if count == 1 else 'groups'}"
    if result["chosen"] == WIDE:
        groups = (
            f"No grouping of the {len(result['metrics'])} tasks was better than one wide encoder of the same cost"
        )
    gain = result["normalized_gain"]
    if gain is None:
        return f"{groups}."
    direction = "lower" if gain >= 0 else "higher"
    return (
        f"{groups}. Against one shared encoder (naive MTL) the mean error on {result['split']} is "
        f"{abs(gain):.1f} % {direction} in this one run, which says nothing yet about how it varies with the seed."
    )
