"""The space of a sweep: keys, settings, labels and corners; all settings are checked before anything starts."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.config.loading import Config
from pipelines.config.sections import TemperatureSection
from pipelines.errors import UserError
from pipelines.storage import locate
from pipelines.sweep.driver import sweep
from pipelines.sweep.plan import Plan, RandomSearch
from pipelines.sweep.space import Space, random_settings, space_of
from pipelines.sweep.trials import label, sweep_name
from tests.pipelines.changing import table_config, write_table

RATE, GROUPS, DECAY = "train.learning_rate", "network.groups", "train.weight_decay"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_table(tmp_path / "t.csv")


def swept(table: Path, work: Path, space: dict[str, Any], **section: Any) -> Config:
    return table_config(table, work, "a", "b", "c", sweep={"space": space, **section})


def settings_of(config: Config) -> list[dict[str, Any]]:
    return Plan(config, locate(config.run.root) / sweep_name(config)).settings


def test_a_grid_has_all_combinations_of_lists_and_steps(table: Path, tmp_path: Path) -> None:
    config = swept(table, tmp_path, {DECAY: "quniform(0, 0.2, 0.1)", GROUPS: [2, 3], "gate.prune": [True, False]})
    found = settings_of(config)
    assert len(found) == 3 * 2 * 2
    assert list(found[0]) == [GROUPS, "gate.prune", DECAY]
    assert {one[DECAY] for one in found} == {0.0, 0.1, 0.2}
    assert label(found[0]) == "groups2_prunetrue_weight_decay0"


def test_a_trial_has_the_values_of_nested_keys(table: Path, tmp_path: Path) -> None:
    space = {"network.options.widths": [[8, 4], [16]], "gate.temperature.end": [0.1, 0.2]}
    config = swept(table, tmp_path, space)
    trials = list(Plan(config, locate(config.run.root) / "s").trials.values())[1:]
    assert [trial.label for trial in trials] == [
        "groups2_end0.1_widths8x4", "groups2_end0.1_widths16",
        "groups2_end0.2_widths8x4", "groups2_end0.2_widths16",
    ]  # fmt: skip
    assert trials[-1].config.network.options == {"widths": [16]}
    assert trials[-1].config.gate.temperature == TemperatureSection(end=0.2)
    assert trials[-1].config.network.encoder == "mlp"


def test_labels_of_two_settings_differ_and_fit_into_a_folder_name() -> None:
    assert label({GROUPS: 2, RATE: 0.1, "gate.learning_rate": 0.2}) == "groups2_train.learning_rate0.1_rate0.2"
    assert label({GROUPS: 2, "train.optimizer": "adam"}) == "groups2_optimizeradam"
    a, b = ({GROUPS: 2, "network.options": {"path": path}} for path in ("a/b", "a b"))
    assert label(a) != label(b)
    assert not set(label(a)) & set("/ {}")
    long = {GROUPS: 2} | {f"network.options.{'x' * 60}{i}": i for i in range(9)}
    assert len(label(long).encode()) < 160
    assert label(long) != label({**long, GROUPS: 3})


@pytest.mark.parametrize(
    ("space", "what"),
    [
        ({"run.root": ["a"]}, "run.root cannot be swept: the sweep names the folders of its trials"),
        ({"ray.workers": [1, 2]}, "all trials share the processes or the cluster"),
        ({"source.root": ["a"]}, "all trials share one data set"),
        ({"data.tasks": [["a"], ["b"]]}, "all trials share one data set, which is read once"),
        ({"train.seed": [1, 2]}, "every setting has the seeds of sweep.seeds"),
        ({"search.baseline": [True]}, "naive MTL is trained once for each seed"),
        ({"network.start_from": [["a"]]}, "the models are copied into the sweep once"),
        ({"train": [{}]}, "it is no key of one of these sections"),
        ({"learning_rate": [1]}, "it is no key of one of these sections"),
        ({"gate.temperature": [{}], "gate.temperature.end": [1.0]}, "is a part of gate.temperature"),
        ({"gate.temperature": [{"family": "square"}]}, "gate.temperature.family"),
    ],
)
def test_a_key_that_cannot_be_swept_is_refused_with_the_reason(
    table: Path, tmp_path: Path, space: dict[str, Any], what: str
) -> None:
    with pytest.raises(UserError) as found:
        space_of(swept(table, tmp_path, space, groups=[2, 3]))
    assert what in found.value.what
    assert found.value.wrong_use


def test_a_key_that_is_swept_twice_is_refused(table: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="network.groups is swept twice, also by sweep.groups"):
        space_of(swept(table, tmp_path, {GROUPS: [2, 3]}, groups=[2]))


@pytest.mark.parametrize(
    ("space", "what"),
    [
        ({"train.learning_rat": [0.1, 0.2]}, "unknown key train.learning_rat"),
        ({"train.optimizer.name": ["adam", "sgd"]}, "train.optimizer: Input should be"),
        ({"train.learning_rate": [0.1, -1.0]}, "setting groups2_learning_rate-1: train.learning_rate"),
        ({"gate.temperature.end": "uniform(-1, 1)"}, "setting groups2_end-1: gate.temperature.end"),
        ({"search.starts": [0, 1]}, "starts must be at least 1"),
        ({"network.stem": "randint(0, 9)"}, "setting groups2_stem9: "),
        ({"network.options.widths": [[8], "wide"]}, "widths"),
    ],
)
def test_every_setting_is_checked_before_anything_starts(
    table: Path, tmp_path: Path, space: dict[str, Any], what: str
) -> None:
    section = {"search": "tpe", "trials": 3} if "(" in str(space) else {}
    with pytest.raises(UserError) as found:
        sweep(swept(table, tmp_path, space, **section))
    assert what in found.value.what
    assert found.value.wrong_use
    assert not list((tmp_path / "runs").rglob("metrics.jsonl"))


def test_a_grid_of_a_range_is_refused(table: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a grid has no combinations of a range without steps") as found:
        settings_of(swept(table, tmp_path, {RATE: "uniform(0.1, 1)"}))
    assert "sweep.search=random or tpe" in found.value.remedy


def test_corners_are_the_ends_of_ranges_with_all_values_of_lists() -> None:
    space = Space({GROUPS: (2, 3, 4), RATE: _range("loguniform(0.1, 1)")})
    assert space.size is None
    assert space.corners() == [{GROUPS: groups, RATE: rate} for groups in (2, 3, 4) for rate in (0.1, 1.0)]
    many = Space({GROUPS: (2, 3)} | {f"train.k{i}": tuple(range(10)) for i in range(4)})
    corners = many.corners()
    assert len(corners) < 50
    assert all({one[f"train.k{i}"] for one in corners} == set(range(10)) for i in range(4))


def _range(text: str) -> Any:
    from pipelines.config.value_ranges import parse_range

    return parse_range(text)


@pytest.mark.parametrize(
    ("text", "median"),
    [("uniform(0, 1)", 0.5), ("loguniform(1e-4, 1)", 1e-2), ("randint(2, 6)", 4), ("lograndint(1, 1024)", 32)],
)
def test_draws_have_the_distribution_of_their_range(text: str, median: float) -> None:
    values, rng = _range(text), np.random.default_rng(1)
    drawn = [Space({RATE: values}).draw(rng)[RATE] for _ in range(2000)]
    assert values.low <= min(drawn) <= max(drawn) <= values.high
    assert np.median(drawn) == pytest.approx(median, rel=0.25)
    assert all(isinstance(value, int) for value in drawn) == values.whole
    if text == "randint(2, 6)":
        assert set(drawn) == {2, 3, 4, 5, 6}


def test_random_settings_are_the_same_every_time_and_differ(table: Path, tmp_path: Path) -> None:
    config = swept(table, tmp_path, {RATE: "loguniform(1e-4, 1e-2)"}, groups=[2, 3], search="random", trials=5)
    found = settings_of(config)
    assert found == settings_of(config)
    assert len({label(one) for one in found}) == 5
    longer = config.model_copy(update={"sweep": config.sweep.model_copy(update={"trials": 9})})
    assert settings_of(longer)[:5] == found
    few = Space({GROUPS: (2, 3), DECAY: (0.0, 0.1)})
    assert len(list(islice(random_settings(few), 100))) == 4


def test_a_proposed_setting_that_is_no_configuration_is_left_out_with_its_reason(
    table: Path, tmp_path: Path
) -> None:
    space = {"search.starts": "quniform(1, 2, 0.5)", RATE: "uniform(0.01, 0.1)"}  # whole numbers at both ends
    config = swept(table, tmp_path, space, search="tpe", trials=5)
    plan = Plan(config, locate(config.run.root) / sweep_name(config))
    plan.resume()
    plan.begin(RandomSearch(plan.space, []))
    started = []
    while (trial := plan.next()) is not None:
        started.append(trial)
        plan.end(trial.name)
    assert len(started) == 1 + 5
    assert {trial.config.search.starts for trial in started[1:]} == {1, 2}
    assert plan.refused
    assert all("search.starts" in reason for reason in plan.refused.values())
    again = Plan(config, plan.folder)
    again.resume()
    assert again.settings == plan.settings
    assert list(again.trials) == [trial.name for trial in started]


def test_one_group_is_left_out_of_a_range(table: Path, tmp_path: Path) -> None:
    found = space_of(swept(table, tmp_path, {GROUPS: "randint(1, 3)"}, search="random", trials=2))
    assert found.all() == [{GROUPS: 2}, {GROUPS: 3}]
