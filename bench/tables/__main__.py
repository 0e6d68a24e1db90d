"""`python -m bench.tables [SETS] [--seeds 1,2,3,4,5] [--methods guided] [--csv PATH TARGETS]`.

Each table is written as CSV with the configuration of `dmtg config new`, and `dmtg compare` trains naive MTL, the
methods and decision trees on it. Nothing in the configuration is changed. Other learners are trained on the same
rows. A seed is a split of the table and the seed of all training. Networks that `work/tables` holds are not
trained again: delete the folder after a change of the code. The results are in
`docs/results/tables/tables.json`, and `python -m bench.results` writes them to the page.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from bench.results import rounded
from bench.tables.learners import LEARNERS, errors
from bench.tables.sets import DEVELOPMENT, UNSEEN, TableSet, write
from dmtg_core.evaluation.trees import TREES
from dmtg_core.tasks import Task
from dmtg_core.training.metrics import error_scale
from pipelines.compare.driver import compare
from pipelines.config.loading import load_config
from pipelines.data.manifest import read_manifest
from pipelines.data.reader import Reader
from pipelines.data.stream import StreamData
from pipelines.scaffold.template import new_config
from pipelines.storage import locate

WORK = Path("work/tables")
RESULT = Path(__file__).parents[2] / "docs" / "results" / "tables" / "tables.json"


def measure(name: str, table: TableSet, seed: int, methods: Sequence[str]) -> dict[str, Any]:
    """Train all methods on a split of a table.

    Returns:
        Method → mean error over the tasks, and seconds.
    """
    csv = WORK / name / f"split{seed}.csv"
    write(table, csv, seed)
    file = csv.with_suffix(".yaml")
    file.write_text(new_config("", str(csv), table.targets, "", str(csv.parent)).text)
    config = load_config(
        str(file),
        [f"compare.seeds=[{seed}]", f"compare.methods=[{','.join((*methods, *TREES))}]", "track.uri=none"],
    )
    started = time.perf_counter()
    found = compare(config).found
    seconds = time.perf_counter() - started
    shards = locate(config.data.shards)
    manifest = read_manifest(shards)
    tasks = manifest.tasks(None, name)
    reader = Reader(shards, manifest, tasks)
    data = StreamData(reader, config.data, seed=seed, rank=0, world_size=1, device=torch.device("cpu"))
    rows = {row["method"]: {k: v["value"] for k, v in row["errors"].items()} for row in found["rows"]}
    rows |= {learner: errors(learner, tasks, data, seed) for learner in LEARNERS}
    return {
        "rows": manifest.rows("train"),
        "features": manifest.description.input.shape[0],
        "tasks": len(tasks),
        "cost": {row["method"]: row["cost"] for row in found["rows"]},
        "errors": {method: mean_error(tasks, values) for method, values in rows.items()},
        "seconds": seconds,
    }


def mean_error(tasks: Sequence[Task], errors: dict[str, float]) -> float:
    """The mean over the tasks of 1 - AUROC, 1 - accuracy, or the RMSE in standard deviations of the labels."""
    return sum(errors[task.name] / error_scale(task) for task in tasks) / len(tasks)


def main() -> None:
    """Measure the requested tables, by default all; what was measured before is kept."""
    parser = argparse.ArgumentParser(prog="python -m bench.tables")
    parser.add_argument("sets", nargs="*", help=f"of {', '.join({**DEVELOPMENT, **UNSEEN})}; by default all")
    parser.add_argument("--seeds", default="1,2,3,4,5")
    parser.add_argument("--methods", default="guided", help="of dmtg compare; empty for naive MTL and trees only")
    parser.add_argument("--csv", nargs=2, metavar=("FILE", "TARGETS"), help="a table of one's own")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    known = {**DEVELOPMENT, **UNSEEN}
    makers = {name: known[name] for name in arguments.sets or known}
    if arguments.csv:
        file, targets = arguments.csv
        makers = {Path(file).stem: lambda: TableSet(pd.read_csv(file), tuple(targets.split(",")))}
    methods = [method for method in arguments.methods.split(",") if method]
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for name, make in makers.items():
        table = make()
        for seed in map(int, arguments.seeds.split(",")):
            found.setdefault(name, {})[str(seed)] = measure(name, table, seed, methods)
            RESULT.parent.mkdir(parents=True, exist_ok=True)
            RESULT.write_text(json.dumps(rounded(found), indent=1) + "\n")
            print(name, seed, json.dumps(found[name][str(seed)]["errors"]), flush=True)


if __name__ == "__main__":
    main()
