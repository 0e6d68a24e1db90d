"""The commands that train many times: the grouping signal, the comparison of methods, and the sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.cli.console import Next, log, print_table, run, show
from pipelines.cli.options import (
    ConfigFile,
    Debug,
    Json,
    LocalOk,
    Overrides,
    RayFile,
    TrustCode,
    command_line,
    load_for_work,
    next_step,
)
from pipelines.compare.verdicts import of_compare, of_signal, of_sweep
from pipelines.report.formatting import cost, figure, percent

if TYPE_CHECKING:
    from pipelines.config.loading import Config


def _load(
    config: str, overrides: Overrides, ray_config: str, tasks: str, *, local_ok: bool, trust_code: bool
) -> Config:
    """Read the configuration, and start the imports of the processes that will train, beside those of this one.

    Args:
        config: Configuration file or recipe.
        overrides: `section.key=value` arguments.
        ray_config: File that configures Ray.
        tasks: Module of the functions that these processes call.
        local_ok: Accept places that only this job can see.
        trust_code: Set `run.trust_code`.
    """
    from pipelines.execution.choice import preload_processes

    loaded = load_for_work(config, overrides, ray_config, local_ok=local_ok, trust_code=trust_code)
    preload_processes(loaded.ray, [tasks])
    return loaded


def signal(
    config: ConfigFile,
    overrides: Overrides = None,
    ray_config: RayFile = "",
    trust_code: TrustCode = False,
    local_ok: LocalOk = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure in short runs whether the grouping can matter.

    It compares the variation between groupings with the variation between seeds.
    """

    def body() -> dict[str, Any]:
        loaded = _load(
            config, overrides, ray_config, "pipelines.compare.training", local_ok=local_ok, trust_code=trust_code
        )
        from pipelines.compare.signal import signal as measure_signal

        done = measure_signal(loaded, log)
        _show_signal(done.found)
        show(f"verdict: {done.found['verdict']}", f"signal:  {done.folder}")
        step = _after_signal(done.found, config, overrides, ray_config)
        return {"run_dir": str(done.folder), **done.found, "next": step}

    run("signal", body, reads=config, as_json=as_json, debug=debug)


EFFECTS = {
    "proposed_over_random": "groups by feature overlap over random groups",
    "between": "standard deviation between random groupings",
    "proposed_over_wide": "groups by feature overlap over one wide encoder",
    "wide_over_random": "one wide encoder over random groups",
    "random": "random groups over naive MTL",
    "wide": "one wide encoder over naive MTL",
}


def _show_signal(found: Mapping[str, Any]) -> None:
    """Show the effects of a grouping signal in gain, and the correlations of the tasks."""
    from pipelines.compare.page import two

    effects = [
        {
            "effect": name,
            "gain": f"{found[key]['value']:+.1f} %",
            "95 % interval": f"{found[key]['low']:+.1f} to {found[key]['high']:+.1f}",
        }
        for key, name in EFFECTS.items()
        if found[key]
    ]
    runs = f"{len(found['partitions'])} random groupings × {len(found['seeds'])} seeds, {found['epochs']} epochs"
    print_table(f"Effects on the losses, worth having from {found['worth']:g} %: {runs}", effects, right=("gain",))
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
    title = "Intraclass correlation of the losses, and their standard deviations"
    print_table(title, rows, right=("correlation", "between groupings", "between seeds"))


def _after_signal(found: Mapping[str, Any], config: str, overrides: Sequence[str] | None, ray_config: str) -> Next:
    """The next command: more runs if the runs cannot tell and it is known how many can, else by the conclusion."""
    enough = found["enough"]
    if not enough:
        return next_step(of_signal(found["conclusion"]), config, overrides, ray_config)
    seeds = ",".join(map(str, enough["seeds"]))
    more = [f"signal.partitions={enough['partitions']}", f"signal.seeds=[{seeds}]"]
    return Next(
        "measure again with enough runs; those that there are are kept",
        command_line(["signal"], config, [*(overrides or []), *more], ray_config),
    )


def compare(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check everything, and estimate the training and its time.")
    ] = False,
    ray_config: RayFile = "",
    trust_code: TrustCode = False,
    local_ok: LocalOk = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare the search with naive MTL, a wide encoder, random groups and published selectors, over seeds.

    Every method has the same budget of training, in runs of naive MTL. It is that of the search, or those of
    compare.budgets: with compare.budgets=[4, 8, 16] each method is trained three times, and the report plots
    gain against training cost. A method ends earlier if its validation score stops improving.
    """

    def body() -> dict[str, Any]:
        loaded = _load(
            config, overrides, ray_config, "pipelines.compare.training", local_ok=local_ok, trust_code=trust_code
        )
        if dry_run:
            step = Next("compare the methods", command_line(["compare"], config, overrides, ray_config))
            return {"estimate": _dry_run(loaded), "next": step}
        found = _compare(loaded)
        verdict = of_compare(found["rows"], found.pop("reference"))
        return found | {"next": next_step(verdict, config, overrides, ray_config)}

    run("compare", body, reads=config, as_json=as_json, debug=debug)


def _dry_run(config: Config) -> dict[str, Any]:
    from pipelines.compare.driver import dry_run

    found = dry_run(config, log)
    show(*found["text"])
    return found


def _compare(config: Config) -> dict[str, Any]:
    from pipelines.compare.driver import compare as compare_methods
    from pipelines.compare.page import agreement, ahead, interval, method_of

    done = compare_methods(config, log)
    found = done.found
    rows = [
        {
            "method": row["method"],
            "gain, errors": interval(row["gain"], " %"),
            "gain, losses": interval(row["gain_loss"], " %"),
            f"against {method_of(found['rows'], found['reference'])}": interval(ahead(row["behind"])),
            "training": f"{row['cost']:.1f}",
            "operations": cost(row["flops"]),
            "parameters": cost(row["parameters"]),
            "agreement": agreement(row, short=True),
        }
        for row in found["rows"]
    ]
    title = (
        f"Gain over naive MTL on {found['split']}, {len(found['seeds'])} seeds, 95 % intervals; "
        "training in runs of naive MTL"
    )
    print_table(title, rows, right=tuple(rows[0])[1:])
    for text in (*found["verdicts"], *(f"note: {note}" for note in found["notes"])):
        show(text)
    show(f"signal:     {found['signal'] or 'not measured; dmtg signal measures whether the grouping can matter'}")
    show(f"comparison: {done.folder}", f"report:     {done.page}")
    ours = next((row for row in found["rows"] if row["method"] == found["reference"]), found["rows"][0])
    return {
        "run_dir": str(done.folder),
        "run_id": done.run_id,
        **{key: found[key] for key in ("rows", "split", "budgets", "fronts", "verdicts", "agreement", "notes")},
        "normalized_gain": ours["gain"]["value"],
        "reference": found["reference"],
        "report": str(done.page),
    }


def sweep(
    config: ConfigFile,
    overrides: Overrides = None,
    ray_config: RayFile = "",
    trust_code: TrustCode = False,
    local_ok: LocalOk = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train the settings of the section sweep: all combinations, random ones, or those that Optuna proposes.

    It reports the best setting and the settings with the best gain for their inference cost.
    """

    def body() -> dict[str, Any]:
        found = _sweep(
            _load(
                config, overrides, ray_config, "pipelines.sweep.embedded", local_ok=local_ok, trust_code=trust_code
            )
        )
        best = Next(
            "train the best setting with all its models",
            command_line(["train"], found["best_config"], [], ray_config),
        )
        return found | {"next": next_step(of_sweep(found["best"]), config, overrides, ray_config, best)}

    run("sweep", body, reads=config, as_json=as_json, debug=debug)


def _sweep(config: Config) -> dict[str, Any]:
    from pipelines.sweep.driver import sweep as run_sweep
    from pipelines.sweep.page import groups_of, marks_of, verdict
    from pipelines.sweep.results import KNEE

    done = run_sweep(config, log)
    found = done.found
    rows = [
        {
            "setting": row["label"],
            "groups": groups_of(row),
            "seeds": f"{row['finished']} of {row['seeds']}",
            "score": figure(row["val_score"]),
            "gain on val": percent(row["gain_validation"]),
            f"on {found['split']}": percent(row["gain"]),
            "operations": cost(row["flops"]),
            "parameters": cost(row["parameters"]),
            "marks": ", ".join(marks_of(row["label"], found)),
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
        show(text)
    show(f"sweep:    {done.folder}", f"report:   {done.page}", f"best:     {done.best_config}")
    return {
        "run_dir": str(done.folder),
        "run_id": done.run_id,
        **{key: found[key] for key in ("rows", "settings", "best", "pareto", "split", "notes")},
        "normalized_gain": found["best"]["gain"],
        "best_config": str(done.best_config),
        "report": str(done.page),
    }
