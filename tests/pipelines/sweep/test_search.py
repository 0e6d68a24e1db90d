"""Sweeps of any key: Optuna, random draws with a budget, and every family of temperatures, on a small table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pipelines.config.loading import Config, load_config
from pipelines.errors import UserError
from pipelines.runs.files import read_jsonl
from pipelines.storage import locate
from pipelines.sweep.driver import SweepResult, _of_data, sweep
from pipelines.sweep.plan import Plan, outcome_of
from pipelines.sweep.tpe import TPESearch
from pipelines.sweep.trials import label
from pipelines.training.driver import train
from tests.pipelines.changing import table_config, write_table
from tests.pipelines.conftest import ON_RAY
from tests.pipelines.sweep.test_driver import SweepDriver, ended, in_progress, rows

ON_TUNE = pytest.param(
    {**ON_RAY, "workers": 1, "object_store_mib": 128}, marks=[pytest.mark.ray, pytest.mark.soak]
)
SERIAL = {"executor": "embedded", "trials": 1}
THREE_KEYS = {
    "train.learning_rate": "loguniform(1e-3, 1e-1)",
    "network.groups": [2, 3],
    "gate.temperature.start": "uniform(1, 5)",
}
TEMPERATURES = [
    {"family": family, "start": 4.0, "end": 1.0} for family in ("constant", "linear", "cosine", "exponential")
]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_table(tmp_path / "t.csv")


def swept(table: Path, work: Path, **sections: Any) -> Config:
    return table_config(table, work, "a", "b", "c", **{"ray": SERIAL, **sections})


@pytest.mark.parametrize("place", [pytest.param(SERIAL, id="embedded"), ON_TUNE])
def test_a_sweep_with_optuna_that_was_killed_resumes_with_the_same_proposals(
    table: Path, tmp_path: Path, place: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    section = {"space": THREE_KEYS, "search": "tpe", "trials": 4, "stop_early": False}
    config = swept(table, tmp_path, sweep=section, ray=place, run={"name": "disturbed"})
    driver = SweepDriver(tmp_path, config.model_dump(mode="json"))
    driver.start()
    driver.wait_for(lambda: len(ended(driver.folder)) >= 3 and in_progress(driver))
    driver.lose()
    first, proposed = ended(driver.folder), json.loads((driver.folder / "settings.json").read_text())
    assert 3 <= len(first) < 5

    found = driver.finish()
    last = ended(driver.folder)
    assert first.items() <= last.items()  # no finished trial runs again
    assert len(last) == len(found["rows"]) == 5
    settings = json.loads((driver.folder / "settings.json").read_text())
    assert settings[: len(proposed)] == proposed
    assert len({label(one) for one in settings}) == 4
    assert all(set(one) == set(THREE_KEYS) for one in settings)

    plan = Plan(config, locate(str(driver.folder)))
    if place is SERIAL:  # one trial at a time: each proposal follows from the results of all earlier ones
        for count in range(4):
            search = TPESearch(plan.space, settings[:count], 4)
            for setting in settings[:count]:
                search.tell(label(setting), outcome_of(plan.seeds(label(setting))))
            assert search.propose() == settings[count]

    monkeypatch.chdir(tmp_path)
    best = next(row for row in found["rows"] if row["label"] == found["best"]["label"])
    chosen = load_config(found["best_config"], ["ray.executor=embedded"])
    assert chosen.train.learning_rate == found["best"]["setting"]["train.learning_rate"]
    assert chosen.gate.temperature.start == found["best"]["setting"]["gate.temperature.start"]
    result = train(chosen).result
    for task, figures in best["validation"].items():
        assert result["validation"][task] == pytest.approx(figures, rel=1e-4, abs=1e-5)
    page = (driver.folder / "sweep.html").read_text()
    assert '<th scope="col" class="n">learning rate</th>' in page
    assert f"{found['best']['setting']['train.learning_rate']:.4g}" in page


@pytest.fixture
def families(table: Path, tmp_path: Path) -> tuple[Config, SweepResult]:
    """Every family of temperatures, with a gate that is trained for all epochs."""
    config = swept(
        table, tmp_path, sweep={"temperatures": TEMPERATURES, "stop_early": False},
        search={"share": 1.0}, ray={"trials": 2},
    )  # fmt: skip
    return config, sweep(config)


def test_every_family_of_temperatures_is_swept(families: tuple[Config, SweepResult]) -> None:
    steps = 6  # two epochs of three batches
    formulas = {
        "constant": lambda _: 4.0,
        "linear": lambda p: 4 - 3 * p,
        "cosine": lambda p: 1 + 3 * (1 + math.cos(math.pi * p)) / 2,
        "exponential": lambda p: 4 * 0.25**p,
    }
    found = rows(families[1])
    assert len(found) == 1 + 4
    for family, formula in formulas.items():
        name = f"groups2_{family}4{'' if family == 'constant' else '-1'}_seed22"
        assert found[name]["status"] == "finished"
        records = read_jsonl(locate(found[name]["run_dir"]) / "gate.jsonl")
        expected = [formula((step - 1) / steps) for step in (3, 6)]
        assert [record["temperature"] for record in records] == pytest.approx(expected)


def test_a_random_search_keeps_its_budget(table: Path, tmp_path: Path) -> None:
    space = {"train.learning_rate": "loguniform(1e-3, 1e-1)", "train.epochs": [1, 2]}
    section = {"space": space, "search": "random", "budget": 9, "stop_early": False}
    logged: list[str] = []
    config = swept(table, tmp_path, sweep=section)
    done = sweep(config, logged.append)
    found = rows(done)
    settings = json.loads((done.folder / "settings.json").read_text())
    assert len(found) == 1 + len(settings)
    assert 3 <= len(settings) <= 10
    plan = Plan(config, done.folder)
    spent = {name: read_jsonl(trial.run / "metrics.jsonl")[-1]["spent"] for name, trial in plan.trials.items()}
    runs = {name: spent[name] * plan.trials[name].config.train.epochs / 2 for name in spent}
    assert runs["naive_mtl_seed22"] == pytest.approx(1)
    assert sum(runs.values()) <= 9
    assert sum(runs.values()) + 2 * 2.2 > 9  # no other setting fits
    assert "of 9 runs of naive MTL)" in logged[-1]
    again: list[str] = []
    assert sweep(config, again.append).found == done.found
    assert not any("epoch" in line for line in again)


def test_a_budget_that_allows_no_setting_is_refused(table: Path, tmp_path: Path) -> None:
    section = {"groups": [2, 3], "search": "random", "budget": 2}
    with pytest.raises(UserError, match="sweep.budget=2 does not allow one setting") as found:
        sweep(swept(table, tmp_path, sweep=section))
    assert found.value.wrong_use
    assert not list((tmp_path / "runs").rglob("metrics.jsonl"))


def test_without_optuna_the_error_names_the_extra(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package optuna") as found:
        sweep(swept(table, tmp_path, sweep={"space": THREE_KEYS, "search": "tpe", "trials": 2}))
    assert "dmtg[optuna]" in found.value.remedy


def test_groups_that_were_asked_for_and_found_differ_visibly(table: Path, tmp_path: Path) -> None:
    section = {"groups": [3], "seeds": [1, 2], "stop_early": False}
    # the gate cannot leave one group: its logits are those of one branch
    config = swept(table, tmp_path, sweep=section, gate={"initial": "gaussian", "initial_scale": 50.0})
    done = sweep(config)
    setting = done.found["settings"][1]
    counts = sorted({len(row["grouping"]) for row in done.found["rows"] if not row["naive"]})
    assert setting["groups"] == counts
    assert counts != [3]
    shown = f"3 → {', '.join(map(str, counts))}"
    assert shown in done.page.read_text()
    assert any(note.startswith("the best setting allows 3 groups") for note in done.found["notes"])


def test_early_stops_leave_no_setting_with_some_of_its_seeds(table: Path, tmp_path: Path) -> None:
    space = {"train.learning_rate": [0.03, 1e-6, 1e-7, 1e-8], "train.epochs": [4]}
    section = {"space": space, "seeds": [1, 2], "grace_epochs": 1, "reduction": 2}
    done = sweep(swept(table, tmp_path, sweep=section, ray={"executor": "embedded", "trials": 2}))
    states = {row["label"]: set[str]() for row in done.found["settings"]}
    for row in done.found["rows"]:
        states[row["label"]].add(row["status"])
    assert all(len(found) == 1 for found in states.values()), states
    assert states["naive_mtl"] == states["groups2_epochs4_learning_rate0.03"] == {"finished"}
    assert sum(found == {"stopped"} for found in states.values()) >= 2
    assert done.found["best"]["finished"] == 2
    reasons = [row["reason"] for row in done.found["rows"] if row["status"] == "stopped"]
    assert any(reason.startswith("with seed ") for reason in reasons)


def test_outputs_of_a_frozen_stem_are_not_shared_by_settings_with_other_stems(table: Path, tmp_path: Path) -> None:
    def data_of(space: dict[str, Any], **data: Any) -> str:
        frozen = {"branch": "last", "stem": 1}
        config = swept(table, tmp_path, sweep={"space": space}, network=frozen, data=data)
        return _of_data(config, Plan(config, locate(str(tmp_path / "s")))).data.stem_outputs

    assert data_of({"network.groups": [2, 3]}) == "auto"
    assert data_of({"network.stem": [0, 1]}) == "off"
    assert data_of({"network.stem": [0, 1]}, stem_outputs="off") == "off"
    with pytest.raises(UserError, match="cannot be shared, because the sweep varies network.stem"):
        data_of({"network.stem": [0, 1]}, stem_outputs="on")
