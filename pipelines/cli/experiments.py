"""The commands that train many times: does grouping matter, which setting, which method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipelines.cli.console import Next, log, number, print_table, run
from pipelines.cli.options import ConfigFile, Debug, Json, RayFile, Words, load, same

if TYPE_CHECKING:
    from pipelines.config.loading import Config


def signal(
    config: ConfigFile, words: Words = None, ray_config: RayFile = "", as_json: Json = False, debug: Debug = False
) -> None:
    """Short runs that tell beforehand whether grouping can matter: how much is the grouping, how much the seed."""

    def body() -> dict[str, Any]:
        from pipelines.compare.page import two
        from pipelines.compare.signal import signal as work

        done = work(load(config, words, ray_config), log)
        found = done.found
        overall = {"task": "all", **found["correlation"]}
        rows = [
            {
                "task": row["task"],
                "correlation": two(row["value"]),
                "interval": f"{two(row['low'])} to {two(row['high'])}",
                "between groupings": f"{100 * row['between']:.1f} %",
                "between seeds": f"{100 * row['within']:.1f} %",
            }
            for row in (overall, *({"task": name, **row} for name, row in found["by_task"].items()))
        ]
        title = (
            f"{len(found['partitions'])} random groupings × {len(found['seeds'])} seeds, {found['epochs']} epochs"
        )
        print_table(title, rows, right=("correlation", "between groupings", "between seeds"))
        log(f"verdict: {found['verdict']}\nsignal:  {done.folder}")
        step = Next("the search beside all that it should beat", same(["compare"], config, words, ray_config))
        return {"run_dir": str(done.folder), **found, "next": step}

    run("signal", body, as_json=as_json, debug=debug)


def compare(
    config: ConfigFile, words: Words = None, ray_config: RayFile = "", as_json: Json = False, debug: Debug = False
) -> None:
    """The search beside naive MTL, a wide encoder, random groups and published selectors, over seeds."""

    def body() -> dict[str, Any]:
        step = Next("the grouping and its models", same(["train"], config, words, ray_config))
        return _compare(load(config, words, ray_config)) | {"next": step}

    run("compare", body, as_json=as_json, debug=debug)


def _compare(config: Config) -> dict[str, Any]:
    from pipelines.compare.driver import compare as work
    from pipelines.compare.page import interval, two
    from pipelines.report.formatting import cost

    done = work(config, log)
    found = done.found
    rows = [
        {
            "method": row["method"],
            "gain, errors": interval(row["gain"], " %"),
            "gain, losses": interval(row["gain_loss"], " %"),
            f"behind {found['reference']}": interval(row["behind"]),
            "training": f"{row['cost']:.1f}",
            "operations": cost(row["flops"]),
            "parameters": cost(row["parameters"]),
            "agreement": two(row["stability"]),
        }
        for row in found["rows"]
    ]
    title = (
        f"Over naive MTL on {found['split']}, {len(found['seeds'])} seeds, 95 % intervals; training in its runs"
    )
    print_table(title, rows, right=tuple(rows[0])[1:])
    for text in (*found["verdicts"], *(f"note: {note}" for note in found["notes"])):
        log(text)
    log(f"signal:     {found['signal'] or 'not asked: dmtg signal tells beforehand whether grouping can matter'}")
    log(f"comparison: {done.folder}\nreport:     {done.page}")
    ours = next((row for row in found["rows"] if row["method"] == found["reference"]), found["rows"][0])
    return {
        "run_dir": str(done.folder),
        "run_id": done.run_id,
        **{key: found[key] for key in ("rows", "split", "verdicts", "agreement", "notes")},
        "normalized_gain": ours["gain"]["value"],
        "report": str(done.page),
    }


def sweep(
    config: ConfigFile, words: Words = None, ray_config: RayFile = "", as_json: Json = False, debug: Debug = False
) -> None:
    """Train all settings of the sweep section beside each other: which is best, and which are worth their cost."""

    def body() -> dict[str, Any]:
        found = _sweep(load(config, words, ray_config))
        step = Next("the best setting, with all its models", same(["train"], found["best_config"], [], ray_config))
        return found | {"next": step}

    run("sweep", body, as_json=as_json, debug=debug)


def _sweep(config: Config) -> dict[str, Any]:
    from pipelines.report.formatting import cost, percent
    from pipelines.sweep.driver import sweep as work
    from pipelines.sweep.page import marks_of, verdict
    from pipelines.sweep.results import KNEE

    done = work(config, log)
    found = done.found
    rows = [
        {
            "setting": row["label"],
            "seeds": f"{row['finished']} of {row['seeds']}",
            "score": number(row["val_score"]),
            "gain on val": percent(row["gain_validation"]),
            f"on {found['split']}": percent(row["gain"]),
            "operations": cost(row["flops"]),
            "parameters": cost(row["parameters"]),
            "": ", ".join(marks_of(row["label"], found)),
        }
        for row in found["settings"]
    ]
    right = ("score", "gain on val", f"on {found['split']}", "operations", "parameters")
    print_table(f"Means over seeds of {len(found['rows'])} trials", rows, right=right)
    for text in (
        verdict(found),
        found["rule"],
        *([KNEE] if found["knee"] else []),
        *(f"note: {note}" for note in found["notes"]),
    ):
        log(text)
    log(f"sweep:    {done.folder}\nreport:   {done.page}\nbest:     {done.best_config}")
    return {
        "run_dir": str(done.folder),
        "run_id": done.run_id,
        **{key: found[key] for key in ("rows", "best", "pareto", "split", "notes")},
        "normalized_gain": found["best"]["gain"],
        "best_config": str(done.best_config),
        "report": str(done.page),
    }
