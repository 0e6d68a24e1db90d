"""The estimate before a training, and `dmtg train --dry-run`: every check, no training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipelines.cli.app import app
from pipelines.config.loading import Config
from pipelines.errors import UserError
from pipelines.runs.files import ESTIMATE, METRICS, read_jsonl
from pipelines.storage import locate
from pipelines.training.driver import Trained, dry_run, train
from pipelines.training.estimate import duration, lines_of
from tests.pipelines.conftest import config_values, make_config

GUIDED = {"method": "guided", "budget": 3}


def guided(images: Path, folder: Path, **sections: Any) -> Config:
    return make_config(images, folder, **({"search": GUIDED, "track": {"uri": "none"}} | sections))


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Trained, list[str], float]:
    """A run with a budget, its log lines, and the seconds of its training."""
    config, logged = guided(images, tmp_path_factory.mktemp("estimate")), []
    done = train(config, logged.append)
    records = read_jsonl(done.run / METRICS)
    return config, done, logged, records[-1]["time"] - records[0]["time"] + records[0]["seconds"]


def test_a_run_spends_at_most_what_was_estimated_before_it(
    trained: tuple[Config, Trained, list[str], float],
) -> None:
    config, done, logged, _ = trained
    estimate = done.result["estimate"]
    assert estimate == (done.run / ESTIMATE).read_json()
    assert done.result["budget"] == estimate["budget"] == config.search.budget == 3
    assert done.result["training_cost"] <= 3 < estimate["runs"] == 4  # the baseline is one more
    costs = done.result["costs"]
    assert costs["naive_mtl"] == pytest.approx(1)
    assert sum(costs.values()) - costs["naive_mtl"] == pytest.approx(done.result["training_cost"])
    places = [next(i for i, line in enumerate(logged) if line == text) for text in estimate["text"]]
    assert places == sorted(places)
    assert estimate["memory_bytes"] > 2**27
    first = next(i for i, line in enumerate(logged) if "score" in line)
    assert places[0] < first


def test_other_budgets_are_described_beside_the_own_one(trained: tuple[Config, Trained, list[str], float]) -> None:
    estimate = trained[1].result["estimate"]
    half, double = estimate["half"], estimate["double"]
    assert (half["budget"], double["budget"]) == (1.5, 6)
    assert half["best_epochs"] < estimate["best_epochs"] < double["best_epochs"]
    more = double["best_epochs"] - estimate["best_epochs"]
    assert f"{more} epochs of the best network" in estimate["text"][-1]
    assert estimate["text"][-1].startswith("search.budget=6 adds ")
    assert estimate["text"][-2].startswith("search.budget=1.5 leaves out ")


def test_a_finished_run_is_not_estimated_again(trained: tuple[Config, Trained, list[str], float]) -> None:
    config, done, *_ = trained
    logged: list[str] = []
    again = train(config, logged.append)
    assert again.resumed
    assert again.result == done.result
    assert not any(line.startswith("estimate") for line in logged)


def test_a_dry_run_estimates_and_leaves_the_run_alone(
    trained: tuple[Config, Trained, list[str], float], images: Path, tmp_path: Path
) -> None:
    _, done, *_ = trained
    before = {file: (done.run / file).read_bytes() for file in done.run.files() if not file.startswith("profile")}
    logged: list[str] = []
    found = dry_run(trained[0], logged.append)
    assert found["runs"] == done.result["estimate"]["runs"]
    assert {name: (done.run / name).read_bytes() for name in before} == before
    fresh = guided(images, tmp_path)
    dry_run(fresh, logged.append)
    run = locate(fresh.run.root) / fresh.run_name()
    assert [file.rpartition("/")[2] for file in run.files()] == [ESTIMATE]
    assert (locate(fresh.data.shards) / "_manifest.json").exists()
    assert not any("epoch" in line and "score" in line for line in logged)


def test_a_training_after_a_dry_run_measures_again(images: Path, tmp_path: Path) -> None:
    config = guided(images, tmp_path, search={"method": "dmtg", "baseline": False}, train={"epochs": 2})
    found = dry_run(config)
    assert found["budget"] is None
    assert found["baseline"] == 0
    assert len(found["text"]) == 1
    assert "half" not in found
    done = train(config)
    assert done.result["budget"] is None
    assert done.result["training_cost"] <= found["runs"] + 1e-9
    assert done.result["estimate"]["epoch_seconds"] != found["epoch_seconds"]


def test_a_dry_run_finds_what_training_would_refuse(images: Path, tmp_path: Path) -> None:
    wrong = guided(images, tmp_path, network={"options": {"widths": [8, -1]}})
    with pytest.raises(UserError, match="width"):
        dry_run(wrong)
    lost = guided(images, tmp_path, track={"uri": "http://127.0.0.1:9"})
    with pytest.raises(UserError, match="MLflow|tracking|refused|answer"):
        dry_run(lost)


def test_the_command_ends_with_the_estimate_as_json(images: Path, tmp_path: Path) -> None:
    file = tmp_path / "c.json"  # JSON is YAML
    values = config_values(images, tmp_path, search=GUIDED, track={"uri": "none"}, train={"epochs": 2})
    file.write_text(json.dumps(values))
    shown = CliRunner().invoke(app, ["train", "-c", str(file), "--dry-run", "--json"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout.splitlines()[-1])
    assert (found["command"], found["status"], found["estimate"]["runs"]) == ("train", "done", 4)
    assert found["next"] == f"dmtg train -c {file}"
    plain = CliRunner().invoke(app, ["train", "-c", str(file), "--dry-run"])
    assert plain.stdout.startswith("estimate: at most 4 runs of naive MTL with the baseline; at most ")


PLAN = {
    "runs": 6.0, "budget": 5.0, "baseline": 1, "left_out": [], "overlap_epochs": 0,
    "rung_epochs": {"wide": 12, "guided": 12, "start_0": 12}, "longest_epochs": 12,
    "rung_runs": 1.75, "best_epochs": 81,
    "further_networks": 0,
}  # fmt: skip
HALF = PLAN | {"runs": 3.5, "budget": 2.5, "left_out": ["guided", "start_0"], "rung_epochs": {"wide": 11},
               "best_epochs": 40}  # fmt: skip
DOUBLE = PLAN | {"runs": 11.0, "budget": 10.0, "best_epochs": 82, "further_networks": 2}


TEXT = """\
estimate: at most 6 runs of naive MTL with the baseline; at most 1.5 h on CPU (x86_64), memory 1.5 GiB
search.budget=5: wide, guided, start_0 for 12 epochs each; about 81 epochs for the best one; no distillation
search.budget=2.5 leaves out guided, start_0, 1 epoch of the first rung, 41 epochs of the best network
search.budget=10 adds 1 epoch of the best network, a distillation from 3 networks
""".splitlines()


def test_the_estimate_in_words() -> None:
    machine = {"seconds": 5400.0, "memory_bytes": 3 * 2**29, "device": "CPU (x86_64)"}
    assert lines_of(PLAN | machine | {"half": HALF, "double": DOUBLE}) == TEXT
    alone = lines_of(HALF | machine | {"baseline": 0, "runs": 2.5, "memory_bytes": None})
    assert alone[0] == "estimate: at most 2.5 runs of naive MTL; at most 1.5 h on CPU (x86_64)"
    assert "wide for 11 epochs (without guided, start_0); " in alone[1]
    shorter, longer = ({"rung_epochs": {"wide": count}, "best_epochs": 40} for count in (2, 11))
    adapters = PLAN | machine | {"rung_epochs": {"wide": 5, "guided": 2, "start_0": 2}}
    stable = lines_of(adapters | {"longest_epochs": 15})[1]
    assert "for 2 epochs each; wide for up to 15 epochs until its groups are stable; about " in stable
    lines = lines_of(adapters | {"longest_epochs": 5, "half": HALF | shorter, "double": PLAN | {"budget": 10.0}})
    assert "wide for 5 epochs; guided, start_0 for 2 epochs each; " in lines[1]
    assert lines[2] == (
        "search.budget=2.5 leaves out guided, start_0, 3 epochs of the first rung, 41 epochs of the best network"
    )
    assert lines[3] == "search.budget=10 adds 7 epochs of the first rung"
    fewer = lines_of(adapters | {"half": HALF | longer})[2]  # alone, the wide encoder has more epochs
    assert fewer == "search.budget=2.5 leaves out guided, start_0, 41 epochs of the best network"
    assert lines_of(PLAN | machine | {"double": PLAN | {"budget": 10.0}})[-1] == "search.budget=10 adds nothing"
    crowded = PLAN | machine | {"overlap_epochs": 3}
    lines = lines_of(crowded | {"half": HALF, "double": crowded | {"budget": 10.0}})
    assert lines[1].startswith(
        "search.budget=5: feature overlap in a wider encoder after 3 epochs; wide, guided, "
    )
    assert lines[2].startswith(
        "search.budget=2.5 leaves out guided, start_0, a wider encoder for the feature overlap, "
    )
    assert lines[3] == "search.budget=10 adds nothing"
    two = DOUBLE | machine | {"half": DOUBLE | {"budget": 5.0, "further_networks": 1}}
    assert lines_of(two)[1].endswith("; a distillation from 3 networks")
    assert lines_of(two)[2] == "search.budget=5 leaves out 1 more network to distil from"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (89.4, "89 s"), (90.0, "2 min"), (5399.0, "90 min"), (9000.0, "2.5 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
