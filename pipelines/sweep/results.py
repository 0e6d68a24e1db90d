"""What a sweep found: a row for each trial and each setting, the best of these, and those worth their cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dmtg_core.tasks import Task
from dmtg_core.training.loop import score_of
from pipelines.runs.files import METRICS, RESULT, read_jsonl
from pipelines.runs.results import finite_or_none, gain_of, numbers
from pipelines.sweep.trials import FAILED, STOPPED, Trial

Row = dict[str, Any]
DONE, ENDED_EARLY, BROKEN, OPEN = "finished", "stopped", "failed", "unfinished"
RULE = (
    "Best is the setting with the lowest mean validation score, less that of naive MTL of the same seed, among "
    "those that finished most seeds; of equal ones the cheaper one. The score is the mean logarithm of the tasks' "
    "losses. Test figures take no part in it."
)
KNEE = (
    "The knee is the setting of the front from which on more operations buy little gain: the point farthest above "
    "the line between its cheapest and its best one, both axes scaled to the front."
)
EQUAL = 1e-6  # scores that differ by less are equal


def status(trial: Trial) -> str:
    """How far a trial has come, by what its run folder holds."""
    for file, found in ((RESULT, DONE), (STOPPED, ENDED_EARLY), (FAILED, BROKEN)):
        if (trial.run / file).exists():
            return found
    return OPEN


def rows_of(trials: Sequence[Trial], tasks: Sequence[Task]) -> list[Row]:
    """A row for each trial, in their order.

    Args:
        trials: All of a sweep.
        tasks: Those of its data.
    """
    rows = [_row(trial) for trial in trials]
    naive = {row["seed"]: row for row in rows if row["naive"] and row["status"] == DONE}
    for row in rows:
        base = naive.get(row["seed"])
        if base is None or row["status"] != DONE:
            continue
        for key, part in (("gain_validation", "validation"), ("gain", "metrics")):
            row[key] = gain_of(tasks, row[part], base[part])
        if row["val_score"] is not None and base["val_score"] is not None:
            row["score_to_naive"] = row["val_score"] - base["val_score"]
    return rows


def _row(trial: Trial) -> Row:
    records, found = read_jsonl(trial.run / METRICS), status(trial)
    reason = ""
    if found in (ENDED_EARLY, BROKEN):
        reason = (trial.run / (STOPPED if found == ENDED_EARLY else FAILED)).read_json()["reason"]
    row: Row = {
        "trial": trial.name, "label": trial.label, "setting": trial.setting, "seed": trial.seed,
        "naive": trial.naive, "status": found, "reason": reason, "epochs": len(records),
        "seconds": round(sum(record["seconds"] for record in records), 1),
        "val_score": records[-1]["val_score"] if records else None,
        "split": None, "metrics": {}, "validation": {}, "gain_validation": None, "gain": None,
        "score_to_naive": None, "grouping": {}, "grouping_name": "", "flops": None, "parameters": None,
        "run_dir": str(trial.run),
    }  # fmt: skip
    if found != DONE:
        return row
    result = (trial.run / RESULT).read_json()
    return row | {
        "val_score": _score(result["validation"]), "split": result["split"], "metrics": result["metrics"],
        "validation": result["validation"], "grouping": result["grouping"],
        "grouping_name": result["grouping_name"], **result["inference"],
    }  # fmt: skip


def _score(metrics: Mapping[str, Any]) -> float | None:
    return finite_or_none(score_of(numbers(metrics)))


def by_setting(rows: Sequence[Row]) -> list[Row]:
    """A row for each setting with the means over its seeds that can be judged; naive MTL first.

    These are the finished ones whose naive MTL has finished too.
    """
    labels = list(dict.fromkeys(row["label"] for row in rows))
    return [_setting([row for row in rows if row["label"] == label]) for label in labels]


def _setting(rows: Sequence[Row]) -> Row:
    done = [row for row in rows if row["score_to_naive"] is not None]
    keys = ("val_score", "score_to_naive", "gain_validation", "gain", "flops", "parameters", "seconds")
    means = {key: _mean([row[key] for row in done]) for key in keys}
    first = {key: rows[0][key] for key in ("label", "setting", "naive")}
    return first | {"finished": len(done), "seeds": len(rows)} | means


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None where there is nothing, or something is not defined."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def best_setting(settings: Sequence[Row]) -> Row | None:
    """The best setting by `RULE`, naive MTL aside; None when none finished."""
    able = [row for row in settings if not row["naive"] and row["finished"]]
    if not able:
        return None
    most = max(row["finished"] for row in able)
    able = [row for row in able if row["finished"] == most]
    lowest = min(row["score_to_naive"] for row in able)
    tied = [row for row in able if row["score_to_naive"] - lowest <= EQUAL]
    return min(tied, key=lambda row: (row["flops"], row["parameters"]))


def pareto_front(settings: Sequence[Row]) -> list[Row]:
    """The settings that no other one beats in cost and in validation gain, the cheapest first."""
    known = [row for row in settings if row["flops"] is not None and row["gain_validation"] is not None]
    front: list[Row] = []
    for row in sorted(known, key=lambda row: (row["flops"], -row["gain_validation"])):
        if not front or row["gain_validation"] > front[-1]["gain_validation"]:
            front.append(row)
    return front


def knee_of(front: Sequence[Row]) -> Row | None:
    """The setting from which on more cost buys little: the point farthest above the line between the ends.

    Both axes run from 0 to 1 over the front (Satopää et al. 2011). There is none on a front of fewer than three
    points, or where no point lies above the line.
    """
    if len(front) < 3:
        return None
    first, last = front[0], front[-1]

    def above(row: Row) -> float:
        spent, gained = (
            (row[key] - first[key]) / (last[key] - first[key]) for key in ("flops", "gain_validation")
        )
        return float(gained - spent)

    best = max(front[1:-1], key=above)
    return best if above(best) > 0 else None


def notes_of(rows: Sequence[Row], best: Row | None) -> list[str]:
    """What has to be known to read the result."""
    notes = []
    stopped = sum(row["status"] == ENDED_EARLY for row in rows)
    if stopped:
        notes.append(f"{stopped} of {len(rows)} trials were stopped early and have no gain")
    notes += [f"{row['trial']} failed: {row['reason']}" for row in rows if row["status"] == BROKEN]
    if best is not None and best["finished"] == 1:
        notes.append("the best setting rests on one seed: sweep.seeds gives more")
    if best is not None and best["gain_validation"] is not None and best["gain_validation"] <= 0:
        notes.append("no gain: on validation the best setting is no better than naive MTL")
    return notes
