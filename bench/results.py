"""`docs/results.md`, from the comparisons in `docs/results/`: `python -m bench.results [FILE NAME [COMMAND]]`.

With COMMAND, FILE is the `compare.json` of a finished comparison. It is first copied to `docs/results/NAME.json`.
Without COMMAND, FILE is the `signal.json` of the same configuration. Its verdict is added to `NAME.json`. A
comparison with several budgets has a plot of gain against training cost, `docs/results/NAME.svg`. The text of
`docs/results/NAME.md`, if there is one, is above its figures.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dmtg_core.names import by_number
from pipelines.compare.budgets import rows_within
from pipelines.compare.page import agreement, ahead, gain_against_cost, method_of
from pipelines.compare.significance import Mean, mean_of
from pipelines.config.sections import METHODS

FOLDER = Path(__file__).parents[1] / "docs" / "results"
PAGE = FOLDER.with_suffix(".md")
TABLES = FOLDER / "tables" / "tables.json"  # written by `bench.tables`
TEXTS = FOLDER / "page"  # texts of the page that are of no single comparison
LEARNERS = {
    "naive_mtl": "naive MTL", "guided": "guided search", "extra_trees": "extra trees",
    "random_forest": "random forest",
    "gradient_boosting": "gradient boosting", "lightgbm": "LightGBM", "mlp_sklearn": "MLP of scikit-learn",
}  # fmt: skip
OTHERS = set(METHODS) - {"naive_mtl", "guided"}
BUDGETS_HEAD = """## Budgets

The guided search beside the other method with the highest gain, at each budget. A method with a training of its
own length is there if it costs no more. The true groups are left out, because no user knows them. The search is at
the front of {front} of {all} budgets. The difference is that of the search to the other method, in points of gain:
positive means that the search is better. It is paired over seeds, and not corrected for the choice of the best of
several methods, which is not the same everywhere. The second table has the mean difference to each of them.

| comparison | seeds | budget | spent | the search | best other method | its gain | difference | front |
|---|---|---|---|---|---|---|---|---|"""
METHODS_HEAD = """
| method | budgets | mean difference | lowest | highest |
|---|---|---|---|---|"""


def store_comparison(file: Path, name: str, command: str) -> None:
    """Store the parts of a finished comparison that the page shows."""
    found = json.loads(file.read_text())
    kept = {key: value for key, value in found.items() if key not in ("together", "name")}
    for row in kept["rows"]:
        del row["errors"]
    _write(name, {"command": command} | rounded(kept))


def store_signal(file: Path, name: str) -> None:
    """Store the verdict of a grouping signal with the comparison."""
    found = json.loads((FOLDER / f"{name}.json").read_text())
    _write(name, found | {"signal": json.loads(file.read_text())["verdict"]})


def _write(name: str, found: dict[str, Any]) -> None:
    """Write JSON with one line for each part, because a line for each figure would make long files."""
    FOLDER.mkdir(exist_ok=True)
    parts = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
    (FOLDER / f"{name}.json").write_text(f"{{\n{parts}\n}}\n")


def rounded(value: Any) -> Any:
    """Round floats to five digits."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def files() -> list[Path]:
    """Return the files of all comparisons, in the order of the page."""
    return sorted(FOLDER.glob("*.json"), key=lambda file: by_number(file.stem))


def page() -> str:
    """Return the whole page."""
    introduction = (TEXTS / "introduction.md").read_text(encoding="utf-8")
    return "\n".join([introduction, budgets(), *(section(file) for file in files()), tables()])


def budgets() -> str:
    """Return the section with a line for each budget of each comparison: the search and the best other method."""
    lines, fronts, differences = [], list[bool](), dict[str, list[float]]()
    for file in files():
        found = json.loads(file.read_text())
        if not OTHERS & {row["base"] for row in found["rows"]}:  # variants of the search alone
            continue
        seeds = len(found["seeds"])
        for within in found["fronts"]:
            rows = {row["base"]: row for row in rows_within(found["rows"], within["budget"])}
            search = rows["guided"]
            ahead_of = {name: _difference(found, search, rows[name]) for name in OTHERS & set(rows)}
            for name, difference in ahead_of.items():
                differences.setdefault(name, []).append(difference.value)
            other = max((rows[name] for name in ahead_of), key=lambda row: row["gain"]["value"])
            fronts.append("guided" in within["methods"])
            cells = [f"[{file.stem}](#{file.stem})", seeds, f"{within['budget']:g}", f"{search['cost']:.1f}"]
            cells += [interval(search["gain"]), other["base"], interval(other["gain"])]
            cells.append(interval(asdict(ahead_of[other["base"]])))
            lines.append(f"| {' | '.join(map(str, cells))} | {'yes' if fronts[-1] else 'no'} |")
    head = BUDGETS_HEAD.format(front=sum(fronts), all=len(fronts))
    means = sorted((sum(values) / len(values), name, values) for name, values in differences.items())
    lines.append(METHODS_HEAD)
    for mean, name, values in means:
        lines.append(f"| {name} | {len(values)} | {mean:+.1f} | {min(values):+.1f} | {max(values):+.1f} |")
    return "\n".join([head, *lines, ""])


def _difference(found: dict[str, Any], search: dict[str, Any], other: dict[str, Any]) -> Mean:
    """Return the paired difference of gains; `behind` of a method without a budget is at the largest one."""
    ours, theirs = (found["per_seed"][row["method"]] for row in (search, other))
    return mean_of([ours[seed]["gain"] - theirs[seed]["gain"] for seed in ours])


def chart(found: dict[str, Any]) -> str:
    """Return the gain against the training cost as an SVG file; empty for a comparison of one budget."""
    if not _several(found):
        return ""
    drawn = gain_against_cost(found["rows"], method_of(found["rows"], found["reference"]))
    return drawn.replace("<svg ", '<svg style="background: white; color: black" ', 1)


def _several(found: dict[str, Any]) -> bool:
    """Whether a comparison has several budgets."""
    return len(found["budgets"]) > 1


def tables() -> str:
    """Return the section of public tables."""
    found = json.loads(TABLES.read_text())
    methods = [
        name for name in LEARNERS if any(name in seed["errors"] for row in found.values() for seed in row.values())
    ]
    lines = [
        (TEXTS / "tables.md").read_text(encoding="utf-8"),
        f"| table | training rows | tasks | splits | {' | '.join(LEARNERS[name] for name in methods)} |",
        f"|{'---|' * (len(methods) + 4)}",
    ]
    for name, seeds in found.items():
        first = next(iter(seeds.values()))
        means = [
            sum(seed["errors"].get(method, math.nan) for seed in seeds.values()) / len(seeds) for method in methods
        ]
        best = min(value for value in means if not math.isnan(value))
        shown = ["–" if math.isnan(v) else f"**{v:.3g}**" if v == best else f"{v:.3g}" for v in means]
        lines.append(f"| {name} | {first['rows']:,} | {first['tasks']} | {len(seeds)} | {' | '.join(shown)} |")
    return "\n".join([*lines, ""])


def section(file: Path) -> str:
    """Return the section of one comparison."""
    found = json.loads(file.read_text())
    reference = found["reference"]
    lines = [f"## {file.stem}", "", "```", found["command"], "```", ""]
    lines += [f"{len(found['tasks'])} tasks, at most {found['groups']} groups, {len(found['seeds'])} seeds.", ""]
    text = file.with_suffix(".md")
    lines += [text.read_text(encoding="utf-8")] if text.exists() else []
    if _several(found):
        lines += [f"![Gain against training cost]({FOLDER.name}/{file.stem}.svg)", ""]
    lines += [f"- {verdict}" for verdict in found["verdicts"]]
    chosen = [name for row in found["per_seed"].get(reference, {}).values() for name in row.get("chosen", [])]
    if chosen:
        counts = ", ".join(f"{name} {chosen.count(name)}" for name in sorted(set(chosen)))
        lines.append(f"- Candidate with the best validation score, number of seeds: {counts}.")
    rows = {row["base"]: row["method"] for row in rows_within(found["rows"], max(found["budgets"]), at_most=False)}
    if "truth" in rows:
        listed = [_with_truth(found, rows[m], rows["truth"], m) for m in ("guided", "dmtg") if m in rows]
        lines.append(f"- Agreement with the true groups: {', '.join(listed)}.")
    if found.get("signal"):
        lines.append(f"- Grouping signal (`dmtg signal`): {found['signal']}")
    lines += ["", "| method | gain, errors % | gain, losses % | against guided | training | agreement |",
              "|---|---|---|---|---|---|"]  # fmt: skip
    for row in sorted(found["rows"], key=lambda row: -row["gain"]["value"]):
        figures = " | ".join(map(interval, (row["gain"], row["gain_loss"], ahead(row["behind"]))))
        lines.append(f"| {row['method']} | {figures} | {row['cost']:.1f} | {agreement(row, short=True)} |")
    return "\n".join([*lines, ""])


def _with_truth(found: dict[str, Any], method: str, truth: str, name: str) -> str:
    """Format the agreement of a method's groupings with the true groups, and the share of results of one group."""
    groupings = [one for seed in found["per_seed"][method].values() for one in seed["groupings"]]
    whole = sum(len(one) == 1 for one in groupings)
    apart = f"; {whole} of {len(groupings)} results have one group" if whole else ""
    value = found["agreement"][method][truth]
    return f"{'–' if value is None else f'{value:.3f}'} ({name}{apart})"


def interval(mean: dict[str, float]) -> str:
    """Format a mean with half of its interval."""
    if mean["low"] is None or math.isnan(mean["low"]):
        return f"{mean['value']:+.1f}"
    return f"{mean['value']:+.1f} ± {(mean['high'] - mean['low']) / 2:.1f}"


def main() -> None:
    """Store a comparison if one is given, and write the page."""
    file, name, command = (sys.argv[1:] + [""] * 3)[:3]
    if command:
        store_comparison(Path(file), name, command)
    elif file:
        store_signal(Path(file), name)
    for path in files():
        if drawn := chart(json.loads(path.read_text())):
            path.with_suffix(".svg").write_text(drawn)
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
