"""The results of a sweep: a row for each trial and each setting, the best setting, and the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dmtg_core.tasks import Task
from pipelines.runs.files import METRICS, RESULT, read_jsonl
from pipelines.runs.results import gain_of
from pipelines.sweep.trials import FAILED, GROUPS, STOPPED, Trial

Row = dict[str, Any]
DONE, ENDED_EARLY, BROKEN, OPEN = "finished", "stopped", "failed", "unfinished"
RULE = (
    "The best setting has the lowest mean difference between its validation score and that of naive MTL with the "
    "same seed, among the settings with the most finished seeds. Of equal settings the cheaper one is best. The "
    "score is the mean over the tasks of the logarithms of loss and headline error. Test figures are not used."
)
KNEE = (
    "The knee is the setting on the Pareto front farthest above the line between its ends, with both axes scaled "
    "to the front. Beyond it, more operations gain little."
)
EQUAL = 1e-6  # scores with a smaller difference are equal


def status(trial: Trial) -> str:
    """The state of a trial, from the files in its run folder."""
    for file, found in ((RESULT, DONE), (STOPPED, ENDED_EARLY), (FAILED, BROKEN)):
        if (trial.run / file).exists():
            return found
    return OPEN


def rows_of(trials: Sequence[Trial], tasks: Sequence[Task]) -> list[Row]:
    """A row for each trial, in the order of the trials.

    Args:
        trials: All trials of a sweep.
        tasks: Tasks of its data.
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
        "split": None, "metrics": {}, "validation": {}, "gain_validation": None, "gain": None, "groups": None,
        "score_to_naive": None, "grouping": {}, "grouping_name": "", "flops": None, "parameters": None,
        "run_dir": str(trial.run),
    }  # fmt: skip
    if found != DONE:
        return row
    result = (trial.run / RESULT).read_json()
    return row | {
        "val_score": result["score"], "split": result["split"], "metrics": result["metrics"],
        "validation": result["validation"], "grouping": result["grouping"],
        "grouping_name": result["grouping_name"], "groups": len(result["grouping"]), **result["inference"],
    }  # fmt: skip


def by_setting(rows: Sequence[Row]) -> list[Row]:
    """A row for each setting with its means over seeds; naive MTL first.

    A seed counts if the trial and naive MTL with this seed have finished.
    """
    labels = list(dict.fromkeys(row["label"] for row in rows))
    return [_setting([row for row in rows if row["label"] == label]) for label in labels]


def _setting(rows: Sequence[Row]) -> Row:
    done = [row for row in rows if row["score_to_naive"] is not None]
    keys = ("val_score", "score_to_naive", "gain_validation", "gain", "flops", "parameters", "seconds")
    means = {key: _mean([row[key] for row in done]) for key in keys}
    first = {key: rows[0][key] for key in ("label", "setting", "naive")}
    groups = sorted({row["groups"] for row in done})  # the numbers of groups that were found
    stopped = any(row["status"] == ENDED_EARLY for row in rows)
    return first | {"finished": len(done), "seeds": len(rows), "groups": groups, "stopped": stopped} | means


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None without values or with an undefined value."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def best_setting(settings: Sequence[Row]) -> Row | None:
    """The best setting by `RULE`, without naive MTL; None if no setting has finished."""
    finished = [row for row in settings if not row["naive"] and row["finished"]]
    if not finished:
        return None
    most = max(row["finished"] for row in finished)
    candidates = [row for row in finished if row["finished"] == most]
    lowest = min(row["score_to_naive"] for row in candidates)
    tied = [row for row in candidates if row["score_to_naive"] - lowest <= EQUAL]
    return min(tied, key=lambda row: (row["flops"], row["parameters"]))


def pareto_front(settings: Sequence[Row]) -> list[Row]:
    """The settings without another one of lower cost and higher validation gain, the cheapest first."""
    known = [row for row in settings if row["flops"] is not None and row["gain_validation"] is not None]
    front: list[Row] = []
    for row in sorted(known, key=lambda row: (row["flops"], -row["gain_validation"])):
        if not front or row["gain_validation"] > front[-1]["gain_validation"]:
            front.append(row)
    return front


def knee_of(front: Sequence[Row]) -> Row | None:
    """The knee of a Pareto front: the point farthest above the line between its ends.

    Both axes run from 0 to 1 over the front (Satopää et al. 2011).

    Returns:
        The setting; None if the front has fewer than three points or no point lies above the line.
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
    """Notes about stopped and failed trials, and about seeds, groups and gain of the best setting."""
    notes = []
    stopped = sum(row["status"] == ENDED_EARLY for row in rows)
    if stopped:
        notes.append(f"{stopped} of {len(rows)} trials were stopped early and have no gain")
    notes += [f"{row['trial']} failed: {row['reason']}" for row in rows if row["status"] == BROKEN]
    if best is not None and best["finished"] < best["seeds"]:
        notes.append(
            f"the best setting has {best['finished']} of {best['seeds']} seeds, the others have no result"
        )
    elif best is not None and best["seeds"] == 1:
        notes.append("the best setting has one seed: set sweep.seeds for more")
    if best is not None and best["groups"] != [best["setting"][GROUPS]]:
        found = ", ".join(map(str, best["groups"]))
        notes.append(f"the best setting allows {best['setting'][GROUPS]} groups; {found} were found")
    if best is not None and best["gain_validation"] is not None and best["gain_validation"] <= 0:
        notes.append("no gain: the best setting is not better than naive MTL on validation")
    return notes
